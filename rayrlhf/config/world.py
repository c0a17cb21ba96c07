"""`world`: data made on the spot instead of read from files."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from rayrlhf.config.base import Section

__all__ = ["WorldConfig"]


class WorldConfig(Section):
    name: Literal["starter"] | None = None
    """A built-in world: its files are written to `<run.output>/worlds/` and fill the `data` section."""
    seed: Annotated[int, Field(ge=0, strict=True)] = 0
