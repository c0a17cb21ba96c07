"""What the plan takes for granted: each with its value, unit and source, in assumptions.yaml."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from pathlib import Path

from rayrlhf.config.base import NonNegative, Section
from rayrlhf.config.load import read_yaml, validated
from rayrlhf.errors import ConfigError

__all__ = ["Assumption", "Assumptions", "assumptions_for"]

# What is a share of a whole; below, what something is divided by.
SHARES = ("prompt_share", "response_share", "fragmentation", "overlap")
# Of what a GPU, or a link, is rated at. What a CPU is rated at is itself only assumed, and calibrating finds more.
RATED = ("mfu_train", "mfu_forward", "decode_bandwidth", "decode_flops", "link_share", "optimizer_bandwidth")
RATES = (*RATED, "host_adam_gb_s", "publish_gb_s", "prompt_share", "response_share")


class _ByKind(Section):
    gpu: NonNegative
    cpu: NonNegative


class _Entry(Section):
    value: NonNegative | _ByKind
    unit: str
    source: str


@dataclass(frozen=True, slots=True)
class Assumption:
    value: float
    unit: str
    source: str


class Assumptions:
    """By name; `assumptions["mfu_train"]` is its value."""

    def __init__(self, known: Mapping[str, Assumption], kind: str) -> None:
        """`kind` of device: `gpu` or `cpu`."""
        self.known, self._kind = dict(known), kind

    def __getitem__(self, name: str) -> float:
        return self.known[name].value

    def changed(self, values: Mapping[str, float], source: str) -> Assumptions:
        """With other values; ConfigError for a name that is not one, or a value that it cannot have."""
        known = dict(self.known)
        for name, value in values.items():
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
                hint = f"did you mean {near[0]}?" if near else f"one of {', '.join(known)}"
                raise ConfigError(f"{source}: the plan has no assumption {name!r}", hint)
            share = name in SHARES or (name in RATED and self._kind == "gpu")
            if not 0 <= value < math.inf or (name in RATES and value == 0) or (share and value > 1):
                least = "above" if name in RATES else "from"
                raise ConfigError(f"{source}: {name} is {value:g}", f"a number {least} 0{' to 1' if share else ''}")
            known[name] = replace(known[name], value=float(value), source=source)
        return Assumptions(known, self._kind)

    def as_json(self) -> dict[str, dict[str, object]]:
        return {n: {"value": a.value, "unit": a.unit, "source": a.source} for n, a in self.known.items()}


@cache
def assumptions_for(kind: str) -> Assumptions:
    """Those for devices of this kind, `gpu` or `cpu`."""
    tree = read_yaml(Path(str(files("rayrlhf.planning").joinpath("assumptions.yaml"))))
    found = {}
    for name, entry in tree.items():
        read = validated(_Entry, entry, f"assumptions.yaml: {name}")
        value = getattr(read.value, kind) if isinstance(read.value, _ByKind) else read.value
        found[name] = Assumption(value, read.unit, read.source)
    return Assumptions(found, kind)
