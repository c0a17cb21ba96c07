"""`rayrlhf plan --calibrate`: half a minute of the product's own engines on this CPU, as a hardware file for the plan.

Two small models learn and score, and one samples, at two sizes of batch; what the plan assumes of a CPU is then set so
that it would have foreseen these seconds. Each is the least of a few: what else runs on the machine can only add.
"""

from __future__ import annotations

import logging
import multiprocessing
import socket
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from rayrlhf.config import Config
from rayrlhf.config.load import dump_yaml
from rayrlhf.config.model import FromScratch
from rayrlhf.errors import ActorError, ConfigError
from rayrlhf.planning.assumptions import assumptions_for
from rayrlhf.planning.decoding import forward_flops
from rayrlhf.planning.hardware import Hardware, hardware_named
from rayrlhf.planning.shapes import ModelShape, from_scratch_config, shape_of
from rayrlhf.planning.time import ADAM_BYTES

__all__ = ["Measured", "calibrate", "fitted", "measure_this_machine", "write_hardware"]

VOCABULARY, PROMPT, RESPONSE = 2048, 32, 32
SPECS = {
    "small": FromScratch(hidden_size=256, layers=4, heads=4, vocab_size=VOCABULARY, context=PROMPT + RESPONSE),
    "large": FromScratch(hidden_size=512, layers=6, heads=8, vocab_size=VOCABULARY, context=PROMPT + RESPONSE),
}
SEQUENCES = (8, 32)
"""of an engine's batch"""
LEARNED = (2, 8, 32)
"""of a micro-batch; with the fewest an update is little but its optimizer step"""
REPEATS = 3
PATIENCE_S = 180.0


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


def calibrate(learner_threads: int, engine_threads: int) -> Measured:
    """Raises ActorError: a process that measures ended without an answer."""
    learned, sampled = _in_a_process(_learn, learner_threads), _in_a_process(_sample, engine_threads)
    return Measured(**learned, **sampled)


def fitted(measured: Measured, hardware: Hardware, learner_threads: int, engine_threads: int) -> dict[str, float]:
    """The plan's assumptions by which it would have foreseen `measured`."""
    shapes = {name: shape_of(from_scratch_config(spec), name) for name, spec in SPECS.items()}
    peak, bandwidth = hardware.flops("float32") * learner_threads, hardware.bandwidth * learner_threads
    learner = _of_learner(measured, shapes, peak, bandwidth)
    return learner | _of_engine(measured, shapes["large"], hardware, engine_threads)


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
    peak, bandwidth = hardware.flops("float32") * threads, hardware.bandwidth * threads
    rate = forward_flops(shape, many * PROMPT, many, PROMPT / 2) / measured.prefill[many]
    share = assumptions_for("cpu")["decode_bandwidth"]
    nbytes = 4.0 * (shape.in_layers + shape.head)
    # One model cannot tell a slow memory from a slow step: what is assumed of memory stays, unless it is too slow.
    reading = min(nbytes / (bandwidth * share), measured.decode[few])
    rest = {
        n: measured.decode[n] - max(reading, forward_flops(shape, n, n, PROMPT + RESPONSE / 2) / rate)
        for n in SEQUENCES
    }
    each = max(0.0, (rest[many] - rest[few]) / (many - few))
    return {
        "decode_flops": rate / peak,
        "decode_step_ms": max(0.0, rest[few] - few * each) * 1e3,
        "decode_sequence_us": each * 1e6,
        "decode_bandwidth": nbytes / reading / bandwidth,
    }


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


# ---- what runs in processes of its own


