"""Samples that fail, and a driver that is killed at any point and resumed: no sample is lost, none counts twice."""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from driver_fakes import KL, World
from hypothesis import given, settings
from hypothesis import strategies as st

import rayrlhf.stages.ledger
from rayrlhf.checkpoint.ledger import LEDGER, Accounted, Facts
from rayrlhf.checkpoint.store import Checkpoint
from rayrlhf.driver.loop import run_ppo
from rayrlhf.driver.pacing import OverlapPacing, PromptStream, SyncPacing
from rayrlhf.driver.protocols import RolloutBatch, ScoredPart
from rayrlhf.errors import CheckpointError
from rayrlhf.stages.ledger import Ledger, audit_run
from rayrlhf.types import RolloutInfo

IDS = [3, 1, 4, 15, 9, 26, 5]
append = rayrlhf.stages.ledger.append


@pytest.fixture(autouse=True, scope="module")
def no_disk() -> Iterator[None]:
    """A process is killed here, not the machine: nothing need reach the disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


class Killed(Exception):
    """As good as SIGKILL: nothing that is called afterwards has an effect."""


@dataclass
class Run:
    """What outlives the driver, and how the run is set up."""

    folder: Path
    failing: Collection[int] = ()
    overlap: int | None = None
    """max_staleness; None for sync"""
    repeats: int = 1
    steps: int = 5
    every: int = 1
    size: int = 4
    checkpoints: dict[int, tuple[list[Any], dict[str, Any]]] = field(default_factory=dict)
    """step -> the learners (what they have learned from), and the state"""

    def live(self, kill_at: int | None = None, turns: Sequence[int] = (), damaged: bool = False) -> list[Any] | None:
        """Start, or resume, and go on until the end or the kill; what was learned from in the end."""
        if damaged and self.checkpoints:
            del self.checkpoints[max(self.checkpoints)]
        life = Life(self, kill_at, turns)
        try:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(rayrlhf.stages.ledger, "append", life.append)
                asyncio.run(asyncio.wait_for(life.run(), 20))
        except Killed:
            return None
        return life.learned

    def killed_after(self) -> int:
        """The number of points at which a whole run can be killed."""
        life = Life(self, None, ())
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(rayrlhf.stages.ledger, "append", life.append)
            asyncio.run(life.run())
        return life.points


class Life(World):
    """One process: learners that know what they learned from, killed at the `kill_at`-th point of it (None: never)."""

    def __init__(self, run: Run, kill_at: int | None, turns: Sequence[int]) -> None:
        super().__init__(keep_log=False)
        self._run, self._kill_at, self._turns = run, kill_at, list(turns)
        self._engines = asyncio.Lock()
        self.points = 0
        self.learned: list[Any] = []

    async def run(self) -> None:
        run, found = self._run, None
        if run.checkpoints:
            step = max(run.checkpoints)
            learned, state = run.checkpoints[step]
            self.learned, found = list(learned), Checkpoint(Path(f"step-{step:06d}"), step, state, {})
        self.ledger = Ledger(run.folder, Facts.of(0, IDS, run.repeats, run.size))
        stream = PromptStream(IDS, 0, run.repeats, self.ledger.start_from(found))
        done, how = found.step if found else 0, (stream, run.size, run.steps, self.clock)
        if run.overlap is None:
            pacing = SyncPacing(*how, done, max_failed=10)
        else:
            pacing = OverlapPacing(*how, run.overlap, done, max_failed=10)
        parts = self.parts()
        object.__setattr__(parts, "ledger", self.ledger)
        self.ledger.end(await run_ppo(parts, pacing, KL(), done))

    def point(self) -> None:
        self.points += 1
        if self._kill_at is not None and self.points > self._kill_at:
            raise Killed

    def _called(self, name: str, *details: Any) -> int:
        self.point()
        return super()._called(name, *details)

    def append(self, path: Path, event: dict[str, Any]) -> None:
        self.point()
        try:
            self.point()
        except Killed:  # in the middle of the write
            text = json.dumps(event).encode()
            with open(path, "ab") as file:
                file.write(text[: len(text) // 2])
            raise
        append(path, event)
        self.point()

    async def _take(self) -> None:
        for _ in range(self._turns.pop(0) if self._turns else 0):
            await asyncio.sleep(0)

    async def generate(self, requests):
        async with self._engines:
            for half in (requests[1::2], requests[::2]):
                await self._take()
                self.point()
                infos = tuple(RolloutInfo(r.sample_id, r.prompt_id, 10, 4, False, self._version) for r in half)
                if infos:
                    yield RolloutBatch(infos, ("rollouts",))

    async def frozen(self, batch):
        await self._take()
        self.point()
        return ScoredPart(("frozen",), {i.sample_id: "no" for i in batch.infos if i.sample_id in self._run.failing})

    async def estimate(self, batch, kl_coef):
        self._batch = batch
        return await super().estimate(batch, kl_coef)

    async def update(self, experience, step):
        await self._take()
        report = await super().update(experience, step)
        trained = sorted(info.sample_id for info in experience.infos)
        self.learned.append((trained, sorted(sample.sample_id for sample in self._batch.quarantined)))
        self.point()
        return report

    async def publish(self, version):
        async with self._engines:
            await self._take()
            return await super().publish(version)

    async def save(self, step, kl_coef, metrics, due=False):
        if step % self._run.every:
            return False
        self.point()
        state = json.loads(json.dumps({"accounted": self.ledger.accounted.to_state()}))
        self._run.checkpoints[step] = list(self.learned), state
        self.point()
        return True


def check(run: Run, learned: list[Any]) -> None:
    """Against what the learners of the run say, not the ledger."""
    assert len(learned) == run.steps
    everything = sorted(sample for trained, out in learned for sample in (*trained, *out))
    assert everything == list(range(len(everything)))
    assert all(len(trained) == run.size for trained, _ in learned)
    groups = {sample // run.repeats for sample in run.failing}
    assert all(sample // run.repeats not in groups for trained, _ in learned for sample in trained)
    assert all(sample // run.repeats in groups for _, out in learned for sample in out)
    (history,) = audit_run(run.folder).values()
    assert history.ended
    assert history.accounted(run.steps).frontier == len(everything)
    assert history.trained == run.steps * run.size
    lines = [json.loads(line) for line in (run.folder / LEDGER).read_text().splitlines()]
    steps = {line["step"]: line for line in lines if line["event"] == "step"}  # the last of each
    noted = [([e[0] for e in steps[n]["trained"]], [e[0] for e in steps[n]["quarantined"]]) for n in sorted(steps)]
    assert noted == learned


def undisturbed(run: Run) -> list[Any]:
    with tempfile.TemporaryDirectory() as place:
        learned = Run(Path(place), run.failing, run.overlap, run.repeats, run.steps, run.every, run.size).live()
    assert learned is not None
    return learned


@given(
    failing=st.sets(st.integers(0, 40), max_size=9),
    kills=st.lists(st.tuples(st.integers(0, 130), st.booleans()), max_size=6),
    turns=st.lists(st.integers(0, 12), max_size=60),
    overlap=st.sampled_from([None, 0, 1, 2]),
    repeats=st.sampled_from([1, 2]),
    every=st.integers(1, 3),
)
@settings(max_examples=150, deadline=None)
def test_after_any_faults_every_sample_is_trained_on_or_quarantined_once(
    failing: set[int],
    kills: list[tuple[int, bool]],
    turns: list[int],
    overlap: int | None,
    repeats: int,
    every: int,
) -> None:
    with tempfile.TemporaryDirectory() as place:
        run = Run(Path(place), failing, overlap, repeats, every=every)
        learned = None
        for kill_at, damaged in kills:
            learned = run.live(kill_at, turns, damaged)
            if kill_at > 3:  # the first line is there
                assert audit_run(run.folder)
        learned = run.live(None, turns)
        assert learned is not None
        check(run, learned)
        assert learned == undisturbed(run)


@pytest.mark.parametrize("overlap", [None, 1], ids=["sync", "overlap"])
def test_a_kill_at_every_point_of_a_run_loses_nothing(tmp_path: Path, overlap: int | None) -> None:
    setting = {"failing": {1, 6, 10, 11}, "overlap": overlap, "steps": 3, "every": 2}
    points = Run(new(tmp_path, "whole"), **setting).killed_after()
    assert points > 50
    for point in range(points):
        run = Run(new(tmp_path, str(point)), **setting)
        assert run.live(point) is None
        learned = run.live()
        assert learned is not None
        check(run, learned)


def new(folder: Path, name: str) -> Path:
    (folder / name).mkdir()
    return folder / name


def test_a_finished_run_goes_on_for_more_steps(tmp_path: Path) -> None:
    run = Run(tmp_path, {2}, steps=3, every=2)
    run.live()
    run.steps = 5
    learned = run.live()
    assert learned is not None
    check(run, learned)
    (history,) = audit_run(tmp_path).values()
    assert (history.rollbacks, history.redone) == (1, 1)


def test_a_checkpoint_whose_line_is_missing_is_gone_on_from_even_after_the_end(tmp_path: Path) -> None:
    """The lines may be those of another run of the same settings, taken from its artifact."""
    run = Run(tmp_path, {2}, steps=3, every=9)
    learned = run.live()
    assert learned is not None
    run.checkpoints[2] = learned[:2], {"accounted": {"frontier": 9, "above": []}}
    learned = run.live()
    assert learned is not None
    check(run, learned)


# ---- a ledger that is not the checkpoint's --------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Killed in its fourth step; the newest checkpoint is of step 3."""
    run = Run(tmp_path, {2})
    assert run.live(75) is None
    assert max(run.checkpoints) == 3
    return run


