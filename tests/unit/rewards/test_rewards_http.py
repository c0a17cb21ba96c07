"""A reward service that does everything wrong that a service can, over a real connection."""

from __future__ import annotations

import asyncio
import gzip
import logging
import random
import threading
from datetime import UTC, datetime
from typing import Any

import pytest
from rewards_fakes import Service, breaks_off, drips, drops, floods, requests, right, says, stalls

from rayrlhf.config.rewards import RewardSourceConfig
from rayrlhf.rewards.base import Failure, Outcome, RewardRequest
from rayrlhf.rewards.http import HTTPSource, retry_after_s
from rayrlhf.rewards.retry import Retries

TOKEN = "planted-Secret-9f31"


def score(
    service: Service,
    asked: list[RewardRequest],
    token: str | None = None,
    waits: list[float] | None = None,
    **keys: Any,
) -> list[Outcome]:
    """Ask once; waits are written down and not waited for."""
    given = {"retries": 0, "timeout_s": 5.0} | keys
    config = RewardSourceConfig.model_validate({"kind": "http", "url": service.url} | given)

    async def sleep(seconds: float) -> None:
        if waits is not None:
            waits.append(seconds)

    async def run() -> list[Outcome]:
        retries = Retries(config.retries, config.backoff_s, config.max_wait_s, random.Random(0), sleep)
        source = HTTPSource(config, token, retries)
        try:
            return await source.score(asked)
        finally:
            await source.close()

    return asyncio.run(run())


def test_samples_travel_in_batches_and_their_rewards_come_back_in_order(service: Service) -> None:
    service.script = [right]
    assert score(service, requests(5), batch=2) == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert sorted(len(body["samples"]) for body in service.bodies) == [1, 2, 2]
    first = next(sample for body in service.bodies for sample in body["samples"] if sample["id"] == 11)
    assert first == {
        "id": 11,
        "prompt": "prompt 1",
        "messages": [{"role": "user", "content": "prompt 1"}],
        "response": "1",
        "finished": False,
        "source": "made",
    }


def test_nothing_to_score_asks_nobody(service: Service) -> None:
    service.script = [right]
    assert score(service, []) == []
    assert service.bodies == []


def test_a_conversation_is_sent_whole_and_its_last_words_as_the_prompt(service: Service) -> None:
    service.script = [says('{"rewards": [1]}')]
    turns = (("system", "be brief"), ("user", "hello"), ("assistant", "hi"), ("user", "\ud800 how are you?"))
    assert score(service, [RewardRequest(1, turns, "fine", True)]) == [1.0]
    sample = service.bodies[0]["samples"][0]
    assert sample["prompt"] == "\ud800 how are you?"
    assert [message["role"] for message in sample["messages"]] == ["system", "user", "assistant", "user"]


def test_no_more_requests_are_under_way_than_allowed(service: Service) -> None:
    met = threading.Barrier(3, timeout=10)

    def together(handler: Any) -> None:
        met.wait()
        right(handler)

    service.script = [together]
    assert score(service, requests(9), batch=1, concurrency=3) == [float(i) for i in range(9)]
    assert service.most == 3


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("<html>all is well</html>", "the answer is not JSON"),
        ("", "the answer is not JSON"),
        (b"\xff\xfe\x00junk", "the answer is not JSON"),
        ("[" * 100_000, "the answer is not JSON"),
        ('{"rewards": [' + "9" * 5000 + ", 1]}", "the answer is not JSON"),
        ("[1, 2]", 'the answer is not {"rewards": [...]}'),
        ('{"scores": [1, 2]}', 'the answer is not {"rewards": [...]}'),
        ('{"rewards": "1, 2"}', 'the answer is not {"rewards": [...]}'),
        ('{"rewards": {"0": 1, "1": 2}}', 'the answer is not {"rewards": [...]}'),
        ('{"rewards": [1]}', "1 rewards for 2 responses"),
        ('{"rewards": [1, 2, 3]}', "3 rewards for 2 responses"),
        ('{"rewards": []}', "0 rewards for 2 responses"),
    ],
)
def test_an_answer_in_another_form_fails_the_whole_batch(service: Service, body: str | bytes, reason: str) -> None:
    service.script = [says(body)]
    assert score(service, requests(2)) == [Failure(f"http: {reason}")] * 2


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("NaN", "is NaN"),
        ("Infinity", "is infinite"),
        ("-Infinity", "is infinite"),
        ("1e999", "is infinite"),
        ("1e300", "is larger than 1e+09"),
        ("1" + "0" * 400, "is infinite"),
        ("null", "is missing"),
        ("true", "is a bool, no number"),
        ('"0.5"', "is a str, no number"),
        ("[0.5]", "is a list, no number"),
        ('{"reward": 1}', "is a dict, no number"),
    ],
)
def test_a_bad_reward_fails_its_own_sample_and_is_not_asked_for_again(
    service: Service, value: str, reason: str
) -> None:
    service.script = [says(f'{{"rewards": [1, -2.5, {value}, 0]}}')]
    assert score(service, requests(4), retries=3) == [1.0, -2.5, Failure(f"http: the reward {reason}"), 0.0]
    assert len(service.bodies) == 1


