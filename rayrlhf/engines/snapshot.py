"""What a learner holds, written to files in whole float32 tensors, for the comparison of a step with the reference.

Every function is a collective: all ranks take part, one parameter at a time, and rank 0 writes. A parameter goes by its
`named_parameters()` name, a tied one by its first.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn

from rayrlhf.engines.deepspeed import Learner

__all__ = ["ADAM", "GRADIENTS", "WEIGHTS", "WEIGHTS_AFTER", "save_adam", "save_gradients", "save_weights"]

WEIGHTS, WEIGHTS_AFTER = "weights.safetensors", "weights_after.safetensors"
GRADIENTS = "gradients.safetensors"
ADAM = {"exp_avg": "exp_avg.safetensors", "exp_avg_sq": "exp_avg_sq.safetensors"}
"""Adam's running means of the gradient and of its square, by their names in torch."""


def save_weights(learner: Learner, module: nn.Module, path: Path) -> None:
    """The weights that the optimizer works on: in bfloat16 the float32 ones behind those that compute."""
    from deepspeed.utils import safe_get_full_fp32_param

    def read(parameter: nn.Parameter) -> Tensor:
        whole: Tensor | None = safe_get_full_fp32_param(parameter)
        return parameter if whole is None else whole  # no ZeRO: the parameter itself

    _save(learner, module, path, read)


def save_adam(learner: Learner, module: nn.Module, folder: Path) -> int:
    """Adam's state; returns the steps that it has counted. Before the first there is no state and no file."""
    from deepspeed.utils import safe_get_full_optimizer_state

    # Under ZeRO the engine's optimizer wraps the one that counts.
    torch_optimizer = getattr(learner.engine.optimizer, "optimizer", learner.engine.optimizer)
    states = list(torch_optimizer.state.values())
    if not states:
        return 0
    for key, name in ADAM.items():

        def read(parameter: nn.Parameter, key: str = key) -> Tensor | None:
            found: Tensor | None = torch_optimizer.state.get(parameter, {}).get(key)  # no ZeRO
            return safe_get_full_optimizer_state(parameter, key) if found is None else found

        _save(learner, module, folder / name, read)
    return int(states[0]["step"])


def save_gradients(learner: Learner, module: nn.Module, path: Path) -> None:
    """Between a step's last backward pass and the optimizer's step."""
    from deepspeed.utils import safe_get_full_grad

    _save(learner, module, path, safe_get_full_grad)


def _save(learner: Learner, module: nn.Module, path: Path, read: Callable[[nn.Parameter], Tensor | None]) -> None:
    tensors: dict[str, Tensor] = {}
    for name, parameter in module.named_parameters():
        whole = read(parameter)
        if learner.rank == 0:
            if whole is None:  # nothing has depended on it
                whole = torch.zeros(getattr(parameter, "ds_shape", parameter.shape))
            tensors[name] = whole.detach().to("cpu", torch.float32, copy=True).contiguous()
    if learner.rank == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path)
    dist.barrier()
