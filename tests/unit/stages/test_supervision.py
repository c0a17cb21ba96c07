"""What the driver does while a supervised stage runs: who is lost, from where it goes on, what is told twice."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import Future
from io import StringIO
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError
from ray.train import WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError, WorkerHealthCheckTimeoutError
from rich.console import Console

from rayrlhf.actors.base import Whereabouts
from rayrlhf.checkpoint.store import Checkpoint, CheckpointStore
from rayrlhf.config import load_config
from rayrlhf.errors import ActorError, ActorTimeout, Stopped, TrainingError
from rayrlhf.metrics.sinks import JsonLines, RunSink, read_jsonl
from rayrlhf.stages import supervision
from rayrlhf.stages.progress import StageProgress
from rayrlhf.stages.supervision import Supervision, lost_worker, say_where
from rayrlhf.supervised.checkpoints import CheckpointPlan

TINY = Path(__file__).parents[3] / "configs" / "tiny.yaml"
GONE = WorkerGroupError("worker died", {1: WorkerHealthCheckFailedError("gone", failure=ActorDiedError())})
Group = Callable[["Stage", Checkpoint | None], BaseException | None]


# ---- who is lost


@pytest.mark.parametrize(
    ("failures", "words"),
    [
        ({1: WorkerHealthCheckFailedError("x", failure=ActorDiedError())}, "worker 1 is gone"),
        # The survivor's error comes with it, or before it.
        (
            {
                0: RuntimeError("[../gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.1]:39"),
                1: WorkerHealthCheckFailedError("x", failure=ActorDiedError()),
            },
            "worker 1 is gone",
        ),
        (
            {0: RuntimeError("[../pair.cc:547] Connection closed by peer [10.0.0.1]:39")},
            "worker 0 has lost another one",
        ),
        ({2: WorkerHealthCheckTimeoutError("x")}, "worker 2 does not answer"),
        # What the work itself ran into would come again.
        ({0: TrainingError("loss is not finite")}, None),
        ({0: TrainingError("loss is not finite"), 1: RuntimeError("Connection closed by peer")}, None),
        ({0: ValueError("a bug")}, None),
        ({}, None),
    ],
)
def test_a_worker_that_is_gone_is_told_from_work_that_failed(failures: dict[int, Any], words: str | None) -> None:
    assert lost_worker(WorkerGroupError("failed", failures)) == words


def test_the_end_of_ray_trains_own_actor_is_a_loss_too() -> None:
    assert lost_worker(ActorDiedError()) == "the actor that leads its workers is gone"


class Hangs(Exception):
    """A group that says nothing any more."""


# ---- a stage, whose groups of workers are functions


class Stage:
    def __init__(self, folder: Path, resume: bool = False, max_restarts: int = 2) -> None:
        self.folder, self.said = folder, StringIO()
        self.store = CheckpointStore(folder / "checkpoints")
        (folder / "workspace").mkdir()
        config = load_config(TINY, [f"cluster.recovery={{max_restarts: {max_restarts}, backoff_s: 0}}"])
        self.context = SimpleNamespace(
            config=config,
            folder=folder,
            console=Console(file=self.said, width=200),
            sink=RunSink(folder),
            resume=resume,
            asked_to_end=False,
        )
        plan = CheckpointPlan(self.store, 2, {}, folder / "workspace", folder / "ray" / "stop")
        self.job = SimpleNamespace(stage="sft", checkpoints=plan, logs=(f"{folder}/logs/sft-0.log", "1", "2"))

    def supervise(self, *groups: Group) -> int:
        waiting = list(groups)

        def start(found: Checkpoint | None, restarts: int) -> Future[Any]:
            assert restarts == len(groups) - len(waiting)
            self.lines, outcome = JsonLines(self.folder / "workspace" / "metrics.jsonl"), Future[Any]()
            error = waiting.pop(0)(self, found)
            if isinstance(error, Hangs):
                self.hanging = outcome
            else:
                outcome.set_exception(error) if error else outcome.set_result(None)
            return outcome

        with StageProgress(self.context.console, "sft") as progress:
            return Supervision(self.context, self.job, progress, start).run()  # type: ignore[arg-type]

    def steps(self, first: int, last: int, saving: bool = True) -> None:
        """Steps are done, every second one saved."""
        self.lines.write({"phase": "training"})
        for step in range(first, last + 1):
            self.lines.write({"step": step, "steps": 6, "loss": 1.0 / step})
            if saving and step % 2 == 0:
                folder = self.store.begin(step)
                text = (self.folder / "workspace" / "metrics.jsonl").read_text()
                (folder / "metrics.jsonl").write_text(text)
                self.store.finish(step, {}, {}, None)

    def told(self) -> list[int]:
        return [record["step"] for record in read_jsonl(self.folder / "metrics.jsonl")]


def dies_after(last: int, saving: bool = True) -> Group:
    def group(stage: Stage, found: Checkpoint | None) -> BaseException:
        stage.steps((found.step if found else 0) + 1, last, saving)
        return GONE

    return group


def ends(stage: Stage, found: Checkpoint | None) -> None:
    stage.steps((found.step if found else 0) + 1, 6)


@pytest.mark.parametrize(
    ("saving", "words"), [(True, "sft: goes on from step 4"), (False, "sft: starts anew, there is no checkpoint")]
)
def test_after_a_loss_it_goes_on_from_the_newest_checkpoint_and_tells_each_step_once(
    tmp_path: Path, saving: bool, words: str
) -> None:
    stage = Stage(tmp_path)
    assert stage.supervise(dies_after(5, saving), ends) == 1
    assert stage.told() == [1, 2, 3, 4, 5, 6]
    assert words in stage.said.getvalue()
    told = read_jsonl(tmp_path / "recoveries.jsonl")
    assert [(r["who"], r["event"]) for r in told] == [("train", "lost"), ("train", "replaced")]
    assert told[0]["cause"] == "sft: worker 1 is gone while training, after step 5"


def hangs_after(last: int, begun: bool = True) -> Group:
    def group(stage: Stage, found: Checkpoint | None) -> BaseException:
        if begun:
            for rank in range(2):
                say_where(stage.job.checkpoints, rank, Whereabouts("node", 100 + rank, 1.5, f"sft-{rank}.log"))
            stage.steps(1, last)
        return Hangs()

    return group


def looked_after(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The processes that are ended, whereupon the group fails."""
    ended: list[int] = []

    async def stack_of(where: Whereabouts, within_s: float) -> str:
        assert within_s == stage.context.config.cluster.recovery.look_s
        return f'File "{where.log}", line {where.pid}'

    async def end_process(where: Whereabouts, within_s: float) -> None:
        ended.append(where.pid)
        if len(ended) == 2:
            stage.hanging.set_exception(GONE)

    monkeypatch.setattr(supervision, "stack_of", stack_of)
    monkeypatch.setattr(supervision, "end_process", end_process)
    return ended


