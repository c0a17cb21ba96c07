"""A log that is followed over a bad line: each character once, in order, to the end."""

from __future__ import annotations

import asyncio
import shlex
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from ray.job_submission import JobDetails, JobStatus, JobType

from rayrlhf.errors import ConfigError, ResourceError
from rayrlhf.launch.follow import OutputClosed, follow
from rayrlhf.launch.jobs import RequestFailed

LOG = "one\ntwo\nthree\nfour\n"


class Server:
    """Tails a log as Ray does, from its start; `tails` says what each attempt gets: chunks, then an end or an error."""

    def __init__(
        self, *tails: list[Any], ends_after: int | None = None, info: Callable[[int], Any] | None = None
    ) -> None:
        self.tails, self.attempts = list(tails), 0
        self.ends_after = len(tails) if ends_after is None else ends_after
        self.info = info

    async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
        self.attempts += 1
        for chunk in self.tails.pop(0) if self.tails else []:
            if isinstance(chunk, Exception):
                raise chunk
            if chunk is None:
                await asyncio.sleep(60)
            yield chunk

    def get_job_info(self, job_id: str) -> JobDetails:
        if self.info and isinstance(problem := self.info(self.attempts), Exception):
            raise problem
        ended = self.attempts >= self.ends_after
        status = JobStatus.SUCCEEDED if ended else JobStatus.RUNNING
        return JobDetails(type=JobType.SUBMISSION, submission_id=job_id, status=status, entrypoint="")

    def get_job_logs(self, job_id: str) -> str:
        return LOG


def followed(server: Server, **settings: Any) -> tuple[str, list[str]]:
    text: list[str] = []
    notices: list[str] = []
    settings = {"pauses_s": (0.001, 0.004), "silence_s": 5.0, "give_up_s": 5.0, **settings}
    details = asyncio.run(follow(server, "job", text.append, notices.append, **settings))
    assert details.status == JobStatus.SUCCEEDED
    return "".join(text), notices


def test_a_log_is_written_once() -> None:
    assert followed(Server(["one\ntwo\n", "three\nfour\n"])) == (LOG, [])


def test_after_a_lost_connection_it_goes_on_where_it_was() -> None:
    lost = RuntimeError("WebSocket connection closed unexpectedly with close code 1006")
    server = Server(
        ["one\n", "two\n", lost], ["one\ntwo\nthree\n", OSError("reset")], ["one\n", "two\nthree\nfo", "ur\n"]
    )
    text, notices = followed(server)
    assert text == LOG
    assert notices == [
        "the connection to the cluster is lost (WebSocket connection closed unexpectedly with close code 1006); "
        "trying again",
        "connected again",
        "the connection to the cluster is lost (reset); trying again",
        "connected again",
    ]


def test_while_nobody_answers_one_sentence_says_so() -> None:
    down = OSError("no route")
    server = Server([down], [down], [down], [LOG], info=lambda attempt: down if attempt < 4 else None)
    text, notices = followed(server)
    assert text == LOG
    assert notices == ["the connection to the cluster is lost (no route); trying again", "connected again"]


def test_a_line_that_went_dead_without_a_word_is_tried_anew() -> None:
    server = Server(["one\n", None], [LOG])
    assert followed(server, silence_s=0.05) == (LOG, [])
    assert server.attempts == 2


def test_what_a_tail_left_out_when_the_job_ended_is_fetched() -> None:
    assert followed(Server(["one\n"])) == (LOG, [])


def test_only_what_comes_after_a_given_place_is_written() -> None:
    assert followed(Server([LOG]), shown=len("one\ntwo\n")) == ("three\nfour\n", [])


def test_it_gives_up_when_nobody_answers_and_says_that_the_job_goes_on() -> None:
    server = Server(ends_after=10**9, info=lambda _: OSError("no route"))
    with pytest.raises(ResourceError, match=r"has not answered for 0\.01 s \(no route\)") as error:
        followed(server, give_up_s=0.01)
    assert "rayrlhf logs --follow" in error.value.hint


def test_a_cluster_that_was_started_anew_knows_the_job_no_longer() -> None:
    server = Server(["one\n"], ends_after=2, info=lambda _: RequestFailed(404, "Job job does not exist"))
    with pytest.raises(ConfigError, match="the cluster no longer knows this job"):
        followed(server)


@pytest.mark.parametrize("problem", [BrokenPipeError(32, "Broken pipe"), OSError(28, "No space left on device")])
def test_an_output_that_takes_no_more_ends_it_and_is_no_lost_connection(problem: OSError) -> None:
    """`logs --follow | head`, or into a file on a full disk."""

    def write(_: str) -> None:
        raise problem

    notices: list[str] = []
    with pytest.raises(OutputClosed, match=str(problem.strerror)):
        asyncio.run(follow(Server([LOG]), "job", write, notices.append, pauses_s=(0.001, 0.004)))
    assert notices == []


def test_a_reader_that_has_seen_enough_ends_the_command_as_it_does_others() -> None:
    code = "from rayrlhf.launch.submit import _write\nfor _ in range(10**6): _write('line\\n')"
    shell = f"{shlex.quote(sys.executable)} -c {shlex.quote(code)} | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.split() == ["line", "141"]
    assert done.stderr == ""