def test_a_server_error_is_tried_again_after_a_random_wait(service: Service) -> None:
    service.script, waits = [says("", 500), says("", 503), right], list[float]()
    assert score(service, requests(3), retries=3, backoff_s=2.0, waits=waits) == [0.0, 1.0, 2.0]
    rng = random.Random(0)
    assert waits == [rng.uniform(0, 2.0), rng.uniform(0, 4.0)]


def test_when_the_tries_are_used_up_every_sample_of_the_batch_has_the_reason(service: Service) -> None:
    service.script = [says("secret details", 503)]
    assert score(service, requests(2), retries=3) == [Failure("http: 503 after 4 tries")] * 2
    assert len(service.bodies) == 4


def test_a_failing_batch_leaves_the_others_alone(service: Service) -> None:
    def picky(handler: Any) -> None:
        (says("", 400) if b'"prompt 1"' in handler.asked else right)(handler)

    service.script = [picky]
    assert score(service, requests(3), batch=1) == [0.0, Failure("http: 400"), 2.0]


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 422])
def test_what_the_service_refuses_is_not_sent_again(service: Service, status: int) -> None:
    service.script = [says("", status)]
    assert score(service, requests(1), retries=5) == [Failure(f"http: {status}")]
    assert len(service.bodies) == 1


def test_too_many_requests_waits_as_long_as_asked(service: Service) -> None:
    service.script, waits = [says("", 429, Retry_After="7"), right], list[float]()
    assert score(service, requests(1), retries=1, waits=waits) == [0.0]
    assert waits == [7.0]


def test_a_service_that_asks_for_an_hour_is_not_waited_for(service: Service) -> None:
    service.script, waits = [says("", 429, Retry_After="3600")], list[float]()
    reason = "http: 429, and asks for a longer wait than max_wait_s"
    assert score(service, requests(1), retries=3, waits=waits) == [Failure(reason)]
    assert waits == []


def test_a_redirect_is_not_followed_wherever_it_leads(service: Service) -> None:
    service.script = [says("", 307, Location=f"{service.url}/elsewhere")]
    assert score(service, requests(1), retries=3) == [Failure("http: 307, a redirect, which is not followed")]
    assert service.paths == ["/score"]


def test_a_redirect_to_a_host_that_nobody_can_have_is_a_failure_like_others(service: Service) -> None:
    """httpx reads the address of a redirect that it does not follow, and idna fails at it."""
    service.script = [says("", 302, Location="http://xn--/")]
    assert score(service, requests(1)) == [Failure("http: IDNAError")]


def test_a_dropped_connection_is_tried_again(service: Service) -> None:
    service.script = [drops, breaks_off, right]
    assert score(service, requests(2), retries=2) == [0.0, 1.0]
    assert len(service.bodies) == 3


def test_a_connection_that_always_breaks_has_its_kind_as_the_reason(service: Service) -> None:
    service.script = [breaks_off]
    assert score(service, requests(1), retries=1) == [Failure("http: RemoteProtocolError after 2 tries")]


def test_nobody_listening_is_a_failure() -> None:
    gone = Service()
    gone.server_close()
    assert score(gone, requests(1), retries=1) == [Failure("http: ConnectError after 2 tries")]


