"""`pretrain`, `sft`, `reward` and `dpo`: the supervised stages, with their papers' numbers as defaults where stated."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from rayrlhf.config.base import Fraction, NonNegative, Positive, PositiveInt, Section, ZeroStage

__all__ = ["Adam", "DPOConfig", "PretrainConfig", "RewardConfig", "SFTConfig", "SupervisedConfig"]


class Adam(Section):
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    """Ouyang et al. 2022, appendix C."""
    eps: Positive = 1e-8
    weight_decay: NonNegative = 0.0
    grad_clip: NonNegative = 1.0
    """Largest global gradient norm; 0 does not clip."""


class SupervisedConfig(Section):
    learning_rate: Positive
    batch_size: PositiveInt
    """Sequences (pretrain, sft) or prompts (reward, dpo) per optimizer step, over all ranks."""
    epochs: Positive = 1.0
    warmup_ratio: Fraction = 0.0
    """Share of the steps over which the learning rate rises from zero."""
    final_lr_ratio: Fraction = 0.1
    """Cosine decay ends at this share of the peak (the paper's 10 %)."""
    adam: Adam = Adam()
    zero_stage: ZeroStage = 0
    """0 on one rank is the fastest; shard optimizer (1), gradients (2) or weights (3) when memory asks for it."""
    micro_batch_tokens: PositiveInt = 4096
    """Tokens, padding included, per forward/backward on a rank."""
    log_every: PositiveInt = 10
    """Steps between records; the first and the last step always have one."""


class PretrainConfig(SupervisedConfig):
    learning_rate: Positive = 3e-3
    batch_size: PositiveInt = 16
    warmup_ratio: Fraction = 0.02
    max_steps: PositiveInt | None = None
    """Stop here even if the epochs are not over."""


class SFTConfig(SupervisedConfig):
    path: str | None = None
    """An existing SFT model (Hugging Face name or folder): the stage is skipped and this one is used."""
    learning_rate: Positive = 9.65e-6
    batch_size: PositiveInt = 32
    epochs: Positive = 16.0
    max_response_tokens: PositiveInt = 128
    dropout: Annotated[float, Field(ge=0, lt=1, strict=True)] = 0.0
    """Residual dropout (the paper's 0.2); only for architectures that have it."""


class RewardConfig(SupervisedConfig):
    path: str | None = None
    """An existing reward model: the stage is skipped and this one is used."""
    learning_rate: Positive = 9e-6
    batch_size: PositiveInt = 64
    max_response_tokens: PositiveInt = 128
    unit_variance: bool = False
    """Scale the rewards so that demonstrations' have variance 1 (their mean is 0 in any case): `ppo.kl.coef` then means
    the same for every reward model."""


class DPOConfig(SupervisedConfig):
    """Rafailov et al. 2023 (arXiv 2305.18290), appendix B: beta 0.1, batches of 64, RMSprop at 1e-6.

    The optimizer here is AdamW, so rate and warm-up are those of DPO under AdamW in Tunstall et al. 2023 (Zephyr, arXiv
    2310.16944); 5e-7 is also what the authors' own code has.
    """

    learning_rate: Positive = 5e-7
    batch_size: PositiveInt = 64
    """Prompts per optimizer step, as for reward: with one pair a prompt these are the paper's pairs."""
    warmup_ratio: Fraction = 0.1
    beta: Positive = 0.1
    """Strength of the pull to the reference, the model as it starts; the implicit reward is beta * log-ratio."""
    max_response_tokens: PositiveInt = 128
