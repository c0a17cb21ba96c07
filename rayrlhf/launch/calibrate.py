"""`rayrlhf plan --calibrate`: the product's own engines on this CPU for a while, as a hardware file for the plan.

Two small models learn and score; one samples, at two sizes of batch, and takes new weights. What the plan assumes of a
CPU is then set so that it would have foreseen these seconds. Each but a publish's is the least of a few: what else runs
on the machine can only add.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import count, islice
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

from rayrlhf.actors.cluster import disconnect, join
from rayrlhf.actors.rollout import RolloutActor
from rayrlhf.config import Config
from rayrlhf.config.load import dump_yaml
from rayrlhf.config.model import FromScratch
from rayrlhf.config.ppo import WeightsConfig
from rayrlhf.data.batching import Cutting
from rayrlhf.engines.deepspeed import Learner
from rayrlhf.engines.learning import UpdateSettings, update_policy
from rayrlhf.engines.scoring import score_logprobs
from rayrlhf.errors import ActorError, ConfigError
from rayrlhf.launch.pair import EOS, Pair, PairPolicy, PairSettings
from rayrlhf.models.build import from_scratch
from rayrlhf.planning.assumptions import assumptions_for
from rayrlhf.planning.decoding import forward_flops
from rayrlhf.planning.hardware import Hardware, hardware_named
from rayrlhf.planning.shapes import ModelShape, from_scratch_config, shape_of
from rayrlhf.planning.time import ADAM_BYTES
from rayrlhf.types import Experience, PromptTokens, Rollout, RolloutInfo, SampleRequest

__all__ = ["Measured", "calibrate", "fitted", "measure_this_machine", "write_hardware"]

VOCABULARY, PROMPT, RESPONSE = 2048, 32, 32
SPECS = {
    "small": FromScratch(hidden_size=256, layers=4, heads=4, vocab_size=VOCABULARY, context=PROMPT + RESPONSE),
    "large": FromScratch(hidden_size=512, layers=6, heads=8, vocab_size=VOCABULARY, context=PROMPT + RESPONSE),
}
SEQUENCES = (8, 32)
"""of an engine's batch"""
LEARNED = (2, 8, 24)
"""of a micro-batch; with the fewest an update is little but its optimizer step"""
REPEATS = 3
PATIENCE_S = 300.0


@dataclass(frozen=True, slots=True)
class Measured:
    """Seconds by (model, sequences); of the engine by sequences, with the larger model."""

    score: Mapping[tuple[str, int], float]
    """a forward pass"""
    update: Mapping[tuple[str, int], float]
    """a minibatch of one micro-batch, with its optimizer step"""
    prefill: Mapping[int, float]
    """all prompts and a first token of each"""
    decode: Mapping[int, float]
    """one more token of each sequence"""
    publish: float
    """of the larger model, to one engine, after both have done other work; a median: caches are never warm in a run"""


def calibrate(learner_threads: int, engine_threads: int) -> Measured:
    """In a Ray of its own.

    Raises:
        ActorError: a process that measures failed, or ended without an answer.
    """
    join(None, "rayrlhf-calibrate")
    try:
        return asyncio.run(_measure(learner_threads, engine_threads))
    finally:
        disconnect()


def fitted(measured: Measured, hardware: Hardware, learner_threads: int, engine_threads: int) -> dict[str, float]:
    """The plan's assumptions by which it would have foreseen `measured`."""
    shapes = {name: shape_of(from_scratch_config(spec), name) for name, spec in SPECS.items()}
    peak, bandwidth = hardware.flops("float32") * learner_threads, hardware.bandwidth * learner_threads
    learner = _of_learner(measured, shapes, peak, bandwidth)
    engine = _of_engine(measured, shapes["large"], hardware, engine_threads)
    return learner | engine | _of_publish(measured.publish, 4.0 * shapes["large"].parameters)


def measure_this_machine(config: Config, hardware: str | None) -> Path:
    """Calibrate for the threads of `config`; the hardware file that comes of it.

    Raises:
        ConfigError: the config, or the hardware, is not a CPU's.
    """
    here = hardware_named(hardware or "cpu")
    if here.is_gpu or config.cluster.device != "cpu":
        raise ConfigError("--calibrate measures this machine's CPU", "set cluster.device=cpu, or leave it out")
    learner, engine = config.cluster.policy.threads, config.cluster.rollout.threads
    path = config.run.output / "this-machine.yaml"
    write_hardware(path, here, fitted(calibrate(learner, engine), here, learner, engine))
    return path


