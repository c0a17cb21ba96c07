"""What the reward stage does after training: measure raw scores, then count them from the demonstrations."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForSequenceClassification

from rayrlhf.data.batching import Cutting
from rayrlhf.data.prompts import RankingExample
from rayrlhf.errors import TrainingError
from rayrlhf.models.build import ScalarModel
from rayrlhf.stages.reward import _evaluate, normalisation


class OneRank:
    """A learner that only scores."""

    rank, world_size, device = 0, 1, torch.device("cpu")

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def infer(self, function: Callable[..., Any], micro_batches: Sequence[Any], dummy: Any) -> list[Any]:
        with torch.no_grad():
            return [function(self.module, m) for m in micro_batches]

    def scores(self, sequences: Sequence[np.ndarray]) -> list[float]:
        def score(tokens: np.ndarray) -> float:
            row = torch.from_numpy(tokens).long()[None]
            raw: Tensor = self.module(tokens=row, positions=torch.tensor([len(tokens) - 1]))
            return float(raw)

        with torch.no_grad():
            return [score(tokens) for tokens in sequences]


def scalar() -> ScalarModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=23,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        initializer_range=0.3,
        pad_token_id=0,
        num_labels=1,
    )
    return ScalarModel(LlamaForSequenceClassification(config))


def sequences(count: int, seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 23, rng.integers(2, 9)).astype(np.int32) for _ in range(count)]


def rankings() -> list[RankingExample]:
    return [RankingExample(tuple(sequences(3, seed)), (2, 1, 3), 1, "people", (4, 7, 7)) for seed in range(5)]


def evaluate(model: ScalarModel, unit_variance: bool, demonstrations: list[np.ndarray]) -> dict[str, Any]:
    learner: Any = OneRank(model)
    return _evaluate(model, learner, rankings(), demonstrations, Cutting(64), unit_variance)


def test_the_bias_is_the_mean_of_the_demonstrations_and_the_scale_their_population_deviation() -> None:
    # Mean 5, squared deviations 9 1 1 1 0 0 4 16: their mean is 4.
    scores = [2.0, 4.0, 4.0, 4.0, 5.0, 5.0, 7.0, 9.0]
    assert normalisation(scores, unit_variance=False) == (5.0, 1.0)
    assert normalisation(scores, unit_variance=True) == (5.0, 2.0)


@pytest.mark.parametrize("scores", [[0.7], [0.0, 0.0], [3.0, 3.0, 3.0], [3.0, 3.0 + 2**-22]])
def test_demonstrations_that_all_score_the_same_cannot_be_scaled_and_the_cure_is_named(scores: list[float]) -> None:
    with pytest.raises(TrainingError, match=rf"the scores of {len(scores)} demonstrations do not vary") as caught:
        normalisation(scores, unit_variance=True)
    assert caught.value.hint == "give data.demonstrations that differ, or set reward.unit_variance=false"
    assert normalisation(scores, unit_variance=False) == (pytest.approx(scores[0]), 1.0)


@pytest.mark.parametrize("unit_variance", [False, True])
@pytest.mark.parametrize("score", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_not_finite_never_becomes_a_bias_or_a_scale(score: float, unit_variance: bool) -> None:
    with pytest.raises(TrainingError, match="not finite"):
        normalisation([1.0, score], unit_variance)


@pytest.mark.parametrize("unit_variance", [False, True])
def test_after_the_stage_demonstrations_average_zero_and_vary_by_one_if_asked(unit_variance: bool) -> None:
    model, demonstrations = scalar(), sequences(9, seed=99)
    raw = OneRank(model).scores(demonstrations)
    result = evaluate(model, unit_variance, demonstrations)
    mean = sum(raw) / 9
    deviation = math.sqrt(sum((s - mean) ** 2 for s in raw) / 9)
    after = OneRank(model).scores(demonstrations)
    assert sum(after) / 9 == pytest.approx(0.0, abs=1e-6)
    assert sum(s * s for s in after) / 9 == pytest.approx(1.0 if unit_variance else deviation**2, rel=1e-5)
    scale = pytest.approx(deviation, rel=1e-5) if unit_variance else 1.0
    assert result["normalisation"] == {"bias": pytest.approx(mean, abs=1e-6), "scale": scale, "demonstrations": 9}


def test_the_scale_is_kept_in_the_models_own_config() -> None:
    model = scalar()
    evaluate(model, True, sequences(9, seed=99))
    assert model.classifier.config.rayrlhf_reward_normalisation == (model.bias, model.scale)
    assert model.scale not in (0.0, 1.0)


def test_calibration_is_measured_on_the_scores_as_trained_whatever_they_are_scaled_to() -> None:
    model = scalar()
    trained = [OneRank(model).scores(r.responses) for r in rankings()]
    # The bins' gaps from the raw scores, pair by pair: with ranks (2, 1, 3) the second is best and the third worst.
    gaps = [0.0] * 10
    for s in trained:
        for better, worse in ((1, 0), (1, 2), (0, 2)):
            p = 1 / (1 + math.exp(-(s[better] - s[worse])))
            gaps[math.ceil((max(p, 1 - p) - 0.5) * 20) - 1] += float(p > 0.5) - max(p, 1 - p)
    expected = sum(abs(gap) for gap in gaps) / 15
    demonstrations = sequences(9, seed=99)
    for unit_variance in (False, True):
        row = evaluate(scalar(), unit_variance, demonstrations)["accuracy"]["people"]
        assert row["ece"] == pytest.approx(expected, rel=1e-5)


def test_without_demonstrations_scores_stay_raw_and_without_rankings_nothing_is_measured() -> None:
    model = scalar()
    assert set(evaluate(model, False, [])) == {"accuracy"}
    assert (model.bias, model.scale) == (0.0, 1.0)
    learner: Any = OneRank(model)
    assert set(_evaluate(model, learner, [], sequences(2, 0), Cutting(64), False)) == {"normalisation"}
