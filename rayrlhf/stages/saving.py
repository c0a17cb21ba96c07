"""Saving a PPO run: checkpoints every so often, from which it can go on, and the models at its end."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.markup import escape

from rayrlhf.actors.group import ActorGroup
from rayrlhf.checkpoint.store import Checkpoint
from rayrlhf.config import Config
from rayrlhf.driver.pacing import TextStream
from rayrlhf.driver.together import together
from rayrlhf.errors import ActorError, ActorLost, CheckpointError, DataLost, RayRLHFError
from rayrlhf.stages.context import StageContext
from rayrlhf.stages.ledger import Ledger
from rayrlhf.stages.resume import inputs_of_arm, store_of_arm

__all__ = ["RECORDS", "PolicySaver"]

# What a checkpoint holds of the steps up to its own.
RECORDS = ("metrics.jsonl", "samples.jsonl")


class PolicySaver:
    """`checkpoints/step-000010/`: {model,value,...} in Hugging Face format, `state/` to resume from, the records."""

    def __init__(
        self,
        groups: Mapping[str, ActorGroup],
        context: StageContext,
        config: Config,
        folder: Path,
        arm: str | None = None,
    ) -> None:
        """`folder`: where the records of this run (of this arm) grow."""
        self._groups = groups
        self._context = context
        self._folder = folder
        self._every = config.checkpoint.every
        self._saved = 0
        """the newest step that has a checkpoint; nothing has happened before the first"""
        self._averages = config.ppo.ema is not None
        self._models = {role: name for role, name in (("policy", "model"), ("value", "value")) if role in groups}
        self._inputs = inputs_of_arm(context.inputs, config)
        self._store = store_of_arm(context.folder, config, arm)
        self.text: TextStream | None = None
        """PPO-ptx's, whose place is part of the state"""
        self.ledger: Ledger | None = None
        """whose account of the samples is"""

    async def save(self, step: int, kl_coef: float, metrics: Mapping[str, float], due: bool = False) -> bool:
        """A checkpoint, every `checkpoint.every` steps or when it is `due`, once for a step; whether it was written.

        Raises:
            CheckpointError: it cannot be: the disk is full, for one. What was saved before is still there.
        """
        if step == self._saved or not (due or (self._every and step % self._every == 0)):
            return False
        try:
            await self._write(step, kl_coef, metrics)
        except (ActorLost, DataLost):
            raise
        except (OSError, ActorError, CheckpointError) as error:
            shutil.rmtree(self._store.partial(step), ignore_errors=True)  # what the run says last needs room too
            what, hint = (error.message, error.hint) if isinstance(error, RayRLHFError) else (str(error), "make room")
            raise CheckpointError(
                f"the checkpoint of step {step} cannot be written to {self._store.root}: {what}",
                f"{hint}; then go on with --resume: earlier checkpoints are as they were",
            ) from None
        self._saved = step
        return True

    async def _write(self, step: int, kl_coef: float, metrics: Mapping[str, float]) -> None:
        assert self.ledger is not None
        partial = self._store.begin(step)
        await self.save_to(partial)
        for names in await self._each("save_state", partial / "state"):
            for name in filter(None, names):
                if not Path(name).is_file():
                    raise CheckpointError(
                        f"a learner has written {name}, and it is not there on the driver's host",
                        "set run.output to storage that all hosts share",
                    )
        for name in RECORDS:
            shutil.copy2(self._folder / name, partial / name)
        text_drawn, accounted = self.text.drawn if self.text else 0, self.ledger.accounted.to_state()
        state = {"kl_coef": kl_coef, "text_drawn": text_drawn, "accounted": accounted}
        # Hashing and flushing take a while, and the next step's responses may be on their way.
        await asyncio.to_thread(self._store.finish, step, state, self._inputs, metrics.get("reward/mean"))

    async def resume(self) -> Checkpoint | None:
        """Let the learners become what the newest whole checkpoint holds, if there is one.

        Raises:
            CheckpointError: it does not fit the learners.
        """
        found = await asyncio.to_thread(self._store.newest)
        for reason in self._store.damaged:
            self._context.console.print(
                f"[yellow]not a whole checkpoint, passed over:[/] {escape(reason)}", soft_wrap=True
            )
        self._store.set_aside(found.step if found else -1)
        if found is not None:
            _check_state(found)
            await self._each("load_state", found.folder / "state")
        return found

    def go_on_from(self, found: Checkpoint | None) -> None:
        self._saved = found.step if found else 0

    async def _each(self, method: str, folder: Path) -> list[list[Any]]:
        """What the ranks of each role that learns return."""
        return await together(*(self._groups[role].call(method, str(folder / role)) for role in self._models))

    async def save_to(self, folder: Path) -> None:
        """All models that learn at once, each written by its rank 0; then the policy's average, and tokenizers."""
        target = folder.resolve()
        await together(*(self._groups[role].call("save", str(target / name)) for role, name in self._models.items()))
        if self._averages:
            await self._groups["policy"].call("save_average", str(target / "model_ema"))
            self._context.data.tokenizer.save_pretrained(target / "model_ema")
        self._context.data.tokenizer.save_pretrained(target / "model")


def _check_state(found: Checkpoint) -> None:
    """What `save` puts there, as it puts it: the manifest is a text that anybody can edit."""
    coef, drawn = found.state.get("kl_coef"), found.state.get("text_drawn")
    if isinstance(coef, bool) or not isinstance(coef, int | float) or coef < 0:
        raise CheckpointError(f"{found.folder}: kl_coef is {coef!r}, expected a number", "resume from another one")
    if isinstance(drawn, bool) or not isinstance(drawn, int) or drawn < 0:
        raise CheckpointError(f"{found.folder}: text_drawn is {drawn!r}, expected a count", "resume from another one")
