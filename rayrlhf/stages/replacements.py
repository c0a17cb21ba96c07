"""Actors that are lost, and others in their place: within a budget, after a pause, and never without a word."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from time import monotonic
from typing import Any

from rich.console import Console
from rich.markup import escape

from rayrlhf.config.cluster import RecoveryConfig
from rayrlhf.config.secrets import masked
from rayrlhf.driver.recovery import Budget, Health
from rayrlhf.errors import ActorError, ResourceError
from rayrlhf.metrics.sinks import JsonLines

__all__ = ["Replacements"]


class Replacements:
    """Of one stage. Each one is a line of `recoveries.jsonl`, and of the console."""

    def __init__(self, config: RecoveryConfig, records: Path, console: Console) -> None:
        self._config = config
        self._budget = Budget(config.max_restarts, config.window_s, config.backoff_s)
        self._records = records
        self._console = console
        self._health: dict[str, Health] = {}
        self._running: dict[str, asyncio.Task[None]] = {}

    async def replace(self, who: str, cause: ActorError, start: Callable[[], Awaitable[None]]) -> None:
        """Run `start`, after a pause, until it succeeds. One that is under way is joined, and goes on when nobody waits
        for it any more: half a replacement would leave actors that know nothing.

        Raises:
            ActorError: `who` (a role, or one engine) has failed too often; the last cause is in the message.
        """
        if who not in self._running or self._running[who].done():
            running = self._running[who] = asyncio.ensure_future(self._replace(who, cause, start))
            running.add_done_callback(lambda task: self._over(who, task))
        await asyncio.shield(self._running[who])

    async def settled(self) -> None:
        """Wait for all that are under way.

        Raises:
            ActorError: as `replace` does.
        """
        await asyncio.gather(*(asyncio.shield(task) for task in self._running.values()))

    async def close(self) -> None:
        """Nobody needs what is being replaced any more."""
        running = list(self._running.values())
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    def _over(self, who: str, task: asyncio.Task[None]) -> None:
        if self._running.get(who) is task:
            del self._running[who]
        if not task.cancelled():
            task.exception()  # whoever waited has it; asyncio prints what nobody has looked at

    async def _replace(self, who: str, cause: ActorError, start: Callable[[], Awaitable[None]]) -> None:
        lost = monotonic()
        while True:
            await asyncio.sleep(self.lost(who, cause))
            self.starts(who)
            try:
                await start()
            except (ActorError, ResourceError) as failure:
                cause = failure if isinstance(failure, ActorError) else ActorError(failure.message, failure.hint)
                continue
            self.is_back(who, monotonic() - lost)
            return

    def lost(self, who: str, cause: ActorError) -> float:
        """Tell of it; seconds to wait before `who` is started again.

        Raises:
            ActorError: it has failed too often.
        """
        health = self._health.setdefault(who, Health(self._budget, monotonic))
        wait = None if health.state == "spent" else health.failed()  # nobody may have waited for the first to hear so
        self._tell(who, cause, wait)
        if wait is None:
            raise self._spent(who, cause, health.failures) from cause
        return wait

    def starts(self, who: str) -> None:
        self._health[who].starting()

    def is_back(self, who: str, seconds: float) -> None:
        """After so many seconds."""
        self._health[who].serving()
        self._write({"who": who, "event": "replaced", "seconds": seconds})
        self._console.print(f"{who} is there again after {seconds:.1f} s", highlight=False)

    def _tell(self, who: str, cause: ActorError, wait: float | None) -> None:
        said = masked(cause.message)
        self._write({"who": who, "event": "lost", "cause": said, "restart_in_s": wait})
        what = "is not replaced again" if wait is None else "is replaced"
        self._console.print(f"[yellow]{who} is lost and {what}:[/] {escape(said)}", soft_wrap=True)

    def _write(self, record: dict[str, Any]) -> None:
        file = JsonLines(self._records)  # most runs have none
        file.write({"at": datetime.now(UTC).isoformat(timespec="milliseconds"), **record})
        file.close()

    def _spent(self, who: str, cause: ActorError, failures: int) -> ActorError:
        times = f"{failures} times within {self._config.window_s:g} s" if failures > 1 else "once"
        error = ActorError(
            f"{who} was lost {times}, and cluster.recovery.max_restarts is {self._config.max_restarts}; the last time: "
            f"{cause.message}",
            f"{cause.hint}; mend the cause, then go on with --resume",
        )
        error.role = cause.role
        return error
