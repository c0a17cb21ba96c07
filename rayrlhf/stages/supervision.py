"""The driver's side of a supervised stage under way: follow its workers, start them again when one is lost, end them
when the run is asked to.

    start ──► follow ──► done
      ▲         │
      │         ├─ a worker is gone ──► newest whole checkpoint ─┐
      └─────────┼─ they say nothing any more ──► ended ──────────┘   as often as cluster.recovery allows
                ├─ SIGTERM ──► the workers end their step, save ──► Stopped
                └─ an error of the work itself ──► raised, once
"""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from time import monotonic, sleep
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ray.exceptions import RayActorError

from rayrlhf.actors.base import Whereabouts
from rayrlhf.actors.nodes import end_process, stack_of
from rayrlhf.checkpoint.store import Checkpoint
from rayrlhf.errors import ActorError, ActorTimeout, RayRLHFError, Stopped
from rayrlhf.metrics.sinks import read_jsonl
from rayrlhf.stages.context import StageContext
from rayrlhf.stages.progress import StageProgress
from rayrlhf.stages.replacements import Replacements
from rayrlhf.supervised.checkpoints import RECORDS, CheckpointPlan, put_back

if TYPE_CHECKING:
    from rayrlhf.stages.training import TrainingJob

__all__ = ["Supervision", "lost_worker", "say_where"]

# The workers' name in `cluster`, and so in what is told of losses.
WHO = "train"
# What a person sees of a record, and what it is called there.
SHOWN = {"loss": "loss", "pretrain_loss": "pretrain loss", "learning_rate": "lr"}
JUDGED = {"heldout_loss": "held-out loss", "reward": "reward"}
# Once the steps are over nothing more is saved on the way: a stage that is asked to end then has so long to be done.
DONE_WITHIN_S = 20.0
# Until Ray Train has noticed that workers were ended.
ENDED_S = 120.0
# Where each worker says where its process is; in the stage's workspace.
WORKERS = ".workers"
# What gloo and NCCL say in a rank whose peer is gone; often it is heard of before the peer's own end.
PEER_GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "ncclRemoteError")