def test_a_ledger_that_is_missing_is_not_made_up(run: Run) -> None:
    os.remove(run.folder / LEDGER)
    with pytest.raises(CheckpointError, match=r"ledger\.jsonl is missing or empty, and step-000003 goes on from it"):
        run.live()
    assert not (run.folder / LEDGER).exists()


def test_a_ledger_that_is_shorter_than_the_checkpoint_is_refused(run: Run) -> None:
    lines = (run.folder / LEDGER).read_bytes().splitlines(keepends=True)
    (run.folder / LEDGER).write_bytes(b"".join(lines[:4]))
    with pytest.raises(CheckpointError, match=r"ledger\.jsonl ends with step 2, before step-000003"):
        run.live()


@pytest.mark.parametrize("other", [{"frontier": 11, "above": []}, {"frontier": 13, "above": [15]}, None])
def test_a_ledger_that_accounts_for_other_samples_than_the_checkpoint_is_refused(run: Run, other: Any) -> None:
    learned, _ = run.checkpoints[3]
    run.checkpoints[3] = learned, {"accounted": other}
    with pytest.raises(CheckpointError, match=r"do not account for the same samples at step 3: .*'frontier': 13"):
        run.live()


def test_a_ledger_that_contradicts_itself_is_refused_with_its_line(run: Run) -> None:
    text = (run.folder / LEDGER).read_text().splitlines(keepends=True)
    (run.folder / LEDGER).write_text("".join([*text[:2], text[1], *text[2:]]))
    with pytest.raises(CheckpointError, match=r"ledger\.jsonl:3: .*") as refused:
        run.live()
    assert "--resume" in refused.value.hint


