"""The built-in world: what it asks, what it answers, and that its judge cannot be talked round."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest

from rayrlhf.errors import DataError
from rayrlhf.worlds.base import World
from rayrlhf.worlds.instructions import MANNERS, OPENERS, Task, draw, manners, read, respond
from rayrlhf.worlds.kinds import KINDS

Records = dict[str, list[dict[str, Any]]]


def tasks(each: int = 12) -> Iterator[Task]:
    """Every kind in every manner that it can be answered in, as order and as question, with some arguments."""
    rng = random.Random(5)
    for kind in KINDS.values():
        for _ in range(each):
            args = kind.draw(rng)
            for manner, (wording, openers) in product(manners(kind, args), OPENERS.items()):
                yield from (Task(kind, args, manner, wording, opener) for opener in openers)


def test_every_prompt_reads_back_to_its_own_task() -> None:
    for task in tasks(each=40):
        found = read(task.prompt)
        assert (found.kind.name, found.args, found.manner, found.wording, found.opener) == (
            task.kind.name,
            task.args,
            task.manner,
            task.wording,
            task.opener,
        )


def test_every_kind_and_every_manner_is_drawn_held_out_or_not() -> None:
    for held_out in (False, True):
        rng = random.Random(7)
        drawn = [draw(rng, held_out) for _ in range(600)]
        assert {task.kind.name for task in drawn} == set(KINDS)
        assert {task.manner for task in drawn} == set(MANNERS)
        assert {task.held_out for task in drawn} == {held_out}


def test_what_is_held_out_does_not_depend_on_the_wording() -> None:
    for task in tasks():
        assert Task(task.kind, task.args, task.manner, "order", "now ").held_out == task.held_out


def test_every_right_answer_of_every_kind_in_every_manner_has_gold_1(world: World) -> None:
    rng = random.Random(11)
    for task in tasks():
        for _ in range(3):
            response = respond(rng, task)
            assert world.gold(task.prompt, response) == pytest.approx(1.0), (task.prompt, response)
            assert world.gold(task.prompt, response.upper()) == pytest.approx(1.0), (task.prompt, response)


def test_no_wrong_answer_is_right_however_it_is_said(world: World) -> None:
    rng = random.Random(13)
    for task in tasks():
        for deaf, rude, rambling in product((False, True), repeat=3):
            response = respond(rng, task, right=False, deaf=deaf, rude=rude, rambling=rambling)
            flags = world.flags(task.prompt, response, True)
            assert not flags["right"], (task.prompt, response)
            assert flags["civil"] is not rude
            assert not (rambling and flags["concise"])


def test_a_right_answer_stays_right_however_rude_or_rambling_it_is(world: World) -> None:
    rng = random.Random(17)
    for task in tasks():
        for deaf, rude, rambling in product((False, True), repeat=3):
            response = respond(rng, task, deaf=deaf, rude=rude, rambling=rambling)
            flags = world.flags(task.prompt, response, True)
            assert flags["right"], (task.prompt, response)
            assert flags["civil"] is not rude
            assert not (rambling and flags["concise"])


def test_a_contractor_deaf_to_a_manner_misses_it(world: World) -> None:
    rng = random.Random(19)
    asked = [task for task in tasks() if task.manner and task.manner != "in at most 5 words"]
    missed = [not world.flags(task.prompt, respond(rng, task, deaf=True), True)["manner"] for task in asked]
    assert sum(missed) / len(missed) > 0.95


def test_no_constant_answer_is_fully_right_on_more_than_a_small_share_of_held_out_prompts(world: World) -> None:
    """Of each kind's prompts at most 30 % (counts are 2 to 5), of all at most 5 %: right answers to some of them."""
    rng = random.Random(23)
    prompts: dict[str, list[str]] = {}
    for task in (draw(rng, held_out=True) for _ in range(4000)):
        prompts.setdefault(task.kind.name, []).append(task.prompt)

    def share(response: str, asked: list[str]) -> float:
        return sum(all(world.flags(prompt, response, True).values()) for prompt in asked) / len(asked)

    best = []
    for kind, asked in prompts.items():
        shares = {response: share(response, asked) for response in {respond(rng, read(p)) for p in asked[:50]}}
        ordered = sorted(shares, key=lambda response: shares[response])
        assert shares[ordered[-1]] <= 0.30, (kind, ordered[-1])
        best += ordered[-3:]
    everything = [prompt for asked in prompts.values() for prompt in asked]
    assert max(share(response, everything) for response in best) <= 0.05


def test_contractors_differ_in_care_and_habits(world: World) -> None:
    rng = random.Random(29)
    flawless: dict[str, list[bool]] = {}
    for _ in range(1500):
        prompt = world.prompt(rng, False)
        response, who = world.demonstration(rng, prompt)
        flawless.setdefault(who, []).append(world.gold(prompt, response) > 1 - 1e-9)
    shares = {who: sum(rows) / len(rows) for who, rows in flawless.items()}
    assert len(shares) == 4
    assert max(shares.values()) > 0.5 > 2 * min(shares.values())


def test_a_prompt_of_another_language_cannot_be_judged(world: World) -> None:
    for prompt in ("write a poem.", "", "name 2 animals", "name 2 animals loudly.", "Name 2 animals."):
        with pytest.raises(DataError, match="not an instruction of this world"):
            world.flags(prompt, "no.", True)


