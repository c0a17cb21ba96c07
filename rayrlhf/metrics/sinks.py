"""Where numbers go: metrics.jsonl, samples.jsonl, and wandb when asked for. What needs Ray is in actors/exporter.py."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Protocol

__all__ = ["JsonLines", "RunSink", "Sink", "WandbSink", "read_jsonl", "to_json"]


def to_json(record: Mapping[str, Any]) -> str:
    """On one line. JSON has no NaN: a number that could not be computed is null, however deep it lies."""
    return json.dumps(_nulled(record), ensure_ascii=False)


def _nulled(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _nulled(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_nulled(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Sink(Protocol):
    """Takes a record at a time, until it is closed."""

    def write(self, record: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """One JSON object a line, flushed at once so that `tail -f` follows the run."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: IO[str] = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close)

    def write(self, record: Mapping[str, Any]) -> None:
        try:
            self._file.write(to_json(record) + "\n")
            self._file.flush()
        except OSError as error:  # which does not know its file
            raise OSError(error.errno, error.strerror, self._file.name) from None

    def keep(self, stays: Callable[[Mapping[str, Any]], bool]) -> None:
        """Drop the records that do not stay; the file is whole at any time."""
        path = Path(self._file.name)
        kept = [line for line in path.read_text(encoding="utf-8").split("\n") if line and stays(json.loads(line))]
        self._file.close()
        aside = path.with_name(f".{path.name}.kept")
        aside.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        os.replace(aside, path)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close)

    def close(self) -> None:
        with suppress(OSError):  # of a record that could not be written: that has been said
            self._file.close()


class WandbSink:
    """Numbers to Weights & Biases; offline (files under the run's folder) when there is no login."""

    def __init__(self, mode: str, project: str, name: str, folder: Path, config: Mapping[str, Any]) -> None:
        import wandb

        if mode == "online" and not (os.environ.get("WANDB_API_KEY") or wandb.api.api_key):
            mode = "offline"
        self.mode = mode
        os.environ.setdefault("WANDB_SILENT", "true")
        self._run = wandb.init(
            project=project,
            name=name,
            dir=str(folder),
            config=dict(config),
            mode="offline" if mode == "offline" else "online",
        )

    def write(self, record: Mapping[str, Any]) -> None:
        stage = record.get("stage", "")
        numbers = {f"{stage}/{k}": v for k, v in record.items() if isinstance(v, int | float)}
        self._run.log(numbers)

    def close(self) -> None:
        self._run.finish()


class RunSink:
    """The run's metrics.jsonl and samples.jsonl, other sinks beside them; each record is marked with its stage."""

    def __init__(self, folder: Path, others: Sequence[Sink] = ()) -> None:
        self._metrics = JsonLines(folder / "metrics.jsonl")
        self._samples = JsonLines(folder / "samples.jsonl")
        self._others = others

    def write(self, record: Mapping[str, Any]) -> None:
        for sink in (self._metrics, *self._others):
            sink.write(record)

    def write_sample(self, record: Mapping[str, Any]) -> None:
        self._samples.write(record)

    def keep(self, stays: Callable[[Mapping[str, Any]], bool]) -> None:
        """Drop records of both files; wandb shows what it was told, and what is done again beside it."""
        for file in (self._metrics, self._samples):
            file.keep(stays)

    def close(self) -> None:
        for sink in (self._metrics, self._samples, *self._others):
            sink.close()


def read_jsonl(path: Path) -> Sequence[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
