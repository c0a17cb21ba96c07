"""What the benchmarks share: the machine they ran on, and how they show rows."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

__all__ = ["machine", "show"]


def machine() -> dict[str, Any]:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"machine": platform.platform(), "cpus": os.cpu_count(), "gpu": gpu, "torch": torch.__version__}


def show(title: str, rows: Sequence[dict[str, Any]], facts: dict[str, Any], as_json: bool = False) -> None:
    """A table of the rows (unless `as_json`), the facts under it, and both as JSON in the last line."""
    if not as_json:
        table = Table(title=title)
        for name in rows[0]:
            table.add_column(name.replace("_", " "), justify="right")
        for row in rows:
            table.add_row(*(f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()))
        Console().print(table)
        Console().print(", ".join(f"{name} {value}" for name, value in facts.items()))
    print(json.dumps({**facts, "rows": list(rows)}))
