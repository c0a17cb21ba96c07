"""Checkpoints: folders that are there whole or not at all, each with a manifest that names every byte of it.

    checkpoints/step-000010/
        manifest.json     step, state (what is no tensor), the run's inputs, and size and hash of every file
        policy/, value/   a learner's state, a file for each rank; its model in Hugging Face format beside it
        ...

Written under another name, flushed to the disk, renamed. What was cut short, altered or lost is found by its hash.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from rayrlhf.errors import CheckpointError

__all__ = ["Checkpoint", "CheckpointStore"]

MANIFEST = "manifest.json"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    folder: Path
    step: int
    state: Mapping[str, Any]
    """what is no tensor"""
    inputs: Mapping[str, Any]
    """all that went into the run"""


@dataclass
class CheckpointStore:
    """The checkpoints of one PPO run or supervised stage: the newest `keep` stay, and beside them the `keep_best` with
    the best score."""

    root: Path
    keep: int = 2
    keep_best: int = 0
    damaged: list[str] = field(default_factory=list, init=False)
    """what `newest` passed over, and why"""

    def begin(self, step: int) -> Path:
        """An empty folder to write the checkpoint into; `finish` makes it one."""
        for broken_off in self.root.glob(".step-*.partial"):
            shutil.rmtree(broken_off, ignore_errors=True)
        partial = self.partial(step)
        partial.mkdir(parents=True)
        return partial

    def partial(self, step: int) -> Path:
        """The folder that `begin` has made, for others who write into it."""
        return self.root / f".step-{step:06d}.partial"

    def finish(self, step: int, state: Mapping[str, Any], inputs: Mapping[str, Any], score: float | None) -> Path:
        """Hash and flush what is in the folder of `begin`, name it, and let go of those that need not stay."""
        partial, final = self.partial(step), self.root / f"step-{step:06d}"
        files = {str(p.relative_to(partial)): _sealed(p) for p in sorted(partial.rglob("*")) if p.is_file()}
        manifest = {"step": step, "state": dict(state), "score": score, "inputs": dict(inputs), "files": files}
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        _flush(partial / MANIFEST)
        for folder in (p for p in (partial, *partial.rglob("*")) if p.is_dir()):
            _flush(folder)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
        _flush(self.root)
        self._retain()
        return final

    def newest(self, whole: bool = True) -> Checkpoint | None:
        """The newest that is whole; those that are not are named in `damaged`. Otherwise its manifest alone is read."""
        self.damaged = []
        for folder in self._folders():
            try:
                return self._read(folder, whole)
            except CheckpointError as error:
                self.damaged.append(str(error))
        return None

    def set_aside(self, after: int) -> None:
        """Take folders that are newer than the one to go on from out of the count: they are damaged."""
        for folder in self._folders():
            if int(folder.name.removeprefix("step-")) > after:
                aside = folder.with_name(f"damaged-{folder.name}")
                shutil.rmtree(aside, ignore_errors=True)
                folder.rename(aside)

    def _read(self, folder: Path, whole: bool) -> Checkpoint:
        try:
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            files, step = manifest["files"], manifest["step"]
            found = Checkpoint(folder, step, manifest["state"], manifest["inputs"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{folder}: its manifest cannot be read ({error})") from None
        for name, (size, digest) in files.items() if whole else ():
            path = folder / name
            if not path.is_file():
                raise CheckpointError(f"{path} is missing")
            if path.stat().st_size != size or _digest(path) != digest:
                raise CheckpointError(f"{path} is not what was saved")
        return found

    def _folders(self) -> list[Path]:
        return sorted((p for p in self.root.glob("step-*") if p.is_dir()), reverse=True)

    def _retain(self) -> None:
        folders = self._folders()
        scored = [(score, folder) for folder in folders if (score := _score(folder)) is not None]
        best = {folder for _, folder in sorted(scored, reverse=True)[: self.keep_best]}
        for folder in folders[self.keep :]:
            if folder not in best:
                shutil.rmtree(folder)


def _score(folder: Path) -> float | None:
    try:
        score = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["score"]
    except (OSError, ValueError, KeyError):
        return None
    return None if score is None else float(score)


def _sealed(path: Path) -> tuple[int, str]:
    """On the disk, not only on its way there; its size and hash."""
    _flush(path)
    return path.stat().st_size, _digest(path)


def _digest(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(2**24):
            digest.update(block)
    return digest.hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
