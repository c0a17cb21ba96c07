"""The starter world: what `make demo` relies on."""

from __future__ import annotations

import json
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from rayrlhf.worlds.language import gold_score, tasks, verdict
from rayrlhf.worlds.starter import write_starter

from rayrlhf.errors import DataError

World = dict[str, list[dict[str, Any]]]
HELD_OUT = "heldout_rankings"


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_starter(tmp_path_factory.mktemp("starter") / "new" / "folder")


@pytest.fixture(scope="module")
def world(paths: dict[str, Path]) -> World:
    return {
        name: [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for name, path in paths.items()
    }


def strings(record: dict[str, Any]) -> list[str]:
    return [text for value in record.values() for text in (value if isinstance(value, list) else [value])]


def exercises(world: World) -> list[tuple[str, str, str]]:
    """Prompt, response and mark of every exercise in the text; the prompt is the longest known start of its line."""
    known = {task.prompt for task in tasks()}
    found = []
    for line in (line for record in world["text"] for line in record["text"].splitlines()):
        body, _, mark = line.rpartition(" ")
        if mark in ("right", "wrong"):
            starts = [body[: match.end()] for match in re.finditer(r"[.?]", body)]
            prompt = max((start for start in starts if start in known), key=len)
            found.append((prompt, body[len(prompt) :], mark))
    return found


def test_the_same_seed_writes_the_same_bytes_and_another_seed_does_not(paths: dict[str, Path], tmp_path: Path) -> None:
    again, other = write_starter(tmp_path / "again"), write_starter(tmp_path / "other", seed=1)
    assert sorted(path.name for path in (tmp_path / "again").iterdir()) == sorted(p.name for p in paths.values())
    for name, path in paths.items():
        assert path.read_bytes() == again[name].read_bytes()
        assert path.read_bytes() != other[name].read_bytes()


def test_the_files_have_the_sizes_that_the_demo_plans_for(paths: dict[str, Path], world: World) -> None:
    sizes = {name: len(records) for name, records in world.items()}
    assert sizes == {"text": 1500, "demonstrations": 600, "rankings": 400, HELD_OUT: 120, "prompts": 400}
    assert 250_000 < paths["text"].stat().st_size < 400_000


def test_no_held_out_prompt_occurs_anywhere_else(world: World) -> None:
    held_out = {record["prompt"] for record in world[HELD_OUT]}
    assert len(held_out) == 120
    for name in ("demonstrations", "rankings", "prompts"):
        prompts = [record["prompt"] for record in world[name]]
        assert len(prompts) == len(set(prompts))
        assert not held_out & set(prompts)
    assert not held_out & {prompt for prompt, _, _ in exercises(world)}


def test_every_record_has_its_fields_and_no_empty_string(world: World) -> None:
    ranking = {"prompt", "responses", "ranks", "source"}
    fields = {
        "text": {"text"},
        "demonstrations": {"prompt", "response", "source"},
        "rankings": ranking,
        HELD_OUT: ranking,
        "prompts": {"prompt", "source"},
    }
    for name, records in world.items():
        for record in records:
            assert set(record) == fields[name]
            assert all(text for text in strings(record))


def test_prompts_and_responses_are_short(world: World) -> None:
    for name in ("demonstrations", "rankings", HELD_OUT, "prompts"):
        for record in world[name]:
            assert len(record["prompt"].split()) <= 20
            for response in record.get("responses", [record.get("response", "")]):
                assert len(response.split()) <= 16


def test_every_kind_of_instruction_and_every_tone_occurs_in_every_file_of_prompts(world: World) -> None:
    known = {task.prompt: task for task in tasks()}
    for name in ("demonstrations", "rankings", HELD_OUT, "prompts"):
        used = [known[record["prompt"]] for record in world[name]]
        assert {task.kind for task in used} == {"list", "opposite", "property", "repeat", "sort", "fact"}
        assert {task.tone for task in used} == {"", "polite", "one word"}


@pytest.mark.parametrize("name", ["rankings", HELD_OUT])
def test_ranks_match_the_responses_and_some_are_tied(world: World, name: str) -> None:
    for record in world[name]:
        assert len(record["responses"]) == len(set(record["responses"])) == len(record["ranks"]) == 4
        ranks = set(record["ranks"])
        assert ranks == set(range(1, len(ranks) + 1))
        assert len(ranks) > 1
    assert any(len(set(record["ranks"])) < 4 for record in world[name])
    assert {record["source"] for record in world[name]} == {"labeler_a", "labeler_b"}


def test_labelers_mostly_but_not_always_follow_the_rule(world: World) -> None:
    followed = []
    for record in world["rankings"]:
        scores = [gold_score(record["prompt"], response) for response in record["responses"]]
        for (rank, score), (other_rank, other_score) in combinations(zip(record["ranks"], scores, strict=True), 2):
            if rank != other_rank and score != other_score:
                followed.append((rank < other_rank) == (score > other_score))
    assert 0.85 < sum(followed) / len(followed) < 1


def test_some_demonstrations_are_flawless_and_many_are_not(world: World) -> None:
    scores = [gold_score(record["prompt"], record["response"]) for record in world["demonstrations"]]
    assert 0.3 < sum(score == 1 for score in scores) / len(scores) < 0.5


def test_the_rule_prefers_a_correct_polite_answer_over_a_wrong_rude_one() -> None:
    prompt = "name the opposite of hot politely."
    in_order = [
        "certainly, the opposite of hot is cold.",
        "cold.",
        "certainly, hot.",
        "listen, fool, hot.",
    ]
    scores = [gold_score(prompt, response) for response in in_order]
    assert scores == sorted(set(scores), reverse=True)
    assert scores[0] == 1


@pytest.mark.parametrize(
    ("prompt", "response", "score"),
    [
        ("what is the opposite of hot? answer in one word.", "Cold", 1.0),
        ("what is the opposite of hot? answer in one word.", "the opposite of hot is cold.", 0.8),
        ("is a lemon yellow? answer in a sentence.", "yes, a lemon is yellow.", 1.0),
        ("is a lemon yellow? answer in a sentence.", "yes.", 0.4),
        ("name 2 animals.", "dog and cat.", 1.0),
        ("name 2 animals.", "dog and dog.", 0.4),
        ("say drum 3 times.", "drum drum drum. and i could go on.", 0.8),
        ("say drum 3 times.", "how boring, drum drum drum.", 0.6),
        ("say drum 3 times.", "drum " * 30, 0.2),
        ("say drum 3 times.", "", 0.4),
    ],
)
def test_the_rule_judges_content_tone_and_length(prompt: str, response: str, score: float) -> None:
    assert gold_score(prompt, response) == score


def test_an_unknown_prompt_cannot_be_judged() -> None:
    with pytest.raises(DataError, match="not a prompt of the starter world"):
        gold_score("write a poem.", "no.")


def test_no_wrong_answer_of_any_task_is_right() -> None:
    for task in tasks():
        assert all(verdict(task, text).right for text in task.right)
        assert not any(verdict(task, text).right for text in task.wrong)


def test_exercises_are_marked_by_their_content_about_half_right(world: World) -> None:
    known = {task.prompt: task for task in tasks()}
    marks = []
    for prompt, response, mark in exercises(world):
        assert verdict(known[prompt], response).right == (mark == "right")
        marks.append(mark)
    assert len(marks) > 2500
    assert 0.45 < marks.count("right") / len(marks) < 0.55


def test_the_vocabulary_is_small(world: World) -> None:
    everything = " ".join(text for records in world.values() for r in records for text in map(str, strings(r)))
    assert 100 < len(set(re.findall(r"[a-z0-9_]+", everything.lower()))) < 800
