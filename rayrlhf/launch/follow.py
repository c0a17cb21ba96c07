"""A job's log as it grows, line by line once, whatever becomes of the connection meanwhile.

The server begins each tail at the log's first character and the log only grows: what was shown is known by its length.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from time import monotonic
from typing import Protocol

from ray.job_submission import JobDetails

from rayrlhf.errors import ConfigError, ResourceError
from rayrlhf.launch.jobs import LOST, RequestFailed

__all__ = ["LogServer", "OutputClosed", "follow"]

# A link that died without a word looks like a job that says nothing.
SILENCE_S = 60.0
PAUSE_S = (1.0, 15.0)
GIVE_UP_S = 900.0


class OutputClosed(Exception):
    """Whoever the log is written to takes no more (a pipe to `head`, a full disk): nothing that the connection did."""


class LogServer(Protocol):
    """What is needed of `Jobs`."""

    def tail_job_logs(self, job_id: str) -> AsyncIterator[str]: ...
    def get_job_info(self, job_id: str) -> JobDetails: ...
    def get_job_logs(self, job_id: str) -> str: ...


async def follow(
    jobs: LogServer,
    job: str,
    write: Callable[[str], object],
    notice: Callable[[str], object],
    shown: int = 0,
    silence_s: float = SILENCE_S,
    pauses_s: tuple[float, float] = PAUSE_S,
    give_up_s: float = GIVE_UP_S,
) -> JobDetails:
    """Write the job's log until the job has ended; returns what became of it.

    Args:
        write: gets the text from character `shown` on.
        notice: gets a sentence when the connection is lost, and when it is there again.
        silence_s: after so long without a line the tail is asked for anew.
        pauses_s: the first wait before another attempt, and the longest.
        give_up_s: how long nobody may answer.

    Raises:
        ResourceError: nobody answered for `give_up_s`; the job knows nothing of that.
        ConfigError: the cluster no longer knows the job.
        OutputClosed: `write` failed.
    """
    line = _Line(notice, pauses_s, give_up_s)
    reader = _Reader(write, shown, line.alive)
    while True:
        problem: Exception | None = None
        try:
            await reader.read(jobs.tail_job_logs(job), silence_s)
        except LOST as error:
            problem = error
        try:
            details = await asyncio.to_thread(jobs.get_job_info, job)
        except LOST as error:
            if isinstance(error, RequestFailed) and error.status == 404:
                raise ConfigError(f"{job}: the cluster no longer knows this job", "was it started anew?") from None
            line.lost(job, error)
        else:
            if details.status.is_terminal():
                await reader.finish(jobs, job)
                return details
            if problem is None:
                line.alive()
            else:  # the server answers, but not with the log, which `finish` has in the end
                line.lost(job, problem, answered=True)
        await asyncio.sleep(line.pause_s)


class _Line:
    """Whether the cluster can be heard, how long not, and when to try again."""

    def __init__(self, notice: Callable[[str], object], pauses_s: tuple[float, float], give_up_s: float) -> None:
        self._notice = notice
        self._pauses_s = pauses_s
        self._give_up_s = give_up_s
        self._told = False
        self._heard = monotonic()
        self.pause_s = pauses_s[0]

    def alive(self) -> None:
        if self._told:
            self._notice("connected again")
        self._told, self._heard, self.pause_s = False, monotonic(), self._pauses_s[0]

    def lost(self, job: str, problem: Exception, answered: bool = False) -> None:
        what = (str(problem).splitlines() or [type(problem).__name__])[0]
        if not self._told:
            self._notice(f"the connection to the cluster is lost ({what}); trying again")
        if answered:
            self._heard = monotonic()
        if monotonic() - self._heard > self._give_up_s:
            raise ResourceError(
                f"{job}: the cluster has not answered for {self._give_up_s:g} s ({what})",
                "the job does not depend on this: come back with `rayrlhf logs --follow`",
            )
        self.pause_s = min(2 * self.pause_s, self._pauses_s[1]) if self._told else self._pauses_s[0]
        self._told = True


class _Reader:
    def __init__(self, write: Callable[[str], object], shown: int, heard: Callable[[], object]) -> None:
        self._write = write
        self._shown = shown
        self._heard = heard

    async def read(self, chunks: AsyncIterator[str], silence_s: float) -> None:
        """All chunks of a tail that begins at the log's start; ends early when it is silent for too long."""
        position = 0
        while True:
            try:
                text = await asyncio.wait_for(anext(chunks), silence_s)
            except (StopAsyncIteration, TimeoutError):
                return
            self._heard()
            self._show(text, position)
            position += len(text)

    async def finish(self, jobs: LogServer, job: str) -> None:
        """What the tail of a job that has ended may have left out; its node may be gone by now."""
        try:
            self._show(await asyncio.to_thread(jobs.get_job_logs, job), 0)
        except LOST:
            return

    def _show(self, text: str, position: int) -> None:
        fresh = text[max(self._shown - position, 0) :]
        if fresh:
            try:
                self._write(fresh)
            except OSError as error:
                raise OutputClosed(error.strerror or type(error).__name__) from error
            self._shown = max(self._shown, position + len(text))
