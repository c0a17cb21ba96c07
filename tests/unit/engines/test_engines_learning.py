"""estimate against a float64 loop, the ratio guard, and losses that do not depend on how a minibatch is cut."""

import math

import numpy as np
import pytest
import torch

from rayrlhf.data.batching import Cutting
from rayrlhf.engines.estimation import EstimateSettings, GapLimits, estimate
from rayrlhf.engines.learning import UpdateSettings, update_policy, update_value
from rayrlhf.engines.scoring import score_logprobs
from rayrlhf.errors import TrainingError
from rayrlhf.types import Experience, Rollout, RolloutInfo, Scores
from tests.engine_fakes import CPU, SHAPES, PlainEngine, Ranks, experiences, rollout, rollouts, tiny_policy, tiny_scalar


def random_scores(batch: list[Rollout], seed: int = 0) -> Scores:
    rng = np.random.default_rng(seed)
    scores = Scores()
    for r in batch:
        i, n = r.info.sample_id, r.info.response_tokens
        scores.logprobs[i] = -rng.random(n).astype(np.float32)
        scores.reference_logprobs[i] = -rng.random(n).astype(np.float32)
        scores.values[i] = rng.normal(size=n).astype(np.float32)
        scores.rewards[i] = float(rng.normal())
    return scores


def kl_by_kind(d: float, kind: str) -> float:
    return {"k1": d, "k2": d * d / 2, "k3": math.exp(-d) - 1 + d}[kind]


def oracle(batch: list[Rollout], scores: Scores, kind: str, gamma: float, lam: float, coef: float) -> dict[int, dict]:
    """Token rewards, GAE by its sum (eq. 16, not the recursion), and whitening; float64 lists, row by row."""
    rows: dict[int, dict] = {}
    for r in batch:
        i, n = r.info.sample_id, r.info.response_tokens
        difference = scores.logprobs[i].astype(float) - scores.reference_logprobs[i].astype(float)
        kl = [kl_by_kind(d, kind) for d in difference]
        reward = [-coef * k for k in kl]
        reward[-1] += scores.rewards[i]
        value = [*scores.values[i].astype(float), 0.0]
        delta = [reward[t] + gamma * value[t + 1] - value[t] for t in range(n)]
        advantage = [sum((gamma * lam) ** (s - t) * delta[s] for s in range(t, n)) for t in range(n)]
        returns = [a + v for a, v in zip(advantage, value, strict=False)]
        rows[i] = {"kl": kl, "advantage": advantage, "returns": returns, "value": value[:-1]}
    every = np.concatenate([row["advantage"] for row in rows.values()])
    for row in rows.values():
        row["white"] = (np.array(row["advantage"]) - every.mean()) / np.sqrt(every.var() + 1e-8)
    return rows


@pytest.mark.parametrize(
    ("kind", "gamma", "lam", "coef"),
    [("k1", 1.0, 0.95, 0.02), ("k2", 1.0, 1.0, 0.5), ("k3", 0.9, 0.8, 1.5), ("k1", 0.99, 0.0, 0.0)],
)
def test_experience_and_metrics_match_a_float64_loop(kind, gamma, lam, coef):
    batch = rollouts(SHAPES)
    scores = random_scores(batch)
    got, metrics = estimate(batch, scores, EstimateSettings(kind, gamma, lam), coef, CPU)
    rows = oracle(batch, scores, kind, gamma, lam, coef)
    for r, e in zip(batch, got, strict=True):
        i = r.info.sample_id
        assert e.rollout is r
        np.testing.assert_allclose(e.advantages, rows[i]["white"], atol=2e-5)
        np.testing.assert_allclose(e.returns, rows[i]["returns"], atol=2e-5)
        assert e.advantages.dtype == e.returns.dtype == np.float32
        assert np.array_equal(e.old_logprobs, scores.logprobs[i])
        assert np.array_equal(e.old_values, scores.values[i])
    returns = np.concatenate([row["returns"] for row in rows.values()])
    values = np.concatenate([row["value"] for row in rows.values()])
    rewards = np.array(list(scores.rewards.values()))
    gaps = np.abs(np.concatenate([scores.logprobs[r.info.sample_id] - r.logprobs for r in batch]))
    assert metrics == pytest.approx(
        {
            "policy/entropy": -np.concatenate([scores.logprobs[r.info.sample_id] for r in batch]).mean(),
            "reward/mean": rewards.mean(),
            "reward/std": rewards.std(),
            "reward/shaped_mean": rewards.mean(),
            "kl/mean": np.mean([sum(row["kl"]) for row in rows.values()]),
            "kl/per_token": np.mean(np.concatenate([row["kl"] for row in rows.values()])),
            "response/length_mean": np.mean([r for _, r in SHAPES]),
            "response/truncated_fraction": 3 / 7,
            "rollout/logprob_gap": gaps.mean(),
            "rollout/logprob_gap_max": gaps.max(),
            "value/explained_variance": 1 - np.var(returns - values) / np.var(returns),
        },
        abs=3e-5,
    )