def write_hardware(path: Path, hardware: Hardware, assumptions: Mapping[str, float]) -> None:
    """As a file that `rayrlhf plan --hardware` takes."""
    device = hardware.device.model_dump() | {"title": "this machine, measured"}
    path.parent.mkdir(parents=True, exist_ok=True)
    tree = {"devices": {"this-machine": device}, "assumptions": dict(assumptions)}
    path.write_text(dump_yaml(tree), encoding="utf-8")


def _of_learner(
    measured: Measured, shapes: Mapping[str, ModelShape], peak: float, bandwidth: float
) -> dict[str, float]:
    """score = fixed + flops / rate; update = 2 fixed + 3 flops / rate + the optimizer's bytes / its bandwidth."""
    cases = list(measured.score)
    flops = np.array([_flops(shapes[name], n) for name, n in cases])
    score = np.array([measured.score[case] for case in cases])
    update = np.array([measured.update[case] for case in cases])
    fixed, forward = _non_negative(np.stack([np.ones_like(flops), flops], 1), score)
    nbytes = np.array([(ADAM_BYTES + 4.0) * shapes[name].parameters for name, _ in cases])
    train, step = _non_negative(np.stack([3 * flops, nbytes], 1), update - 2 * fixed)
    return {
        "micro_batch_ms": fixed * 1e3,
        "mfu_forward": 1 / (forward * peak),
        "mfu_train": 1 / (train * peak),
        "optimizer_bandwidth": 1 / (max(step, 1e-13) * bandwidth),
    }


def _of_engine(measured: Measured, shape: ModelShape, hardware: Hardware, threads: int) -> dict[str, float]:
    """decode = reading or arithmetic + a step's own + so much a sequence; prompts tell how fast arithmetic is."""
    few, many = SEQUENCES
    assume = assumptions_for("cpu")
    # The plan gives an engine this share of its cores. Measured as an actor it had no more.
    prefill, decode = ({n: s * assume["cpu_share"] for n, s in m.items()} for m in (measured.prefill, measured.decode))
    peak, bandwidth = hardware.flops("float32") * threads, hardware.bandwidth * threads
    rate = forward_flops(shape, many * PROMPT, many, PROMPT / 2) / prefill[many]
    nbytes = 4.0 * (shape.in_layers + shape.head)
    # One model cannot tell a slow memory from a slow step: what is assumed of memory stays, unless it is too slow.
    reading = min(nbytes / (bandwidth * assume["decode_bandwidth"]), decode[few])
    rest = {n: decode[n] - max(reading, forward_flops(shape, n, n, PROMPT + RESPONSE / 2) / rate) for n in SEQUENCES}
    each = max(0.0, (rest[many] - rest[few]) / (many - few))
    return {
        "decode_flops": rate / peak,
        "decode_step_ms": max(0.0, rest[few] - few * each) * 1e3,
        "decode_sequence_us": each * 1e6,
        "decode_bandwidth": nbytes / reading / bandwidth,
    }


def _of_publish(seconds: float, nbytes: float) -> dict[str, float]:
    """One size cannot tell a publish's own time from its bytes': both are as much slower than assumed."""
    assume = assumptions_for("cpu")
    own, rate = assume["publish_fixed_s"], assume["publish_gb_s"]
    slower = seconds / (own + nbytes / (rate * 1e9))
    return {"publish_fixed_s": own * slower, "publish_gb_s": rate / slower}


def _flops(shape: ModelShape, sequences: int) -> float:
    return forward_flops(shape, sequences * (PROMPT + RESPONSE), sequences * RESPONSE, PROMPT + RESPONSE)


def _non_negative(columns: np.ndarray, values: np.ndarray) -> list[float]:
    """Least squares of relative errors with no negative factor: those that would be are left out, the worst first."""
    used = list(range(columns.shape[1]))
    weights = 1 / values
    while True:
        scaled = columns[:, used] * weights[:, None]
        sizes = np.abs(scaled).max(0)
        found = np.linalg.lstsq(scaled / sizes, values * weights, rcond=None)[0] / sizes
        if (found >= 0).all():
            factors = dict(zip(used, found.tolist(), strict=True))
            return [max(factors.get(column, 0.0), 1e-18) for column in range(columns.shape[1])]
        del used[int(np.argmin(found * sizes))]


# ---- what is measured


