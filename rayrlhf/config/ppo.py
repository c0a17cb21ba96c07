"""`ppo`, `rollout` and `weights`: the reinforcement-learning step."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from rayrlhf.config.base import (
    LARGEST_INT,
    Fraction,
    NonNegative,
    NonNegativeInt,
    Positive,
    PositiveInt,
    Section,
    ZeroStage,
)
from rayrlhf.config.rewards import RewardSourceConfig
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
    stop: Positive | None = None
    """Nats per response between the policy now and at the start of the step; past it the step's remaining minibatches
    are left out."""


class PTXConfig(Section):
    """PPO-ptx: the pretraining gradient in every policy step (Ouyang et al. 2022, eq. 2). See docs/ptx.md."""

    coef: NonNegative = 0.0
    """Of the language-modelling loss, a token mean over the minibatch's text, beside PPO's token mean; 0 is plain PPO.
    The paper's 27.8 belongs to its own reduction."""
    examples_per_episode: Positive = 8.0
    """Blocks of `data.text` (as long as the context) per response of a minibatch; the paper takes 8."""
    norms_every: PositiveInt = 10
    """Steps between measurements of both parts' gradient norms (of a step's first minibatch). Each one reads the
    gradients of the whole model twice."""


class TruncationConfig(Section):
    """What becomes of a response that `rollout.max_tokens` cut before its EOS."""

    treatment: Literal["keep", "penalty", "replace", "mask"] = "keep"
    """Its score stays; loses `value`; becomes `value`; or the response is not trained on (it still counts in what is
    reported)."""
    value: Annotated[float, Field(allow_inf_nan=False, strict=True)] | None = None
    """In the reward model's normalised units; needed by penalty and replace."""

    @model_validator(mode="after")
    def _value_where_it_is_used(self) -> TruncationConfig:
        if (self.treatment in ("penalty", "replace")) != (self.value is not None):
            wrong = "missing" if self.value is None else "not used"
            raise ValueError(f"value is {wrong} with treatment {self.treatment}: penalty and replace need it")
        return self


class ScoreConfig(Section):
    """What is done to the reward model's scores before the KL penalty joins them."""

    normalize: Literal["none", "batch"] = "none"
    """batch: mean 0 and variance 1 over the step's responses."""
    clip: Positive | None = None
    """Scores are held to +-clip, after normalising and before the treatment of truncated responses."""


class PacingConfig(Section):
    """When the responses of a step are drawn."""

    kind: Literal["sync", "overlap"] = "sync"
    """sync: each step samples from the newest weights. overlap: the next step's responses are drawn while this one is
    learned from, so a step takes as long as the longer of the two."""
    max_staleness: NonNegativeInt = 1
    """overlap: versions that the policy that sampled a response may be older than the one that learns from it."""


