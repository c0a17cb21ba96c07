"""Scores of a batch are those of each response alone, in float64, by a plain loop."""

import numpy as np
import pytest
import torch
from torch import nn

from rayrlhf.data.batching import Cutting
from rayrlhf.engines.scoring import check_packing, probe_logprobs, score_logprobs, score_rewards, score_values
from rayrlhf.errors import ModelError
from rayrlhf.weights.probe import ProbeRow
from tests.engine_fakes import SHAPES, PlainEngine, rollout, rollouts, tiny_policy, tiny_scalar

CUTTINGS = [Cutting(tokens, packed) for tokens in (1, 30, 10_000) for packed in (False, True)]


@pytest.fixture(scope="module")
def policy():
    return tiny_policy()


@pytest.fixture(scope="module")
def scalar():
    return tiny_scalar()


@torch.no_grad()
def logprobs_alone(policy, rollout, temperature: float) -> np.ndarray:
    logits = policy.lm(torch.from_numpy(rollout.tokens).long()[None]).logits[0].double().numpy() / temperature
    values = []
    for t in range(rollout.prompt_tokens, rollout.info.tokens):
        row = logits[t - 1]
        values.append(row[rollout.tokens[t]] - row.max() - np.log(np.exp(row - row.max()).sum()))
    return np.array(values)


@torch.no_grad()
def outputs_alone(scalar, rollout) -> np.ndarray:
    """The head at every position of the sequence, unbatched."""
    tokens = torch.from_numpy(rollout.tokens).long()[None]
    hidden = scalar.classifier.base_model(tokens).last_hidden_state[0].double().numpy()
    return hidden @ scalar.classifier.score.weight[0].double().numpy()


@pytest.mark.parametrize("cutting", CUTTINGS, ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_of_each_sequence_alone(policy, temperature, cutting):
    batch = rollouts(SHAPES)
    scores = score_logprobs(PlainEngine(policy), batch, batch[0], cutting, temperature)
    assert set(scores.logprobs) == {r.info.sample_id for r in batch}
    for r in batch:
        got = scores.logprobs[r.info.sample_id]
        assert got.dtype == np.float32
        assert got.shape == (r.info.response_tokens,)
        np.testing.assert_allclose(got, logprobs_alone(policy, r, temperature), atol=1e-5)


def test_the_temperature_matters(policy):
    """The test above could not fail on a model whose log-probs hardly depend on it."""
    r = rollout(0, 4, 6)
    assert np.abs(logprobs_alone(policy, r, 1.0) - logprobs_alone(policy, r, 0.7)).max() > 0.05


@pytest.mark.parametrize("cutting", CUTTINGS, ids=str)
def test_values_are_read_one_position_before_each_response_token(scalar, cutting):
    batch = rollouts(SHAPES)
    scores = score_values(PlainEngine(scalar), batch, batch[0], cutting)
    for r in batch:
        expected = outputs_alone(scalar, r)[r.prompt_tokens - 1 : r.info.tokens - 1]
        np.testing.assert_allclose(scores.values[r.info.sample_id], expected, atol=1e-5)


@pytest.mark.parametrize("cutting", CUTTINGS, ids=str)
def test_a_reward_is_read_at_the_last_token_only(scalar, cutting):
    batch = rollouts(SHAPES)
    scores = score_rewards(PlainEngine(scalar), batch, batch[0], cutting)
    assert set(scores.rewards) == {r.info.sample_id for r in batch}
    for r in batch:
        assert scores.rewards[r.info.sample_id] == pytest.approx(outputs_alone(scalar, r)[-1], abs=1e-5)
        assert type(scores.rewards[r.info.sample_id]) is float


@pytest.mark.parametrize(("scale", "word"), [(float("nan"), "is NaN"), (0.0, "is infinite"), (1e-12, "larger than")])
def test_a_score_that_is_no_finite_number_is_a_failure_with_its_reason(scale, word):
    model = tiny_scalar()
    model.normalise(bias=0.0, scale=scale)
    batch = rollouts(SHAPES)
    scores = score_rewards(PlainEngine(model), batch, batch[0], Cutting(10_000))
    assert scores.rewards == {}
    assert set(scores.failed) == {r.info.sample_id for r in batch}
    assert all(reason.startswith("model: the score") and word in reason for reason in scores.failed.values())


def test_rewards_and_values_are_in_normalised_units(scalar):
    r = rollout(1, 3, 4)
    raw = outputs_alone(scalar, r)
    model = tiny_scalar()
    model.normalise(bias=0.25, scale=2.0)
    reward = score_rewards(PlainEngine(model), [r], r, Cutting(100)).rewards[1]
    assert reward == pytest.approx((raw[-1] - 0.25) / 2, abs=1e-5)
    values = score_values(PlainEngine(model), [r], r, Cutting(100)).values[1]
    np.testing.assert_allclose(values, (raw[2:6] - 0.25) / 2, atol=1e-5)


@pytest.mark.parametrize("seed", [1, 2])
def test_what_the_padding_holds_changes_nothing(policy, scalar, seed):
    batch = rollouts(SHAPES)
    clean, junk = PlainEngine(scalar), PlainEngine(scalar, pad_with=seed)
    assert score_rewards(junk, batch, batch[0], Cutting(10_000, packed=False)).rewards == pytest.approx(
        score_rewards(clean, batch, batch[0], Cutting(10_000, packed=False)).rewards, abs=1e-6
    )
    pairs = [
        (score_values(e, batch, batch[0], Cutting(10_000, packed=False)).values for e in (clean, junk)),
        (
            score_logprobs(e, batch, batch[0], Cutting(10_000, packed=False), 0.7).logprobs
            for e in (PlainEngine(policy), PlainEngine(policy, pad_with=seed))
        ),
    ]
    for clean_rows, junk_rows in pairs:
        for sample_id, row in clean_rows.items():
            np.testing.assert_allclose(junk_rows[sample_id], row, atol=1e-6)


def test_a_rank_without_a_share_scores_nothing(policy, scalar):
    spare = rollout(1, 2, 2)
    assert score_logprobs(PlainEngine(policy), [], spare, Cutting(10), 1.0).logprobs == {}
    assert score_values(PlainEngine(scalar), [], spare, Cutting(10)).values == {}
    assert score_rewards(PlainEngine(scalar), [], spare, Cutting(10)).rewards == {}


def test_the_probe_reads_each_target_after_its_context_at_temperature_1(policy):
    rows = [ProbeRow([1, 5, 9], [22, 0]), ProbeRow([0, 3, 3], [7, 7]), ProbeRow([21, 2, 8], [1, 20])]
    expected = []
    for row in rows:
        with torch.no_grad():
            after = policy.lm(torch.tensor([row.context])).logits[0, -1].double().log_softmax(-1)
        expected += [float(after[target]) for target in row.targets]
    assert probe_logprobs(PlainEngine(policy), rows) == pytest.approx(expected, abs=1e-5)


def test_an_architecture_that_keeps_sequences_apart_passes_the_packing_check(policy, scalar):
    check_packing(PlainEngine(policy), "float32")
    check_packing(PlainEngine(scalar), "float32")


def test_an_architecture_that_lets_sequences_see_each_other_is_refused(policy):
    class Deaf(nn.Module):
        """Ignores the position ids, and with them where a sequence begins."""

        def forward(self, tokens, positions, temperature=1.0, position_ids=None):
            return policy(tokens=tokens, positions=positions, temperature=temperature)

    with pytest.raises(ModelError, match=r"(?s)share a row.*model\.packed=false"):
        check_packing(PlainEngine(Deaf()), "float32")
