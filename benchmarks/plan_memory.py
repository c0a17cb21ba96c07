"""The plan's memory beside real processes: GiB of a rank above what its imports take.

    python benchmarks/plan_memory.py [--cases policy-30M-z1x1,...] [--json]

A case is a role, a size, a ZeRO stage and a number of ranks: policy-125M-z3x2. Each rank is a fresh process with the
product's own engine (DeepSpeed, gloo, float32). It learns from a minibatch (or scores one), lets go of what it can, and
does so again; measured is the most resident memory of the second time, less that after the imports. Planned is
`planning.memory` of the same shape, stage, ranks and micro-batch, without the framework. An engine (rollout-30M-z0x1)
is in plan_memory_engine.py.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import multiprocessing
import re
import socket
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from common import machine, print_result, print_table
from plan_memory_engine import measure_engine

from rayrlhf.config.model import FromScratch
from rayrlhf.config.ppo import WeightsConfig
from rayrlhf.planning.assumptions import assumptions_for
from rayrlhf.planning.hardware import hardware_named
from rayrlhf.planning.memory import rank_memory
from rayrlhf.planning.shapes import ModelShape, from_scratch_config, shape_of
from rayrlhf.planning.workload import Role, Workload

GIB = 2**30
PROMPT, RESPONSE, ROWS = 32, 96, 8
"""tokens of a long sequence; rows of the one micro-batch: half of them a long sequence, half two of half its size"""
LENGTHS = [PROMPT + RESPONSE] * (ROWS // 2) + [(PROMPT + RESPONSE) // 2] * ROWS
SHAPES = {
    "30M": FromScratch(hidden_size=512, layers=9, heads=8, vocab_size=2048, context=PROMPT + RESPONSE),
    "125M": FromScratch(
        hidden_size=768, layers=12, heads=12, intermediate_size=2048, vocab_size=50257, context=PROMPT + RESPONSE
    ),
}
BUCKET_BYTES = WeightsConfig().bucket_mib * 2**20
LEARNERS = [f"policy-{size}-z{stage}x{ranks}" for size in SHAPES for stage in (1, 2, 3) for ranks in (1, 2)]
OTHERS = [
    *(
        f"{role}-{size}-z{stage}x2"
        for role, stage in (("value", 2), ("reference", 0), ("reward", 3))
        for size in SHAPES
    ),
    *(f"rollout-{size}-z0x1" for size in SHAPES),
]


@dataclass(frozen=True, slots=True)
class Case:
    role: str
    size: str
    stage: int
    ranks: int

    @classmethod
    def read(cls, text: str) -> Case:
        found = re.fullmatch(r"(policy|value|reference|reward|rollout)-(\w+)-z([0-3])x(\d+)", text)
        if not found or found[2] not in SHAPES:
            raise SystemExit(f"{text}: expected ROLE-SIZE-zSTAGExRANKS, as policy-30M-z1x2")
        return cls(found[1], found[2], int(found[3]), int(found[4]))

    @property
    def learns(self) -> bool:
        return self.role in ("policy", "value")

    @property
    def shape(self) -> ModelShape:
        shape = shape_of(from_scratch_config(SHAPES[self.size]), self.size)
        return shape.as_scalar() if self.role in ("value", "reward") else shape


def main(
    cases: Annotated[str, typer.Option(help="Several with commas between; all if left out.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="The last line alone.")] = False,
) -> None:
    rows = [compared(Case.read(text)) for text in (cases.split(",") if cases else [*LEARNERS, *OTHERS])]
    if not as_json:
        print_table("GiB a rank above its imports", rows)
    print_result({**machine("cpu"), "rows": rows})


def compared(case: Case) -> dict[str, Any]:
    measured, planned = measure(case), plan(case)
    return {
        "role": case.role,
        "size": case.size,
        "zero_stage": case.stage,
        "ranks": case.ranks,
        "measured": measured / GIB,
        "planned": planned / GIB,
        "planned_over_measured_ratio": planned / measured,
    }


def plan(case: Case) -> float:
    role = Role(case.role, case.shape, case.ranks, 1.0, case.learns, case.stage)
    sequences = len(LENGTHS) * case.ranks
    work = Workload(
        roles={case.role: role},
        dtype="float32",
        gpu=False,
        steps=1,
        batch_size=sequences,
        minibatch_size=sequences,
        epochs=1,
        prompt_tokens=PROMPT,
        longest_prompt=PROMPT,
        response_tokens=RESPONSE,
        longest_response=RESPONSE,
        response_spread=0.0,
        micro_batch_tokens=ROWS * (PROMPT + RESPONSE),
        transport=WeightsConfig().transport,
        bucket_bytes=BUCKET_BYTES,
    )
    memory = rank_memory(role, work, hardware_named("cpu"), assumptions_for("cpu"))
    assume = assumptions_for("cpu")
    baseline = assume["engine_imports_gib" if case.role == "rollout" else "framework_gib"]
    # No publish is measured of the others.
    held = sum(memory.working.values()) if case.role != "rollout" else sum(memory.moment.values())
    return memory.resident + held - baseline * GIB


def measure(case: Case) -> float:
    """Bytes of the largest rank."""
    if case.role == "rollout":
        return measure_engine(SHAPES[case.size], PROMPT, RESPONSE, int(BUCKET_BYTES))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    answers = context.SimpleQueue()
    ranks = [context.Process(target=_rank, args=(case, rank, port, answers)) for rank in range(case.ranks)]
    try:
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join(300)
            if rank.exitcode:
                raise SystemExit(f"a rank of {case} ended with {rank.exitcode}")
    finally:
        for rank in ranks:
            rank.kill()
    return max(answers.get() for _ in ranks)


def _rank(case: Case, rank: int, port: int, answers: Any) -> None:
    from rayrlhf.engines.deepspeed import FrozenModel
    from rayrlhf.engines.distributed import Rendezvous, join_process_group

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    threads = 2 if case.ranks == 1 else 1
    join_process_group(Rendezvous(rank, case.ranks, "127.0.0.1", port, "cpu", threads, deterministic=False))
    _warm_up()
    before = _resident("VmRSS")
    with tempfile.TemporaryDirectory() as folder:
        module = _module(case, Path(folder))
        engine = _learner(case, module, folder) if case.learns else FrozenModel(module, case.stage, "float32", "cpu")
        del module
        step = _step(case, engine, rank)
        step()
        _let_go()
        step()
    answers.put(_resident("VmHWM") - before)


def _warm_up() -> None:
    """Threads and buffers of the kernels' own, as an import takes them; of autograd and Adam too."""
    import torch

    layer = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.LayerNorm(64), torch.nn.SiLU())
    adam = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(64, 64)).sum().backward()
    adam.step()


