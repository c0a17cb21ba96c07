"""Tokens per second through the actor system, beside plain vLLM processes.

    python benchmarks/rollout.py [--engines 1,2] [--pairs 7] [--json]

Both sides hold the same model with the same engine settings, threads, seeds and log-prob options, and get the same
prompts in the same shares; each response has a length of its own that is given in advance, all alike (fixed) or
log-normal with a quarter of the limit as mean. The sides take turns; ratios are medians of 7 pairs.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import tempfile
from collections.abc import Sequence
from multiprocessing.connection import Connection
from statistics import median
from time import perf_counter
from typing import Annotated, Any

import numpy as np
import ray
import typer
from common import engine_settings, machine, print_result, print_table
from lengths import NICE, GivenLengths, given_lengths

from rayrlhf.actors.group import ActorGroup
from rayrlhf.actors.placement import RolePlacement
from rayrlhf.actors.pool import EnginePool
from rayrlhf.actors.rollout import RolloutActor
from rayrlhf.config.model import FromScratch
from rayrlhf.engines.vllm import EngineSettings
from rayrlhf.models.build import from_scratch
from rayrlhf.types import PromptTokens, SampleRequest
from rayrlhf.weights.publish import Publication, PublishSource, PublishTarget, WeightPublisher

PAIRS, REQUESTS, LIMIT, PROMPT, START_S = 7, 128, 256, 32, 300.0
SHAPE = FromScratch(vocab_size=2048, hidden_size=256, layers=4, heads=4, context=LIMIT + PROMPT)


class Rollout(RolloutActor):
    def start(self, prompts: list[PromptTokens]) -> None:
        self._engine = _engine(self._settings, prompts)

    def take_lengths(self, lengths: Sequence[int]) -> None:
        self._engine.lengths = lengths

    def close(self) -> None:
        self._engine.close()


def main(
    engines: str = "1,2",
    pairs: int = PAIRS,
    responses: int = REQUESTS,
    as_json: Annotated[bool, typer.Option("--json", help="The last line alone.")] = False,
) -> None:
    ray.init("local", num_cpus=4, include_dashboard=False, log_to_driver=False, configure_logging=False)
    with tempfile.TemporaryDirectory() as folder:
        from_scratch(SHAPE, SHAPE.vocab_size, 0, 1, seed=0).lm.save_pretrained(folder)
        rows = [
            row
            for count in map(int, engines.split(","))
            for row in asyncio.run(_measure(folder, count, pairs, responses))
        ]
    ray.shutdown()
    title = (
        f"{responses} responses of {LIMIT // 4} tokens in the mean, 4M parameters, float32, {os.cpu_count()} threads"
    )
    if not as_json:
        print_table(title, rows)
    print_result({**machine("cpu"), "pairs": pairs, "responses": responses, "rows": rows})


async def _measure(folder: str, engines: int, pairs: int, responses: int) -> list[dict[str, Any]]:
    """A row for each kind of lengths."""
    threads = max(1, (os.cpu_count() or 1) // engines)
    settings, prompts = engine_settings(folder, LIMIT + PROMPT, LIMIT, 256, threads), _prompts(responses)
    group = ActorGroup(RolePlacement("rollout", engines, 0.5, 0, settings.threads), START_S)
    logs = f"{tempfile.gettempdir()}/rayrlhf-rollout"
    await group.spawn(Rollout, [(f"{logs}/rollout-{i}.log", settings) for i in range(engines)], START_S)
    await group.call("start", prompts)
    plain = [_Plain(settings, prompts) for _ in range(engines)]
    try:
        return [await _compare(kind, group, plain, prompts, pairs) for kind in ("fixed", "log-normal")]
    finally:
        for process in plain:
            process.close()
        await group.call("close")
        group.close()


async def _compare(
    kind: str, group: ActorGroup, plain: Sequence[_Plain], prompts: Sequence[PromptTokens], pairs: int
) -> dict[str, Any]:
    lengths = given_lengths(kind, len(prompts), LIMIT)
    pool = EnginePool(group, group, _AsTheyAre(), prompts)
    await pool.publish(0)
    await group.call("take_lengths", lengths)
    seconds: dict[str, list[float]] = {"system": [], "plain": []}
    for round_ in range(pairs + 1):  # the first warms up
        requests = [SampleRequest(i, i, seed=len(prompts) * round_ + i) for i in range(len(prompts))]
        shares = list(pool._deal(requests).values())
        seconds["system"].append(await _through_the_system(pool, requests, sum(lengths)))
        seconds["plain"].append(_through_plain(plain, shares, lengths))
    speed = {side: [sum(lengths) / s for s in times[1:]] for side, times in seconds.items()}
    return {
        "engines": group.ranks,
        "lengths": kind,
        "tokens": sum(lengths),
        "system_tokens_per_s": median(speed["system"]),
        "plain_tokens_per_s": median(speed["plain"]),
        "system_to_plain_ratio": median(a / b for a, b in zip(speed["system"], speed["plain"], strict=True)),
    }


async def _through_the_system(pool: EnginePool, requests: Sequence[SampleRequest], expected: int) -> float:
    start = perf_counter()
    infos = [info async for part in pool.generate(requests) for info in part.infos]
    seconds = perf_counter() - start
    assert sum(info.response_tokens for info in infos) == expected
    return seconds


def _through_plain(plain: Sequence[_Plain], shares: Sequence[list[SampleRequest]], lengths: Sequence[int]) -> float:
    start = perf_counter()
    for process, share in zip(plain, shares, strict=True):
        process.pipe.send((share, lengths))
    tokens = sum(process.pipe.recv() for process in plain)
    seconds = perf_counter() - start
    assert tokens == sum(lengths)
    return seconds


class _AsTheyAre(WeightPublisher):
    """Sends nothing: the weights that an engine was started with are as good as any here."""

    def __init__(self) -> None:
        super().__init__([], "float32", None)

    async def publish(self, version: int, source: PublishSource, targets: Sequence[PublishTarget]) -> Publication:
        for target in targets:
            await target.commit(version)
        return Publication(version, committed=[target.name for target in targets])


class _Plain:
    """vLLM in a process of its own, without Ray: `LLM.generate`, and nothing else."""

    def __init__(self, settings: EngineSettings, prompts: list[PromptTokens]) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, settings, prompts))
        # Libraries read it when they are imported: before anything of ours runs there.
        os.environ.update(RolePlacement("rollout", 1, 0, 0, settings.threads).environment())
        self._process.start()
        self.pipe.recv()  # ready

    def close(self) -> None:
        self.pipe.send(None)
        self._process.join(30)


def _serve(pipe: Connection, settings: EngineSettings, prompts: list[PromptTokens]) -> None:
    os.nice(NICE - os.nice(0))
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    from vllm import TokensPrompt

    engine = _engine(settings, prompts)
    tokens = {p.prompt_id: TokensPrompt(prompt_token_ids=p.tokens.tolist()) for p in prompts}
    pipe.send("ready")
    while (work := pipe.recv()) is not None:
        share, engine.lengths = work
        params = [engine._sampling(request, None) for request in share]
        outputs = engine._llm.generate([tokens[r.prompt_id] for r in share], params, use_tqdm=False)
        pipe.send(sum(len(output.outputs[0].token_ids) for output in outputs))


def _engine(settings: EngineSettings, prompts: Sequence[PromptTokens]) -> GivenLengths:
    engine = GivenLengths(settings, prompts)
    engine._version = 0
    return engine


def _prompts(count: int) -> list[PromptTokens]:
    rng = np.random.default_rng(1)
    return [PromptTokens(i, rng.integers(5, SHAPE.vocab_size, PROMPT).astype(np.int32)) for i in range(count)]


if __name__ == "__main__":
    typer.run(main)
