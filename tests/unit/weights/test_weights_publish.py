"""A publish commits what it verified, and quarantines exactly what it could not."""

import asyncio
import re
from dataclasses import replace

import pytest
import torch
from weights_fakes import ROWS, Engine, Policy

from rayrlhf.errors import WeightSyncError
from rayrlhf.weights.publish import Publication, WeightPublisher

# fault -> what the quarantine says of it
FAULTS = {
    "drops a bucket": r"no weights came for head",
    "gets a flipped bit": r"bucket 1 of 3 arrived altered \(sent [0-9a-f]{32}, got [0-9a-f]{32}\)",
    "gets a bucket of the previous version": r"bucket 1 of 3 arrived altered",
    "has a parameter nobody sends": r"no weights came for extra\.bias",
    "keeps a stale head": r"largest log-prob difference .* is over 0\.0001 on 6 probed tokens",
    "answers a probe too short": r"the trainer probed 6 tokens, the engine 5",
    "raises in begin": "bad failed in begin",
    "raises in load": "bad failed in load",
    "raises in verify": "bad failed in verify",
    "raises in commit": "bad failed in commit",
}


def publish(version: int, policy: Policy, engines: list[Engine]) -> Publication:
    publisher = WeightPublisher(ROWS, "float32", None)
    return asyncio.run(asyncio.wait_for(publisher.publish(version, policy, engines), 10))


def three() -> list[Engine]:
    return [Engine("a"), Engine("bad"), Engine("c")]


def test_a_good_publish_commits_every_engine():
    policy, engines = Policy(), three()
    result = publish(0, policy, engines)
    assert result.committed == ["a", "bad", "c"]
    assert result.quarantined == {}
    assert [e.version for e in engines] == [0, 0, 0]
    for engine in engines:
        assert engine.calls == ["begin", "load", "load", "load", "verify", "commit"]
        assert all(torch.equal(engine.weights[n], policy.weights[n]) for n in policy.weights)


def test_a_publication_counts_its_buckets_bytes_and_seconds():
    result = publish(6, Policy(), three())
    assert result.version == 6
    assert result.buckets == len(result.fingerprints) == len(set(result.fingerprints)) == 3
    assert result.nbytes == 50 * 6 * 4 + 50 * 6 * 4 + 50 * 4
    assert result.seconds > 0
    # A quarter and a half of each of three buckets on the policy's side; engines work side by side.
    assert result.gather_s == 0.75
    assert result.transfer_s == 1.0
    assert result.fingerprint_s == 1.5 + 2.0
    assert result.load_s == 3.0
    assert result.probe_s == 4.0


def test_one_bucket_or_many_give_the_same_weights():
    for bucket_bytes in (1, 1400, 10**9):
        policy, engine = Policy(bucket_bytes), Engine("a")
        publish(0, policy, [engine])
        assert all(torch.equal(engine.weights[n], policy.weights[n]) for n in policy.weights)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_quarantines_its_engine_and_no_other(fault):
    policy, engines = Policy(), three()
    publish(0, policy, engines)
    policy.learn()
    engines[1].fault = fault
    result = publish(1, policy, engines)
    assert result.committed == ["a", "c"]
    assert list(result.quarantined) == ["bad"]
    assert re.search(FAULTS[fault], result.quarantined["bad"])
    assert [engines[0].version, engines[2].version] == [1, 1]
    assert engines[1].version != 1


@pytest.mark.parametrize("fault", FAULTS)
def test_an_engine_once_quarantined_is_back_after_the_next_good_publish(fault):
    policy, engines = Policy(), three()
    publish(0, policy, engines)
    policy.learn()
    engines[1].fault = fault
    publish(1, policy, engines)
    policy.learn()
    engines[1].fault = ""
    assert publish(2, policy, engines).committed == ["a", "bad", "c"]
    assert [e.version for e in engines] == [2, 2, 2]
    assert all(torch.equal(engines[1].weights[n], policy.weights[n]) for n in policy.weights)


