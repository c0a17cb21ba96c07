"""`ppo`, `rollout` and `weights`: the reinforcement-learning step."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from rayrlhf.config.base import Fraction, NonNegative, NonNegativeInt, Positive, PositiveInt, Section, ZeroStage
from rayrlhf.config.training import Adam

__all__ = ["KLConfig", "PPOConfig", "RolloutConfig", "WeightsConfig"]


class KLConfig(Section):
    kind: Literal["k1", "k2", "k3"] = "k1"
    coef: NonNegative = 0.02
    """Ouyang et al. 2022, appendix C.4."""
    target: Positive | None = None
    """Nats per response; set, the coefficient adapts (Ziegler et al. 2019), else it stays."""
    horizon: Positive = 10_000.0
    """Samples over which an adaptive coefficient reacts."""


class PPOConfig(Section):
    steps: PositiveInt = 100
    batch_size: PositiveInt = 512
    """Responses per step."""
    minibatch_size: PositiveInt = 64
    """Responses per optimizer step, over all ranks."""
    epochs: PositiveInt = 1
    """Passes over the batch."""
    micro_batch_tokens: PositiveInt = 4096
    """Tokens, padding included, per forward/backward on a rank."""
    learning_rate: Positive = 9e-6
    value_learning_rate: Positive = 9e-6
    warmup_steps: NonNegativeInt = 10
    """Steps over which both learning rates rise from 0.1x; constant afterwards."""
    adam: Adam = Adam(eps=1e-5)
    clip: Positive = 0.2
    value_clip: Positive = 0.2
    gamma: Fraction = 1.0
    lam: Fraction = 0.95
    kl: KLConfig = KLConfig()
    zero_stage: ZeroStage = 1
    """Of the policy's and the value model's learners."""
    frozen_zero_stage: ZeroStage = 0
    """Reference and reward: whole on each rank (0) or sharded over the role's ranks (3)."""

    @model_validator(mode="after")
    def _minibatches_divide_the_batch(self) -> PPOConfig:
        if self.batch_size % self.minibatch_size:
            raise ValueError(f"batch_size {self.batch_size} is not a multiple of minibatch_size {self.minibatch_size}")
        return self

    @model_validator(mode="after")
    def _adaptive_kl_can_move(self) -> PPOConfig:
        if self.kl.target is not None:
            if self.kl.coef == 0:
                raise ValueError("kl.target and kl.coef 0 contradict each other: a coefficient of 0 never moves")
            if self.kl.horizon <= 0.2 * self.batch_size:
                raise ValueError(
                    f"kl.horizon {self.kl.horizon:g} and batch_size {self.batch_size} contradict each other: one step "
                    "could turn the coefficient negative; take a horizon of many batches"
                )
        return self

    @model_validator(mode="after")
    def _frozen_models_have_no_optimizer_to_shard(self) -> PPOConfig:
        if self.frozen_zero_stage not in (0, 3):
            raise ValueError(
                f"frozen_zero_stage is 0 or 3, found {self.frozen_zero_stage}: stages 1 and 2 shard optimizers"
            )
        return self


class RolloutConfig(Section):
    engines: PositiveInt = 1
    tensor_parallel: PositiveInt = 1
    max_tokens: PositiveInt = 128
    """Longest response."""
    temperature: Positive = 1.0
    """Of sampling and of every log-prob computed afterwards. No top-k, no top-p: they would bias the ratio."""
    kv_cache_gib: PositiveInt = 1
    """CPU engines: size of the key/value cache."""
    gpu_memory_utilization: Fraction = 0.5
    """GPU engines: share of the device the engine may take."""
    max_sequences: PositiveInt = 256
    """Sequences decoded together."""


class WeightsConfig(Section):
    transport: str = "shared_memory"
    """A name registered in rayrlhf.weights.transports."""
    bucket_mib: Positive = 64.0
    """Weights travel in buckets of at most this size, or of one larger tensor; ZeRO-3 gathers one at a time."""
    probe_tokens: Annotated[int, Field(ge=64, strict=True)] = 64
    """Tokens, spread over the vocabulary, whose log-probs trainer and engine must agree on after each publish."""
    probe_tolerance: Positive | None = None
    """None: 1e-4 at most in float32, 0.03 on average in bfloat16."""
