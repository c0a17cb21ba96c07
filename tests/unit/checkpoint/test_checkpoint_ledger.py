"""What a ledger must say to be believed: each way to contradict itself is planted, and found at its line."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayrlhf.checkpoint.ledger import LEDGER, Accounted, Facts, append
from rayrlhf.errors import CheckpointError, DataError, LedgerError
from rayrlhf.stages.ledger import audit_run

PROMPTS, SEED = [3, 4, 5, 8], 7
Events = list[dict[str, Any]]


def places(repeats: int = 1) -> list[list[int]]:
    """Of the first samples: number, epoch, prompt, index; written from the definition."""
    return [
        [(epoch * 4 + place) * repeats + index, epoch, PROMPTS[prompt], index]
        for epoch in range(6)
        for place, prompt in enumerate(np.random.default_rng([SEED, epoch]).permutation(4))
        for index in range(repeats)
    ]


def history(repeats: int = 1) -> Events:
    """Two samples a step; the second step quarantines one, the fourth was done twice."""
    at = places(repeats)
    begin = {"event": "begin", "seed": SEED, "prompts": [[3, 6], [8, 9]], "samples_per_prompt": repeats}
    return [
        {**begin, "batch_size": 2},
        {"event": "step", "step": 1, "trained": at[0:2], "quarantined": []},
        {"event": "step", "step": 2, "trained": at[2:4], "quarantined": [[*s, "broken"] for s in at[4:6]]},
        {"event": "checkpoint", "step": 2},
        {"event": "step", "step": 3, "trained": at[6:8], "quarantined": []},
        {"event": "step", "step": 4, "trained": at[8:10], "quarantined": []},
        {"event": "rollback", "step": 2},
        {"event": "step", "step": 3, "trained": at[6:8], "quarantined": []},
        {"event": "step", "step": 4, "trained": at[8:10], "quarantined": []},
        {"event": "checkpoint", "step": 4},
        {"event": "end", "step": 4},
    ]


def write(folder: Path, events: Events, numbered: bool = True) -> Path:
    (folder / LEDGER).unlink(missing_ok=True)
    for n, event in enumerate(events, start=1):
        append(folder / LEDGER, {"n": n, **event} if numbered else event)
    return folder


@pytest.mark.parametrize("repeats", [1, 2])
def test_a_history_with_a_rollback_and_quarantined_samples_holds(tmp_path: Path, repeats: int) -> None:
    (found,) = audit_run(write(tmp_path, history(repeats))).values()
    assert len(found.steps) == 4
    assert found.trained == 8
    assert found.quarantined == {"broken": 2}
    assert (found.rollbacks, found.redone, found.ended) == (1, 2, True)
    assert found.accounted(4) == Accounted(10)


def test_a_steps_samples_may_lie_in_two_epochs() -> None:
    """An epoch of four prompts ends in the middle of the second step's three samples."""
    assert [sample[1] for sample in places()[3:6]] == [0, 1, 1]


@pytest.mark.parametrize("kept", range(1, 12))
def test_what_a_killed_run_leaves_holds_at_every_length(tmp_path: Path, kept: int) -> None:
    assert audit_run(write(tmp_path, history()[:kept]))


def change(line: int, **values: Any) -> Callable[[Events], None]:
    return lambda events: events[line - 1].update(values)


def swap(events: Events) -> None:
    events[1], events[2] = events[2], events[1]


def drop(line: int) -> Callable[[Events], None]:
    return lambda events: events.__delitem__(line - 1)


def entry(line: int, number: int, **values: int) -> Callable[[Events], None]:
    def alter(events: Events) -> None:
        fields = ("sample", "epoch", "prompt", "index")
        entries = events[line - 1]["trained"]
        entries[number] = [values.get(name, was) for name, was in zip(fields, entries[number], strict=True)]

    return alter


def pass_over(events: Events) -> None:
    """The last step of the end takes the sample after the next in place of the next."""
    events[8]["trained"] = [places()[9], places()[10]]


