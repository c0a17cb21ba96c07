"""How the work is dealt to ranks: everything once, the same for policy and value, the same again."""

import asyncio
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayrlhf.actors.roles import LearnerRoles, ScorerRoles, StepPlan, TextPlan, _deal, memory_per_role
from rayrlhf.algorithms.kl import AdaptiveKL
from rayrlhf.driver.pacing import TextStream
from rayrlhf.driver.protocols import ExperienceBatch, RolloutBatch, ScoredBatch, ScoredPart
from rayrlhf.errors import TrainingError
from rayrlhf.types import RolloutInfo


class Group:
    """An `ActorGroup` of nothing: notes each call and answers with `results`, one per rank."""

    def __init__(self, role: str, ranks: int, results: dict[str, list[Any]] | None = None) -> None:
        self.role, self.ranks = role, ranks
        self.calls: list[tuple[str, tuple, list[tuple]]] = []
        self._results = results or {}

    async def call(self, method: str, *shared: Any, each: list[tuple] | None = None) -> list[Any]:
        self.calls.append((method, shared, each))
        assert each is None or len(each) == self.ranks
        await asyncio.sleep(0)
        return self._results.get(method, [{} for _ in range(self.ranks)])


def infos(count: int, seed: int = 0) -> tuple[RolloutInfo, ...]:
    """In the random order in which engines finish."""
    rng = np.random.default_rng(seed)
    made = [RolloutInfo(1000 + i, i % 5, int(n), 1, False) for i, n in enumerate(rng.integers(2, 60, count))]
    return tuple(made[i] for i in rng.permutation(count))


def roles(policy: Group, value: Group, minibatch_size: int = 4, epochs: int = 2, seed: int = 0) -> LearnerRoles:
    return LearnerRoles(policy, value, plan(minibatch_size=minibatch_size, epochs=epochs, seed=seed))


def plan(**changes: Any) -> StepPlan:
    given = {
        "minibatch_size": 4,
        "epochs": 2,
        "seed": 0,
        "samples_per_prompt": 1,
        "value_warmup_steps": 0,
        "first_kl_limit": 1e-4,
        "learning_rates": lambda step: (0.1 + step, 0.2 + step),
    }
    return StepPlan(**given | changes)


def minibatches(step: int, seed: int = 0, batch=None, **options) -> list[list[int]]:
    group = Group("policy", 1)
    cuts = roles(group, group, seed=seed, **options)._minibatches(batch or infos(12), step)
    return [[info.sample_id for info in cut] for cut in cuts]


@given(st.integers(1, 30), st.integers(1, 6))
@settings(max_examples=50, deadline=None)
def test_every_sample_is_dealt_to_one_rank(count, ranks):
    shares = _deal(infos(count), ranks)
    assert len(shares) == ranks
    assert sorted(i for share in shares for i in share) == [1000 + i for i in range(count)]


def test_ranks_are_balanced_by_tokens():
    made = [RolloutInfo(i, 0, tokens, 1, False) for i, tokens in enumerate([90, 10, 10, 10, 30, 30])]
    assert _deal(made, 2) == [[0], [1, 2, 3, 4, 5]]


def test_the_order_in_which_engines_finish_changes_no_share_and_no_minibatch():
    batch = infos(20)
    shuffled = tuple(batch[i] for i in np.random.default_rng(1).permutation(20))
    assert _deal(batch, 3) == _deal(shuffled, 3)
    assert minibatches(4, batch=batch) == minibatches(4, batch=shuffled)


