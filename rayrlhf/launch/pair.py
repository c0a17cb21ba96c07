"""A policy and engines beside it, with a small model of their own: for what is tried or timed outside of a run.

All of it is the product's own: the actors of a run, its publisher, its pool of engines.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

from rayrlhf.actors.group import ActorGroup
from rayrlhf.actors.models import ModelSettings, PolicyActor
from rayrlhf.actors.placement import RolePlacement
from rayrlhf.actors.pool import EnginePool
from rayrlhf.actors.rollout import RolloutActor
from rayrlhf.config.model import FromScratch
from rayrlhf.data.batching import Cutting
from rayrlhf.engines.deepspeed import LearnerSettings
from rayrlhf.engines.vllm import EngineSettings
from rayrlhf.models.build import from_scratch
from rayrlhf.types import PromptTokens
from rayrlhf.weights.probe import probe_rows
from rayrlhf.weights.publish import WeightPublisher

__all__ = ["EOS", "PROBED", "Pair", "PairPolicy", "PairSettings"]

START_S, CALL_S = 240.0, 60.0
EOS = 0
PROBED = 64


@dataclass(frozen=True, slots=True)
class PairSettings:
    name: str
    """who asks for it: in the names of its folder and its shared memory"""
    shape: FromScratch
    device: str
    max_tokens: int
    """of a response"""
    sequences: int
    """of the engine's batch"""
    bucket_bytes: int
    engines: int = 1
    threads: tuple[int, int] = (1, 1)
    """of policy and engine"""
    gpus: float = 0.0
    """for each of them"""
    resources: Mapping[str, float] = field(default_factory=dict)
    """of the node for all"""

    @property
    def dtype(self) -> str:
        return "bfloat16" if self.device == "cuda" else "float32"


class PairPolicy(PolicyActor):
    _tokenizer = "none: nothing is decoded here"

    def build(self, shape: FromScratch) -> None:
        """Write the model where the engine will find it."""
        from_scratch(shape, shape.vocab_size, EOS, 1, seed=0).lm.save_pretrained(self.settings.path)

    def clear(self, logs: bool) -> None:
        model = Path(self.settings.path)
        shutil.rmtree(model.parent if logs else model, ignore_errors=True)


class Pair:
    """Ray has to be there. Use as: `spawn`, then `start_policy` and `start_engines`, together or not; `close`."""

    def __init__(self, settings: PairSettings, prompts: Sequence[PromptTokens]) -> None:
        self.settings = settings
        self.folder = f"{tempfile.gettempdir()}/rayrlhf-{settings.name}-{uuid4().hex[:8]}"
        """on its node: model and logs"""
        s, (learning, sampling) = settings, settings.threads
        self.policy = ActorGroup(RolePlacement("policy", 1, 0, s.gpus, learning, s.resources), CALL_S)
        self.rollout = ActorGroup(RolePlacement("rollout", s.engines, 0, s.gpus, sampling, s.resources), CALL_S)
        rows = probe_rows(s.shape.vocab_size, PROBED, s.shape.context)
        publisher = WeightPublisher(rows, s.dtype, None)
        self._prompts = list(prompts)
        self.pool = EnginePool(self.rollout, self.policy, publisher, self._prompts)

    async def spawn(self, policy: type[PairPolicy] = PairPolicy, engine: type[RolloutActor] = RolloutActor) -> None:
        """Processes, and the model's files."""
        await self.policy.spawn(policy, [(f"{self.folder}/policy.log", self._policy_settings())], START_S)
        logs = [f"{self.folder}/rollout-{i}.log" for i in range(self.settings.engines)]
        await self.rollout.spawn(engine, [(log, self._engine_settings()) for log in logs], START_S)
        await self.policy.call("build", self.settings.shape, timeout_s=START_S)

    async def start_policy(self) -> None:
        meeting = await self.policy.rendezvous(self.settings.device, False, START_S)
        await self.policy.call("start", each=[(rank,) for rank in meeting], timeout_s=START_S)

    async def start_engines(self) -> None:
        await self.rollout.call("start", self._prompts, timeout_s=START_S)

    async def close(self, logs: bool) -> None:
        """Processes and model are gone afterwards, and on request the logs; whatever failed has been told."""
        with suppress(Exception):
            await asyncio.gather(self.policy.call("close"), self.rollout.call("close"), return_exceptions=True)
            await self.policy.call("clear", logs)
        for group in (self.policy, self.rollout):
            with suppress(Exception):
                group.close()

    def _policy_settings(self) -> ModelSettings:
        s = self.settings
        learner = LearnerSettings(1, s.dtype, s.device, 1e-4, (0.9, 0.95), 1e-5, 0.0, 1.0, 1e9, self.folder, "policy")
        return ModelSettings(
            path=f"{self.folder}/model",
            dtype=s.dtype,
            device=s.device,
            trust_remote_code=False,
            cutting=Cutting(4096),
            zero_stage=1,
            temperature=1.0,
            learner=learner,
            transport="shared_memory",
            bucket_bytes=s.bucket_bytes,
            run=s.name,
        )

    def _engine_settings(self) -> EngineSettings:
        s = self.settings
        return EngineSettings(
            model=f"{self.folder}/model",
            dtype=s.dtype,
            device=s.device,
            context=s.shape.context,
            max_tokens=s.max_tokens,
            temperature=1.0,
            tensor_parallel=1,
            threads=s.threads[1],
            kv_cache_gib=1,
            gpu_memory_utilization=0.3,
            max_sequences=s.sequences,
            transport="shared_memory",
            run=s.name,
            eos=EOS,
            trust_remote_code=False,
            deterministic=False,
        )