# What is done to the history, the line that is found, and what is said of it. Lines are numbered anew afterwards.
PLANTED: dict[str, tuple[Callable[[Events], None], int, str]] = {
    "a step's line is dropped": (drop(2), 2, "step 2 comes after step 0"),
    "a redone step's line is dropped": (drop(8), 8, "step 4 comes after step 2"),
    "the last step's line is dropped": (drop(9), 9, "a checkpoint of step 4, and the last step is 3"),
    "the first line is dropped": (drop(1), 1, "step comes before the run begins"),
    "a rollback's line is dropped": (drop(7), 7, "step 3 comes after step 4"),
    "a checkpoint's line is dropped": (drop(4), 6, "a rollback to step 2, of which there is no checkpoint"),
    "a step's line is doubled": (lambda e: e.insert(2, copy.deepcopy(e[1])), 3, "step 1 comes after step 1"),
    "the run begins twice": (lambda e: e.insert(3, e[0]), 4, "begins a second time"),
    "two lines are swapped": (swap, 2, "step 2 comes after step 0"),
    "a sample is doubled in a step": (lambda e: e[1].update(trained=[places()[0]] * 2), 2, "second time"),
    "a sample of an earlier step is doubled": (
        lambda e: e[4].update(trained=[places()[6], places()[0]]),
        5,
        r"sample 0 \(epoch 0, prompt \d, index 0\) is accounted for a second time",
    ),
    "a quarantined sample is trained on": (lambda e: e[4].update(trained=[places()[6], places()[5]]), 5, "second time"),
    "a trained sample is quarantined": (
        lambda e: e[4].update(quarantined=[[*places()[1], "late"]]),
        5,
        "sample 1 .* second time",
    ),
    "a prompt is altered": (entry(2, 0, prompt=99), 2, "sample 0 stands as epoch 0, prompt 99, index 0, and is"),
    "an epoch is altered": (entry(6, 1, epoch=0), 6, "sample 9 stands as epoch 0"),
    "an index is altered": (entry(5, 0, index=1), 5, "sample 6 stands as"),
    "a sample's number is altered": (entry(5, 0, sample=-1), 5, "there is no sample -1"),
    "a sample is passed over": (pass_over, 9, r"sample 8 \(epoch 2, prompt \d, index 0\) is missing"),
    "a batch is too small": (lambda e: e[4]["trained"].pop(), 5, "step 3 trained on 1 samples, a batch is 2"),
    "a batch is too large": (lambda e: e[4]["trained"].append(places()[8]), 5, "trained on 3 samples, a batch is 2"),
    "a rollback goes where no checkpoint is": (change(7, step=3), 7, "a rollback to step 3, of which there is no"),
    "a rollback goes to what was rolled back": (
        lambda e: e.extend([{"event": "rollback", "step": 0}, {"event": "rollback", "step": 2}]),
        13,
        "a rollback to step 2, of which there is no",
    ),
    "a checkpoint is of a step to come": (change(4, step=3), 4, "a checkpoint of step 3, and the last step is 2"),
    "a step follows the end": (
        lambda e: e.append({"event": "step", "step": 5, "trained": places()[10:12], "quarantined": []}),
        12,
        "step comes after the end",
    ),
    "the end is of another step": (change(11, step=5), 11, "the run ends with step 5, and the last step is 4"),
    "an event is unknown": (change(4, event="chekpoint"), 4, "'chekpoint' is no event"),
    "an event lacks a key": (lambda e: e[4].pop("quarantined"), 5, "not a line of a ledger"),
    "an event holds something else": (change(5, trained=[1, 2]), 5, "not a line of a ledger"),
    "a step is no number": (change(4, step="2"), 4, "not a line of a ledger"),
    "there are no prompts": (change(1, prompts=[]), 1, "its prompts are none"),
    "there are more prompts than any memory holds": (
        change(1, prompts=[[0, 10**9]]),
        1,
        "its prompts are none, or over",
    ),
    "the seed is altered": (change(1, seed=8), 2, "stands as"),
    "an arm appears from nowhere": (change(5, arm="other"), 5, "step comes before the run begins"),
}


@pytest.mark.parametrize(("plant", "line", "said"), PLANTED.values(), ids=PLANTED)
def test_a_contradiction_is_found_at_its_line(
    tmp_path: Path, plant: Callable[[Events], None], line: int, said: str
) -> None:
    events = copy.deepcopy(history())
    plant(events)
    with pytest.raises(LedgerError, match=rf"ledger\.jsonl:{line}: .*{said}"):
        audit_run(write(tmp_path, events))


def test_a_group_that_is_torn_apart_is_found(tmp_path: Path) -> None:
    events, at = history(2), places(2)
    events[1] |= {"trained": [at[0], at[2]], "quarantined": [[*at[1], "late"], [*at[3], "late"]]}
    with pytest.raises(LedgerError, match=r":2: of the 2 samples to a prompt from sample 0 .*, 1 count"):
        audit_run(write(tmp_path, events))


@pytest.mark.parametrize("line", range(1, 11))
def test_no_line_but_the_last_can_be_lost_unseen(tmp_path: Path, line: int) -> None:
    """Though what is left would make sense, as without the checkpoint that nobody goes back to."""
    text = (write(tmp_path, history()) / LEDGER).read_text().splitlines(keepends=True)
    del text[line - 1]
    (tmp_path / LEDGER).write_text("".join(text))
    with pytest.raises(LedgerError, match=rf":{line}: this is line {line + 1} of the ledger"):
        audit_run(tmp_path)