@pytest.mark.parametrize("behaviour", [stalls, drips])
def test_an_answer_that_does_not_come_or_never_ends_is_given_up(service: Service, behaviour: Any) -> None:
    service.script = [behaviour, right]
    assert score(service, requests(1), timeout_s=0.3) == [Failure("http: no answer within 0.3 s")]
    service.script = [behaviour, right]
    assert score(service, requests(2), timeout_s=0.3, retries=1) == [0.0, 1.0]


def test_a_flood_is_read_no_further_than_the_limit(service: Service) -> None:
    service.script = [floods]
    found = score(service, requests(1), max_response_mib=0.5)
    assert found == [Failure("http: the answer is longer than 0.5 MiB")]
    assert service.written < 32 * 2**20  # the limit and what lay in buffers between the two


def test_a_compressed_answer_is_refused_unread(service: Service) -> None:
    service.script = [says(gzip.compress(b'{"rewards": [1]}' + b" " * 10_000_000), Content_Encoding="gzip")]
    assert score(service, requests(1)) == [Failure("http: the answer is compressed, which was not asked for")]


def test_after_failures_in_a_row_the_service_is_left_alone(service: Service) -> None:
    service.script = [says("", 500)]
    found = score(service, requests(6), batch=1, concurrency=1, breaker_failures=2)
    assert found == [Failure("http: 500")] * 2 + [Failure("http: 500 (circuit open)")] * 4
    assert len(service.bodies) == 2


def test_a_service_that_refuses_is_not_one_that_fails(service: Service) -> None:
    service.script = [says("", 422)]
    assert score(service, requests(4), batch=1, concurrency=1, breaker_failures=1) == [Failure("http: 422")] * 4


def test_once_the_pause_is_over_a_service_that_is_back_is_used_again(service: Service) -> None:
    service.script = [says("", 500), says("", 500), right]
    config = RewardSourceConfig.model_validate(
        {"kind": "http", "url": service.url, "retries": 5, "breaker_failures": 2, "breaker_pause_s": 20.0}
    )
    now = 0.0

    async def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    async def run() -> list[Outcome]:
        source = HTTPSource(config, None, Retries(5, 0.5, 30.0, random.Random(1), sleep), clock=lambda: now)
        try:
            return await source.score(requests(2))
        finally:
            await source.close()

    assert asyncio.run(run()) == [0.0, 1.0]
    assert len(service.bodies) == 3
    assert now >= 20.0


def test_the_token_is_in_the_header_and_nowhere_else(
    service: Service, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.INFO)

    def echoes(handler: Any) -> None:
        said = str(handler.headers["Authorization"])
        handler.answer(f'{{"rewards": ["{said}"], "error": "{said}"}}'.encode())

    service.script = [says(f"no such token: {TOKEN}", 401)]
    refused = score(service, requests(1), token=TOKEN)
    service.script = [echoes]
    echoed = score(service, requests(1), token=TOKEN)
    service.script = [says(f"Bearer {TOKEN}")]
    junk = score(service, requests(1), token=TOKEN)
    assert service.authorization == [f"Bearer {TOKEN}"] * 3
    captured = capsys.readouterr()
    everything = f"{refused}{echoed}{junk}{caplog.text}{captured.out}{captured.err}"
    assert "the reward is a str" in everything
    assert TOKEN not in everything
    assert TOKEN not in str(service.bodies)


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        (None, 0.0),
        ("120", 120.0),
        (" 5 ", 5.0),
        ("Sun, 06 Nov 1994 08:50:07 GMT", 30.0),
        ("Sun, 06 Nov 1994 08:00:00 GMT", 0.0),
        ("soon", 0.0),
        ("-3", 0.0),
        ("1.5", 0.0),
        ("\u0665", 0.0),  # a digit, and no ASCII
        ("9" * 400, 1e9),
    ],
)
def test_retry_after_is_read_in_both_its_forms_and_junk_asks_for_nothing(header: str | None, seconds: float) -> None:
    assert retry_after_s(header, datetime(1994, 11, 6, 8, 49, 37, tzinfo=UTC)) == seconds
