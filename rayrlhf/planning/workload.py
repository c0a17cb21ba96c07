"""What is to be planned, by whatever it was described: sizes, counts and who sits where. Numbers only."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from rayrlhf.planning.shapes import ModelShape

__all__ = ["DTYPE_BYTES", "LIVE_PARAMETERS", "REDUCE_BUCKET", "Role", "Workload", "fitting_transport"]

DTYPE_BYTES = {"float32": 4, "bfloat16": 2}
# DeepSpeed's defaults of reduce_bucket_size and stage3_max_live_parameters, in elements.
REDUCE_BUCKET = 500_000_000
LIVE_PARAMETERS = 1_000_000_000


def fitting_transport(shared: Iterable[Collection[str]]) -> str:
    """Of GPUs: nccl wants engines on GPUs of their own, ipc the policy on theirs."""
    return "ipc" if any({"policy", "rollout"} <= set(roles) for roles in shared) else "nccl"


@dataclass(frozen=True, slots=True)
class Role:
    """One model in one place: a learner, a frozen scorer or an engine."""

    name: str
    shape: ModelShape
    ranks: int
    """processes; of rollout: engines"""
    devices: float = 1.0
    """of one rank: GPUs (of an engine its tensor parallelism), or cores"""
    learns: bool = False
    zero_stage: int = 0
    trainable: int | None = None
    """parameters that learn (LoRA); None: all"""
    average: bool = False
    """an average of the weights is kept"""
    copies: float = 1.0
    """models of this shape on each rank: of an ensemble, its members"""

    @property
    def learned(self) -> int:
        return self.shape.parameters if self.trainable is None else self.trainable


@dataclass(frozen=True, slots=True)
class Workload:
    """PPO as the plan sees it. Token counts of a response or prompt are means but for `longest_*`."""

    roles: Mapping[str, Role]
    dtype: str
    gpu: bool
    steps: int
    batch_size: int
    minibatch_size: int
    epochs: int
    prompt_tokens: float
    longest_prompt: int
    response_tokens: float
    longest_response: int
    response_spread: float
    """standard deviation of the logarithm of lengths"""
    micro_batch_tokens: int
    transport: str
    """of the weights"""
    bucket_bytes: float
    """the most that travel at once, but for a larger tensor"""
    shared: tuple[tuple[str, ...], ...] = ()
    """roles on the same devices, which they hold in turns"""
    text_blocks: float = 0.0
    """PPO-ptx: blocks of pretraining text per response ..."""
    text_tokens: int = 0
    """... and their length"""
    checkpointing: bool = False
    offload_optimizer: bool = False
    offload_param: bool = False
    hpz: int = 1
    reduce_bucket: int = REDUCE_BUCKET
    live_parameters: int = LIVE_PARAMETERS
    max_sequences: int = 256
    kv_cache_gib: float = 1.0
    gpu_memory_utilization: float = 0.9
    recomputes_old: bool = True
    """the policy scores its responses before the first update"""
    overlap: bool = False
    """the next step's responses are drawn while this one is learned from"""
    train: Role | None = None
    """the workers of the supervised stages: the largest of them"""
    train_micro_batch_tokens: int = 0
    train_longest: int = 0
    """tokens that stay in one micro-batch of theirs: a sequence, or all that were ranked"""
    gradient_dtype: Literal["float32", "bfloat16"] | None = None
    """that gradients add up in; None: the model's"""

    @property
    def dtype_bytes(self) -> int:
        return DTYPE_BYTES[self.dtype]

    @property
    def gradient_bytes(self) -> int:
        return DTYPE_BYTES[self.gradient_dtype or self.dtype]

    @property
    def sequence_tokens(self) -> float:
        return self.prompt_tokens + self.response_tokens

    @property
    def longest(self) -> int:
        return self.longest_prompt + self.longest_response

    def sharing(self, role: str) -> tuple[str, ...]:
        """The roles on this role's devices, itself among them."""
        return next((roles for roles in self.shared if role in roles), (role,))

    def with_roles(self, **changes: Role) -> Workload:
        return replace(self, roles={**self.roles, **changes})

    def device_sets(self) -> list[tuple[str, ...]]:
        """Who sits together: every role in one of them."""
        sets: list[tuple[str, ...]] = []
        for name in self.roles:
            together = tuple(role for role in self.sharing(name) if role in self.roles)
            if together not in sets:
                sets.append(together)
        return sets

    def devices(self) -> float:
        """GPUs (cores on a CPU) that the roles take together."""
        return sum(
            max(self.roles[r].ranks * self.roles[r].devices for r in together) for together in self.device_sets()
        )
