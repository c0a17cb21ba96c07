"""Plain pretraining text, and the questions about what only it teaches."""

from __future__ import annotations

import random
import re
from collections import Counter
from typing import Any

from rayrlhf.worlds.base import Choice, World
from rayrlhf.worlds.texts import story

Records = dict[str, list[dict[str, Any]]]
WEEK = ["monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday"]
SHOPS = {"market": "bread", "harbour": "cheese", "school": "soup", "garden": "honey", "station": "rice"}
SHOPS |= {"library": "butter", "bakery": "salt", "castle": "tea"}
OUTINGS = {"sunny": "market", "rainy": "harbour", "windy": "school", "foggy": "garden", "snowy": "station"}
OUTINGS |= {"stormy": "library"}


def ending(told: str) -> str:
    """Follow a story sentence by sentence, and say its last word."""
    place: dict[str, str] = {}
    holds: dict[str, str] = {}
    day = ""
    *sentences, question = told.rstrip(".").split(". ")
    if found := re.fullmatch(r"after (\w+) comes", question):
        return (WEEK + WEEK)[WEEK.index(found[1]) + 1]
    if found := re.fullmatch(r"at the (\w+) people buy", question):
        return SHOPS[found[1]]
    if found := re.fullmatch(r"on (\w+) days people go to the", question):
        return OUTINGS[found[1]]
    for sentence in sentences:
        if found := re.fullmatch(r"on (\w+) it was \w+", sentence):
            day = found[1]
        elif found := re.fullmatch(r"(\w+) was at the (\w+) with (\w+)", sentence):
            place[found[1]], holds[found[1]] = found[2], found[3]
        elif found := re.fullmatch(r"(\w+) went to the (\w+)", sentence):
            place[found[1]] = found[2]
        else:
            found = re.fullmatch(r"(\w+) and (\w+) swapped what they had", sentence)
            assert found, sentence
            holds[found[1]], holds[found[2]] = holds[found[2]], holds[found[1]]
    if question == "the next day was":
        return (WEEK + WEEK)[WEEK.index(day) + 1]
    asked = re.fullmatch(r"in the end (\w+) (was at the|had the)", question)
    assert asked, question
    return (place if asked[2] == "was at the" else holds)[asked[1]]


def test_multiple_choice_answers_are_the_truth(world: World, files: Records) -> None:
    rng = random.Random(1)
    drawn = [world.cloze(rng) for _ in range(500)]
    questions = [choice for choice in drawn if choice is not None]
    questions += [Choice(r["prompt"], tuple(r["choices"]), r["answer"]) for r in files["multiple_choice"]]
    assert len(questions) > 800
    for question in questions:
        assert question.choices[question.answer] == ending(question.prompt), question
        assert len(set(question.choices)) == 4


def test_the_right_choice_is_as_likely_in_every_place_and_no_word_is_right_too_often(files: Records) -> None:
    places = Counter(record["answer"] for record in files["multiple_choice"])
    words = Counter(record["choices"][record["answer"]] for record in files["multiple_choice"])
    total = len(files["multiple_choice"])
    assert set(places) == {0, 1, 2, 3}
    assert max(places.values()) / total < 0.33
    assert max(words.values()) / total < 0.15


def test_stories_end_as_they_must() -> None:
    rng = random.Random(2)
    for _ in range(300):
        told, _, last = story(rng).removesuffix(".").rpartition(" ")
        assert last == ending(told), told


def test_questions_are_not_told_in_the_pretraining_text(files: Records) -> None:
    texts = {record["text"].rpartition(" ")[0] for record in files["text"]}
    told = sum(record["prompt"] in texts for record in files["multiple_choice"])
    assert told <= 0.02 * len(files["multiple_choice"])


def test_what_the_text_states_of_opposites_and_numbers_is_true(files: Records) -> None:
    opposites = {frozenset(pair.split()) for pair in (
        "big small", "heavy light", "hard soft", "hot cold", "fast slow", "wet dry", "old new", "loud quiet",
    )}  # fmt: skip
    plain = [r["text"] for r in files["text"] if not re.search(r" (right|wrong)$", r["text"], flags=re.M)]
    stated = [pair for text in plain for pair in re.findall(r"the opposite of (\w+) is (\w+)\.", text)]
    counted = [run for text in plain for run in re.findall(r"count from (\d+) to (\d+): ([\d, ]+)\.", text)]
    assert len(stated) > 100
    assert {frozenset(pair) for pair in stated} <= opposites
    assert len(counted) > 100
    for start, end, numbers in counted:
        assert [int(number) for number in numbers.split(", ")] == list(range(int(start), int(end) + 1))
