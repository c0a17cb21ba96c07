"""Saving the policy and the value model of a PPO run, every so often and at its end."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from rayrlhf.actors.group import ActorGroup
from rayrlhf.config import Config
from rayrlhf.stages.context import StageContext

__all__ = ["PolicySaver"]


class PolicySaver:
    """`checkpoints/step-000010/{model,value,...}` in Hugging Face format; a folder is there whole or not at all."""

    def __init__(
        self, groups: Mapping[str, ActorGroup], context: StageContext, config: Config, arm: str | None = None
    ) -> None:
        self._groups = groups
        self._context = context
        self._config = config.checkpoint
        self._averages = config.ppo.ema is not None
        self._folder = context.folder / "checkpoints" / (arm or "")
        self._models = {role: name for role, name in (("policy", "model"), ("value", "value")) if role in groups}

    async def save_if_due(self, step: int) -> None:
        if not self._config.every or step % self._config.every:
            return
        partial, final = self._folder / f".step-{step:06d}.partial", self._folder / f"step-{step:06d}"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        await self.save_to(partial)
        (partial / "manifest.json").write_text(json.dumps({"step": step}), encoding="utf-8")
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
        for old in sorted(self._folder.glob("step-*"))[: -self._config.keep]:
            shutil.rmtree(old)

    async def save_to(self, folder: Path) -> None:
        """All models that learn at once, each written by its rank 0; then the policy's average, and tokenizers."""
        target = folder.resolve()
        calls = [self._groups[role].call("save", str(target / name)) for role, name in self._models.items()]
        await asyncio.gather(*calls)
        if self._averages:
            await self._groups["policy"].call("save_average", str(target / "model_ema"))
            self._context.data.tokenizer.save_pretrained(target / "model_ema")
        self._context.data.tokenizer.save_pretrained(target / "model")
