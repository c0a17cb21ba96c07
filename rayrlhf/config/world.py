"""`world`: data made on the spot instead of read from files, and its exact judge."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from rayrlhf.config.base import LARGEST_INT, PathOrName, Positive, Section

__all__ = ["WorldConfig"]


class WorldConfig(Section):
    name: str | None = None
    """A registered world (`instructions` is built in): its files are written to `<run.output>/worlds/` and fill every
    key of the `data` section that names none. Its judge scores responses as `reward/gold`; nothing learns from that."""
    module: PathOrName | None = None
    """Where a world of your own is registered: a .py file or an importable module. See docs/worlds.md."""
    seed: Annotated[int, Field(ge=0, le=LARGEST_INT, strict=True)] = 0
    size: Positive = 1.0
    """Of all files, as a share of the world's own sizes."""
