"""The whole system on GPUs, as a user would start it: every guard, probe and fingerprint of it then looks at them."""

from __future__ import annotations

from pathlib import Path

__all__ = ["RUNS", "arguments"]

STEPS = 3
# name: (GPUs, keys). `tiny.yaml` with few steps; each way that weights reach an engine, and each way to share devices.
ONE_GPU = ["cluster.shared=[[policy, value, rollout, reference, reward]]", "weights.transport=ipc"]
SMALL_PARTS = [f"cluster.{role}.gpus=0.25" for role in ("policy", "value", "reference", "reward")]
RUNS: dict[str, tuple[int, list[str]]] = {
    "ipc": (1, ONE_GPU),
    "ipc_bfloat16": (1, [*ONE_GPU, "model.dtype=bfloat16"]),
    "shared_memory": (2, SMALL_PARTS),
    "nccl": (2, [*SMALL_PARTS, "weights.transport=nccl"]),
    "nccl_overlap": (
        2,
        [*SMALL_PARTS, "weights.transport=nccl", "ppo.pacing.kind=overlap", "ppo.importance_cap=2.0"],
    ),
    "nccl_shards_zero_3": (
        4,
        [
            "weights.transport=nccl",
            "rollout.tensor_parallel=2",
            "ppo.zero_stage=3",
            "cluster.policy.ranks=2",
            "cluster.value.ranks=2",
            "cluster.policy.gpus=0.5",
            "cluster.value.gpus=0.25",
            "cluster.reference.gpus=0.25",
            "cluster.reward.gpus=0.25",
        ],
    ),
}


def arguments(name: str, folder: Path) -> list[str]:
    """Of `rayrlhf run`, after the config."""
    return [
        f"run.output={folder}",
        f"run.name={name}",
        "run.stages=[sft, reward, ppo]",
        "cluster.device=cuda",
        "world.size=0.05",
        f"ppo.steps={STEPS}",
        "rollout.gpu_memory_utilization=0.3",
        *RUNS[name][1],
    ]
