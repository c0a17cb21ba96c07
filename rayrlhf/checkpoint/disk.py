"""What a power loss must not take: files and folders are on the disk once these return, not only on their way there."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["flush", "flush_tree"]


def flush(path: Path) -> None:
    """A file's bytes; of a folder, the names in it."""
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