def _module(case: Case, folder: Path) -> Any:
    """The role's model, with weights that a test may have."""
    from rayrlhf.models.build import ScalarModel, from_scratch

    policy = from_scratch(SHAPES[case.size], SHAPES[case.size].vocab_size, 0, 1, seed=0)
    if case.role in ("policy", "reference"):
        return policy
    from transformers import AutoModelForSequenceClassification

    config = policy.lm.config
    config.num_labels = 1
    return ScalarModel(AutoModelForSequenceClassification.from_config(config))


def _learner(case: Case, module: Any, folder: str) -> Any:
    from rayrlhf.config.training import Adam
    from rayrlhf.engines.deepspeed import Learner, LearnerSettings

    adam = Adam()
    return Learner(
        module,
        LearnerSettings(
            zero_stage=case.stage,
            dtype="float32",
            device="cpu",
            learning_rate=1e-5,
            betas=adam.betas,
            eps=adam.eps,
            weight_decay=0.0,
            grad_clip=1.0,
            max_loss=1e9,
            failed_folder=folder,
            role=case.role,
            # Any key of ZeRO's own: one rank in float32 would go without ZeRO otherwise. This one has its default.
            deepspeed={"zero_optimization": {"contiguous_gradients": True}} if case.stage else {},
        ),
    )


def _step(case: Case, engine: Any, rank: int) -> Any:
    """What the role does in a PPO step, with this rank's share of the minibatch."""
    from rayrlhf.data.batching import Cutting
    from rayrlhf.engines.learning import UpdateSettings, update_policy, update_value
    from rayrlhf.engines.scoring import score_logprobs, score_rewards

    experiences = _experiences(case, rank)
    cutting = Cutting(ROWS * (PROMPT + RESPONSE))
    if not case.learns:
        rollouts = [e.rollout for e in experiences]
        if case.role == "reference":
            return lambda: score_logprobs(engine, rollouts, rollouts[0], cutting, 1.0)
        return lambda: score_rewards(engine, rollouts, rollouts[0], cutting)
    update = update_policy if case.role == "policy" else update_value
    settings = UpdateSettings(0.2, cutting)
    return lambda: update(engine, experiences, [range(len(experiences))], experiences[0], settings, 1e-5)


def _experiences(case: Case, rank: int) -> list[Any]:
    from rayrlhf.types import Experience, Rollout, RolloutInfo

    rng, made = np.random.default_rng(rank), []
    for i, length in enumerate(LENGTHS):
        response = length * RESPONSE // (PROMPT + RESPONSE)
        tokens = rng.integers(2, SHAPES[case.size].vocab_size, length).astype(np.int32)
        numbers = [rng.normal(size=response).astype(np.float32) for _ in range(4)]
        info = RolloutInfo(i, i, length, response, truncated=False)
        rollout = Rollout(info, tokens, numbers[0], np.zeros(response, np.int32))
        made.append(Experience(rollout, *numbers))
    return made


def _let_go() -> None:
    """Freed memory goes back to the system, and the most resident memory counts from here."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def _resident(which: str) -> int:
    """Bytes: VmRSS now, VmHWM at most."""
    (line,) = [row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith(f"{which}:")]
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    typer.run(main)
