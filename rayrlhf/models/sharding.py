"""From a file to ranks that hold a part each, on no rank more than a parameter at a time beyond its own parts.

    rank 0       read whole (host) ──┐
                                     ├─► one parameter: cast ► device ► broadcast ► each keeps its part ──► the next
    rank 1 ...   empty, untouched  ──┘

DeepSpeed by itself would let each rank read the model, and move it whole to its device, before it shards it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import PretrainedConfig

__all__ = ["empty_model", "reads_weights", "shard"]


def reads_weights(zero_stage: int) -> bool:
    """Whether this rank reads a model's file: under ZeRO-3 rank 0 alone does, and sends the others their parts."""
    return zero_stage != 3 or not dist.is_initialized() or dist.get_rank() == 0


def empty_model(kind: Any, config: PretrainedConfig, trust_remote_code: bool) -> Any:
    """A model of this shape whose parameters hold nothing in particular; its buffers are what they should be.

    Memory that nobody has written to costs nothing.
    """
    from transformers.initialization import no_init_weights  # imports all that a model needs: see build.py

    with no_init_weights():
        model = kind.from_config(config, dtype=torch.float32, trust_remote_code=trust_remote_code)
    model.tie_weights()
    return model


def shard(module: nn.Module, config: Mapping[str, Any], dtype: str) -> None:
    """Leave each rank its part of rank 0's parameters, in `dtype`. Every rank takes part.

    Args:
        config: DeepSpeed's, of ZeRO-3.
    """
    import deepspeed
    from deepspeed.utils import groups

    first = dist.get_rank() == 0
    for parameter in module.parameters():
        wanted = getattr(torch, dtype) if parameter.is_floating_point() else parameter.dtype
        # Of the other ranks' values nothing is kept: no need to touch them.
        parameter.data = parameter.data.to(wanted) if first else torch.empty_like(parameter.data, dtype=wanted)
    # hpZ's group of ranks is one for the whole process, and DeepSpeed does not make it twice.
    hierarchical = config["zero_optimization"].get("zero_hpz_partition_size", 1) > 1
    group = groups._get_zero_param_intra_parallel_group() if hierarchical else None
    deepspeed.zero.Init(module=module, config_dict_or_path=dict(config), zero_param_parallel_group=group)
