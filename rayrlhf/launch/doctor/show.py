"""Findings as a table with one line that sums them up, and as one line of JSON."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rayrlhf.config import Config, load_config
from rayrlhf.config.secrets import masked
from rayrlhf.errors import RayRLHFError
from rayrlhf.launch.doctor.findings import Finding, Status

__all__ = ["as_json", "failed", "read_config", "show", "summary"]

COLOURS: dict[Status, str] = {"pass": "green", "skipped": "dim", "warn": "yellow", "fail": "bold red"}
ORDER: tuple[Status, ...] = ("pass", "warn", "fail", "skipped")


def failed(findings: Sequence[Finding]) -> bool:
    return any(finding.status == "fail" for finding in findings)


def summary(findings: Sequence[Finding]) -> str:
    counts = Counter(finding.status for finding in findings)
    told = ", ".join(f"{counts[status]} {status}" for status in ORDER if counts[status])
    verdict = "a run would fail here" if failed(findings) else "nothing found that would stop a run"
    return f"{verdict}: {told}"


def show(findings: Sequence[Finding], console: Console) -> None:
    table = Table("check", "", "found", show_lines=False)
    for finding in findings:
        cure = f"\n[bold]→ {escape(finding.cure)}[/]" if finding.cure and finding.status in ("warn", "fail") else ""
        colour = COLOURS[finding.status]
        table.add_row(finding.name, f"[{colour}]{finding.status}[/]", escape(finding.found) + cure)
    console.print(table, highlight=False)
    console.print(summary(findings), highlight=False, markup=False, soft_wrap=True)


def read_config(path: Path, overrides: Sequence[str], on_json: bool) -> Config:
    """The config that is asked about; who reads JSON gets one that cannot be read as a finding as well.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        return load_config(path, overrides)
    except RayRLHFError as error:
        if on_json:
            print(as_json([Finding("config", "fail", masked(error.message), masked(error.hint))]))
        raise


def as_json(findings: Sequence[Finding]) -> str:
    """`ok`, how many of each status, and `checks`: name, status, found, cure, figures."""
    counts = Counter(finding.status for finding in findings)
    rows = [
        {"name": f.name, "status": f.status, "found": f.found, "cure": f.cure, "figures": dict(f.figures)}
        for f in findings
    ]
    return json.dumps({"ok": not failed(findings), **{s: counts[s] for s in ORDER}, "checks": rows})
