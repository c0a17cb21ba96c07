"""What the options of a PPO step change: scores, advantages, masks, weights, early stop, pretraining text."""

import math

import numpy as np
import pytest
import torch

from rayrlhf.data.batching import Cutting
from rayrlhf.engines.estimation import EstimateSettings, GapLimits, estimate
from rayrlhf.engines.learning import TextShare, UpdateSettings, update_policy, update_value
from rayrlhf.errors import TrainingError
from rayrlhf.types import Experience, Rollout, RolloutInfo, Scores
from tests.engine_fakes import CPU, VOCAB, PlainEngine, Ranks, experiences, rollout, tiny_policy


def made(sample_id: int, engine: list[float], truncated: bool = False) -> Rollout:
    n = len(engine)
    info = RolloutInfo(sample_id, sample_id // 2, 2 + n, n, truncated)
    return Rollout(info, np.ones(2 + n, np.int32), np.array(engine, np.float32), np.zeros(n, np.int32))


def four() -> tuple[list[Rollout], Scores]:
    """Two prompts, two responses each; KL (k1) of the responses 0.5, 0, -1 and 0; the third is cut."""
    batch = [made(0, [-1.0, -2.0]), made(1, [-1.0]), made(2, [-3.0], True), made(3, [-1.0, -1.0])]
    scores = Scores(
        logprobs={r.info.sample_id: r.logprobs.copy() for r in batch},
        reference_logprobs={r.info.sample_id: r.logprobs.copy() for r in batch},
        rewards={0: 3.0, 1: 1.0, 2: -1.0, 3: 2.0},
    )
    scores.reference_logprobs[0][0] -= 0.5
    scores.reference_logprobs[2][0] += 1.0
    scores.values = {r.info.sample_id: np.zeros_like(r.logprobs) for r in batch}
    return batch, scores


def settings(**changes) -> EstimateSettings:
    return EstimateSettings(**{"kl_kind": "k1", "gamma": 1.0, "lam": 1.0} | changes)


def returns(**changes) -> list[float]:
    """With values 0 and gamma 1 the first return of a response is its score less its KL penalty."""
    batch, scores = four()
    made, _ = estimate(batch, scores, settings(**changes), changes.pop("coef", 0.0), CPU)
    return [float(e.returns[0]) for e in made]


# ---- scores ------------------------------------------------------------------------------------------------


def test_scores_enter_as_they_are():
    assert returns() == [3.0, 1.0, -1.0, 2.0]


def test_scores_are_clipped_on_both_sides():
    assert returns(score_clip=1.5) == [1.5, 1.0, -1.0, 1.5]
    assert returns(score_clip=0.5) == [0.5, 0.5, -0.5, 0.5]


def test_normalised_scores_have_mean_0_and_variance_1():
    # 3, 1, -1, 2: mean 5/4, population variance 15/4 - 25/16 = 35/16
    std = math.sqrt(35 / 16)
    assert returns(normalize=True) == pytest.approx([1.75 / std, -0.25 / std, -2.25 / std, 0.75 / std], rel=1e-6)


def test_normalising_comes_before_clipping_and_both_before_the_treatment_of_cut_responses():
    std = math.sqrt(35 / 16)
    got = returns(normalize=True, score_clip=1.0, truncated="penalty", truncated_value=0.25)
    assert got == pytest.approx([1.0, -0.25 / std, -1.25, 0.75 / std], rel=1e-6)


def test_a_cut_response_gets_the_replacement_and_the_raw_reward_is_still_reported():
    batch, scores = four()
    got, metrics = estimate(batch, scores, settings(truncated="replace", truncated_value=-4.0), 0.0, CPU)
    assert [float(e.returns[0]) for e in got] == [3.0, 1.0, -4.0, 2.0]
    assert metrics["reward/mean"] == 1.25
    assert metrics["reward/shaped_mean"] == 0.5


def test_normalising_over_ranks_is_normalising_the_whole(monkeypatch):
    batch, scores = four()
    whole, metrics = estimate(batch, scores, settings(normalize=True), 0.1, CPU)
    shares = [[0, 3], [2], [1]]
    results = Ranks(3, monkeypatch).run(
        lambda rank: estimate([batch[i] for i in shares[rank]], scores, settings(normalize=True), 0.1, CPU)
    )
    for share, (got, theirs) in zip(shares, results, strict=True):
        assert theirs == pytest.approx(metrics, rel=1e-5)
        for i, e in zip(share, got, strict=True):
            np.testing.assert_allclose(e.advantages, whole[i].advantages, atol=1e-6)


# ---- responses that are not trained on ---------------------------------------------------------------------


def test_a_masked_response_trains_nothing_and_is_in_no_statistic_of_the_others():
    batch, scores = four()
    got, metrics = estimate(batch, scores, settings(truncated="mask"), 0.0, CPU)
    assert [e.trained for e in got] == [True, True, False, True]
    assert got[2].advantages.tolist() == [0.0]
    without = [r for r in batch if not r.info.truncated]
    alone, _ = estimate(without, scores, settings(truncated="mask"), 0.0, CPU)
    for e, other in zip([got[0], got[1], got[3]], alone, strict=True):
        np.testing.assert_allclose(e.advantages, other.advantages, atol=1e-6)
    assert metrics["reward/mean"] == 1.25  # still reported
    assert metrics["reward/shaped_mean"] == 2.0, "of 3, 1 and 2: the score of the masked one enters no reward"
    assert metrics["response/truncated_fraction"] == 0.25


@pytest.mark.parametrize("update", [update_policy, update_value])
def test_a_masked_response_leaves_losses_as_if_it_were_not_there(update):
    class Constant(torch.nn.Module):
        def forward(self, tokens, positions, temperature=1.0, position_ids=None):
            return torch.full(positions.shape, -1.5)

    batch = experiences()
    masked = [*batch[:3], Experience(**{**fields(batch[3]), "trained": False}), *batch[4:]]
    given = UpdateSettings(clip=0.2, cutting=Cutting(40))
    everyone = list(range(len(batch)))
    with_it = update(PlainEngine(Constant()), masked, [everyone], batch[0], given, 0.1)
    without = update(PlainEngine(Constant()), batch, [[i for i in everyone if i != 3]], batch[0], given, 0.1)
    assert with_it == pytest.approx(without, rel=1e-6)


def fields(e: Experience) -> dict:
    return {name: getattr(e, name) for name in Experience.__dataclass_fields__}


def test_a_minibatch_of_masked_responses_has_loss_0():
    e = Experience(**{**fields(experiences()[0]), "trained": False})
    engine = PlainEngine(tiny_policy())
    metrics = update_policy(engine, [e], [[0]], e, UpdateSettings(0.2, Cutting(99)), 0.1)
    assert engine.losses == [0.0]
    assert metrics["policy/grad_norm"] == 0.0
    assert math.isnan(metrics["policy/loss"]), "nothing to report a mean of"
    assert math.isnan(metrics["policy/ratio_mean"])


@pytest.mark.parametrize("update", [update_policy, update_value])
def test_a_minibatch_of_masked_responses_is_in_no_mean_over_minibatches(update):
    """It would count as one of ratio 0 and loss 0, and halve what is reported of the others."""
    seen = Experience(**{**fields(one([-1.0, -1.0], [1.0, 2.0])), "returns": np.ones(2, np.float32)})
    seen = Experience(**{**fields(seen), "old_values": np.zeros(2, np.float32)})
    masked = Experience(**{**fields(seen), "trained": False})
    given = UpdateSettings(0.2, Cutting(99))
    alone = update(PlainEngine(Told([-1.0, -1.0])), [seen], [[0]], seen, given, 0.1)
    beside = update(PlainEngine(Told([-1.0, -1.0])), [seen, masked], [[0], [1]], seen, given, 0.1)
    means = [name for name in alone if not name.endswith(("grad_norm", "minibatches"))]
    assert [beside[name] for name in means] == [alone[name] for name in means]


# ---- advantages --------------------------------------------------------------------------------------------


def test_group_estimators_compare_the_responses_to_a_prompt_kl_included():
    batch, scores = four()
    scores.values = {}
    given = settings(advantage="leave_one_out", group_size=2)
    got, metrics = estimate(batch, scores, given, 2.0, CPU)
    # less 2 x KL: 3 - 1 = 2 against 1; -1 + 2 = 1 against 2
    assert [e.advantages.tolist() for e in got] == [[1.0, 1.0], [-1.0], [-1.0], [1.0, 1.0]]
    assert all(e.returns is None and e.old_values is None for e in got)
    assert "value/explained_variance" not in metrics


def test_group_relative_advantages_have_deviation_1_in_each_group():
    batch, scores = four()
    got, _ = estimate(batch, scores, settings(advantage="group_relative", group_size=2), 0.0, CPU)
    assert [float(e.advantages[0]) for e in got] == pytest.approx([1.0, -1.0, -1.0, 1.0], rel=1e-6)


def test_a_masked_response_is_nobodys_baseline():
    batch, scores = four()
    given = settings(advantage="leave_one_out", group_size=2, truncated="mask")
    got, _ = estimate(batch, scores, given, 0.0, CPU)
    assert [float(e.advantages[0]) for e in got] == [2.0, -2.0, 0.0, 0.0]  # the fourth has no other left


# ---- the engine's log-probs --------------------------------------------------------------------------------


def test_importance_weights_are_the_trainer_over_the_engine_up_to_the_cap():
    batch, scores = four()
    scores.logprobs[0] = np.array([-1.0 + math.log(3), -2.0 - math.log(2)], np.float32)
    got, metrics = estimate(batch, scores, settings(importance_cap=2.0), 0.0, CPU)
    assert got[0].weights.tolist() == pytest.approx([2.0, 0.5], rel=1e-6)
    assert got[1].weights.tolist() == [1.0]
    assert metrics["rollout/importance_weight"] == pytest.approx((2 + 0.5 + 4) / 6, rel=1e-6)
    assert metrics["rollout/importance_capped_fraction"] == pytest.approx(1 / 6)


def test_the_weights_multiply_the_loss():
    e = experiences()[3]
    weighted = Experience(**{**fields(e), "weights": np.full_like(e.advantages, 0.5)})
    given = UpdateSettings(0.2, Cutting(99))
    losses = [
        update_policy(PlainEngine(tiny_policy()), [x], [[0]], x, given, 0.1)["policy/loss"] for x in (e, weighted)
    ]
    assert losses[1] == pytest.approx(losses[0] / 2, rel=1e-6)


def test_with_the_engines_logprobs_the_policy_need_not_score():
    batch, scores = four()
    scores.logprobs = {}
    got, metrics = estimate(batch, scores, settings(old_from_rollout=True, importance_cap=2.0), 0.0, CPU)
    assert got[0].old_logprobs.tolist() == [-1.0, -2.0]
    assert got[0].weights is None
    assert "rollout/logprob_gap" not in metrics  # nobody has measured it yet
    assert metrics["kl/mean"] == pytest.approx((0.5 + 0 - 1 + 0) / 4)


class Told(torch.nn.Module):
    """Log-probs as told, differentiable in one parameter that is 0."""

    def __init__(self, logprobs: list[float]) -> None:
        super().__init__()
        self.shift = torch.nn.Parameter(torch.zeros(()))
        self.logprobs = torch.tensor(logprobs)

    def forward(self, tokens, positions, temperature=1.0, position_ids=None):
        return self.logprobs + self.shift


def one(old: list[float], advantages: list[float]) -> Experience:
    r = rollout(0, 2, len(old))
    return Experience(r, np.array(old, np.float32), np.array(advantages, np.float32))


def test_a_ratio_to_the_engine_ends_at_the_cap_and_the_gap_is_reported():
    e = one([-2.0, -1.0], [-1.0, -1.0])
    given = UpdateSettings(0.2, Cutting(99), ratio_cap=2.0)
    module = Told([-2.0 + math.log(3), -1.0])
    metrics = update_policy(PlainEngine(module), [e], [[0]], e, given, 0.1)
    # -A min(ratio, 2): (2 + 1) / 2, and so is its derivative
    assert metrics["policy/loss"] == pytest.approx(1.5, rel=1e-6)
    assert float(module.shift.grad) == pytest.approx(1.5, rel=1e-6)
    assert metrics["rollout/logprob_gap"] == pytest.approx(math.log(3) / 2, rel=1e-6)
    assert metrics["rollout/logprob_gap_max"] == pytest.approx(math.log(3), rel=1e-6)


def test_weights_that_are_the_ratio_are_reported_over_all_minibatches_as_those_of_the_loss_are():
    seen, capped = one([-2.0, -1.0], [-1.0, -1.0]), one([-2.0 - math.log(4), -1.0], [-1.0, -1.0])
    masked = Experience(**{**fields(seen), "trained": False})
    given = UpdateSettings(0.2, Cutting(99), ratio_cap=2.0)
    metrics = update_policy(PlainEngine(Told([-2.0, -1.0])), [seen, capped, masked], [[0], [1], [2]], seen, given, 0.1)
    # 1 and 1; 4, which ends at 2, and 1; the third minibatch has no token to weigh
    assert metrics["rollout/importance_weight"] == pytest.approx((1 + 1.5) / 2)
    assert metrics["rollout/importance_capped_fraction"] == pytest.approx((0 + 0.5) / 2)


def test_an_update_from_recomputed_logprobs_reports_no_weights_for_the_estimate_has():
    e = one([-2.0, -1.0], [1.0, 1.0])
    metrics = update_policy(PlainEngine(Told([-2.0, -1.0])), [e], [[0]], e, UpdateSettings(0.2, Cutting(99)), 0.1)
    assert not [name for name in metrics if name.startswith("rollout/")]


@pytest.mark.parametrize("limits", [GapLimits(largest=0.2), GapLimits(mean=0.1)])
def test_an_engine_that_is_not_the_trainer_stops_the_run(limits):
    batch, scores = four()
    scores.logprobs[3] = scores.logprobs[3] - np.float32(0.5)
    with pytest.raises(TrainingError, match=r"differ by 0\.5 .*mean 0\.167") as error:
        estimate(batch, scores, settings(gap=limits), 0.0, CPU)
    assert "rollout.max_logprob_gap" in error.value.hint
    estimate(batch, scores, settings(gap=GapLimits(0.6, 0.2)), 0.0, CPU)


@pytest.mark.parametrize("version", [0, 1], ids=["fresh", "stale"])
@pytest.mark.parametrize("given", [{}, {"old_from_rollout": True}], ids=["recompute", "rollout"])
@pytest.mark.parametrize(
    ("bad", "what"), [(-math.inf, "is not finite"), (math.nan, "is not finite"), (3.0, "is above 0")]
)
def test_what_is_no_log_prob_of_the_engine_stops_the_run_however_old(version, given, bad, what):
    batch, scores = four()
    batch[3].logprobs[1] = bad
    with pytest.raises(TrainingError, match=f"log-prob of sample 3 {what}"):
        estimate(batch, scores, settings(importance_cap=2.0, **given), 0.0, CPU, version)


def test_a_log_prob_of_the_engine_that_rounding_left_above_0_is_one():
    batch, scores = four()
    batch[3].logprobs[1] = 1e-5
    experiences, metrics = estimate(batch, scores, settings(), 0.0, CPU)
    assert [e.rollout.info.sample_id for e in experiences] == [rollout.info.sample_id for rollout in batch]
    assert metrics["rollout/logprob_gap_max"] == pytest.approx(abs(1e-5 - scores.logprobs[3][1]))


def test_the_gap_of_what_older_versions_sampled_is_reported_apart_and_stops_nothing():
    batch, scores = four()
    batch[3].versions[:] = 6
    batch[1].versions[:] = 7
    scores.logprobs[0][1] -= 4.0
    scores.logprobs[1][0] -= 0.25
    _, metrics = estimate(batch, scores, settings(gap=GapLimits(0.3, 0.3)), 0.0, CPU, version=7)
    assert (metrics["rollout/logprob_gap"], metrics["rollout/logprob_gap_max"]) == (0.25, 0.25)
    assert metrics["rollout/stale_logprob_gap"] == 4.0 / 5
    assert metrics["rollout/stale_logprob_gap_max"] == 4.0
    _, older = estimate(batch, scores, settings(gap=GapLimits(0.3, 0.3)), 0.0, CPU, version=8)
    assert math.isnan(older["rollout/logprob_gap"])
    assert math.isnan(older["rollout/logprob_gap_max"])
    assert older["rollout/stale_logprob_gap"] == pytest.approx(4.25 / 6)
    with pytest.raises(TrainingError, match=r"differ by 0\.25"):
        estimate(batch, scores, settings(gap=GapLimits(0.2)), 0.0, CPU, version=7)


def test_ranks_that_hold_old_and_new_responses_report_both_gaps_and_stop_together(monkeypatch):
    batch, scores = four()
    batch[0].versions[:] = batch[1].versions[:] = 5
    scores.logprobs[1][0] -= 0.25
    scores.logprobs[3][1] -= 4.0
    given = settings(gap=GapLimits(0.3))
    _, whole = estimate(batch, scores, given, 0.0, CPU, version=5)
    shares = [batch[:2], batch[2:]]
    for _, metrics in Ranks(2, monkeypatch).run(
        lambda rank: estimate(shares[rank], scores, given, 0.0, CPU, version=5)
    ):
        assert metrics == pytest.approx(whole)
        assert (metrics["rollout/logprob_gap_max"], metrics["rollout/stale_logprob_gap_max"]) == (0.25, 4.0)
    batch[2].logprobs[0] = 1.0

    def stops(rank: int) -> str:
        with pytest.raises(TrainingError) as stopped:
            estimate(shares[rank], scores, given, 0.0, CPU, version=5)
        return str(stopped.value)

    other, own = Ranks(2, monkeypatch).run(stops)
    assert "on another rank" in other
    assert "the engine's log-prob of sample 2 is above 0" in own


def test_the_first_minibatch_shows_the_gap_when_the_engines_logprobs_are_the_old_ones():
    e = one([-2.0, -1.0], [1.0, 1.0])
    given = UpdateSettings(0.2, Cutting(99), ratio_cap=2.0, first_ratio=GapLimits(largest=0.3))
    with pytest.raises(TrainingError, match="engine and trainer differ"):
        update_policy(PlainEngine(Told([-1.5, -1.0])), [e], [[0]], e, given, 0.1)


def test_a_first_minibatch_of_masked_responses_reports_no_gap_rather_than_one_of_0():
    seen = one([-1.0, -1.0], [1.0, 2.0])
    masked = Experience(**{**fields(seen), "trained": False})
    given = UpdateSettings(0.2, Cutting(99), ratio_cap=2.0, first_ratio=GapLimits(largest=0.3))
    metrics = update_policy(PlainEngine(Told([-1.5, -1.0])), [masked, seen], [[0], [1]], seen, given, 0.1)
    for name in ("rollout/logprob_gap", "rollout/logprob_gap_max", "policy/first_log_ratio_max"):
        assert math.isnan(metrics[name])
    assert metrics["policy/ratio_mean"] == pytest.approx((math.exp(-0.5) + 1) / 2)


# ---- clipping and stopping ---------------------------------------------------------------------------------


def test_the_dual_clip_bounds_the_loss_of_negative_advantages():
    e = one([-2.0], [-1.0])
    module = Told([-2.0 + math.log(5)])
    plain = update_policy(PlainEngine(module), [e], [[0]], e, UpdateSettings(0.2, Cutting(99)), 0.1)
    dual = update_policy(PlainEngine(module), [e], [[0]], e, UpdateSettings(0.2, Cutting(99), dual_clip=3.0), 0.1)
    assert (plain["policy/loss"], dual["policy/loss"]) == pytest.approx((5.0, 3.0), rel=1e-6)


@pytest.mark.parametrize(("stop", "minibatches"), [(None, 3), (0.45, 3), (0.35, 1)])
def test_a_step_stops_when_kl_from_its_start_is_past_the_limit(stop, minibatches):
    # one response of two tokens, ratio 1/2 each: k3 of KL(old || new) is 1/2 - 1 + log 2 a token, 0.386 in all
    e = one([-1.0, -1.0], [1.0, 1.0])
    ratio = 0.5
    module = Told([-1.0 + math.log(ratio)] * 2)
    given = UpdateSettings(0.2, Cutting(99), kl_stop=stop)
    metrics = update_policy(PlainEngine(module), [e], [[0]] * 3, e, given, 0.1)
    assert metrics["policy/minibatches"] == minibatches


# ---- PPO-ptx -----------------------------------------------------------------------------------------------


BLOCKS = np.random.default_rng(3).integers(0, VOCAB, (6, 11)).astype(np.int32)


def test_the_pretraining_gradient_joins_the_policys_in_one_step():
    """loss_PPO + coef x mean over text tokens of -log p, gradients and all, by plain autograd."""
    module, batch, coef = tiny_policy(), experiences(), 3.0
    given = UpdateSettings(0.2, Cutting(50), ptx_coef=coef)
    update_policy(PlainEngine(module), batch, [list(range(7))], batch[0], UpdateSettings(0.2, Cutting(50)), 0.1)
    alone = [p.grad.clone() for p in module.parameters()]
    text = TextShare(BLOCKS, [[4, 1, 5]])
    engine = PlainEngine(module)
    metrics = update_policy(engine, batch, [list(range(7))], batch[0], given, 0.1, text)
    together = [p.grad.clone() for p in module.parameters()]
    module.zero_grad()
    tokens = torch.from_numpy(BLOCKS[[4, 1, 5]]).long()
    table = module.lm(tokens).logits[:, :-1].double().log_softmax(-1)
    loss = -table.gather(-1, tokens[:, 1:, None]).mean()
    (coef * loss).backward()
    assert metrics["ptx/loss"] == pytest.approx(loss.item(), rel=1e-5)
    for a, b, p in zip(together, alone, module.parameters(), strict=True):
        np.testing.assert_allclose(a, b + p.grad, atol=1e-5 * float((b + p.grad).abs().max()))


def test_the_text_of_two_ranks_is_that_of_one(monkeypatch):
    batch, rows = experiences(), [[0, 1, 2, 3], [4, 5, 6]]
    given = UpdateSettings(0.2, Cutting(30), ptx_coef=2.0)
    text = [[0, 1, 2], [3, 4]]
    module = tiny_policy()
    whole = update_policy(PlainEngine(module), batch, rows, batch[0], given, 0.0, TextShare(BLOCKS, text))
    ranks, models = Ranks(2, monkeypatch), [tiny_policy(), tiny_policy()]  # made here: threads share torch's seed

    def on_rank(rank: int) -> dict[str, float]:
        shares = [ids[rank::2] for ids in rows]
        mine = TextShare(BLOCKS, [ids[rank::2] for ids in text])
        engine = PlainEngine(models[rank], rank=rank, world_size=2)
        return update_policy(engine, batch, shares, batch[0], given, 0.0, mine)

    for metrics in ranks.run(on_rank):
        for name in ("ptx/loss", "policy/loss", "policy/ratio_mean"):
            assert metrics[name] == pytest.approx(whole[name], rel=1e-5)


def test_metrics_without_text_say_nothing_of_it():
    batch = experiences()
    metrics = update_policy(
        PlainEngine(tiny_policy()), batch, [[0, 1]], batch[0], UpdateSettings(0.2, Cutting(50)), 0.1
    )
    assert not [name for name in metrics if name.startswith("ptx")]
