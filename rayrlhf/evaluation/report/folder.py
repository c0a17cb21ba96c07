"""A run's folder, read with patience: a run that was stopped leaves files cut short, and still has a story."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from rayrlhf.config.limits import UNREADABLE, check_size
from rayrlhf.config.secrets import masked
from rayrlhf.errors import DataError

__all__ = ["RunFolder", "read_folder"]

SIGNS_OF_A_RUN = ("config.yaml", "metrics.jsonl", "summary.json")


@dataclass(frozen=True, slots=True)
class RunFolder:
    """What the files of a run hold; whatever is missing is empty, and what was wrong with it is in `notes`."""

    path: Path
    config: dict[str, Any]
    """dotted key -> value, in the order of the file"""
    summary: dict[str, Any]
    metrics: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    answers: list[dict[str, Any]]
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return str(self.summary.get("name") or self.config.get("run.name") or self.path.name)


def read_folder(path: Path) -> RunFolder:
    """Read what is there.

    Raises:
        DataError: when `path` is no run's folder at all.
    """
    _check(path)
    notes: list[str] = []
    summary = _object(path / "summary.json", notes)
    if not (path / "summary.json").is_file():
        notes.append("summary.json is missing: the run is still going, or was killed.")
    return RunFolder(
        path=path,
        config=_config(path / "config.yaml", notes),
        summary=summary,
        metrics=_lines(path / "metrics.jsonl", notes),
        samples=_lines(path / "samples.jsonl", notes),
        answers=_lines(_evaluated(path, summary, notes) / "answers.jsonl", notes),
        notes=notes,
    )


def _evaluated(path: Path, summary: dict[str, Any], notes: list[str]) -> Path:
    """Where the answers are: in the run, or in the eval/ that `rayrlhf eval` left in a run without a stage of its own.

    The evaluation found there becomes the summary's.
    """
    later = path / "eval"
    if summary.get("evaluation") or not (later / "evaluation.json").is_file():
        return path
    summary["evaluation"] = _object(later / "evaluation.json", notes)
    notes.append("The evaluation is that of a later `rayrlhf eval`, in eval/.")
    return later


def _check(path: Path) -> None:
    if path.is_dir() and any((path / name).is_file() for name in SIGNS_OF_A_RUN):
        return
    if not path.exists():
        near = _runs_in(path.parent) if path.parent.is_dir() else []
        raise DataError(f"{path}: no such folder", _suggest(near))
    found = "a file" if path.is_file() else f"none of {', '.join(SIGNS_OF_A_RUN)}"
    inside = _runs_in(path.parent if path.is_file() else path)
    raise DataError(f"{path}: expected the folder of a run, found {found}", _suggest(inside))


def _runs_in(folder: Path) -> list[Path]:
    return sorted(p.parent for name in SIGNS_OF_A_RUN[:1] for p in folder.glob(f"*/{name}"))


def _suggest(runs: list[Path]) -> str:
    if runs:
        return f"runs near it: {', '.join(map(str, runs[:5]))}"
    return "name a folder that `rayrlhf run` wrote, such as runs/demo"


def _config(path: Path, notes: list[str]) -> dict[str, Any]:
    """Read, not validated: a report must open the runs of older versions, with keys that are gone."""
    if not path.is_file():
        notes.append("config.yaml is missing.")
        return {}
    try:
        tree = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8", errors="replace"))
        check_size(tree, str(path))
    except UNREADABLE:
        notes.append("config.yaml cannot be read as YAML and is left out.")
        return {}
    return _flat(tree) if isinstance(tree, dict) else {}


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = _masked(value)
    return flat


def _masked(value: Any) -> Any:
    """Today's configs hold no secrets; one of an older version may."""
    if isinstance(value, list):
        return [_masked(item) for item in value]
    return masked(value) if isinstance(value, str) else value


def _object(path: Path, notes: list[str]) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        notes.append(f"{path.name} is broken and is left out.")
        return {}
    return found


def _lines(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """The objects of a JSON Lines file. A torn last line is what a killed run leaves; it is left out, and said."""
    if not path.is_file():
        return []
    lines = [line for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if line.strip()]
    records: list[dict[str, Any]] = []
    wrong: list[int] = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict):
            records.append(record)
        else:
            wrong.append(number)
    if wrong == [len(lines)]:
        notes.append(f"The last line of {path.name} was cut off and is left out.")
    elif wrong:
        word = "line is" if len(wrong) == 1 else "lines are"
        notes.append(f"{len(wrong)} {word} no JSON object in {path.name} (first: line {wrong[0]}) and left out.")
    return records