def two_responses() -> tuple[list[Rollout], Scores]:
    def one(sample_id: int, response: int, engine: list[float], truncated: bool) -> Rollout:
        info = RolloutInfo(sample_id, 0, 2 + response, response, truncated)
        tokens = np.ones(2 + response, dtype=np.int32)
        return Rollout(info, tokens, np.array(engine, dtype=np.float32), np.zeros(response, dtype=np.int32))

    scores = Scores(
        logprobs={5: np.array([-1.0, -2.0], np.float32), 8: np.array([-3.0], np.float32)},
        reference_logprobs={5: np.array([-1.5, -2.0], np.float32), 8: np.array([-2.0], np.float32)},
        values={5: np.array([1.0, 2.0], np.float32), 8: np.array([0.5], np.float32)},
        rewards={5: 3.0, 8: -1.0},
    )
    return [one(5, 2, [-1.25, -2.0], False), one(8, 1, [-3.0], True)], scores


def test_estimate_by_hand():
    """KL 0.5, 0 and -1 at coefficient 2: token rewards -1, 3 and -1 + 2 = 1; gamma = lambda = 1."""
    batch, scores = two_responses()
    got, metrics = estimate(batch, scores, EstimateSettings("k1", 1.0, 1.0), 2.0, CPU)
    assert got[0].returns.tolist() == [2.0, 3.0]
    assert got[1].returns.tolist() == [1.0]
    # advantages 1, 1 and 0.5: mean 5/6, population variance 1/18
    std = math.sqrt(1 / 18)
    assert got[0].advantages.tolist() == pytest.approx([1 / 6 / std, 1 / 6 / std], rel=1e-5)
    assert got[1].advantages.tolist() == pytest.approx([-1 / 3 / std], rel=1e-5)
    assert metrics == pytest.approx(
        {
            "policy/entropy": 2.0,  # log-probs -1, -2, -3
            "reward/mean": 1.0,
            "reward/std": 2.0,
            "reward/shaped_mean": 1.0,
            "kl/mean": -0.25,
            "kl/per_token": -0.5 / 3,
            "response/length_mean": 1.5,
            "response/truncated_fraction": 0.5,
            "rollout/logprob_gap": 0.25 / 3,
            "rollout/logprob_gap_max": 0.25,
            # returns 2, 3, 1 have variance 2/3, the residuals 1, 1, 0.5 variance 1/18
            "value/explained_variance": 1 - 1 / 12,
        }
    )


@pytest.mark.parametrize("field", ["rewards", "values", "logprobs", "reference_logprobs"])
def test_a_number_that_is_not_finite_stops_the_run_and_names_the_sample(field):
    batch, scores = two_responses()
    table = getattr(scores, field)
    table[8] = table[8] * math.nan
    with pytest.raises(TrainingError, match="of sample 8 is not finite"):
        estimate(batch, scores, EstimateSettings("k1", 1.0, 1.0), 2.0, CPU)


def test_equal_returns_have_no_explained_variance():
    batch, scores = two_responses()
    scores.rewards = {5: 0.0, 8: 0.0}
    scores.values = {i: v * 0 for i, v in scores.values.items()}
    _, metrics = estimate(batch, scores, EstimateSettings("k1", 1.0, 1.0), 0.0, CPU)
    assert math.isnan(metrics["value/explained_variance"])


