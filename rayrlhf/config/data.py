"""`data`: which files hold what people wrote."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from rayrlhf.config.base import Folder, PathOrName, PositiveInt, Section

__all__ = ["SOURCE_FIELDS", "DataConfig"]

SOURCE_FIELDS = (
    *("text", "demonstrations", "ranking_prompts", "rankings", "heldout_rankings", "prompts", "heldout_prompts"),
    "multiple_choice",
)


# A list of sources; one alone may be written without the brackets.
Sources = Annotated[
    tuple[PathOrName, ...], BeforeValidator(lambda value: (value,) if isinstance(value, str) else value)
]


class DataConfig(Section):
    """A source is a file (.jsonl, .jsonl.gz, .json, .parquet, .txt, .txt.gz) or a hub name `org/name:split`."""

    root: Folder | None = None
    """Folder that relative file names start from; the environment's RAYRLHF_HUMAN_DATA when None."""
    text: Sources = ()
    """Plain text to pretrain on."""
    demonstrations: Sources = ()
    """prompt and response, or messages."""
    ranking_prompts: Sources = ()
    """What `collect` samples responses for."""
    rankings: Sources = ()
    """prompt, responses, ranks; or prompt, chosen, rejected."""
    heldout_rankings: Sources = ()
    """Never trained on; the accuracy of the reward model, and of dpo, is reported on them, per source."""
    prompts: Sources = ()
    """What PPO samples responses for."""
    heldout_prompts: Sources = ()
    """What `eval` samples responses for; never trained on."""
    multiple_choice: Sources = ()
    """prompt, choices, answer: `eval` counts how often the right choice is the likeliest."""
    heldout_fraction: Annotated[float, Field(ge=0, le=0.5, strict=True)] = 0.05
    """Share of prompts kept out of sft and pretrain for the validation loss."""
    max_prompt_tokens: PositiveInt = 128
    overlong_prompts: Literal["drop", "refuse"] = "drop"
    """Drop prompts over the limit and count them, or refuse to run."""
    max_records: PositiveInt | None = None
    """At most this many records for each value of their `source` field, the first ones; None takes all."""