class PPOConfig(Section):
    arms: dict[Annotated[str, Field(pattern=r"^[a-z0-9_]{1,32}$")], dict[str, Any]] = Field(default_factory=dict)
    """Several runs of this stage one after the other on the same actors, each with some keys of this section changed:
    `{ppo: {ptx.coef: 0}, ppo_ptx: {}}`. The last one's policy is the run's."""
    steps: PositiveInt = 100
    batch_size: PositiveInt = 512
    """Responses per step."""
    minibatch_size: PositiveInt = 64
    """Responses per optimizer step, over all ranks."""
    max_failed_share: Fraction = 0.1
    """Of a step's batch_size. Samples that could not be scored are put aside, and others drawn in their place; when
    more of a step than this share fail, the run stops. One may always."""
    epochs: PositiveInt = 1
    """Passes over the batch."""
    pacing: PacingConfig = PacingConfig()
    samples_per_prompt: PositiveInt = 1
    """Responses drawn for each prompt; group estimators compare them with each other."""
    advantage: str = "gae"
    """A name in rayrlhf.algorithms.advantages.ESTIMATORS: gae; group_relative and leave_one_out need no value model."""
    micro_batch_tokens: PositiveInt = 4096
    """Tokens, padding included, per forward/backward on a rank."""
    learning_rate: Positive = 9e-6
    value_learning_rate: Positive = 9e-6
    warmup_steps: NonNegativeInt = 10
    """Steps over which both learning rates rise from 0.1x; constant afterwards."""
    adam: Adam = Adam(eps=1e-5)
    value_warmup_steps: NonNegativeInt = 0
    """Steps at the start in which the value model alone learns."""
    clip: Positive = 0.2
    dual_clip: Annotated[float, Field(gt=1, allow_inf_nan=False, strict=True)] | None = None
    """Bounds the loss of tokens with a negative advantage at this many times the advantage (Ye et al. 2020)."""
    value_clip: Positive = 0.2
    old_logprobs: Literal["recompute", "rollout"] = "recompute"
    """The trainer scores each response before the first update; or the engine's own log-probs are taken, which saves
    that pass and makes the engine's rounding part of the ratio."""
    importance_cap: Positive | None = None
    """Largest importance weight of a token that the engine sampled, trainer over engine (Yao et al. 2025): recomputed,
    the loss is multiplied by min(old / engine, cap); from the rollout, the ratio itself ends at cap. None: off."""
    gamma: Fraction = 1.0
    lam: Fraction = 0.95
    kl: KLConfig = KLConfig()
    truncated: TruncationConfig = TruncationConfig()
    reward: RewardSourceConfig = RewardSourceConfig()
    score: ScoreConfig = ScoreConfig()
    ptx: PTXConfig = PTXConfig()
    ema: Annotated[float, Field(gt=0, lt=1, strict=True)] | None = None
    """Decay per optimizer step of an average of the policy's weights, saved beside it (the paper's 0.992; it does not
    say per what). Never sampled from."""
    zero_stage: ZeroStage = 1
    """Of the policy's and the value model's learners. One rank has nothing to shard: in float32 it uses 0 instead. In
    bfloat16 gradients add up in float32, which takes at least 2."""
    frozen_zero_stage: ZeroStage = 0
    """Reference and reward: whole on each rank (0) or sharded over the role's ranks (3)."""

    @property
    def max_failed(self) -> int:
        """Samples of a step that may fail."""
        return max(1, math.floor(self.max_failed_share * self.batch_size + 1e-6))  # 0.29 * 100 is 28.999...

    @model_validator(mode="after")
    def _minibatches_divide_the_batch(self) -> PPOConfig:
        if self.batch_size % self.minibatch_size:
            raise ValueError(f"batch_size {self.batch_size} is not a multiple of minibatch_size {self.minibatch_size}")
        return self

    @model_validator(mode="after")
    def _prompts_fill_the_batch(self) -> PPOConfig:
        if self.batch_size % self.samples_per_prompt:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of samples_per_prompt {self.samples_per_prompt}"
            )
        return self

    @model_validator(mode="after")
    def _old_logprobs_of_the_engine_are_corrected(self) -> PPOConfig:
        if self.old_logprobs == "rollout" and self.importance_cap is None:
            raise ValueError("old_logprobs rollout needs importance_cap (2.0 is usual): the engine is not the trainer")
        return self

    @model_validator(mode="after")
    def _stale_samples_are_corrected(self) -> PPOConfig:
        pacing = self.pacing
        if pacing.kind == "overlap" and pacing.max_staleness:
            if self.old_logprobs == "rollout":
                raise ValueError(
                    "pacing.kind overlap and old_logprobs rollout contradict each other: clipping is around the policy "
                    "at the start of the step, which has not sampled the responses; take recompute"
                )
            if self.importance_cap is None:
                raise ValueError(
                    "pacing.kind overlap needs importance_cap (2.0 is usual): an older policy sampled the responses"
                )
        return self

    @model_validator(mode="after")
    def _the_policy_gets_to_learn(self) -> PPOConfig:
        if self.value_warmup_steps >= self.steps:
            raise ValueError(f"value_warmup_steps {self.value_warmup_steps} leaves the policy none of {self.steps}")
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
    max_logprob_gap: Positive | None = None
    """A step whose log-probs differ more between engine and trainer stops the run. Looked at where the newest version
    sampled: with a `ppo.pacing.max_staleness` of 1 or more as good as in the first step alone. None: 1e-3 at the worst
    token in float32, 0.05 on average in bfloat16."""


class WeightsConfig(Section):
    transport: str = "shared_memory"
    """A name in rayrlhf.weights.transports: shared_memory (and Ray's object store to other nodes); on GPUs nccl, for
    engines with GPUs of their own, and ipc, for engines that share a GPU with a policy rank."""
    bucket_mib: Positive = 128.0
    """Weights travel in buckets of at most this size, or of one larger tensor; ZeRO-3 gathers one at a time."""
    probe_tokens: Annotated[int, Field(ge=64, le=LARGEST_INT, strict=True)] = 64
    """Tokens, spread over the vocabulary, whose log-probs trainer and engine must agree on after each publish."""
    probe_tolerance: Positive | None = None
    """None: 1e-4 at most in float32, 0.03 on average in bfloat16."""
