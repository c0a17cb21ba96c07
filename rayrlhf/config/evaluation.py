"""`collect` and `eval`: sampling from finished models, to have the responses ranked or to measure them."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from rayrlhf.config.base import NonNegative, PathOrName, PositiveInt, Section

__all__ = ["CollectConfig", "EvalConfig"]


class CollectConfig(Section):
    """The SFT model's own responses, ranked by the world's simulated labelers (Ouyang et al. 2022, section 3.2)."""

    fewest: Annotated[int, Field(ge=2, strict=True)] = 4
    most: Annotated[int, Field(ge=2, strict=True)] = 9
    """K, the responses of a prompt that are ranked at once, is drawn between the two (the paper's 4 and 9)."""
    heldout: PositiveInt = 200
    """Rankings of held-out prompts: what the reward model is measured on."""

    @model_validator(mode="after")
    def _in_order(self) -> CollectConfig:
        if self.fewest > self.most:
            raise ValueError(f"fewest {self.fewest} is over most {self.most}")
        return self


class EvalConfig(Section):
    prompts: PositiveInt = 512
    """At most so many of `data.heldout_prompts`, the first ones."""
    temperature: NonNegative | None = None
    """Of the answers that are compared; None is `rollout.temperature`, 0 takes the likeliest token."""
    best_of: PositiveInt = 8
    """Beside the policies: the SFT model's best of so many, chosen by the reward model (always sampled at
    `rollout.temperature`); 1 leaves it out."""
    reward_model: PathOrName | None = None
    """A reward model that no policy was trained against (Hugging Face name or folder): it scores every answer too. The
    run's own reward model is what PPO learned to please, so its opinion of PPO is no measure."""
    bootstrap: Annotated[int, Field(ge=100, le=100_000, strict=True)] = 2000
    """Resamples of the prompts behind each 95 % interval."""
    text_blocks: PositiveInt = 64
    """At most so many held-out blocks of text for the pretraining loss."""