@pytest.mark.parametrize("count", [12, 10, 3])
def test_every_sample_is_in_one_minibatch_an_epoch(count):
    cuts = minibatches(0, batch=infos(count), epochs=3)
    per_epoch = -(-count // 4)
    assert len(cuts) == 3 * per_epoch
    for epoch in range(3):
        seen = Counter(i for cut in cuts[epoch * per_epoch : (epoch + 1) * per_epoch] for i in cut)
        assert seen == Counter(1000 + i for i in range(count))


def test_each_epoch_and_each_step_has_a_fresh_shuffle():
    orders = set()
    for step in range(5):
        flat = [i for cut in minibatches(step) for i in cut]
        orders |= {tuple(flat[:12]), tuple(flat[12:])}
    assert len(orders) == 10


def test_seed_and_step_make_the_minibatches():
    assert minibatches(3, seed=7) == minibatches(3, seed=7)
    assert minibatches(3, seed=7) != minibatches(3, seed=8)
    assert minibatches(3, seed=7) != minibatches(4, seed=7)


def experience() -> ExperienceBatch:
    return ExperienceBatch(infos(10), ("e0", "e1"), {"kl/per_token": 0.0, "kl/mean": 1.5, "reward/mean": 0.25}, [])


def test_policy_and_value_learn_from_the_same_minibatches_each_dealt_to_its_own_ranks():
    policy, value = Group("policy", 2), Group("value", 3)
    asyncio.run(roles(policy, value).update(experience(), 1))
    taken = []
    for group, rate in ((policy, 1.1), (value, 1.2)):
        ((method, shared, each),) = group.calls
        assert method == "update"
        assert shared == (pytest.approx(rate), "e0", "e1")
        by_rank = [minibatch_ids for minibatch_ids, _ in each]
        assert {len(ids) for ids in by_rank} == {6}  # ten samples in minibatches of 4: three an epoch, two epochs
        taken.append([sorted(i for ids in by_rank for i in ids[number]) for number in range(6)])
    assert taken[0] == taken[1] == [sorted(cut) for cut in minibatches(1, batch=experience().infos)]


def test_an_update_leaves_a_record_of_what_was_learned_from_and_how_fast():
    """Over all ranks and in order: what another trainer needs to take the same step."""
    policy, value = Group("policy", 2), Group("value", 1)
    text = TextPlan(TextStream(100, seed=3), blocks_per_response=0.5, measure_every=10)
    learners = LearnerRoles(policy, value, plan(text=text))
    assert learners.last is None
    asyncio.run(learners.update(experience(), 1))
    last = learners.last
    assert last.minibatches == minibatches(1, batch=experience().infos)
    assert last.rates == {"policy": pytest.approx(1.1), "value": pytest.approx(1.2)}
    given = [share[0] for _, share in policy.calls[0][2]]
    assert [sorted(a + b) for a, b in zip(*given, strict=True)] == [sorted(blocks) for blocks in last.text]
    assert [len(blocks) for blocks in last.text] == [2, 2, 1, 2, 2, 1]


def test_a_report_joins_the_metrics_of_both_and_carries_the_kl():
    policy = Group("policy", 2, {"update": [{"policy/loss": 1.0}, {"policy/loss": 1.0}]})
    value = Group("value", 1, {"update": [{"value/loss": 2.0}]})
    report = asyncio.run(roles(policy, value).update(experience(), 0))
    assert report.metrics == {
        "kl/mean": 1.5,
        "kl/per_token": 0.0,
        "reward/mean": 0.25,
        "policy/loss": 1.0,
        "value/loss": 2.0,
        "policy/learning_rate": 0.1,
    }
    assert (report.kl, report.num_samples) == (1.5, 10)


def test_policy_and_value_learn_at_the_same_time():
    started = []

    class Meeting(Group):
        async def call(self, method, *shared, each=None):
            started.append(self.role)
            while len(started) < 2:
                await asyncio.sleep(0)
            return [{}]

    asyncio.run(asyncio.wait_for(roles(Meeting("policy", 1), Meeting("value", 1)).update(experience(), 0), 5))
    assert sorted(started) == ["policy", "value"]


def test_estimate_hands_every_handle_to_every_policy_rank_and_a_share_of_ids_to_each():
    results = [(({"kl/per_token": 0.0, "kl/mean": 0.5}, ["text"]), "x0"), (({"kl/mean": 0.5}, []), "x1")]
    policy = Group("policy", 2, {"estimate": results})
    batch = infos(7)
    scored = ScoredBatch(RolloutBatch(batch, ("r0", "r1")), ("s0", "s1", "s2"), 5)
    got = asyncio.run(roles(policy, Group("value", 1)).estimate(scored, 0.3))
    ((method, shared, each),) = policy.calls
    assert (method, shared) == ("estimate", (0.3, 5, 2, "r0", "r1", "s0", "s1", "s2"))
    assert sorted(i for (ids,) in each for i in ids) == [1000 + i for i in range(7)]
    assert got == ExperienceBatch(batch, ("x0", "x1"), {"kl/per_token": 0.0, "kl/mean": 0.5}, ["text"])


def test_every_role_scores_every_sample_once():
    lost = {1003: "no answer"}
    groups = [Group("a", 2, {"score": [({}, "a0"), (lost, "a1")]}), Group("b", 1, {"score": [({}, "b0")]})]
    scorers, batch = ScorerRoles(groups[:1], groups[1:]), RolloutBatch(infos(9), ("r0", "r1"))
    assert asyncio.run(scorers.frozen(batch)) == ScoredPart(("a0", "a1"), lost)
    assert asyncio.run(scorers.learning(batch)) == ("b0",)
    for group in groups:
        ((method, shared, each),) = group.calls
        assert (method, shared) == ("score", ("r0", "r1"))
        assert sorted(i for (ids,) in each for i in ids) == [1000 + i for i in range(9)]


def test_memory_is_that_of_the_largest_rank_of_each_role():
    groups = [Group("policy", 2, {"memory_gib": [1.0, 3.0]}), Group("value", 1, {"memory_gib": [2.0]})]
    assert asyncio.run(memory_per_role(groups)) == {"memory/policy_gib": 3.0, "memory/value_gib": 2.0}


@pytest.mark.parametrize("first_kl", [2e-4, -2e-4, float("nan")])
def test_a_policy_that_is_not_its_reference_before_the_first_update_stops_the_run(first_kl: float):
    group = Group("policy", 1)
    batch = ExperienceBatch(infos(4), ("e0",), {"kl/mean": 0.0, "kl/per_token": first_kl}, [])
    with pytest.raises(TrainingError, match="before any update"):
        asyncio.run(roles(group, group).update(batch, step=0))
    assert not group.calls


@given(st.integers(1, 8), st.integers(1, 5), st.integers(1, 4))
@settings(max_examples=50, deadline=None)
def test_the_responses_to_one_prompt_are_dealt_to_one_rank(prompts, together, ranks):
    rng = np.random.default_rng(prompts)
    made = [RolloutInfo(i, i // together, int(rng.integers(2, 60)), 1, False) for i in range(prompts * together)]
    shares = _deal(made, ranks, together)
    assert sorted(i for share in shares for i in share) == list(range(prompts * together))
    owner = {i: rank for rank, share in enumerate(shares) for i in share}
    for i in owner:
        assert owner[i] == owner[i - i % together]


def test_estimation_is_dealt_by_prompt_and_scoring_and_learning_are_not():
    policy = Group("policy", 2, {"estimate": [(({}, []), "x0"), (({}, []), "x1")]})
    made = tuple(RolloutInfo(i, i // 4, 10, 5, False) for i in range(8))
    scored = ScoredBatch(RolloutBatch(made, ("r0",)), ("s0",), 0)
    asyncio.run(LearnerRoles(policy, None, plan(samples_per_prompt=4)).estimate(scored, 0.0))
    assert [ids for (ids,) in policy.calls[0][2]] == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_without_a_value_model_the_policy_learns_alone():
    policy = Group("policy", 1, {"update": [{"policy/loss": 1.0}]})
    report = asyncio.run(LearnerRoles(policy, None, plan()).update(experience(), 0))
    assert report.metrics["policy/loss"] == 1.0
    assert [call[0] for call in policy.calls] == ["update"]


def test_while_the_critic_warms_up_it_learns_alone_and_draws_no_text():
    policy, value = Group("policy", 1), Group("value", 1, {"update": [{"value/loss": 2.0}]})
    stream = TextStream(5, seed=0)
    learners = LearnerRoles(policy, value, plan(value_warmup_steps=2, text=TextPlan(stream, 1.0, 1)))
    for step in (0, 1):
        report = asyncio.run(learners.update(experience(), step))
        assert report.metrics["policy/learning_rate"] == 0.0
        assert report.metrics["value/loss"] == 2.0
    assert not policy.calls
    assert stream.drawn == 0
    asyncio.run(learners.update(experience(), 2))
    assert len(policy.calls) == 1
    assert stream.drawn > 0


def test_an_adaptive_kl_coefficient_stays_while_the_policy_does_not_learn():
    """Nothing it does can move a KL of 0 then: it would shrink with every step of the warm-up, to no end."""
    policy, value = Group("policy", 1), Group("value", 1)
    learners, kl = LearnerRoles(policy, value, plan(value_warmup_steps=2)), AdaptiveKL(0.2, target=6.0, horizon=100)
    coefs = []
    for step in range(3):
        report = asyncio.run(learners.update(experience(), step))
        kl.update(report.kl, report.num_samples)
        coefs.append(kl.coef)
    assert coefs == [0.2, 0.2, pytest.approx(0.2 * (1 - 0.2 * 10 / 100))]


def test_each_minibatch_gets_blocks_for_its_episodes_shared_out_over_the_ranks():
    policy, value = Group("policy", 2), Group("value", 1)
    stream = TextStream(100, seed=3)
    learners = LearnerRoles(policy, value, plan(epochs=1, text=TextPlan(stream, 1.5, measure_every=4)))
    asyncio.run(learners.update(experience(), 4))
    # minibatches of 4, 4 and 2 responses: 6, 6 and 3 blocks
    expected = TextStream(100, seed=3)
    drawn = [expected.take(6), expected.take(6), expected.take(3)]
    for rank, (_, (blocks, measure)) in enumerate(policy.calls[0][2]):
        assert blocks == [ids[rank::2] for ids in drawn]
        assert measure, "step 4, measured every 4"
    assert [text for _, text in value.calls[0][2]] == [None]
    asyncio.run(learners.update(experience(), 5))
    assert [text[1] for _, text in policy.calls[1][2]] == [False, False]


def test_a_small_share_of_text_is_still_one_block():
    policy = Group("policy", 1)
    learners = LearnerRoles(policy, None, plan(epochs=1, text=TextPlan(TextStream(9, 0), 0.01, 1)))
    asyncio.run(learners.update(experience(), 0))
    assert [len(ids) for ids in policy.calls[0][2][0][1][0]] == [1, 1, 1]