def test_workers_that_say_nothing_any_more_show_where_they_are_and_are_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = Stage(tmp_path)
    stage.context.config = load_config(TINY, ["cluster={call_timeout_s: 0.5, recovery: {backoff_s: 0}}"])
    ended = looked_after(stage, monkeypatch)
    assert stage.supervise(hangs_after(3), ends) == 1
    assert ended == [100, 101]
    assert stage.told() == [1, 2, 3, 4, 5, 6]
    cause = read_jsonl(tmp_path / "recoveries.jsonl")[0]["cause"]
    assert 'worker 0 is in File "sft-0.log", line 100; worker 1 is in File "sft-1.log", line 101' in cause
    assert not (tmp_path / "workspace" / ".workers").exists()


def test_workers_that_never_begin_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(tmp_path)
    stage.context.config = load_config(TINY, ["cluster={start_timeout_s: 0.3}"])
    looked_after(stage, monkeypatch)
    with pytest.raises(ActorTimeout, match="sft: its workers have said nothing"):
        stage.supervise(hangs_after(0, begun=False))


def test_a_checkpoint_that_was_cut_short_is_named_and_the_one_before_it_is_taken(tmp_path: Path) -> None:
    def damages(stage: Stage, found: Checkpoint | None) -> BaseException:
        stage.steps(1, 5)
        (stage.store.root / "step-000004" / "metrics.jsonl").write_text("")
        return GONE

    stage = Stage(tmp_path)
    assert stage.supervise(damages, ends) == 1
    assert "step-000004/metrics.jsonl is not what was saved" in stage.said.getvalue()
    assert "goes on from step 2" in stage.said.getvalue()
    assert stage.told() == [1, 2, 3, 4, 5, 6]


def test_the_budget_of_restarts_ends_the_run_with_cause_place_and_log(tmp_path: Path) -> None:
    stage = Stage(tmp_path, max_restarts=1)
    with pytest.raises(ActorError) as spent:
        stage.supervise(dies_after(3), dies_after(5))
    assert spent.value.message == (
        "train was lost 2 times within 3600 s, and cluster.recovery.max_restarts is 1; the last time: "
        "sft: worker 1 is gone while training, after step 5"
    )
    assert spent.value.hint == f"see {tmp_path}/logs; mend the cause, then go on with --resume"


