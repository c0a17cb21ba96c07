"""A run's folder is one process's at a time: two real processes, and a file system without locks."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from rayrlhf.checkpoint.owner import owned
from rayrlhf.errors import ConfigError

HOLDER = """\
import sys
from pathlib import Path
from rayrlhf.checkpoint.owner import owned
if sys.argv[2:]:
    import fcntl
    def none(*_): raise OSError(int(sys.argv[2]), "no locks")
    fcntl.flock = none
with owned(Path(sys.argv[1]), print):
    print("has it", flush=True)
    sys.stdin.read()
"""


@contextmanager
def holder(folder: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Another process that has the folder until its stdin is closed."""
    command = [sys.executable, "-c", HOLDER, str(folder), *arguments]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin
    assert process.stdout
    try:
        while process.stdout.readline() != "has it\n":
            assert process.poll() is None
        yield process
    finally:
        process.stdin.close()
        process.wait()
        process.stdout.close()


def refused(folder: Path) -> ConfigError:
    with pytest.raises(ConfigError) as error, owned(folder, print):
        pass
    return error.value


@pytest.fixture
def without_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "no locks")

    monkeypatch.setattr(fcntl, "flock", flock)


def test_a_folder_that_another_process_has_is_refused_with_who_has_it_and_since_when(tmp_path: Path) -> None:
    with holder(tmp_path / "demo") as other:
        error = refused(tmp_path / "demo")
        assert f"{tmp_path / 'demo'} is in use: process {other.pid} on {socket.gethostname()} " in error.message
        assert " has it since 20" in error.message
        assert "give another run.name, or stop that one first" in error.hint
        with owned(tmp_path / "another", print):
            pass


def test_a_folder_whose_holder_was_killed_is_free_at_once(tmp_path: Path) -> None:
    with holder(tmp_path / "demo") as other:
        other.send_signal(signal.SIGKILL)
        other.wait()
        with owned(tmp_path / "demo", print):
            owner = json.loads((tmp_path / ".demo.lock").read_text())
            assert (owner["pid"], owner["host"]) == (os.getpid(), socket.gethostname())


def test_what_is_given_back_leaves_nothing_and_can_be_had_again(tmp_path: Path) -> None:
    for _ in range(2):
        with owned(tmp_path / "runs" / "demo", print):
            assert not (tmp_path / "runs" / "demo").exists()
        assert list((tmp_path / "runs").iterdir()) == []


def test_a_folder_that_moves_aside_while_it_is_had_does_not_take_the_lock_along(tmp_path: Path) -> None:
    (tmp_path / "demo").mkdir()
    with owned(tmp_path / "demo", print):
        (tmp_path / "demo").rename(tmp_path / "demo.1")
        (tmp_path / "demo").mkdir()
        refused(tmp_path / "demo")
    assert list((tmp_path / "demo.1").iterdir()) == []


def test_a_child_that_outlives_its_parent_does_not_keep_the_folder(tmp_path: Path) -> None:
    """Ray's processes may: a lock is of all who have the file open."""
    with owned(tmp_path / "demo", print):
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, close_fds=False)
    try:
        assert child.poll() is None
        with owned(tmp_path / "demo", print):
            assert json.loads((tmp_path / ".demo.lock").read_text())["pid"] == os.getpid()
    finally:
        child.communicate(b"\n")


def test_a_lock_that_another_user_made_is_told_as_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: object) -> int:
        raise PermissionError

    monkeypatch.setattr(os, "open", denied)
    assert "demo.lock cannot be opened" in refused(tmp_path / "demo").message


# Where files cannot be locked.


def test_without_locks_a_file_says_who_has_the_folder(
    tmp_path: Path, without_locks: None, capsys: pytest.CaptureFixture[str]
) -> None:
    with holder(tmp_path / "demo", str(errno.ENOSYS)) as other:
        error = refused(tmp_path / "demo")
        assert f"process {other.pid} on " in error.message
        assert f"if that process is gone, delete {tmp_path / '.demo.owner'}" in error.hint
    with owned(tmp_path / "demo", print):
        assert "has no locks" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_without_locks_what_a_killed_process_of_this_machine_left_is_taken_over(
    tmp_path: Path, without_locks: None
) -> None:
    with holder(tmp_path / "demo", str(errno.ENOLCK)) as other:
        other.send_signal(signal.SIGKILL)
        other.wait()
        assert (tmp_path / ".demo.owner").exists()
        with owned(tmp_path / "demo", print):
            refused(tmp_path / "demo")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "free"),
    [
        ({"host": "elsewhere", "pid": 2**22 + 1}, False),  # nothing is known of it
        ({"began": 1.0}, True),  # this process has the number of one that is gone
        ({"pid": None}, False),
    ],
)
def test_without_locks_a_process_is_known_by_its_machine_its_number_and_when_it_began(
    tmp_path: Path, without_locks: None, changes: dict[str, object], free: bool
) -> None:
    with owned(tmp_path / "demo", print):
        left = json.loads((tmp_path / ".demo.owner").read_text())
    (tmp_path / ".demo.owner").write_text(json.dumps(left | changes))
    if free:
        with owned(tmp_path / "demo", print):
            pass
    else:
        refused(tmp_path / "demo")
        assert (tmp_path / ".demo.owner").exists()


def test_an_owner_that_cannot_be_read_is_another_process(tmp_path: Path, without_locks: None) -> None:
    (tmp_path / ".demo.owner").write_text("[")
    assert "is in use: another process has it" in refused(tmp_path / "demo").message