class Supervision:
    """One stage's workers from their first start to their end."""

    def __init__(
        self,
        context: StageContext,
        job: TrainingJob,
        progress: StageProgress,
        start: Callable[[Checkpoint | None, int], Future[Any]],
    ) -> None:
        """`start`: a group of workers that goes on from a checkpoint, and how many there were before it."""
        self._context, self._job, self._progress, self._start = context, job, progress, start
        self._plan: CheckpointPlan = job.checkpoints
        self._follower = _Follower(self._plan.workspace / RECORDS)
        self._phase, self._step, self._steps = "starting", 0, 0
        config = context.config.cluster.recovery
        self._replacements = Replacements(config, context.folder / "recoveries.jsonl", context.console)
        self._lost_at: float | None = None

    def run(self) -> int:
        """Until the stage is done; returns how often its workers were started again.

        Raises:
            Stopped: the run was asked to end, and can go on from what is saved.
            ActorError: workers were lost more often than `cluster.recovery` allows, or say nothing.
            RayRLHFError: what a worker raised itself.
        """
        stage, restarts = self._job.stage, 0
        found = self._newest() if self._context.resume else None
        with _HeedingSigterm() as request:
            while True:
                if found:
                    self._say(f"{stage}: goes on from step {found.step}")
                self._put_back(found)
                error = self._follow(self._start(found, restarts), request)
                self._context.asked_to_end = request.asked
                if error is None:
                    shutil.rmtree(self._plan.workspace / WORKERS, ignore_errors=True)
                    return restarts
                lost = lost_worker(error)
                if lost is None:
                    raise self._explain(error) from None
                if request.asked:
                    raise self._stopped(f"{lost} while it was asked to end")
                self._wait_to_start_again(lost)
                restarts, found = restarts + 1, self._newest()
                if found is None:
                    self._say(f"{stage}: starts anew, there is no checkpoint (checkpoint.training_every)")

    def _wait_to_start_again(self, lost: str) -> None:
        """
        Raises:
            ActorError: that would be once too often.
        """
        job, self._lost_at = self._job, monotonic()
        cause = ActorError(
            f"{job.stage}: {lost} while {self._phase}, after step {self._step}", f"see {Path(job.logs[0]).parent}"
        )
        sleep(self._replacements.lost(WHO, cause))
        self._replacements.starts(WHO)

    def _newest(self) -> Checkpoint | None:
        """The newest whole checkpoint; newer ones are named and set aside."""
        store = self._plan.store
        found = store.newest()
        for reason in store.damaged:
            self._say(f"not a whole checkpoint, passed over: {reason}")
        store.set_aside(found.step if found else -1)
        return found

    def _put_back(self, found: Checkpoint | None) -> None:
        """Workspace and records as they were then: steps done after it are done, and told of, again."""
        put_back(found, self._plan.workspace)
        shutil.rmtree(self._plan.workspace / WORKERS, ignore_errors=True)
        self._plan.stop.unlink(missing_ok=True)
        stage = self._job.stage
        self._context.sink.keep(lambda record: record.get("stage") != stage)
        for record in read_jsonl(self._follower.path):
            if "step" in record:
                self._context.sink.write({"stage": stage, **record})
        self._follower.skip_to_end()
        self._phase, self._step = "starting", found.step if found else 0

    def _follow(self, outcome: Future[Any], request: _HeedingSigterm) -> BaseException | None:
        """Show the workers' records until the trainer ends; what made it fail, if it did.

        Raises:
            ActorTimeout: when the workers do not start.
            Stopped: when they need not or cannot save before the end.
        """
        cluster = self._context.config.cluster
        done, deadline = False, monotonic() + cluster.start_timeout_s
        while not done:
            done = not wait([outcome], timeout=0.2).not_done
            for record in self._follower.new_records():  # once more after the end: the last lines count too
                self._show(record)
                deadline = monotonic() + cluster.call_timeout_s
            if request.asked and not done:
                self._end(request.since)
            if not done and monotonic() > deadline:
                return self._end_the_hung(outcome)
        return outcome.exception()

    def _end_the_hung(self, outcome: Future[Any]) -> ActorTimeout:
        """Look where the workers are stuck, and end them.

        Raises:
            ActorTimeout: they have not begun, or cannot be ended.
        """
        where = told_where(self._plan)
        stuck = asyncio.run(_stuck(where, self._context.config.cluster.recovery.look_s))
        error = ActorTimeout(
            "; ".join(["its workers have said nothing before the deadline", *stuck]),
            f"see {self._job.logs[0]}; raise cluster.start_timeout_s or cluster.call_timeout_s if they are only slow",
        )
        if not where or wait([outcome], timeout=ENDED_S).not_done:
            raise ActorTimeout(f"{self._job.stage}: {error.message}", error.hint)
        return error

    def _end(self, since: float) -> None:
        """Tell the workers; do not wait for those that have nothing to save."""
        self._plan.stop.parent.mkdir(parents=True, exist_ok=True)
        self._plan.stop.touch()
        over = self._steps > 0 and self._step == self._steps
        if not self._stepping() or (over and monotonic() > since + DONE_WITHIN_S):
            raise self._stopped(f"asked to end while {self._phase}")

    def _stepping(self) -> bool:
        """Whether this group's steps have begun: before them all is as the newest checkpoint has it."""
        return self._follower.has_trained

    def _stopped(self, why: str) -> Stopped:
        found = self._plan.store.newest(whole=False)
        there = f"the newest checkpoint is of step {found.step}" if found else "there is no checkpoint of it"
        return Stopped(f"{self._job.stage}: {why}; {there}", "go on with --resume")

    def _explain(self, error: BaseException) -> Exception:
        """A worker's own error if it is one of ours, else where to look."""
        job = self._job
        for rank, failure in _failures(error).items():
            where = f"{job.stage} worker {rank}"
            if isinstance(failure, Stopped):
                return Stopped(f"{job.stage}: {failure.message}", failure.hint)
            if isinstance(failure, RayRLHFError):
                return type(failure)(f"{where}: {failure.message}", failure.hint)
            return ActorError(
                f"{where} failed: {type(failure).__name__}: {str(failure)[:500]}", f"see {job.logs[rank]}"
            )
        return ActorError(f"{job.stage} failed: {str(error)[:500]}", f"see {job.logs[0]}")

    def _show(self, record: dict[str, Any]) -> None:
        if "phase" in record:
            self._phase = record["phase"]
            self._progress.phase(self._phase)
            if self._phase == "training" and self._lost_at is not None:
                self._replacements.is_back(WHO, monotonic() - self._lost_at)
                self._lost_at = None
            return
        stage, self._step, self._steps = self._job.stage, record["step"], record["steps"]
        self._context.sink.write({"stage": stage, **record})
        if "heldout_loss" in record:  # an epoch is judged: rare, so it gets a line even where there is a bar
            words = "  ".join(f"{name} {record[key]:.4g}" for key, name in JUDGED.items() if key in record)
            self._context.console.print(f"{stage:<9} {record['step']}/{record['steps']}  {words}", highlight=False)
        else:
            numbers = {name: record[key] for key, name in SHOWN.items() if key in record}
            self._progress.step(record["step"], record["steps"], numbers)

    def _say(self, text: str) -> None:
        self._context.console.print(text, style="yellow", highlight=False, markup=False, soft_wrap=True)


