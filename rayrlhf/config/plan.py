"""`plan`: what `rayrlhf plan` (and `--dry-run`) cannot read from the rest. Nothing that runs looks at it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from rayrlhf.config.base import PositiveInt, Section

__all__ = ["PlanConfig"]


class PlanConfig(Section):
    hardware: str | None = None
    """A device of rayrlhf/planning/hardware.yaml, or a YAML file of the same form. None: h100-80g where
    `cluster.device` is cuda, else the CPU of this machine."""
    nodes: PositiveInt | None = None
    """Machines there are; None: as many as the roles need."""
    shapes: dict[Literal["policy", "reward"], str | dict[str, Any]] = Field(default_factory=dict)
    """Models that are not at hand yet: a name of rayrlhf/planning/models.yaml, a folder or file with a Hugging Face
    config, or its keys. Reference and policy have one shape, reward and value the other."""
    assume: dict[str, float] = Field(default_factory=dict)
    """In place of values in rayrlhf/planning/assumptions.yaml, by name."""
