"""`pretrain`, `sft`, `reward` and `dpo`: the supervised stages, with their papers' numbers as defaults where stated."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from rayrlhf.config.base import Fraction, NonNegative, PathOrName, Positive, PositiveInt, Section, ZeroStage

__all__ = [
    "Adam",
    "DPOConfig",
    "PretrainConfig",
    "PretrainMixConfig",
    "RewardConfig",
    "SFTConfig",
    "SelectConfig",
    "SupervisedConfig",
]


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
    """Shard optimizer (1), gradients (2) or weights (3) over the ranks when memory asks for it; 0 is the fastest. One
    rank has nothing to shard: in float32 it uses 0 whatever is asked for. In bfloat16 gradients add up in float32,
    which takes at least 2."""
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


class PretrainMixConfig(Section):
    """Blocks of `data.text` learned beside the demonstrations, in the same optimizer steps:

        loss = mean over the response tokens + coef * mean over the text tokens

    each a mean over all tokens of its own minibatch. Text that is to have a share s of the loss needs s / (1 - s): the
    10 % of pretraining data that the paper mixes in before PPO (Ouyang et al. 2022, appendix C.3) are coef 0.111, since
    (SFT + 0.111 text) is (0.9 SFT + 0.1 text) / 0.9, and Adam does not see the 0.9. "SFT loss + 0.5 x pretraining loss"
    is coef 0.5.
    """

    coef: NonNegative = 0.0
    """0 reads no text."""
    examples_per_demonstration: Positive = 0.125
    """Blocks a step for each of `sft.batch_size`, at least one: how much text the mean is taken over, not its weight.
    Beside the paper's 32 demonstrations 4 blocks, as many as a batch with 10 % of text holds."""


class SelectConfig(Section):
    """Which epoch's weights `sft` keeps.

    Ouyang et al. 2022 (section 3.5, appendix C.1): held-out loss is at its best after one epoch, more epochs are better
    by reward-model score and by people's ratings, so their models were chosen by reward-model score.
    """

    by: Literal["last", "heldout_loss", "reward"] = "last"
    """`last`; or of all epochs that with the lowest loss on held-out demonstrations, or the highest mean score of its
    own responses to their prompts. Ties go to the earlier one."""
    reward_model: PathOrName | None = None
    """For `reward`: an existing reward model that reads the policy's tokens (Hugging Face name or folder)."""
    prompts: PositiveInt = 64
    """For `reward`: at most so many held-out prompts are answered, greedily, after each epoch."""

    @model_validator(mode="after")
    def _a_reward_model_where_one_judges(self) -> SelectConfig:
        if self.by == "reward" and self.reward_model is None:
            raise ValueError("by reward needs reward_model: name an existing reward model")
        if self.by != "reward" and self.reward_model is not None:
            raise ValueError(f"by {self.by} and reward_model contradict each other: set by to reward, or leave it out")
        return self


class SFTConfig(SupervisedConfig):
    path: PathOrName | None = None
    """An existing SFT model (Hugging Face name or folder): the stage is skipped and this one is used."""
    learning_rate: Positive = 9.65e-6
    batch_size: PositiveInt = 32
    epochs: Positive = 16.0
    max_response_tokens: PositiveInt = 128
    dropout: Annotated[float, Field(ge=0, lt=1, strict=True)] = 0.0
    """Residual dropout (the paper's 0.2); only for architectures that have it."""
    pretrain_mix: PretrainMixConfig = PretrainMixConfig()
    select: SelectConfig = SelectConfig()

    @model_validator(mode="after")
    def _sharded_weights_do_not_generate(self) -> SFTConfig:
        if self.select.by == "reward" and self.zero_stage == 3:
            raise ValueError(
                "select.by reward and zero_stage 3 contradict each other: a rank needs whole weights to generate "
                "responses; take zero_stage 2 or less, or select.by heldout_loss"
            )
        return self


class RewardConfig(SupervisedConfig):
    path: PathOrName | None = None
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
