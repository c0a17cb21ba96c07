"""The reference trainer as an actor: it takes one recorded step again, apart from the roles that took it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from ray.exceptions import RayError
from safetensors import safe_open
from torch import Tensor, nn

from rayrlhf.actors.base import Actor
from rayrlhf.actors.group import explain
from rayrlhf.actors.placement import RolePlacement
from rayrlhf.actors.roles import UpdateRecord
from rayrlhf.driver.protocols import ExperienceBatch, Handle, ScoredBatch
from rayrlhf.engines.snapshot import ADAM, GRADIENTS, WEIGHTS, WEIGHTS_AFTER
from rayrlhf.errors import ActorTimeout
from rayrlhf.evaluation.agreement import Recipe, RecordedLearner, RecordedStep, Role, Row, compare_step
from rayrlhf.types import Scores

__all__ = ["Snapshot", "verify"]

LOG = "reference-trainer"
# What is exact in float32 is checked in more; bfloat16 is coarse enough for float32 to be the yardstick.
YARDSTICK = {"float32": torch.float64, "bfloat16": torch.float32}


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything that was recorded of a step but its tokens."""

    folder: str
    """holds a folder for each learner"""
    update: UpdateRecord
    adam_steps: Mapping[str, int]
    """by role, before the step"""
    metrics: Mapping[str, float]
    models: Mapping[Role, str]
    """the model that each role was started from"""
    trust_remote_code: bool
    recipe: Recipe


async def verify(
    snapshot: Snapshot,
    batch: ScoredBatch,
    experience: ExperienceBatch,
    text: Handle | None,
    log: str,
    threads: int,
    timeout_s: float,
) -> list[Row]:
    """Take the step again in a process of its own. It asks for no CPU of the cluster, since every role waits for it.

    Args:
        text: int32 [blocks, L], all pretraining text there is; None without PPO-ptx.

    Raises:
        ActorLost, ActorTimeout: its process is gone, or too slow; it can be asked again.
    """
    environment = RolePlacement(LOG, 1, 0, 0, threads).environment()
    actor = ray.remote(_ReferenceTrainer).options(num_cpus=0, runtime_env={"env_vars": environment}).remote(log)
    chunks = (*batch.rollouts.handles, *batch.scores, *experience.handles)
    counts = len(batch.rollouts.handles), len(batch.scores)
    try:
        asked = _answer(actor.compare.remote(snapshot, threads, counts, text, *chunks))
        return await asyncio.wait_for(asked, timeout_s)
    except TimeoutError:
        raise ActorTimeout(
            f"the reference trainer did not finish within {timeout_s:g} s", "raise cluster.call_timeout_s"
        ) from None
    except RayError as error:
        raise explain(error, "the reference trainer failed", LOG) from None
    finally:
        ray.kill(actor)


async def _answer(rows: Any) -> list[Row]:
    return list(await rows)


class _ReferenceTrainer(Actor):
    def compare(
        self, snapshot: Snapshot, threads: int, counts: tuple[int, int], text: np.ndarray | None, *chunks: Any
    ) -> list[Row]:
        """`chunks` are rollouts and scores, of which there are `counts`, and experiences."""
        torch.set_num_threads(threads)
        rollouts, rest = chunks[: counts[0]], chunks[counts[0] :]
        scores = Scores()
        for part in rest[: counts[1]]:
            scores.merge(part)
        update = snapshot.update
        step = RecordedStep(
            rollouts={r.info.sample_id: r for chunk in rollouts for r in chunk},
            scores=scores,
            experiences={e.rollout.info.sample_id: e for chunk in rest[counts[1] :] for e in chunk},
            minibatches=update.minibatches,
            text=[] if text is None or update.text is None else [[text[i] for i in ids] for ids in update.text],
            metrics=snapshot.metrics,
            policy=_recorded(snapshot, "policy"),
            value=_recorded(snapshot, "value"),
        )
        return compare_step(step, snapshot.recipe, lambda role: _load(snapshot, role))


def _recorded(snapshot: Snapshot, role: str) -> RecordedLearner:
    folder, adam_steps = Path(snapshot.folder) / role, snapshot.adam_steps[role]
    adam = {key: _TensorFile(folder / name) if adam_steps else {} for key, name in ADAM.items()}
    return RecordedLearner(
        learning_rate=snapshot.update.rates[role],
        adam_steps=adam_steps,
        weights=_TensorFile(folder / WEIGHTS),
        gradients=_TensorFile(folder / GRADIENTS),
        weights_after=_TensorFile(folder / WEIGHTS_AFTER),
        **adam,
    )


def _load(snapshot: Snapshot, role: Role) -> nn.Module:
    """With transformers alone: what the product does to a model on loading is part of what is checked."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    auto = AutoModelForCausalLM if role in ("policy", "reference") else AutoModelForSequenceClassification
    model: nn.Module = auto.from_pretrained(
        snapshot.models[role],
        dtype=torch.float32,
        trust_remote_code=snapshot.trust_remote_code,
        use_safetensors=True,
    )
    return model.to(YARDSTICK[snapshot.recipe.dtype])


class _TensorFile(Mapping[str, Tensor]):
    """A safetensors file as a mapping that reads a tensor when it is asked for: five of a model's size fit nowhere."""

    def __init__(self, path: Path) -> None:
        opened: Any = safe_open(path, framework="pt")
        self._file, self._names = opened, list[str](opened.keys())

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        tensor: Tensor = self._file.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