async def _measure(learner_threads: int, engine_threads: int) -> Measured:
    rng = np.random.default_rng(0)
    prompts = [PromptTokens(i, rng.integers(2, VOCABULARY, PROMPT).astype(np.int32)) for i in range(4096)]
    settings = PairSettings(
        name="calibrate",
        shape=SPECS["large"],
        device="cpu",
        max_tokens=RESPONSE,
        sequences=max(SEQUENCES),
        bucket_bytes=int(WeightsConfig().bucket_mib * 2**20),
        threads=(learner_threads, engine_threads),
    )
    pair, problem = Pair(settings, prompts), None
    try:
        await pair.spawn(_Policy, _Engine)
        await asyncio.gather(pair.start_policy(), pair.start_engines())
        await pair.pool.publish(0)
        learned = (await pair.policy.call("measure", timeout_s=PATIENCE_S))[0]
        sampled = (await pair.rollout.call("measure", timeout_s=PATIENCE_S))[0]
        return Measured(**learned, **sampled, publish=await _publishing(pair))
    except ActorError as error:
        problem = error.message.splitlines()[0]
        raise ActorError(f"calibrating: {problem}", f"see the logs in {pair.folder}") from error
    finally:
        await pair.close(logs=problem is None)


async def _publishing(pair: Pair) -> float:
    """As in a run, where both have done other work since the last one."""
    seconds = []
    for version in range(1, REPEATS + 1):
        async for _ in pair.pool.generate([SampleRequest(i, i, i) for i in range(max(SEQUENCES))]):
            pass
        await pair.policy.call("learn")
        seconds.append((await pair.pool.publish(version)).seconds)
    return median(seconds)


class _Policy(PairPolicy):
    def measure(self) -> Mapping[str, Any]:
        logging.disable(logging.WARNING)
        assert self.settings.learner is not None
        small = from_scratch(SPECS["small"], VOCABULARY, EOS, 1, seed=0)
        learners = {"small": Learner(small, replace(self.settings.learner, role="small")), "large": self.engine}
        score, update = {}, {}
        for name, learner in learners.items():
            for sequences in LEARNED:
                made, cutting = _experiences(sequences), Cutting(sequences * (PROMPT + RESPONSE))
                rollouts, rows, rate = [e.rollout for e in made], [range(len(made))], 1e-6
                key, settings = (name, sequences), UpdateSettings(0.2, cutting)
                score[key] = _timed(partial(score_logprobs, learner, rollouts, rollouts[0], cutting, 1.0))
                update[key] = _timed(partial(update_policy, learner, made, rows, made[0], settings, rate))
        return {"score": score, "update": update}

    def learn(self) -> None:
        made, cutting = _experiences(max(LEARNED)), self.settings.cutting
        update_policy(self.engine, made, [range(len(made))], made[0], UpdateSettings(0.2, cutting), 1e-6)


class _Engine(RolloutActor):
    def measure(self) -> Mapping[str, Any]:
        self._engine.commit(0)
        fixed, used = _Fixed(self._engine), count()

        def draw(sequences: int, tokens: int) -> None:
            """Of prompts that it has not seen: nothing of them is cached."""
            fixed.draw([SampleRequest(i, i, i) for i in islice(used, sequences)], tokens)

        prefill, decode = {}, {}
        for sequences in SEQUENCES:
            first, whole = (_timed(partial(draw, sequences, tokens)) for tokens in (1, RESPONSE))
            prefill[sequences] = first
            decode[sequences] = (whole - first) / (RESPONSE - 1)
        fixed.end()
        return {"prefill": prefill, "decode": decode}


def _experiences(number: int) -> list[Experience]:
    """In `number` rows, half of which hold two short ones: packed under a mask, as in a run."""
    rng, made = np.random.default_rng(0), []
    for i, parts in enumerate([1] * (number // 2) + [2] * number):
        prompt, response = PROMPT // parts, RESPONSE // parts
        tokens = rng.integers(2, VOCABULARY, prompt + response).astype(np.int32)
        old, advantages, logprobs = (rng.normal(size=response).astype(np.float32) for _ in range(3))
        info = RolloutInfo(i, i, prompt + response, response, truncated=False)
        made.append(Experience(Rollout(info, tokens, logprobs, np.zeros(response, np.int32)), old, advantages))
    return made


class _Fixed:
    """An engine whose responses have the length asked for."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine

    def draw(self, requests: Sequence[Any], tokens: int) -> None:
        sampling = type(self.engine)._sampling

        def fixed(request: Any, temperature: float | None) -> Any:
            params = sampling(self.engine, request, temperature)
            params.max_tokens, params.ignore_eos, params.stop_token_ids = tokens, True, []
            return params

        self.engine._sampling = fixed
        for _ in self.engine.generate(requests, len(requests)):
            pass

    def end(self) -> None:
        del self.engine._sampling


def _timed(work: Callable[[], object]) -> float:
    """Seconds, the least of a few: the first of them warms up."""
    seconds = []
    for _ in range(REPEATS):
        start = perf_counter()
        work()
        seconds.append(perf_counter() - start)
    return min(seconds)
