"""Files that are there or are not: written aside and renamed; and, once flushed, not taken by a power loss."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["flush", "flush_tree", "write_whole"]


def write_whole(path: Path, data: bytes) -> None:
    """The file appears whole or not at all."""
    part = path.with_name(path.name + ".part")
    try:
        part.write_bytes(data)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """On the disk, not only on the way there: a file's bytes; of a folder, the names in it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_tree(folder: Path) -> None:
    """All that is in it, links left out."""
    for path in (folder, *folder.rglob("*")):
        if path.is_dir() or (path.is_file() and not path.is_symlink()):
            flush(path)
