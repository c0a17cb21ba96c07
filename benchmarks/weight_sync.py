"""What a verified publish costs: policy rank -> engines through real Ray actors, beside two yardsticks.

    python benchmarks/weight_sync.py [--sizes 4M,30M,125M] [--engines 1,2] [--json]

Each round, in turn and in the same processes: a publish (gather, shared memory, fingerprints, re-pack, probe, commit);
vLLM's own `reload_weights` from tensors that lie in the engine's memory, on all engines at once; one plain copy of as
many bytes in the policy's process; a reload again. So publish and copy both find the caches as a reload leaves them.
Medians of 7 rounds; the last line is JSON.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Annotated, Any

import numpy as np
import ray
import torch
import typer
from common import engine_settings, machine, print_result, print_table

from rayrlhf.actors.group import ActorGroup
from rayrlhf.actors.models import ModelSettings, PolicyActor
from rayrlhf.actors.placement import RolePlacement
from rayrlhf.actors.pool import EnginePool
from rayrlhf.actors.rollout import RolloutActor
from rayrlhf.config.model import FromScratch
from rayrlhf.config.ppo import WeightsConfig
from rayrlhf.data.batching import Cutting
from rayrlhf.engines.deepspeed import LearnerSettings
from rayrlhf.models.build import from_scratch
from rayrlhf.types import PromptTokens
from rayrlhf.weights.probe import probe_rows
from rayrlhf.weights.publish import PUBLISH_PARTS, Publication, WeightPublisher

ROUNDS, CONTEXT, EOS, START_S = 7, 128, 0, 300.0
# The last one has the bytes of 4M in 17 times as many tensors.
SHAPES = {
    "4M": FromScratch(vocab_size=2048, hidden_size=256, layers=4, heads=4, context=CONTEXT),
    "30M": FromScratch(vocab_size=768, hidden_size=512, layers=9, heads=8, intermediate_size=1408, context=CONTEXT),
    "125M": FromScratch(
        vocab_size=50257, hidden_size=768, layers=12, heads=12, intermediate_size=2048, context=CONTEXT
    ),
    "4M-deep": FromScratch(vocab_size=2048, hidden_size=64, layers=68, heads=2, intermediate_size=192, context=CONTEXT),
}


class Policy(PolicyActor):
    _tokenizer = "none: nothing is decoded here"

    _source = _target = torch.empty(0, dtype=torch.uint8)

    def plain_copy(self) -> float:
        """Seconds to copy as many bytes as the model has from one buffer to another."""
        nbytes = sum(p.nbytes for p in self._published_module().parameters())
        if self._source.numel() != nbytes:
            self._source, self._target = torch.ones(nbytes, dtype=torch.uint8), torch.zeros(nbytes, dtype=torch.uint8)
        start = perf_counter()
        self._target.copy_(self._source)
        return perf_counter() - start


class Rollout(RolloutActor):
    _weights: dict[str, torch.Tensor] | None = None

    def reload_from_memory(self, folder: str) -> float:
        """Seconds of vLLM's own reload of a checkpoint that was read into memory before."""
        from safetensors.torch import load_file

        if self._weights is None:  # a copy: what is read is mapped from the file
            self._weights = {n: t.clone() for n, t in load_file(Path(folder) / "model.safetensors").items()}
        weights = self._weights

        def reload(worker: Any) -> float:
            start = perf_counter()
            worker.model_runner.reload_weights(weights_iterator=iter(weights.items()))
            return perf_counter() - start

        return float(max(self._engine._llm.collective_rpc(reload)))


def main(
    sizes: str = "4M,4M-deep,30M,125M",
    engines: str = "1,2",
    rounds: int = ROUNDS,
    bucket_mib: float = WeightsConfig().bucket_mib,
    as_json: Annotated[bool, typer.Option("--json", help="The last line alone.")] = False,
) -> None:
    ray.init("local", num_cpus=4, include_dashboard=False, log_to_driver=False, configure_logging=False)
    rows = []
    for size in sizes.split(","):
        for count in map(int, engines.split(",")):
            rows.append(asyncio.run(_measure(size, count, rounds, int(bucket_mib * 2**20))))
    ray.shutdown()
    title = f"one policy rank, buckets of {bucket_mib:g} MiB, medians of {rounds} rounds; times in ms"
    if not as_json:
        print_table(title, rows)
    print_result({**machine("cpu"), "rounds": rounds, "rows": rows})