def _in_a_process(work: Callable[[int, Any], None], threads: int) -> Mapping[str, Any]:
    """What `work` sends: fresh, since engines cannot share a process, and its noise goes nowhere."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_quietly, args=(work, threads, theirs))
    process.start()
    theirs.close()
    try:
        if not ours.poll(PATIENCE_S):
            raise ActorError(f"calibrating: {work.__name__} took over {PATIENCE_S:g} s")
        found: Mapping[str, Any] = ours.recv()
    except EOFError:
        raise ActorError(f"calibrating: {work.__name__} ended without an answer") from None
    finally:
        process.join(5)
        process.kill()
    return found


def _quietly(work: Callable[[int, Any], None], threads: int, pipe: Any) -> None:
    import os

    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    work(threads, pipe)


def _learn(threads: int, pipe: Any) -> None:
    from rayrlhf.data.batching import Cutting
    from rayrlhf.engines.distributed import Rendezvous, join_process_group
    from rayrlhf.engines.learning import UpdateSettings, update_policy
    from rayrlhf.engines.scoring import score_logprobs
    from rayrlhf.models.build import from_scratch

    logging.disable(logging.WARNING)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    join_process_group(Rendezvous(0, 1, "127.0.0.1", port, "cpu", threads, deterministic=False))
    score, update = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for name, spec in SPECS.items():
            learner = _learner(from_scratch(spec, VOCABULARY, 0, 1, seed=0), folder)
            for sequences in LEARNED:
                made = _experiences(sequences)
                rollouts, rows, rate = [e.rollout for e in made], [range(len(made))], 1e-6
                cutting = Cutting(sequences * (PROMPT + RESPONSE))
                settings = UpdateSettings(0.2, cutting)
                key = (name, sequences)
                score[key] = _timed(partial(score_logprobs, learner, rollouts, rollouts[0], cutting, 1.0))
                update[key] = _timed(partial(update_policy, learner, made, rows, made[0], settings, rate))
    pipe.send({"score": score, "update": update})


def _learner(policy: Any, folder: str) -> Any:
    from rayrlhf.config.ppo import PPOConfig
    from rayrlhf.engines.deepspeed import Learner, LearnerSettings

    adam = PPOConfig().adam
    settings = LearnerSettings(
        zero_stage=0,
        dtype="float32",
        device="cpu",
        learning_rate=1e-6,
        betas=adam.betas,
        eps=adam.eps,
        weight_decay=adam.weight_decay,
        grad_clip=adam.grad_clip,
        max_loss=1e9,
        failed_folder=folder,
        role="calibrate",
    )
    return Learner(policy, settings)


def _experiences(count: int) -> list[Any]:
    """In `count` rows, half of which hold two short ones: packed under a mask, as in a run."""
    from rayrlhf.types import Experience, Rollout, RolloutInfo

    rng, made = np.random.default_rng(0), []
    for i, parts in enumerate([1] * (count // 2) + [2] * count):
        prompt, response = PROMPT // parts, RESPONSE // parts
        tokens = rng.integers(2, VOCABULARY, prompt + response).astype(np.int32)
        old, advantages, logprobs = (rng.normal(size=response).astype(np.float32) for _ in range(3))
        info = RolloutInfo(i, i, prompt + response, response, truncated=False)
        made.append(Experience(Rollout(info, tokens, logprobs, np.zeros(response, np.int32)), old, advantages))
    return made


def _sample(threads: int, pipe: Any) -> None:
    from rayrlhf.engines.vllm import EngineSettings, RolloutEngine
    from rayrlhf.models.build import from_scratch
    from rayrlhf.types import PromptTokens, SampleRequest

    rng = np.random.default_rng(0)
    prompts = [PromptTokens(i, rng.integers(2, VOCABULARY, PROMPT).astype(np.int32)) for i in range(4096)]
    with tempfile.TemporaryDirectory() as folder:
        from_scratch(SPECS["large"], VOCABULARY, 0, 1, seed=0).lm.save_pretrained(folder)
        settings = EngineSettings(
            model=folder,
            dtype="float32",
            device="cpu",
            context=PROMPT + RESPONSE,
            max_tokens=RESPONSE,
            temperature=1.0,
            tensor_parallel=1,
            threads=threads,
            kv_cache_gib=1,
            gpu_memory_utilization=0.5,
            max_sequences=max(SEQUENCES),
            transport="shared_memory",
            run="calibrate",
            eos=0,
            trust_remote_code=False,
            deterministic=False,
        )
        engine = _Fixed(RolloutEngine(settings, prompts))
        prefill, decode, used = {}, {}, iter(range(len(prompts)))
        for sequences in SEQUENCES:
            times = {}
            for tokens in (1, RESPONSE):

                def draw(count: int = sequences, length: int = tokens) -> None:
                    engine.draw([SampleRequest(i, i, i) for i in (next(used) for _ in range(count))], length)

                times[tokens] = _timed(draw)
            prefill[sequences] = times[1]
            decode[sequences] = (times[RESPONSE] - times[1]) / (RESPONSE - 1)
        pipe.send({"prefill": prefill, "decode": decode})
        engine.engine.close()


class _Fixed:
    """An engine whose responses have the length asked for; its own weights are as good as any here."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        engine._version = 0

    def draw(self, requests: Sequence[Any], tokens: int) -> None:
        sampling = type(self.engine)._sampling

        def fixed(request: Any, temperature: float | None) -> Any:
            params = sampling(self.engine, request, temperature)
            params.max_tokens, params.ignore_eos, params.stop_token_ids = tokens, True, []
            return params

        self.engine._sampling = fixed
        for _ in self.engine.generate(requests, len(requests)):
            pass


def _timed(work: Callable[[], object]) -> float:
    """Seconds, the least of a few after one that warms up."""
    work()
    seconds = []
    for _ in range(REPEATS):
        start = perf_counter()
        work()
        seconds.append(perf_counter() - start)
    return min(seconds)
