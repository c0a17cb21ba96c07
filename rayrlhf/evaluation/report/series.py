"""metrics.jsonl as columns, an arm or a stage at a time: what the plots and the signs are made from."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

__all__ = ["Column", "Columns", "finite", "ppo_columns", "rounded", "supervised_columns", "thinned"]

Column = list[float | None]
Columns = dict[str, Column]
"""metric -> a value a record, None where there is none; "step" is always among them."""

MOST_POINTS = 500
"""Points of a line in the page; a plot is at most about a thousand pixels wide."""
SUPERVISED = ("pretrain", "sft", "reward", "dpo")


def finite(value: Any) -> float | None:
    """A number that can be drawn, or None. JSON's own readers let NaN and Infinity through."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return value if math.isfinite(value) else None
    except OverflowError:  # a whole number of hundreds of digits
        return None


def rounded(value: float | None, digits: int = 5) -> float | None:
    """To significant digits: a page does not need the other eleven."""
    return None if value is None else float(f"{value:.{digits}g}")


def ppo_columns(metrics: Iterable[Mapping[str, Any]]) -> dict[str, Columns]:
    """arm -> columns. A run of one arm does not name it; it is called ppo then."""
    arms: dict[str, list[Mapping[str, Any]]] = {}
    for record in metrics:
        if record.get("stage") == "ppo":
            arms.setdefault(str(record.get("arm") or "ppo"), []).append(record)
    return {arm: table for arm, records in arms.items() if (table := _columns(records))}


def supervised_columns(metrics: Sequence[Mapping[str, Any]]) -> dict[str, Columns]:
    """stage -> columns, in the order of the recipe."""
    tables = {stage: _columns([r for r in metrics if r.get("stage") == stage]) for stage in SUPERVISED}
    return {stage: table for stage, table in tables.items() if table}


def thinned(columns: Columns, most: int = MOST_POINTS) -> Columns:
    """Every k-th record and the last one, so that a long run's page stays small."""
    count = len(columns["step"])
    stride = max(1, math.ceil(count / most))
    keep = sorted({*range(0, count, stride), count - 1})
    return {name: [rounded(column[i]) for i in keep] for name, column in columns.items()}


def _columns(records: Sequence[Mapping[str, Any]]) -> Columns:
    """By step, the last record of a step being the one that counts: a resumed run may write one twice."""
    by_step: dict[float, Mapping[str, Any]] = {}
    for record in records:
        if (step := finite(record.get("step"))) is not None:
            by_step[step] = record
    steps = sorted(by_step)
    names = {name: None for step in steps for name, value in by_step[step].items() if finite(value) is not None}
    return {name: [finite(by_step[step].get(name)) for step in steps] for name in names} if steps else {}
