"""What a verified publish costs: policy rank -> engines through real Ray actors, beside two yardsticks.

    python benchmarks/weight_sync.py [--sizes 4M,30M,125M] [--engines 1,2] [--json]

Each round, in turn and in the same processes: a publish (gather, shared memory, fingerprints, re-pack, probe, commit);
vLLM's own `reload_weights` from tensors that lie in the engine's memory, on all engines at once; one plain copy of as
many bytes in the policy's process; a reload again. So publish and copy both find the caches as a reload leaves them.
A publish is timed by the driver, which asks for it; a reload inside the engine ("reload") and by the driver as well
("asked_reload", with the call to the actor and back). Medians of 7 rounds; the last line is JSON.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Annotated, Any

import numpy as np
import ray
import torch
import typer
from common import machine, print_result, print_table

from rayrlhf.actors.rollout import RolloutActor
from rayrlhf.config.model import FromScratch
from rayrlhf.config.ppo import WeightsConfig
from rayrlhf.launch.pair import Pair, PairPolicy, PairSettings
from rayrlhf.types import PromptTokens
from rayrlhf.weights.publish import PUBLISH_PARTS, Publication

ROUNDS, CONTEXT = 7, 128
PROMPT = PromptTokens(0, np.arange(1, 9, dtype=np.int32))
# The last one has the bytes of 4M in 17 times as many tensors.
SHAPES = {
    "4M": FromScratch(vocab_size=2048, hidden_size=256, layers=4, heads=4, context=CONTEXT),
    "30M": FromScratch(vocab_size=768, hidden_size=512, layers=9, heads=8, intermediate_size=1408, context=CONTEXT),
    "125M": FromScratch(
        vocab_size=50257, hidden_size=768, layers=12, heads=12, intermediate_size=2048, context=CONTEXT
    ),
    "4M-deep": FromScratch(vocab_size=2048, hidden_size=64, layers=68, heads=2, intermediate_size=192, context=CONTEXT),
}


class Policy(PairPolicy):
    _source = _target = torch.empty(0, dtype=torch.uint8)

    def counted(self) -> tuple[int, int]:
        """Bytes and tensors of the model."""
        parameters = list(self._published_module().parameters())
        return sum(p.nbytes for p in parameters), len(parameters)

    def plain_copy(self) -> float:
        """Seconds to copy as many bytes as the model has from one buffer to another."""
        nbytes, _ = self.counted()
        if self._source.numel() != nbytes:
            self._source, self._target = torch.ones(nbytes, dtype=torch.uint8), torch.zeros(nbytes, dtype=torch.uint8)
        start = perf_counter()
        self._target.copy_(self._source)
        return perf_counter() - start


class Rollout(RolloutActor):
    _weights: dict[str, torch.Tensor] | None = None

    def reload_from_memory(self) -> float:
        """Seconds of vLLM's own reload of a checkpoint that was read into memory before."""
        from safetensors.torch import load_file

        if self._weights is None:  # a copy: what is read is mapped from the file
            saved = load_file(Path(self._settings.model) / "model.safetensors")
            self._weights = {n: t.clone() for n, t in saved.items()}
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
    settings = PairSettings(
        name="bench",
        shape=SHAPES[size],
        device="cpu",
        max_tokens=32,
        sequences=64,
        bucket_bytes=bucket_bytes,
        engines=engines,
    )
    pair, whole = Pair(settings, [PROMPT]), False
    try:
        await pair.spawn(Policy, Rollout)
        await asyncio.gather(pair.start_policy(), pair.start_engines())
        (nbytes, tensors), *_ = await pair.policy.call("counted")
        row = {"size": size, "mib": nbytes / 2**20, "tensors": tensors, "engines": engines}
        row |= await _rounds(pair, rounds)
        whole = True
        return row
    finally:
        await pair.close(logs=whole)


async def _rounds(pair: Pair, rounds: int) -> dict[str, Any]:
    publishes: list[Publication] = []
    copies: list[float] = []
    reloads: list[float] = []
    asked: list[float] = []
    for version in range(rounds + 2):  # the first two warm up
        publishes.append(await pair.pool.publish(version))
        start = perf_counter()
        reloads.append(max(await pair.rollout.call("reload_from_memory")))
        asked.append(perf_counter() - start)
        copies.append((await pair.policy.call("plain_copy"))[0])
        await pair.rollout.call("reload_from_memory")
    return _row(publishes[2:], copies[2:], reloads[2:], asked[2:])


def _row(
    publishes: Sequence[Publication], copies: Sequence[float], reloads: Sequence[float], asked: Sequence[float]
) -> dict[str, Any]:
    def milliseconds(name: str) -> float:
        return 1000 * median(getattr(p, name) for p in publishes)

    return {
        "buckets": publishes[0].buckets,
        **{part: milliseconds(f"{part}_s") for part in PUBLISH_PARTS},
        "publish": milliseconds("seconds"),
        "copy": 1000 * median(copies),
        "reload": 1000 * median(reloads),
        "asked_reload": 1000 * median(asked),
        "moved_to_copy_ratio": median((p.gather_s + p.transfer_s) / c for p, c in zip(publishes, copies, strict=True)),
        "publish_to_reload_ratio": median(p.seconds / r for p, r in zip(publishes, reloads, strict=True)),
        "publish_to_asked_reload_ratio": median(p.seconds / r for p, r in zip(publishes, asked, strict=True)),
    }


if __name__ == "__main__":
    typer.run(main)
