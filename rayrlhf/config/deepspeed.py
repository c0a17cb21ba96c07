"""`deepspeed`: where a learner's weights and optimizer live, in PPO and in the supervised stages alike."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

from pydantic import Field

from rayrlhf.config.base import PositiveInt, Section

__all__ = ["DeepSpeedConfig", "LearnerShape", "check_deepspeed", "zero_stage_in_use"]

# What `extra` may not hold, and which keys say it instead.
OWNED = {
    "train_batch_size": "ppo.minibatch_size or <stage>.batch_size",
    "train_micro_batch_size_per_gpu": "ppo.micro_batch_tokens or <stage>.micro_batch_tokens",
    "gradient_accumulation_steps": "ppo.micro_batch_tokens or <stage>.micro_batch_tokens",
    "managed_gradient_accumulation": "ppo.micro_batch_tokens or <stage>.micro_batch_tokens",
    "elasticity": "ppo.minibatch_size or <stage>.batch_size",
    "optimizer": "ppo.adam or <stage>.adam",
    "scheduler": "ppo.learning_rate or <stage>.learning_rate",
    "gradient_clipping": "ppo.adam.grad_clip or <stage>.adam.grad_clip",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
    "amp": "model.dtype",
    "torch_autocast": "model.dtype",
    "activation_checkpointing": "deepspeed.activation_checkpointing",
    "zero_optimization.stage": "ppo.zero_stage or <stage>.zero_stage",
    "zero_optimization.offload_optimizer": "deepspeed.offload_optimizer",
    "zero_optimization.offload_param": "deepspeed.offload_param",
    "zero_optimization.cpu_offload": "deepspeed.offload_optimizer",
    "zero_optimization.cpu_offload_param": "deepspeed.offload_param",
    "zero_optimization.zero_hpz_partition_size": "deepspeed.zero_hpz_partition_size",
    "zero_optimization.compute_grad_norm": "nothing (every step's guard reads the norm)",
}


class DeepSpeedConfig(Section):
    """Keys of DeepSpeed's own config, by its names; each goes to every learner of the run."""

    offload_optimizer: Literal["none", "cpu"] = "none"
    """cpu: Adam's state and the float32 weights that it works on stay in the host's memory, and the step is computed
    there (by torch's own fused AdamW). Needs ZeRO stage 1 or more; at stages 1 and 2 PPO-ptx's two gradient norms are
    not measured then."""
    offload_param: Literal["none", "cpu"] = "none"
    """cpu: the shards of the weights stay in the host's memory too, and a layer's come to the GPU when it computes.
    Needs ZeRO stage 3."""
    pin_memory: bool = True
    """What is offloaded lies in page-locked memory: faster to copy, and never swapped out. False where the host allows
    too little of it (`ulimit -l`)."""
    zero_hpz_partition_size: PositiveInt = 1
    """ZeRO-3: weights gathered for a forward pass are kept sharded over so many neighbouring ranks, those of one node,
    until the backward pass needs them again, which then asks no other node (hpZ; Wang et al. 2023, arXiv 2306.10209,
    section 3.2). 1 does not. It costs memory: a copy of the weights per group of ranks."""
    activation_checkpointing: bool = False
    """Only the inputs of the model's layers are kept for the backward pass, which computes the rest again: a third
    more arithmetic, for memory that no longer grows with layers x tokens."""
    extra: dict[str, Any] = Field(default_factory=dict)
    """Further keys, handed to DeepSpeed as they are: `{zero_optimization: {reduce_bucket_size: 50000000}}`."""

    def keys(self) -> dict[str, Any]:
        """What of DeepSpeed's config these settings fill."""
        zero = dict(self.extra.get("zero_optimization", {}))
        for name in ("offload_optimizer", "offload_param"):
            if (device := getattr(self, name)) != "none":
                zero[name] = {"device": device, "pin_memory": self.pin_memory}
        if self.zero_hpz_partition_size > 1:
            zero["zero_hpz_partition_size"] = self.zero_hpz_partition_size
        return self.extra | ({"zero_optimization": zero} if zero else {})


class LearnerShape(NamedTuple):
    """What decides how one learner of a run is sharded, and the keys that say it."""

    stage_key: str
    zero_stage: int
    ranks_key: str
    ranks: int


def zero_stage_in_use(asked: int, dtype: str, ranks: int, asks_for_zero: bool) -> int:
    """The ZeRO stage of a learner for which `asked` is configured: the only place where the two differ.

    Args:
        asks_for_zero: offload, hpZ or other keys of ZeRO's own are set.
    """
    if dtype == "bfloat16":
        # Gradients add up in float32: in bfloat16 the sum of some hundred micro-batches stops growing. Below stage 2
        # that would be another optimizer, whose Adam counts one step more.
        return max(2, asked)
    # One rank has nothing to shard, and ZeRO's own copies would cost it time and memory.
    return asked if ranks > 1 or asks_for_zero else 0


def check_deepspeed(given: DeepSpeedConfig, device: str, dtype: str, learners: list[LearnerShape]) -> None:
    """Raise ValueError where `extra` says what other keys say, or a learner cannot do what is asked of all of them."""
    _check_extra(given.extra)
    for name, least in (("offload_optimizer", 1), ("offload_param", 3)):
        if getattr(given, name) == "none":
            continue
        if device == "cpu":
            raise ValueError(
                f"deepspeed.{name} is cpu but cluster.device is cpu too: nothing lies on a GPU; set it to none"
            )
        _check_stage(f"deepspeed.{name} cpu", least, dtype, learners)
    size = given.zero_hpz_partition_size
    if size == 1:
        return
    _check_stage(f"deepspeed.zero_hpz_partition_size {size}", 3, dtype, learners)
    for learner in learners:
        if learner.ranks % size:
            raise ValueError(
                f"deepspeed.zero_hpz_partition_size {size} does not divide {learner.ranks_key} {learner.ranks}: "
                "take the number of ranks that share a node"
            )


def _check_extra(extra: dict[str, Any]) -> None:
    for path in _paths(extra):
        dotted = ".".join(path)
        if any("." in key for key in path):  # DeepSpeed would leave it unread
            raise ValueError(f"deepspeed.extra.{dotted}: its sections are written as sections, not with dots")
        if dotted in OWNED:
            raise ValueError(f"deepspeed.extra.{dotted} is not passed on: set {OWNED[dotted]} instead")
    zero = extra.get("zero_optimization", {})
    if not isinstance(zero, dict):
        raise ValueError(f"deepspeed.extra.zero_optimization: found {zero!r}; it is a section of keys")


def _check_stage(what: str, least: int, dtype: str, learners: list[LearnerShape]) -> None:
    for learner in learners:
        if zero_stage_in_use(learner.zero_stage, dtype, learner.ranks, asks_for_zero=True) < least:
            raise ValueError(
                f"{what} needs ZeRO stage {least}{'' if least == 3 else ' or more'} in every learner of the run, and "
                f"{learner.stage_key} is {learner.zero_stage}: set {learner.stage_key}={least}"
            )


def _paths(tree: Mapping[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every key of a tree under the keys above it, sections included."""
    for key, value in tree.items():
        yield (*above, str(key))
        if isinstance(value, Mapping):
            yield from _paths(value, (*above, str(key)))
