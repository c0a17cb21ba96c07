"""What the ranks of the GPU tests do, a process each; and the same training by plain torch on the CPU."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rayrlhf.config.deepspeed import DeepSpeedConfig
from rayrlhf.config.model import FromScratch
from rayrlhf.data.batching import Cutting
from rayrlhf.data.prompts import LMExample
from rayrlhf.engines.tasks import LanguageTask
from rayrlhf.models.build import PolicyModel, from_scratch

STEPS, EXAMPLES, RATE, CLIP = 3, 16, 1e-3, 0.5
BETAS, EPS, DECAY = (0.9, 0.95), 1e-4, 0.1
"""With a smaller eps Adam would make a whole step of what rounding leaves of a zero gradient."""
SHARD_ALL = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
HOST = {"offload_optimizer": "cpu", "offload_param": "cpu", "extra": SHARD_ALL}
# name: (dtype, ZeRO stage, largest gradient norm, keys of `deepspeed`)
CASES: dict[str, tuple[str, int, float, dict[str, Any]]] = {
    **{f"float32_{stage}": ("float32", stage, CLIP, {}) for stage in (0, 1, 2, 3)},
    "unclipped_1": ("float32", 1, 0.0, {}),
    "checkpointed_1": ("float32", 1, CLIP, {"activation_checkpointing": True}),
    "checkpointed_3": ("float32", 3, CLIP, {"activation_checkpointing": True, "extra": SHARD_ALL}),
    "optimizer_offloaded_1": ("float32", 1, CLIP, {"offload_optimizer": "cpu"}),
    "optimizer_offloaded_2": ("float32", 2, CLIP, {"offload_optimizer": "cpu"}),
    "all_offloaded_3": ("float32", 3, CLIP, HOST),
    "bfloat16_1": ("bfloat16", 1, CLIP, {}),
    "bfloat16_offloaded_3": ("bfloat16", 3, CLIP, HOST | {"activation_checkpointing": True}),
}


def model() -> PolicyModel:
    spec = FromScratch(hidden_size=128, layers=4, heads=4, context=128, initializer_range=0.08)
    return from_scratch(spec, 512, 0, 1, seed=3)


def examples() -> list[LMExample]:
    rng = np.random.default_rng(0)
    return [LMExample(rng.integers(2, 512, n).astype(np.int32), 0, "") for n in rng.integers(9, 100, STEPS * EXAMPLES)]


def minibatch(step: int) -> list[int]:
    return list(range(step * EXAMPLES, (step + 1) * EXAMPLES))


def on_the_cpu(clip: float) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    """Weights after the steps, and each step's loss and gradient norm, by torch alone."""
    module, task = model().train(), LanguageTask(examples())
    optimizer = torch.optim.AdamW(module.parameters(), lr=RATE, betas=BETAS, eps=EPS, weight_decay=DECAY)
    steps = []
    for step in range(STEPS):
        rows, total = minibatch(step), 0.0
        for batch in task.cut(rows, Cutting(400), torch.device("cpu")):
            loss = task.loss(module, batch, task.denominator(rows))
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(module.parameters(), clip or float("inf"))
        optimizer.step()
        optimizer.zero_grad()
        steps.append({"loss": total, "grad_norm": norm.item()})
    return {name: p.detach().clone() for name, p in module.lm.named_parameters()}, steps


def train(name: str) -> dict[str, Any]:
    """The same on all ranks' GPUs; the loss is this rank's share."""
    from rayrlhf.engines.deepspeed import Learner, LearnerSettings

    dtype, stage, clip, keys = CASES[name]
    section = DeepSpeedConfig(**keys)
    settings = LearnerSettings(
        zero_stage=stage,
        dtype=dtype,
        device="cuda",
        learning_rate=RATE,
        betas=BETAS,
        eps=EPS,
        weight_decay=DECAY,
        grad_clip=clip,
        max_loss=1e4,
        failed_folder="failed",
        role="test",
        deepspeed=section.keys(),
        activation_checkpointing=section.activation_checkpointing,
    )
    learner, task, steps = Learner(model(), settings), LanguageTask(examples()), list[dict[str, float]]()
    for step in range(STEPS):
        rows = minibatch(step)
        total, mine = task.denominator(rows), rows[learner.rank :: learner.world_size]
        batches = task.cut(mine, Cutting(400), learner.device)
        steps.append(
            learner.train_step(
                lambda module, batch, total=total: task.loss(module, batch, total),
                batches,
                task.dummy(learner.device),
                RATE,
            )
        )
    buckets = learner.named_buckets(learner.module.lm, 2**22)
    weights = {n: t.to("cpu", torch.float32, copy=True) for bucket in buckets for n, t in bucket}
    group = getattr(learner.engine.optimizer, "optimizer", learner.engine.optimizer).param_groups[0]
    return {
        "weights": weights,
        "steps": steps,
        "fused": bool(group["fused"]),
        "attention": learner.module.lm.config._attn_implementation,
    }


def attend(dtype: str) -> dict[str, Any]:
    """Log-probs of a frozen model, packed and padded, of every sequence's tokens in turn."""
    from rayrlhf.engines.deepspeed import FrozenModel
    from rayrlhf.engines.scoring import check_packing
    from rayrlhf.supervised.ranking import infer_sequences

    engine, sequences = FrozenModel(model(), 0, dtype, "cuda"), [e.tokens for e in examples()]

    def forward(module: Any, layout: Any, held: list[int]) -> torch.Tensor:
        from rayrlhf.engines.batches import spans

        lengths = [len(sequences[i]) for i in held]
        found = module(**layout.inputs, positions=spans(layout, [1] * len(held), lengths))
        return torch.stack([part.mean() for part in torch.split(found, [n - 1 for n in lengths])])

    check_packing(engine, dtype)
    packed, padded = (infer_sequences(engine, sequences, forward, Cutting(400, rows)) for rows in (True, False))
    return {"packed": packed, "padded": padded, "attention": engine.module.lm.config._attn_implementation}


def reduce(rank: int, world: int) -> dict[str, Any]:
    """What the reductions of the engines give over NCCL."""
    from rayrlhf.engines.distributed import all_reduce_max, all_reduce_sum, reduce_means

    device = torch.device("cuda", torch.cuda.current_device())
    doubles = torch.tensor([rank + 1, 1e-17 * world], dtype=torch.float64, device=device)
    return {
        "visible": torch.cuda.device_count(),
        "sum": all_reduce_sum(doubles).tolist(),
        "max": all_reduce_max(float(rank), device),
        "means": reduce_means({"a": (float(rank), 1.0), "b": (0.0, 0.0)}, device),
    }


def work(rank: int, world: int, port: int, folder: str) -> None:
    # As Ray does: a process sees its own GPU only. Before the first call that starts CUDA.
    every = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    os.environ["CUDA_VISIBLE_DEVICES"] = every[rank] if every != [""] else str(rank)
    import deepspeed

    from rayrlhf.engines.distributed import Rendezvous, join_process_group

    join_process_group(Rendezvous(rank, world, "127.0.0.1", port, "cuda", 4, deterministic=False))
    gc.freeze()  # ZeRO-3 collects garbage when it starts
    found = {"reduced": reduce(rank, world)} | {f"attention_{d}": attend(d) for d in ("float32", "bfloat16")}
    found |= {name: train(name) for name in CASES}
    torch.save(found, Path(folder) / f"{rank}.pt")
    deepspeed.comm.barrier()
    gc.unfreeze()
    deepspeed.comm.destroy_process_group()