def test_work_that_failed_is_not_started_again(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    with pytest.raises(TrainingError, match="sft worker 0: the loss is not finite"):
        stage.supervise(lambda *_: WorkerGroupError("x", {0: TrainingError("the loss is not finite", "lower it")}))


def test_a_resumed_run_begins_where_the_earlier_one_was(tmp_path: Path) -> None:
    with pytest.raises(ActorError):
        Stage(tmp_path, max_restarts=0).supervise(dies_after(3))
    (tmp_path / "workspace").rename(tmp_path / "gone")  # a workspace is of one process
    (tmp_path / "metrics.jsonl").unlink()
    stage = Stage(tmp_path, resume=True)
    assert stage.supervise(ends) == 0
    assert stage.told() == [1, 2, 3, 4, 5, 6]


def test_a_run_that_does_not_resume_takes_nothing_of_what_is_there(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.lines = JsonLines(tmp_path / "workspace" / "metrics.jsonl")
    stage.steps(1, 5)
    assert stage.supervise(lambda stage, found: stage.steps(1, 6) if found is None else GONE) == 0


# ---- asked to end


class Terminated(BaseException):
    pass


@pytest.fixture
def sigterm() -> Any:
    def end(number: int, frame: object) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, end)
    yield lambda: os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is end, "heard as before once the stage is over"
    signal.signal(signal.SIGTERM, before)


def test_workers_that_learn_are_told_to_save_and_to_end(tmp_path: Path, sigterm: Callable[[], None]) -> None:
    stage = Stage(tmp_path)

    class Later(Future[Any]):
        """Ends once the stage's workers have been told."""

        def exception(self, timeout: float | None = None) -> BaseException | None:
            return WorkerGroupError("x", {0: Stopped("stopped after step 3 of 6, which is saved", "go on")})

    def start(found: Checkpoint | None, restarts: int) -> Future[Any]:
        stage.lines = JsonLines(tmp_path / "workspace" / "metrics.jsonl")
        stage.steps(1, 3)
        sigterm()
        outcome, wait = Later(), stage.job.checkpoints.stop

        def told() -> None:
            while not wait.exists():
                time.sleep(0.01)
            outcome.set_result(None)

        Thread(target=told, daemon=True).start()
        return outcome

    with (
        StageProgress(stage.context.console, "sft") as progress,
        pytest.raises(Stopped, match="sft: stopped after step 3 of 6, which is saved"),
    ):
        Supervision(stage.context, stage.job, progress, start).run()  # type: ignore[arg-type]


@pytest.mark.parametrize("saved", [True, False])
def test_workers_that_do_not_learn_yet_are_not_waited_for(
    tmp_path: Path, sigterm: Callable[[], None], saved: bool
) -> None:
    stage = Stage(tmp_path, resume=True)
    if saved:
        stage.lines = JsonLines(tmp_path / "workspace" / "metrics.jsonl")
        stage.steps(1, 2)

    def start(found: Checkpoint | None, restarts: int) -> Future[Any]:
        JsonLines(tmp_path / "workspace" / "metrics.jsonl").write({"phase": "evaluating"})
        sigterm()
        return Future()

    there = "the newest checkpoint is of step 2" if saved else "there is no checkpoint of it"
    with (
        StageProgress(stage.context.console, "sft") as progress,
        pytest.raises(Stopped, match=f"sft: asked to end while evaluating; {there}"),
    ):
        Supervision(stage.context, stage.job, progress, start).run()  # type: ignore[arg-type]


def test_a_stage_that_ends_all_the_same_is_done_and_the_run_knows_that_it_was_asked(
    tmp_path: Path, sigterm: Callable[[], None]
) -> None:
    def asked(stage: Stage, found: Checkpoint | None) -> None:
        stage.steps(1, 6)
        sigterm()

    stage = Stage(tmp_path)
    assert stage.supervise(asked) == 0
    assert stage.context.asked_to_end


def test_asked_a_second_time_it_ends_at_once(tmp_path: Path, sigterm: Callable[[], None]) -> None:
    def asked(stage: Stage, found: Checkpoint | None) -> None:
        stage.steps(1, 3)
        sigterm()
        sigterm()

    with pytest.raises(Terminated):
        Stage(tmp_path).supervise(asked)