@pytest.mark.parametrize("shares", [[range(3), range(3, 7)], [range(7), range(0)], [[6, 0], [3], [5, 1, 2, 4]]])
def test_estimates_do_not_depend_on_how_ranks_share_the_rollouts(monkeypatch, shares):
    """The second case leaves a rank without any rollout."""
    batch = rollouts(SHAPES)
    scores, given = random_scores(batch), EstimateSettings("k1", 1.0, 0.95)
    whole, metrics = estimate(batch, scores, given, 0.3, CPU)
    ranks = Ranks(len(shares), monkeypatch)
    results = ranks.run(lambda rank: estimate([batch[i] for i in shares[rank]], scores, given, 0.3, CPU))
    for share, (experiences_of_rank, metrics_of_rank) in zip(shares, results, strict=True):
        assert metrics_of_rank == pytest.approx(metrics, rel=1e-5, abs=1e-6)
        for i, e in zip(share, experiences_of_rank, strict=True):
            np.testing.assert_allclose(e.advantages, whole[i].advantages, atol=1e-6)
            assert np.array_equal(e.returns, whole[i].returns)


@pytest.mark.parametrize("field", ["logprobs", "reference_logprobs", "values", "rewards"])
def test_a_score_that_is_missing_is_an_error_not_a_zero(field):
    batch, scores = two_responses()
    del getattr(scores, field)[8]
    with pytest.raises(KeyError):
        estimate(batch, scores, EstimateSettings("k1", 1.0, 0.95), 0.02, CPU)


# ------------------------------------------------------------------------------------------------ updates


class Table:
    """A module that gives what it is told, whatever it is asked."""

    def __init__(self, *answers: list[float]) -> None:
        self.answers = list(answers)
        self.asked: list[dict] = []

    def __call__(self, **inputs):
        self.asked.append(inputs)
        return torch.tensor(self.answers[len(self.asked) - 1])


def single(old: list[float], advantages: list[float], prompt: int = 2) -> Experience:
    r = rollout(0, prompt, len(old))
    other = np.array(old, np.float32)
    return Experience(r, other, np.array(advantages, np.float32), returns=other * 0 + 1, old_values=other * 0)


SETTINGS = UpdateSettings(clip=0.2, cutting=Cutting(100, packed=False), temperature=0.7, first_ratio=GapLimits(1e-4))


def test_a_first_minibatch_at_ratio_1_passes():
    e = single([-1.0, -2.0], [1.0, -3.0])
    table = Table([-1.0, -2.00009])
    metrics = update_policy(PlainEngine(table), [e], [[0]], e, SETTINGS, 1e-3)
    assert metrics["policy/ratio_mean"] == pytest.approx(1.0, abs=1e-4)
    assert metrics["policy/clip_fraction"] == 0.0
    assert metrics["policy/loss"] == pytest.approx(1.0, abs=2e-4)
    assert table.asked[0]["temperature"] == 0.7
    assert table.asked[0]["positions"].tolist() == [2, 3]


@pytest.mark.parametrize("new", [[-1.0, -2.0002], [-0.9998, -2.0], [-1.0, -50.0]])
def test_a_first_minibatch_off_ratio_1_stops_the_run(new):
    e = single([-1.0, -2.0], [1.0, -3.0])
    with pytest.raises(TrainingError, match=r"first minibatch saw log ratios up to .* where they must be 0") as error:
        update_policy(PlainEngine(Table(new)), [e], [[0], [0]], e, SETTINGS, 1e-3)
    assert "positions, temperature or dropout" in error.value.hint


def test_the_worst_micro_batch_of_the_first_minibatch_counts():
    e = single([-1.0], [1.0], prompt=60)  # 61 of 100 tokens: a micro-batch each
    table = Table([-1.5], [-1.0])
    with pytest.raises(TrainingError, match=r"log ratios up to 0\.5 "):
        update_policy(PlainEngine(table), [e, e], [[0, 1]], e, SETTINGS, 1e-3)
    assert len(table.asked) == 2