def test_a_dropped_bucket_is_seen_even_where_its_parameters_came_before():
    """Only the count of fingerprints tells: the engine believes that nothing is missing."""
    policy, engines = Policy(), three()
    publish(0, policy, engines)

    class Forgetful(Engine):
        async def verify(self, ticket, rows):
            return replace(await super().verify(ticket, rows), missing=())

    engines[1] = Forgetful("bad")
    engines[1].fault = "drops a bucket"
    result = publish(1, policy, engines)
    assert result.quarantined == {"bad": "3 buckets were sent, 2 arrived"}


def test_an_engine_that_failed_is_not_committed_and_what_follows_from_a_failure_is_not_its_reason():
    for fault in ("raises in begin", "raises in load", "gets a flipped bit", "raises in verify"):
        engines = three()
        engines[1].fault = fault
        result = publish(0, Policy(bucket_bytes=1), engines)
        assert "commit" not in engines[1].calls
        assert re.search(FAULTS[fault], result.quarantined["bad"]), fault


def test_an_engine_that_failed_gets_at_most_what_was_sent_ahead():
    engines = three()
    engines[1].fault = "raises in load"
    policy = Policy(bucket_bytes=1)
    policy.weights |= {f"more{i}": torch.zeros(3) for i in range(4)}
    for engine in engines:
        engine.weights |= {f"more{i}": torch.zeros(3) for i in range(4)}
    publish(0, policy, engines)
    assert engines[0].calls.count("load") == 7
    assert engines[1].calls == ["begin", "load", "load"]


@pytest.mark.parametrize("fault", FAULTS)
def test_no_verified_engine_at_all_is_an_error_that_names_each(fault):
    policy, engines = Policy(), [Engine("bad"), Engine("bad")]
    engines[0].name, engines[1].name = "rollout-0", "rollout-1"
    publish(0, policy, engines)
    policy.learn()
    for engine in engines:
        engine.fault = fault
    with pytest.raises(WeightSyncError, match="weights version 1: no engine could be verified") as error:
        publish(1, policy, engines)
    assert "rollout-0: " in str(error.value)
    assert "rollout-1: " in str(error.value)


@pytest.mark.parametrize("call", ["start_publish", "next_bucket 0", "next_bucket 2", "probe"])
def test_a_failing_policy_fails_the_publish_and_no_engine_commits(call):
    policy, engines = Policy(), three()
    policy.fail = call
    with pytest.raises(RuntimeError, match=f"policy failed in {call}"):
        publish(0, policy, engines)
    assert [e.version for e in engines] == [None, None, None]


def test_a_failing_policy_leaves_no_load_unfinished():
    log: list = []
    policy = Policy(log=log)
    policy.fail = "next_bucket 2"
    with pytest.raises(RuntimeError, match="policy failed"):
        publish(0, policy, [Engine("a", log, load_turns=20)])
    assert ("end", 1) in log


@pytest.mark.parametrize("turns", [0, 1, 40])
def test_the_next_bucket_is_gathered_while_the_last_one_loads_and_never_two_ahead(turns):
    log: list = []
    policy = Policy(bucket_bytes=1, log=log)
    policy.weights |= {f"more{i}": torch.zeros(3) for i in range(4)}
    engine = Engine("a", log, load_turns=turns + 3)
    engine.weights |= {f"more{i}": torch.zeros(3) for i in range(4)}
    publish(0, policy, [engine])
    place = {event: i for i, event in enumerate(log)}
    buckets = len(policy.weights)
    assert buckets == 7
    for k in range(buckets - 1):
        assert place["ask", k + 1] < place["end", k]
        assert place["end", k] < place["start", k + 1]
    for k in range(buckets - 2):
        assert place["end", k] < place["ask", k + 2]


def test_the_slowest_engine_holds_back_the_bucket_after_next():
    log: list = []
    policy = Policy(log=log)
    publish(0, policy, [Engine("quick"), Engine("slow", log, load_turns=50)])
    place = {event: i for i, event in enumerate(log)}
    assert place["end", 0] < place["ask", 2]