def lost_worker(error: BaseException) -> str | None:
    """In words, which worker went away and took the group with it; None if it is the work that failed.

    A worker that raises an error of ours (a loss that is not finite, a full disk) would raise it again.
    """
    if isinstance(error, ActorTimeout):
        return error.message
    if isinstance(error, RayActorError):  # Ray Train's own actor
        return "the actor that leads its workers is gone"
    failures = _failures(error)
    if any(isinstance(failure, RayRLHFError) for failure in failures.values()):
        return None
    for rank, failure in failures.items():
        if isinstance(failure, RayActorError):
            return f"worker {rank} is gone"
        if type(failure).__name__ == "WorkerHealthCheckTimeoutError":
            return f"worker {rank} does not answer"
    for rank, failure in failures.items():
        if any(words in str(failure) for words in PEER_GONE):
            return f"worker {rank} has lost another one"
    return None


async def _stuck(where: Mapping[int, Whereabouts], within_s: float) -> list[str]:
    """In words, where each rank is; none of them is anywhere afterwards."""
    stacks = await asyncio.gather(*(stack_of(one, within_s) for one in where.values()))
    await asyncio.gather(*(end_process(one, within_s) for one in where.values()))
    return [f"worker {rank} is in {stack}" for rank, stack in zip(where, stacks, strict=True)]


def say_where(plan: CheckpointPlan, rank: int, where: Whereabouts) -> None:
    """A worker that hangs cannot say it any more."""
    path = plan.workspace / WORKERS / f"{rank}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(asdict(where)), encoding="utf-8")


def told_where(plan: CheckpointPlan) -> dict[int, Whereabouts]:
    """By rank."""
    files = sorted((plan.workspace / WORKERS).glob("*.json"), key=lambda path: int(path.stem))
    return {int(path.stem): Whereabouts(**json.loads(path.read_text(encoding="utf-8"))) for path in files}


def _failures(error: BaseException) -> dict[int, BaseException]:
    """What ended each worker that failed, by rank, without Ray Train's wrappings."""
    failures: Mapping[int, BaseException] = getattr(error, "worker_failures", {})
    return {rank: _unwrapped(failure) for rank, failure in sorted(failures.items())}


def _unwrapped(failure: BaseException) -> BaseException:
    for name in ("health_check_failure", "cause"):
        inner = getattr(failure, name, None)
        if isinstance(inner, BaseException):
            return inner
    return failure


class _HeedingSigterm:
    """Within it SIGTERM is noted and no more; asked a second time, the process ends as it would without."""

    def __init__(self) -> None:
        self.asked, self.since = False, 0.0
        self._before: Any = None

    def __enter__(self) -> _HeedingSigterm:
        self._before = signal.getsignal(signal.SIGTERM)
        with suppress(ValueError):  # signals reach the main thread alone
            signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(ValueError):
            signal.signal(signal.SIGTERM, self._before)

    def _note(self, number: int, frame: object) -> None:
        self.asked, self.since = True, monotonic()
        signal.signal(signal.SIGTERM, self._before)


class _Follower:
    """Reads the lines that a growing JSONL file has gained since the last look."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.has_trained = False
        """whether a line since `skip_to_end` says that training has begun"""
        self._position = 0

    def skip_to_end(self) -> None:
        """The file is another one now, and known as it is."""
        self._position, self.has_trained = self.path.stat().st_size, False

    def new_records(self) -> list[dict[str, Any]]:
        records: list[dict[str, Any]] = []
        with open(self.path, encoding="utf-8") as file:
            file.seek(self._position)
            while (line := file.readline()).endswith("\n"):
                self._position = file.tell()
                records.append(json.loads(line))
        self.has_trained |= any(record.get("phase") == "training" for record in records)
        return records
