"""Checkpoints: folders that are there whole or not at all, each with a manifest that names every byte of it.

    checkpoints/step-000010/
        manifest.json     step, state (what is no tensor), the run's inputs, size and hash of every file, and of itself
        policy/, value/   a learner's state, a file for each rank; its model in Hugging Face format beside it
        ...

Written under another name, flushed to the disk, renamed. What was cut short, altered or lost is found by its hash.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from rayrlhf.checkpoint.disk import flush, flush_tree
from rayrlhf.errors import CheckpointError

__all__ = ["Checkpoint", "CheckpointStore"]

MANIFEST = "manifest.json"
_STEP = re.compile(r"step-[0-9]{1,15}")


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
        files = {str(p.relative_to(partial)): _sized(p) for p in sorted(partial.rglob("*")) if p.is_file()}
        manifest = {"step": step, "state": dict(state), "score": score, "inputs": dict(inputs), "files": files}
        text = json.dumps(manifest | {"hash": _hash_of(manifest)}, indent=1)
        (partial / MANIFEST).write_text(text, encoding="utf-8")
        flush_tree(partial)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
        flush(self.root)
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
            if _step_of(folder) > after:
                aside = folder.with_name(f"damaged-{folder.name}")
                shutil.rmtree(aside, ignore_errors=True)
                folder.rename(aside)

    def _read(self, folder: Path, whole: bool) -> Checkpoint:
        manifest = _manifest(folder)
        for name, (size, digest) in manifest["files"].items() if whole else ():
            try:
                _check_file(folder, folder / name, size, digest)
            except (OSError, ValueError) as error:  # a name that no file can have, one that may not be read
                raise CheckpointError(f"{folder}: {name[:200]!r} cannot be read ({error.__class__.__name__})") from None
        return Checkpoint(folder, manifest["step"], manifest["state"], manifest["inputs"])

    def _folders(self) -> list[Path]:
        """Newest first."""
        folders = (p for p in self.root.glob("step-*") if p.is_dir() and _STEP.fullmatch(p.name))
        return sorted(folders, key=_step_of, reverse=True)

    def _retain(self) -> None:
        folders = self._folders()
        scored = [(score, folder) for folder in folders if (score := _score(folder)) is not None]
        best = {folder for _, folder in sorted(scored, reverse=True)[: self.keep_best]}
        for folder in folders[self.keep :]:
            if folder not in best:
                shutil.rmtree(folder)


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _manifest(folder: Path) -> dict[str, Any]:
    """What the manifest says, once each entry is of its kind: whoever can write there might have written anything."""
    try:
        manifest: Any = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest.pop("hash") != _hash_of(manifest):
            raise ValueError("it is not what was saved")
        step, files = manifest["step"], manifest["files"]
        if step != _step_of(folder) or isinstance(step, bool | float):
            raise ValueError(f"its step is {str(step)[:60]}")
        for name, kind in (("state", dict), ("inputs", dict), ("files", dict)):
            if not isinstance(manifest[name], kind):
                raise ValueError(f"{name} is no object")
        for name, value in manifest["state"].items():
            if isinstance(value, int | float) and not abs(value) < 2**63:  # NaN too
                raise ValueError(f"{name} of the state is no number that a run has")
        for name, (size, digest) in files.items():
            if not isinstance(size, int) or not isinstance(digest, str):
                raise ValueError(f"{name!r} has no size and hash")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{folder}: its manifest cannot be read ({error})") from None
    return dict(manifest)


def _check_file(folder: Path, path: Path, size: int, digest: str) -> None:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    if path.is_symlink() or not path.resolve().is_relative_to(folder.resolve()):
        raise CheckpointError(f"{path} lies outside the checkpoint")
    if path.stat().st_size != size or _digest(path) != digest:
        raise CheckpointError(f"{path} is not what was saved")


def _score(folder: Path) -> float | None:
    try:
        score = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["score"]
        return float(score) if score is not None and math.isfinite(score) else None
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None


def _hash_of(manifest: Mapping[str, Any]) -> str:
    """Over what JSON keeps of it."""
    plain = json.loads(json.dumps(manifest))
    return xxhash.xxh3_128(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def _sized(path: Path) -> tuple[int, str]:
    return path.stat().st_size, _digest(path)


def _digest(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(2**24):
            digest.update(block)
    return digest.hexdigest()
