"""A world as files: what is in them, what is only in one of them, and what never changes."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any, ClassVar

import pytest

from rayrlhf.data.readers import read_choices, read_demonstrations, read_prompts, read_rankings, read_text
from rayrlhf.errors import DataError
from rayrlhf.worlds.base import Sizes, World
from rayrlhf.worlds.files import write_world
from rayrlhf.worlds.instructions import MANNERS, read
from rayrlhf.worlds.kinds import KINDS
from rayrlhf.worlds.labelers import PANEL

Records = dict[str, list[dict[str, Any]]]
TRAINING = ("demonstrations", "rankings", "ranking_prompts", "prompts")
HELD_OUT = ("heldout_prompts", "heldout_rankings")


def words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def exercises(text: str) -> list[tuple[str, str]]:
    """(prompt, response) of each exercise in a document: a line that is an instruction, and the line after it."""
    lines, found = text.splitlines(), []
    for prompt, response in pairwise(lines):
        try:
            read(prompt)
        except DataError:
            continue
        found.append((prompt, response))
    return found


def combination(prompt: str) -> tuple[str, ...]:
    return read(prompt).combination


def test_the_same_seed_writes_the_same_bytes_and_another_seed_does_not(world: World, tmp_path: Path) -> None:
    first, again, other = (
        write_world(world, tmp_path / name, seed, size=0.02) for name, seed in (("a", 3), ("b", 3), ("c", 4))
    )
    assert len(first) == 8
    for name, path in first.items():
        assert path.name == again[name].name == f"{name}.jsonl"
        assert path.read_bytes() == again[name].read_bytes()
        assert path.read_bytes() != other[name].read_bytes()


def test_the_files_have_the_worlds_sizes_or_a_share_of_them(world: World, files: Records, tmp_path: Path) -> None:
    assert {name: len(records) for name, records in files.items()} == {
        name: getattr(world.sizes, name) for name in Sizes.__slots__
    }
    small = write_world(world, tmp_path, seed=0, size=1e-6)
    assert {len(path.read_text(encoding="utf-8").splitlines()) for path in small.values()} == {8}


def test_every_file_is_read_by_its_reader(paths: dict[str, Path], files: Records) -> None:
    readers = {
        "text": read_text,
        "demonstrations": read_demonstrations,
        "multiple_choice": read_choices,
        **dict.fromkeys(("rankings", "heldout_rankings"), read_rankings),
    }
    for name, path in paths.items():
        found: list[Any] = readers.get(name, read_prompts)([str(path)], None)
        assert len(found) == len(files[name])


def test_held_out_prompts_differ_from_each_other_and_from_all_that_is_trained_on(files: Records) -> None:
    trained_on = {record["prompt"] for name in TRAINING for record in files[name]}
    for name in HELD_OUT:
        prompts = [record["prompt"] for record in files[name]]
        assert len(set(prompts)) == len(prompts)
        assert not trained_on & set(prompts)


def test_the_combinations_of_held_out_prompts_occur_in_no_other_file(files: Records) -> None:
    held_out = {combination(record["prompt"]) for name in HELD_OUT for record in files[name]}
    seen = {combination(record["prompt"]) for name in TRAINING for record in files[name]}
    texts = files["text"][:5000]
    seen |= {combination(prompt) for record in texts for prompt, _ in exercises(record["text"])}
    assert len(held_out) > 50
    assert held_out & seen == set()


def test_every_word_of_a_held_out_prompt_occurs_in_training_prompts(files: Records) -> None:
    known = {
        word for name in ("demonstrations", "prompts") for record in files[name] for word in words(record["prompt"])
    }
    held_out = {word for name in HELD_OUT for record in files[name] for word in words(record["prompt"])}
    assert held_out - known == set()


def test_every_kind_and_manner_has_about_the_same_share_of_every_training_file(files: Records) -> None:
    """PPO must see what eval asks: a kind with few prompts may not be used up by the first files."""
    shares: dict[str, dict[str, float]] = {}
    for name in TRAINING:
        tasks = [read(record["prompt"]) for record in files[name]]
        counts = Counter(label for task in tasks for label in (task.kind.name, task.manner))
        shares[name] = {label: count / len(tasks) for label, count in counts.items()}
    labels = {label for row in shares.values() for label in row}
    assert labels == {*KINDS, *MANNERS}
    for label in labels:
        row = [shares[name].get(label, 0.0) for name in TRAINING]
        assert max(row) - min(row) < 0.05, label
        assert min(row) > 0.002, label


def test_every_kind_is_held_out(files: Records) -> None:
    for name in HELD_OUT:
        assert {read(record["prompt"]).kind.name for record in files[name]} == set(KINDS)


def test_prompts_name_their_kind_as_source(files: Records) -> None:
    for name in ("ranking_prompts", "prompts", "heldout_prompts"):
        assert all(record["source"] == read(record["prompt"]).kind.name for record in files[name])


def test_the_pretraining_text_has_words_that_no_instruction_and_no_answer_uses(files: Records) -> None:
    instructed = {
        word
        for name in (*TRAINING, *HELD_OUT)
        for record in files[name]
        for text in [record["prompt"], record.get("response", ""), *record.get("responses", [])]
        for word in words(text)
    }
    own = [len(set(words(record["text"])) - instructed) for record in files["text"]]
    everything = {word for record in files["text"] for word in words(record["text"])}
    assert len(everything - instructed) > 25
    assert sum(count > 3 for count in own) / len(own) > 0.1


def test_every_exercise_of_the_text_is_answered_rightly(world: World, files: Records) -> None:
    found = [exercise for record in files["text"][:3000] for exercise in exercises(record["text"])]
    assert len(found) > 3000
    for prompt, response in found:
        assert world.flags(prompt, response, True)["right"], (prompt, response)


def test_demonstrations_are_flawed_in_every_way_and_often_flawless(world: World, files: Records) -> None:
    judged = [world.flags(r["prompt"], r["response"], True) for r in files["demonstrations"]]
    flawless = sum(all(flags.values()) for flags in judged) / len(judged)
    assert 0.2 < flawless < 0.6
    for flag in set(world.weights) - {"ends"}:
        assert sum(not flags[flag] for flags in judged) / len(judged) > 0.05, flag


@pytest.mark.parametrize("name", ["rankings", "heldout_rankings"])
def test_ranks_are_dense_from_1_for_different_responses_and_some_tie(files: Records, name: str) -> None:
    tied = 0
    for record in files[name]:
        responses, ranks = record["responses"], record["ranks"]
        assert 2 <= len(set(responses)) == len(responses) == len(ranks)
        assert set(ranks) == set(range(1, max(ranks) + 1))
        tied += len(set(ranks)) < len(ranks)
    assert tied / len(files[name]) > 0.1
    assert {record["source"] for record in files[name]} == {labeler.name for labeler in PANEL}


def test_labelers_follow_gold_mostly_but_not_always_on_the_held_out_pairs(world: World, files: Records) -> None:
    followed = []
    for record in files["heldout_rankings"]:
        scored = [world.gold(record["prompt"], response) for response in record["responses"]]
        for (rank, gold), (other, other_gold) in combinations(zip(record["ranks"], scored, strict=True), 2):
            if rank != other and abs(gold - other_gold) > 1e-9:
                followed.append((rank < other) == (gold > other_gold))
    assert 0.80 < sum(followed) / len(followed) < 0.93


# ---- worlds of a user's own


class Tiny(World):
    """Add 1; it has three prompts to train on and two held out."""

    sizes = Sizes(
        text=2,
        demonstrations=1,
        rankings=0,
        heldout_rankings=0,
        ranking_prompts=0,
        prompts=1,
        heldout_prompts=1,
    )
    weights: ClassVar = {"right": 0.75, "short": 0.25}

    def document(self, rng: random.Random) -> str:
        return "1, 2, 3"

    def prompt(self, rng: random.Random, heldout: bool) -> str:
        return rng.choice(("4", "5") if heldout else ("1", "2", "3"))

    def demonstration(self, rng: random.Random, prompt: str) -> tuple[str, str]:
        return str(int(prompt) + rng.choice((0, 1))), "somebody"

    def flags(self, prompt: str, response: str, finished: bool) -> dict[str, bool]:
        return {"right": response == str(int(prompt) + 1), "short": finished}


def test_a_world_without_choices_or_rankings_leaves_those_files_out(tmp_path: Path) -> None:
    paths = write_world(Tiny(), tmp_path, seed=0)
    assert set(paths) == {"text", "demonstrations", "prompts", "heldout_prompts"}
    prompt = json.loads(paths["heldout_prompts"].read_text(encoding="utf-8"))
    assert prompt["prompt"] in ("4", "5")
    assert prompt["source"] == ""


def test_the_gold_score_is_the_sum_of_the_weights_of_the_flags_that_hold() -> None:
    assert Tiny().gold("1", "2") == 1.0
    assert Tiny().gold("1", "2", finished=False) == 0.75
    assert Tiny().gold("1", "1") == 0.25
    assert Tiny().gold("1", "1", finished=False) == 0.0


def test_a_world_with_fewer_prompts_than_its_sizes_ask_for_is_a_data_error(tmp_path: Path) -> None:
    class Greedy(Tiny):
        sizes = Sizes(
            text=1,
            demonstrations=2,
            rankings=0,
            heldout_rankings=0,
            ranking_prompts=0,
            prompts=2,
            heldout_prompts=20,
        )

    with pytest.raises(DataError, match="too few distinct prompts") as caught:
        write_world(Greedy(), tmp_path, seed=0)
    assert "World.sizes" in caught.value.hint