@given(st.data())
@settings(deadline=None)
def test_a_last_line_that_is_torn_does_not_count_and_one_elsewhere_is_found(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as place:
        lines = (write(Path(place), history()) / LEDGER).read_bytes().splitlines(keepends=True)
        kept = data.draw(st.integers(1, len(lines) - 1))
        torn = lines[kept][: data.draw(st.integers(0, len(lines[kept]) - 1))]
        (Path(place) / LEDGER).write_bytes(b"".join(lines[:kept]) + torn)
        whole = audit_run(Path(place))
        (Path(place) / LEDGER).write_bytes(b"".join(lines[:kept]))
        assert audit_run(Path(place)) == whole
        (Path(place) / LEDGER).write_bytes(b"".join(lines[:kept]) + torn[:-1] + b"\x00\n" + b"".join(lines[kept:]))
        with pytest.raises(LedgerError, match=rf":{kept + 1}: this is not a line of a ledger"):
            audit_run(Path(place))


@pytest.mark.parametrize("garbled", [b'{"n": 5, "event": "st\n', b"[" * 200_000 + b"\n", b"7\n"])
def test_a_last_line_that_is_no_event_but_whole_is_found(tmp_path: Path, garbled: bytes) -> None:
    """A kill leaves the beginning of a line, and so no newline: this one was altered, and a step may be behind it."""
    lines = (write(tmp_path, history()) / LEDGER).read_bytes().splitlines(keepends=True)
    (tmp_path / LEDGER).write_bytes(b"".join(lines[:4]) + garbled)
    with pytest.raises(LedgerError, match=r":5: this is not a line of a ledger"):
        audit_run(tmp_path)


def test_a_torn_line_that_another_process_wrote_behind_is_found(tmp_path: Path) -> None:
    lines = (write(tmp_path, history()) / LEDGER).read_bytes().splitlines(keepends=True)
    (tmp_path / LEDGER).write_bytes(b"".join(lines[:4]) + lines[4][:9] + lines[5])
    with pytest.raises(LedgerError, match=r":5: this is not a line of a ledger"):
        audit_run(tmp_path)


@settings(deadline=None)
@given(st.binary(max_size=40), st.integers(0, 2000), st.integers(0, 30))
def test_whatever_is_written_over_a_ledger_it_holds_or_names_a_line(junk: bytes, place: int, cut: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        text = (write(Path(folder), history()) / LEDGER).read_bytes()
        (Path(folder) / LEDGER).write_bytes(text[:place] + junk + text[place + cut :])
        with suppress(LedgerError, DataError):
            assert audit_run(Path(folder))


def test_arms_have_a_history_each(tmp_path: Path) -> None:
    plain, mixed = ([{**event, "arm": name} for event in history()] for name in ("plain", "mixed"))
    found = audit_run(write(tmp_path, [*plain[:6], *mixed, *plain[6:]]))
    assert {name: (len(arm.steps), arm.redone) for name, arm in found.items()} == {"plain": (4, 2), "mixed": (4, 2)}
    mixed[1]["trained"] = [places()[0]] * 2
    with pytest.raises(LedgerError, match=r":13: sample 0 .* second time"):
        audit_run(write(tmp_path, [*plain, *mixed]))


def test_what_is_not_there_or_empty_is_no_ledger(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not there"):
        audit_run(tmp_path)
    (tmp_path / LEDGER).write_bytes(b'{"n": 1, "event": "beg')
    with pytest.raises(DataError, match="is empty"):
        audit_run(tmp_path)


@given(st.lists(st.sets(st.integers(0, 30))))
def test_accounted_is_the_set_of_what_was_added(parts: list[set[int]]) -> None:
    accounted, plain = Accounted(), set[int]()
    for part in parts:
        accounted, plain = accounted.plus(part), plain | part
    assert {sample for sample in range(40) if sample in accounted} == plain
    assert accounted.frontier == min(set(range(40)) - plain)
    assert accounted.to_state() == {"frontier": accounted.frontier, "above": sorted(accounted.above)}


@given(st.lists(st.integers(0, 50)))
def test_prompt_ids_survive_being_written_as_ranges(prompt_ids: list[int]) -> None:
    facts = Facts.of(0, prompt_ids, 1, 4)
    assert facts.prompt_ids == prompt_ids
    assert json.loads(json.dumps(facts.prompts)) == [list(span) for span in facts.prompts]


def test_a_ledger_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / LEDGER).mkdir()
    with pytest.raises(CheckpointError, match=r"ledger\.jsonl cannot be written"):
        append(tmp_path / LEDGER, {})