async def _measure(size: str, engines: int, rounds: int, bucket_bytes: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        model = from_scratch(SHAPES[size], SHAPES[size].vocab_size, EOS, 1, seed=0).lm
        model.save_pretrained(folder)
        nbytes = sum(p.nbytes for p in model.parameters())
        tensors = len(list(model.parameters()))
        del model
        groups = await _start(folder, engines, bucket_bytes)
        try:
            return {"size": size, "mib": nbytes / 2**20, "tensors": tensors, "engines": engines} | await _rounds(
                *groups, folder, SHAPES[size].vocab_size, rounds
            )
        finally:
            for group in groups:
                await group.call("close")
                group.close()


async def _start(folder: str, engines: int, bucket_bytes: int) -> tuple[ActorGroup, ActorGroup]:
    logs = f"{tempfile.gettempdir()}/rayrlhf-weight-sync"
    learner = LearnerSettings(1, "float32", "cpu", 1e-4, (0.9, 0.95), 1e-5, 0.0, 1.0, 1e3, logs, "policy")
    settings = ModelSettings(
        path=folder,
        dtype="float32",
        device="cpu",
        trust_remote_code=False,
        cutting=Cutting(4096),
        zero_stage=1,
        temperature=1.0,
        learner=learner,
        transport="shared_memory",
        bucket_bytes=bucket_bytes,
        run="bench",
    )
    policy = ActorGroup(RolePlacement("policy", 1, 0.5, 0, 1), START_S)
    rollout = ActorGroup(RolePlacement("rollout", engines, 0.5, 0, 1), START_S)

    async def start_policy() -> None:
        await policy.spawn(Policy, [(f"{logs}/policy.log", settings)], START_S)
        await policy.call("start", each=[(r,) for r in await policy.rendezvous("cpu", False, START_S)])

    async def start_engines() -> None:
        engine = engine_settings(folder, CONTEXT, 32, 64, 1)
        await rollout.spawn(Rollout, [(f"{logs}/rollout-{i}.log", engine) for i in range(engines)], START_S)
        await rollout.call("start", [PromptTokens(0, np.arange(1, 9, dtype=np.int32))])

    await asyncio.gather(start_policy(), start_engines())
    return policy, rollout


async def _rounds(policy: ActorGroup, rollout: ActorGroup, folder: str, vocab: int, rounds: int) -> dict[str, Any]:
    publisher = WeightPublisher(probe_rows(vocab, 64, CONTEXT), "float32", None)
    pool = EnginePool(rollout, policy, publisher, [])
    publishes: list[Publication] = []
    copies: list[float] = []
    reloads: list[float] = []
    for version in range(rounds + 2):  # the first two warm up
        publishes.append(await pool.publish(version))
        reloads.append(max(await rollout.call("reload_from_memory", folder)))
        copies.append((await policy.call("plain_copy"))[0])
        await rollout.call("reload_from_memory", folder)
    return _row(publishes[2:], copies[2:], reloads[2:])


def _row(publishes: Sequence[Publication], copies: Sequence[float], reloads: Sequence[float]) -> dict[str, Any]:
    def milliseconds(name: str) -> float:
        return 1000 * median(getattr(p, name) for p in publishes)

    return {
        "buckets": publishes[0].buckets,
        **{part: milliseconds(f"{part}_s") for part in PUBLISH_PARTS},
        "publish": milliseconds("seconds"),
        "copy": 1000 * median(copies),
        "reload": 1000 * median(reloads),
        "moved_to_copy_ratio": median((p.gather_s + p.transfer_s) / c for p, c in zip(publishes, copies, strict=True)),
        "publish_to_reload_ratio": median(p.seconds / r for p, r in zip(publishes, reloads, strict=True)),
    }


if __name__ == "__main__":
    typer.run(main)
