"""Looking at a job and leaving it."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from rayrlhf import cli
from rayrlhf.launch import submit as jobs

ADDRESS = ("--address", "http://head:8265")


def ends_with(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["rayrlhf", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert isinstance(end.value.code, int)
    return end.value.code


@pytest.mark.parametrize(
    ("reason", "code"), [(KeyboardInterrupt, 130), (cli._Terminated, 143)], ids=["Ctrl-C", "SIGTERM"]
)
@pytest.mark.parametrize("command", [("logs", "mine-1", "--follow"), ("stop", "mine-1")], ids=["logs", "stop"])
def test_whoever_leaves_is_told_that_the_job_goes_on(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: tuple[str, ...],
    reason: type[BaseException],
    code: int,
) -> None:
    def left(*_: Any) -> int:
        raise reason

    monkeypatch.setattr(jobs, "show_logs", left)
    monkeypatch.setattr(jobs, "stop", left)
    assert ends_with(monkeypatch, *command, *ADDRESS) == code
    said = capsys.readouterr().err
    assert said == (
        "mine-1 goes on; to look at it again: rayrlhf logs mine-1 --follow --address http://head:8265\n"
    )  # and not that its actors are gone


def test_following_ends_with_the_jobs_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "submit", lambda *_: "mine-1")
    monkeypatch.setattr(jobs, "show_logs", lambda job, *_: 2 if job == "mine-1" else 0)
    assert ends_with(monkeypatch, "submit", "mine.yaml", "--follow", *ADDRESS) == 2
    assert ends_with(monkeypatch, "submit", "mine.yaml", *ADDRESS) == 0