def test_a_ledger_of_another_batch_size_is_refused(run: Run) -> None:
    run.size = 8
    with pytest.raises(CheckpointError, match=r"another run's: .*batch_size=4"):
        run.live()


# ---- the stream ------------------------------------------------------------------------------------------------------


@given(st.sets(st.integers(0, 60)), st.lists(st.integers(1, 9), max_size=6))
def test_the_stream_gives_the_samples_that_are_not_accounted_for_in_order(done: set[int], takes: list[int]) -> None:
    stream = PromptStream(IDS, 1, 2, Accounted().plus(done))
    taken = [request for count in takes for request in stream.take(count)]
    left = [n for n in range(200) if n not in done]
    assert [request.sample_id for request in taken] == left[: sum(takes)]
    whole = {request.sample_id: request for request in PromptStream(IDS, 1, 2).take(200)}
    assert all(request == whole[request.sample_id] for request in taken)


def test_a_batch_that_an_epoch_does_not_fill_is_filled_from_the_next(tmp_path: Path) -> None:
    """Seven prompts, four samples a step: the second step has three of the first epoch, one of the second."""
    Run(tmp_path, steps=2).live()
    lines = [json.loads(line) for line in (tmp_path / LEDGER).read_text().splitlines()]
    epochs = [[entry[1] for entry in line["trained"]] for line in lines if line["event"] == "step"]
    assert epochs == [[0, 0, 0, 0], [0, 0, 0, 1]]
