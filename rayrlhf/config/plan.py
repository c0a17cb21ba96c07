"""`plan`: what `rayrlhf plan` (and `--dry-run`) cannot read from the rest. Nothing that runs looks at it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from rayrlhf.config.base import PathOrName, PositiveInt, Section, path_or_name

__all__ = ["PlanConfig"]

# Checked as a whole: of a union's parts a message would name each.
Shape = Annotated[
    str | dict[str, Any], AfterValidator(lambda value: path_or_name(value) if isinstance(value, str) else value)
]


class PlanConfig(Section):
    hardware: PathOrName | None = None
    """A device of rayrlhf/planning/hardware.yaml, or a YAML file of the same form. None: h100-80g where
    `cluster.device` is cuda, else the CPU of this machine."""
    nodes: PositiveInt | None = None
    """Machines there are; None: as many as the roles need."""
    shapes: dict[Literal["policy", "reward"], Shape] = Field(default_factory=dict)
    """Models that are not at hand yet: a name of rayrlhf/planning/models.yaml, a folder or file with a Hugging Face
    config, or its keys. Reference and policy have one shape, reward and value the other."""
    assume: dict[str, float] = Field(default_factory=dict)
    """In place of values in rayrlhf/planning/assumptions.yaml, by name."""
