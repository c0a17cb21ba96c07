"""A learner's whole state on one rank, as named tensors: what an exact resume needs, in safetensors, never pickled.

weights.<parameter>      what computes: whole without ZeRO-3, this rank's shard with it
master.<i>               the optimizer's own copy of them, where it has one (ZeRO's partitions)
adam.<i>.<name>          Adam's means and step count
average.<i>              of the weights' average, where there is one
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rayrlhf.engines.deepspeed import Learner
from rayrlhf.errors import CheckpointError

__all__ = ["load_state", "save_state"]

# Where DeepSpeed keeps the partitions that its optimizer works on, by ZeRO stage (3; 1 and 2; bfloat16 without).
MASTERS = ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition")


def save_state(learner: Learner, folder: Path) -> Path | None:
    """Every rank writes its own file, and returns it; one that holds nothing but what rank 0 does writes none."""
    if learner.rank and not learner.zero_stage:
        return None
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in _state(learner).items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, _file(folder, learner.rank))
    return _file(folder, learner.rank)


@torch.no_grad()
def load_state(learner: Learner, folder: Path) -> None:
    """Become what was saved.

    Raises:
        CheckpointError: the state is of another model, another number of ranks or another ZeRO stage.
    """
    path = _file(folder, learner.rank if learner.zero_stage else 0)
    if not path.exists():
        raise CheckpointError(
            f"{path} is missing", "resume with as many ranks and the ZeRO stage that it was saved with"
        )
    try:
        saved = load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"{path}: not a safetensors file: {error}", "resume from another checkpoint") from None
    optimizer, masters = _optimizer(learner)
    # Where the optimizer would have made its step count: a fused one's is beside the weights.
    beside = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
    for i, master in enumerate(masters):  # torch makes Adam's state at the first step, which may be still to come
        prefix = f"adam.{i}."
        for name in [key.removeprefix(prefix) for key in saved if key.startswith(prefix)]:
            value = saved[prefix + name]
            if value.dim() and value.shape != master.shape:
                raise CheckpointError(
                    f"{path}: {prefix}{name} does not fit this learner", "resume with the model that it was saved with"
                )
            optimizer.state[master].setdefault(name, value.to(master.device if value.dim() or beside else "cpu"))
    # ZeRO-3 keeps small weights whole, and what a pass has gathered last: copies that would outlive what is loaded.
    _partition(learner)
    held = _state(learner)
    if learner.rank and not learner.zero_stage:  # rank 0's file, and of a whole model it alone keeps the average
        saved = {name: tensor for name, tensor in saved.items() if not name.startswith("average.")}
    for name in sorted(held.keys() | saved.keys()):
        if name not in held or name not in saved or held[name].shape != saved[name].shape:
            raise CheckpointError(
                f"{path}: {name} does not fit this learner",
                "resume with the model, the number of ranks and the ZeRO stage that it was saved with",
            )
        held[name].copy_(saved[name])
    if small := getattr(learner.engine.optimizer, "persistent_parameters", None):
        small[0].all_gather(small)


def _partition(learner: Learner) -> None:
    sharded: list[Any] = [p for p in learner.module.parameters() if hasattr(p, "ds_tensor")]
    for parameter in sharded:
        parameter.partition()  # one that is not gathered stays as it is
        parameter.ds_secondary_tensor = None  # hpZ's copy, which a pass would rather gather from


def _state(learner: Learner) -> dict[str, Tensor]:
    """The tensors themselves: to be read or written in place."""
    state: dict[str, Tensor] = {}
    for name, parameter in learner.module.named_parameters():
        state[f"weights.{name}"] = getattr(parameter, "ds_tensor", parameter.data)
    optimizer, masters = _optimizer(learner)
    for i, master in enumerate(masters):
        if learner.zero_stage:
            state[f"master.{i}"] = master.data
        for name, value in optimizer.state.get(master, {}).items():
            state[f"adam.{i}.{name}"] = value
    if learner.average:
        state |= {f"average.{i}": tensor for i, tensor in enumerate(learner.average.tensors)}
    return state


def _optimizer(learner: Learner) -> tuple[Any, list[Tensor]]:
    """torch's optimizer, and what it works on."""
    zero = learner.engine.optimizer
    optimizer = getattr(zero, "optimizer", zero)
    for name in MASTERS:
        if hasattr(zero, name):
            return optimizer, list(getattr(zero, name))
    return optimizer, [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _file(folder: Path, rank: int) -> Path:
    return folder / f"state-{rank}.safetensors"