# ---- the judge, by hand. R right, M in the manner asked for, E ends by itself with a full stop, C concise, V civil

FLAGS = {"R": "right", "M": "manner", "E": "ends", "C": "concise", "V": "civil"}
WEIGHTS = {"right": 0.5, "manner": 0.15, "ends": 0.1, "concise": 0.1, "civil": 0.15}
JUDGED = [
    # a list: the number asked for, each a member, each once, in any order
    ("name 2 animals.", "a cat and a dog.", "RMECV"),
    ("name 2 animals.", "dog, cat.", "RMECV"),
    ("can you name 2 animals?", "A Cat AND A DOG.", "RMECV"),
    ("name 2 animals.", "a cat and a cat.", "MECV"),
    ("name 2 animals.", "a cat.", "MECV"),
    ("name 2 animals.", "cat, dog and cow.", "MECV"),
    ("name 2 animals.", "a cat and a drum.", "MECV"),
    ("name 2 animals in a sentence.", "a cat and a dog are animals.", "RMECV"),
    ("name 2 animals in a sentence.", "a cat and a dog.", "RECV"),
    ("name 2 animals in a sentence.", "a cat and a drum are animals.", "MECV"),
    ("name 2 animals in a sentence.", "are animals.", "ECV"),
    # the end
    ("name 2 animals.", "a cat and a dog", "RMCV"),
    ("name 2 animals.", "a cat and a dog. \n", "RMECV"),
    ("name 2 animals.", "a cat and a dog!", "RMCV"),
    # nothing, and next to nothing
    ("name 2 animals.", "", "MV"),
    ("name 2 animals.", ".", "MEV"),
    ("name 2 animals.", "?!? ...", "MEV"),
    ("name 2 animals.", "xyzzy plugh 7.", "MECV"),
    ("name 2 animals in at most 5 words.", "", "V"),
    ("what is the opposite of hot? answer in one word.", "", "V"),
    # courtesy
    ("name 2 animals politely.", "sure, a cat and a dog.", "RMECV"),
    ("name 2 animals politely.", "Of course, a cat and a dog.", "RMECV"),
    ("name 2 animals politely.", "a cat and a dog.", "RECV"),
    ("name 2 animals.", "sure, a cat and a dog.", "RMECV"),
    ("name 2 animals politely.", "sure,", "MCV"),
    ("name 2 animals politely.", "with pleasure.", "MECV"),
    ("what is the opposite of hot? answer politely in a sentence.", "gladly, the opposite of hot is cold.", "RMECV"),
    ("what is the opposite of hot? answer politely in a sentence.", "gladly, cold.", "RECV"),
    ("what is the opposite of hot? answer politely in a sentence.", "the opposite of hot is cold.", "RECV"),
    ("what is the opposite of hot? answer politely.", "of course, silly question, cold.", "RMEC"),
    # one word, few words
    ("what is the opposite of hot? answer in one word.", "cold.", "RMECV"),
    ("what is the opposite of hot? answer in one word.", "COLD.", "RMECV"),
    ("what is the opposite of hot? answer in one word.", "the opposite of hot is cold.", "RECV"),
    ("what is the opposite of hot? answer in one word.", "cold cold.", "ECV"),
    ("what is the opposite of hot? answer in one word.", "hot.", "MECV"),
    ("sort 7, 2, 9 in at most 5 words.", "2, 7, 9.", "RMECV"),
    ("sort 7, 2, 9 in at most 5 words.", "the order is 2, 7, 9.", "RECV"),
    ("sort 7, 2, 9.", "2 7 9.", "RMECV"),
    ("sort 7, 2, 9.", "9, 7, 2.", "MECV"),
    ("sort 7, 2, 9.", "2, 7.", "MECV"),
    # rude, rambling, far too long
    ("name the opposite of hot.", "silly question, cold.", "RMEC"),
    ("name the opposite of hot.", "cold. i talk a lot today.", "RMEV"),
    ("name the opposite of hot.", "you are lazy, cold. and i could go on.", "RME"),
    ("name the opposite of hot.", "cold. right", "MCV"),
    ("say drum 3 times.", "drum drum drum.", "RMECV"),
    ("say drum 3 times.", "drum drum.", "MECV"),
    ("say drum 3 times.", "drum " * 13 + ".", "MEV"),
    ("say drum 3 times.", "drum " * 12 + ".", "MECV"),
]


@pytest.mark.parametrize(("prompt", "response", "held"), JUDGED)
def test_the_judge_sees_each_flag_of_a_response_and_the_gold_score_weighs_them(
    world: World, prompt: str, response: str, held: str
) -> None:
    expected = {name: letter in held for letter, name in FLAGS.items()}
    assert world.flags(prompt, response, True) == expected
    assert world.flags(prompt, response, False) == expected | {"ends": False}
    assert world.gold(prompt, response) == pytest.approx(sum(w for name, w in WEIGHTS.items() if expected[name]))


def test_the_weights_of_the_flags_are_those_that_the_table_was_worked_with(world: World) -> None:
    assert dict(world.weights) == WEIGHTS
