"""A disk that is really full: a file system of 64 KiB, in a mount namespace of the test's own."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


def why_not() -> str | None:
    tried = subprocess.run(
        ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True, text=True, check=False
    )
    return f"no file system may be mounted here: {tried.stderr.strip()}" if tried.returncode else None


def on_a_small_disk(folder: Path, work: str) -> str:
    """What `work` prints; in it `disk` is a folder with room for 16 pages."""
    reason = why_not()
    if reason:
        pytest.skip(reason)
    program = f"from pathlib import Path; disk = Path({str(folder)!r})\n" + textwrap.dedent(work)
    command = 'mount -t tmpfs -o size=64k tmpfs "$0" && exec "$1" -c "$2"'
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", command, str(folder), sys.executable, program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_save_that_finds_no_room_leaves_the_one_before_whole_and_the_next_one_goes_well(tmp_path: Path) -> None:
    said = on_a_small_disk(
        tmp_path,
        """
        from rayrlhf.checkpoint.store import CheckpointStore
        store = CheckpointStore(disk / "checkpoints")
        def save(step, size):
            (store.begin(step) / "model").write_bytes(bytes(size))
            store.finish(step, {}, {}, None)
        save(1, 8192)
        try:
            save(2, 2**17)
        except OSError as error:
            print(error.strerror)
        found = store.newest()
        print(found.step, store.damaged)
        save(3, 8192)
        print(store.newest().step, sorted(p.name for p in store.root.iterdir()))
        """,
    )
    assert said.splitlines() == [
        "No space left on device",
        "1 []",
        "3 ['step-000001', 'step-000003']",
    ]


def test_a_ledger_line_that_finds_room_for_its_beginning_alone_is_told_of_and_does_not_count(tmp_path: Path) -> None:
    said = on_a_small_disk(
        tmp_path,
        """
        from rayrlhf.checkpoint.ledger import Facts, append, read_lines
        from rayrlhf.errors import CheckpointError
        path = disk / "ledger.jsonl"
        facts = {"seed": 0, "prompts": [[0, 9]], "samples_per_prompt": 1, "batch_size": 1}
        append(path, {"n": 1, "event": "begin", **facts})
        append(path, {"n": 2, "event": "step", "step": 1, "trained": [[0, 0, 0, 0]], "quarantined": []})
        whole = path.stat().st_size
        try:  # the disk has sixteen pages, the ledger's first among them
            (disk / "filler").write_bytes(bytes(2**17))
        except OSError:
            print("full")
        try:
            append(path, {"n": 3, "event": "step", "step": 2, "trained": [], "quarantined": ["x" * 8000]})
        except CheckpointError as error:
            print("No space left on device" in error.message, "--resume" in error.hint)
        print(path.stat().st_size > whole)
        found = read_lines(path, lambda facts: lambda sample: (0, 0, 0))
        print(found.count, found.size == whole)
        """,
    )
    assert said.splitlines() == ["full", "True True", "True", "2 True"]