def test_later_minibatches_may_move_away_from_ratio_1():
    e = single([-1.0], [1.0])
    metrics = update_policy(PlainEngine(Table([-1.0], [-0.5])), [e], [[0], [0]], e, SETTINGS, 1e-3)
    assert metrics["policy/ratio_mean"] == pytest.approx((1 + math.exp(0.5)) / 2)
    assert metrics["policy/clip_fraction"] == 0.5


def test_without_a_limit_any_ratio_passes():
    e = single([-1.0], [1.0])
    settings = UpdateSettings(clip=0.2, cutting=Cutting(100, packed=False))
    metrics = update_policy(PlainEngine(Table([-9.0])), [e], [[0]], e, settings, 1e-3)
    assert metrics["policy/ratio_mean"] == pytest.approx(math.exp(-8.0))


def test_a_first_minibatch_of_nan_stops_the_run():
    e = single([-1.0], [1.0])
    with pytest.raises(TrainingError, match="log ratio"):
        update_policy(PlainEngine(Table([math.nan])), [e], [[0]], e, SETTINGS, 1e-3)


def test_policy_metrics_are_means_over_minibatches():
    e = single([-1.0, -1.0], [2.0, 1.0])
    engine = PlainEngine(Table([-1.0, -1.0], [-1.0, -1.0 + math.log(1.1)]))
    metrics = update_policy(engine, [e], [[0], [0]], e, SETTINGS, 3e-4)
    # losses -(2 + 1) / 2 and -(2 + 1.1) / 2; k3 of the second 1.1 - 1 - log 1.1, over 2 tokens and 2 minibatches
    assert metrics == pytest.approx(
        {
            "policy/loss": -1.525,
            "policy/clip_fraction": 0.0,
            "policy/ratio_mean": (1 + 1.05) / 2,
            "policy/approx_kl_per_token": (0.1 - math.log(1.1)) / 4,
            "policy/grad_norm": 0.0,
            "policy/first_log_ratio_max": 0.0,
            "policy/minibatches": 2.0,
        },
        rel=1e-4,
    )
    assert engine.rates == [3e-4, 3e-4]


def test_values_are_learned_where_they_are_read_and_clipped():
    e = single([0.0, 0.0], [0.0, 0.0])  # old values 0, returns 1
    table = Table([0.1, 0.5])
    settings = UpdateSettings(clip=0.2, cutting=Cutting(100, packed=False))
    metrics = update_value(PlainEngine(table), [e], [[0]], e, settings, 1e-3)
    # half the mean of 0.9^2 and max(0.5^2, 0.8^2)
    assert metrics == pytest.approx(
        {"value/loss": (0.81 + 0.64) / 4, "value/clip_fraction": 0.5, "value/grad_norm": 0.0}, rel=1e-5
    )
    assert table.asked[0]["positions"].tolist() == [1, 2]
    assert "temperature" not in table.asked[0]


def gradients(module: torch.nn.Module) -> list[torch.Tensor]:
    return [p.grad.clone() for p in module.parameters() if p.grad is not None]


