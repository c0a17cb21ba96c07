"""A run's folder is one process's at a time: who comes second is told who has it, before anything in it is changed.

    <output>/.<name>.lock     locked by whoever has <output>/<name>; a process that was killed has let go of it
    <output>/.<name>.owner    in its place where the file system has no locks: there it stays after a kill

Both are beside the folder, which moves aside when a run of its name starts anew, and are gone when the run ends. A
mount whose locks hold on this machine alone (NFS with `nolock`, Lustre with `localflock`) hides other machines.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil

from rayrlhf.errors import ConfigError

__all__ = ["owned"]

NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)
# Two readings of when a process began may differ by a clock's tick; a process that got its number later, by more.
SAME_START_S = 1.0


@contextmanager
def owned(folder: Path, say: Callable[[str], object]) -> Iterator[None]:
    """Have a run's folder until the block ends, or the process does.

    Args:
        say: gets a line where the file system has no locks.

    Raises:
        ConfigError: another process has it; says which, and since when.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = folder.with_name(f".{folder.name}.lock")
    descriptor = _lock(path, folder)
    if descriptor is None:
        path = folder.with_name(f".{folder.name}.owner")
        descriptor = _sign(path, folder)
        say(f"the file system of {folder} has no locks: {path} says who has it, and stays when its process is killed")
    try:
        yield
    finally:
        if _is(path, descriptor):  # nobody has taken it away by hand
            path.unlink()
        os.close(descriptor)


def _lock(path: Path, folder: Path) -> int | None:
    """An open file that is locked for this process; None where files cannot be locked."""
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except PermissionError:
            raise ConfigError(f"run.output, run.name: {path} cannot be opened", "give another run.name") from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is(path, descriptor):
                os.truncate(descriptor, 0)
                os.write(descriptor, _signature())
                return descriptor
        except BlockingIOError:
            owner = os.pread(descriptor, 4096, 0)
            os.close(descriptor)
            raise _taken(folder, owner, "a process that was killed has let go of it") from None
        except OSError as error:
            os.close(descriptor)
            if error.errno not in NO_LOCKS:
                raise
            path.unlink(missing_ok=True)
            return None
        os.close(descriptor)  # whoever had it took the file away just now


def _is(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _sign(path: Path, folder: Path) -> int:
    """The file is made by one process alone, on any file system; one that a dead process of this machine left goes."""
    owner = b""
    with suppress(FileNotFoundError):
        owner = path.read_bytes()
        if _is_dead(owner):
            aside = path.with_name(f"{path.name}.{os.getpid()}")
            path.rename(aside)
            owner = aside.read_bytes()  # another process may have been quicker, and this be its own
            aside.unlink() if _is_dead(owner) else aside.rename(path)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        raise _taken(folder, owner, f"if that process is gone, delete {path}") from None
    os.write(descriptor, _signature())
    return descriptor


def _signature() -> bytes:
    now = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    owner = {"host": socket.gethostname(), "pid": os.getpid(), "since": now, "began": psutil.Process().create_time()}
    return json.dumps(owner).encode()


def _read(signature: bytes) -> dict[str, Any]:
    try:
        owner = json.loads(signature)
    except ValueError:  # not written yet
        return {}
    return owner if isinstance(owner, dict) else {}


def _is_dead(signature: bytes) -> bool:
    """Whether it is of a process of this machine that is no more; of other machines nothing is known."""
    owner = _read(signature)
    if owner.get("host") != socket.gethostname():
        return False
    try:
        began = float(psutil.Process(owner["pid"]).create_time())
        return abs(began - float(owner["began"])) > SAME_START_S
    except psutil.NoSuchProcess:
        return True
    except (KeyError, TypeError, ValueError, psutil.Error):
        return False


def _taken(folder: Path, signature: bytes, or_else: str) -> ConfigError:
    owner = _read(signature)
    who = (
        "process {pid} on {host} has it since {since}".format_map(owner)
        if owner.keys() >= {"pid", "host", "since"}
        else "another process has it"
    )
    return ConfigError(
        f"run.output, run.name: {folder} is in use: {who}", f"give another run.name, or stop that one first; {or_else}"
    )