def assert_close(got: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(got) == len(expected) > 0
    for a, b in zip(got, expected, strict=True):
        assert float((a - b).abs().max()) <= 1e-5 * float(b.abs().max())


@pytest.mark.parametrize(("update", "build"), [(update_policy, tiny_policy), (update_value, tiny_scalar)])
def test_loss_and_gradients_are_those_of_the_whole_for_any_cut(update, build):
    module, batch = build(), experiences()
    rows = [list(range(len(batch)))]
    results = {}
    for tokens, packed in ((10_000, False), (30, False), (1, False), (10_000, True), (30, True)):
        engine = PlainEngine(module)
        settings = UpdateSettings(clip=0.2, cutting=Cutting(tokens, packed))
        metrics = update(engine, batch, rows, batch[0], settings, 1e-3)
        results[engine.cuts[0]] = metrics, gradients(module)
    assert min(results) == 1
    assert max(results) == len(batch)
    assert len(results) == 3
    whole, expected = results[1]
    for metrics, got in results.values():
        assert metrics == pytest.approx(whole, rel=1e-5, abs=1e-6)
        assert_close(got, expected)


def test_the_loss_of_a_minibatch_is_the_token_mean_over_all_its_responses():
    module, batch = tiny_policy(), experiences()
    scored = score_logprobs(
        PlainEngine(module), [e.rollout for e in batch], batch[0].rollout, Cutting(100), 0.7
    ).logprobs
    losses = []
    for e in batch:
        for new, old, a in zip(scored[e.rollout.info.sample_id], e.old_logprobs, e.advantages, strict=True):
            ratio = math.exp(float(new) - float(old))
            losses.append(-min(ratio * a, min(max(ratio, 0.8), 1.2) * a))
    settings = UpdateSettings(clip=0.2, cutting=Cutting(40, packed=False), temperature=0.7)
    metrics = update_policy(PlainEngine(module), batch, [list(range(len(batch)))], batch[0], settings, 1e-3)
    assert metrics["policy/loss"] == pytest.approx(np.mean(losses), rel=1e-4)


def test_scoring_then_learning_sees_ratio_1_at_any_two_budgets():
    module, fresh = tiny_policy(), rollouts(SHAPES)
    old = score_logprobs(PlainEngine(module), fresh, fresh[0], Cutting(25), 0.7).logprobs
    batch = [
        Experience(e.rollout, old[e.rollout.info.sample_id], e.advantages, e.returns, e.old_values)
        for e in experiences()
    ]
    settings = UpdateSettings(clip=0.2, cutting=Cutting(60, packed=False), temperature=0.7, first_ratio=GapLimits(1e-4))
    metrics = update_policy(PlainEngine(module), batch, [list(range(len(batch)))], batch[0], settings, 1e-3)
    assert metrics["policy/ratio_mean"] == pytest.approx(1.0, abs=1e-5)
    off = UpdateSettings(clip=0.2, cutting=Cutting(60, packed=False), temperature=1.0, first_ratio=GapLimits(1e-4))
    with pytest.raises(TrainingError, match="first minibatch"):
        update_policy(PlainEngine(module), batch, [list(range(len(batch)))], batch[0], off, 1e-3)


@pytest.mark.parametrize(("update", "build"), [(update_policy, tiny_policy), (update_value, tiny_scalar)])
@pytest.mark.parametrize("shares", [[range(3), range(3, 7)], [range(7), range(0)], [[6, 0], [3], [5, 1, 2, 4]]])
def test_metrics_and_gradients_do_not_depend_on_how_ranks_share_a_minibatch(monkeypatch, update, build, shares):
    module, batch = build(), experiences()
    settings = UpdateSettings(clip=0.2, cutting=Cutting(30, packed=False), temperature=0.7)
    whole = update(PlainEngine(module), batch, [list(range(7))], batch[0], settings, 1e-3)
    expected = gradients(module)
    ranks = Ranks(len(shares), monkeypatch)
    engines = [PlainEngine(build(), rank=rank, world_size=len(shares)) for rank in range(len(shares))]
    results = ranks.run(
        lambda rank: update(engines[rank], batch, [list(shares[rank])], batch[0], settings, 1e-3),
    )
    for metrics in results:
        for name in whole.keys() - {"policy/grad_norm", "value/grad_norm"}:  # DeepSpeed's to reduce
            assert metrics[name] == pytest.approx(whole[name], rel=1e-5, abs=1e-6), name
    got = [gradients(engine.module) for engine in engines]
    assert_close([sum(parts) for parts in zip(*got, strict=True)], expected)


def test_the_ratio_guard_stops_every_rank_when_one_is_off(monkeypatch):
    good, bad = single([-1.0], [1.0]), single([-1.5], [1.0])

    def rank_update(rank: int) -> str:
        engine = PlainEngine(Table([-1.0]), rank=rank, world_size=2)
        try:
            update_policy(engine, [good, bad], [[rank]], good, SETTINGS, 1e-3)
        except TrainingError as error:
            return error.message
        return "went on"

    messages = Ranks(2, monkeypatch).run(rank_update)
    assert messages[0] == messages[1]
    assert "log ratios up to 0.5 " in messages[0]
