"""One PPO step of a run against the reference trainer, quantity by quantity.

A run records what a step started from and what it came to (`RecordedStep`). `compare_step` takes the same step again
from the same weights, optimizer state and responses with `rayrlhf.reference`, which shares no code with the run:

    scores      of the recorded responses by all four models, from the weights before the step
    estimates   advantages and returns, from the reference's own scores
    update      every minibatch in the run's order, on the experience that the run made: losses, gradient norms, each
                gradient tensor of the first minibatch, each weight tensor after the last

so that a fault shows in the row where it arises, and what follows from it does not hide it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from rayrlhf.reference import (
    PPOExample,
    Sample,
    Scored,
    Step,
    estimate,
    policy_step,
    response_logprobs,
    response_reward,
    response_values,
    value_step,
)
from rayrlhf.types import Experience, Rollout, Scores

__all__ = ["TOLERANCES", "Recipe", "RecordedLearner", "RecordedStep", "Role", "Row", "Tolerances", "compare_step"]

Role = Literal["policy", "reference", "reward", "value"]
Tensors = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Tolerances:
    """Largest gaps allowed between a run and the reference."""

    scores: float
    """log-probs, values, rewards: absolute"""
    estimates: float
    """advantages (whitened, so of size 1) and returns: absolute"""
    losses: float
    """of the loss, or of the terms that cancel in it"""
    norms: float
    """of the gradient norm"""
    gradients: float
    """of the largest entry of the same tensor"""
    gradient_floor: float
    """A tensor whose largest entry is below this share of the largest of all counts as one of that size: where the
    true gradient is 0 (a bias that softmax ignores) there is rounding alone."""
    weights: float
    """Learning rates per optimizer step: Adam moves an entry by about one at most, and where the gradient is next to
    nothing rounding can turn its sign."""
    weights_mean: float
    """The same, on average over a tensor: an optimizer that counts its steps wrongly moves every entry a little."""


# Ten times and more what configs/demo.yaml gives in float32: 8e-6 in scores, 7e-6 in estimates (whitening divides by
# the advantages' deviation, so close rewards make it more), 1e-7 in losses, 2e-6 in norms, 6e-6 in gradients, 0.005 and
# 0.002 rates in weights (on a run's first step; 0.001 and 0.0004 later; 0.02 and 0.004 with eps 1e-8, which damps
# small gradients less). A toy's gradients agree to 1e-5, but longer sequences and wider layers round more. In bfloat16,
# whose numbers have 8 bits, it gives 0.11, 0.06, 0.011, 0.022, 0.1, 0.4 and 0.02: only gross faults show.
TOLERANCES = {
    "float32": Tolerances(1e-4, 1e-3, 1e-5, 1e-4, 1e-4, 1e-4, 2.0, 0.05),
    "bfloat16": Tolerances(0.3, 0.5, 0.05, 0.1, 0.3, 1e-2, 2.0, 0.1),
}


@dataclass(frozen=True, slots=True)
class Recipe:
    """What the config asks of the step."""

    dtype: str
    temperature: float
    kl_coef: float
    kl_kind: Literal["k1", "k2", "k3"]
    gamma: float
    lam: float
    clip: float
    value_clip: float
    ptx_coef: float
    normalisation: tuple[float, float]
    """(bias, scale) of the reward model, and of the value model that started from it"""
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    grad_clip: float


@dataclass(frozen=True, slots=True)
class RecordedLearner:
    """One learner before and after the step; tensors are float32, by parameter name."""

    learning_rate: float
    adam_steps: int
    """counted before this step; with 0 there is no Adam state"""
    weights: Tensors
    exp_avg: Tensors
    exp_avg_sq: Tensors
    gradients: Tensors
    """of the first minibatch, before clipping"""
    weights_after: Tensors


@dataclass(frozen=True, slots=True)
class RecordedStep:
    """What the run did; mappings are by sample id."""

    rollouts: Mapping[int, Rollout]
    scores: Scores
    experiences: Mapping[int, Experience]
    minibatches: Sequence[Sequence[int]]
    text: Sequence[Sequence[np.ndarray]]
    """token rows of each minibatch of PPO-ptx; empty without"""
    metrics: Mapping[str, float]
    policy: RecordedLearner
    value: RecordedLearner


@dataclass(frozen=True, slots=True)
class Row:
    """How far run and reference are apart in one quantity."""

    quantity: str
    gap: float
    """the largest; infinite where something is missing, misshapen or not a number"""
    tolerance: float
    unit: str
    differs: str | None
    """the first tensor or sample out of tolerance"""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class _Again:
    """What the reference makes of one learner's step."""

    scores: dict[int, Tensor]
    losses: dict[str, float]
    """means over the minibatches, as the run reports them; likewise `norm`"""
    norm: float
    first: Step
    weights: Tensors


def compare_step(step: RecordedStep, recipe: Recipe, load: Callable[[Role], nn.Module]) -> list[Row]:
    """Take the step again and measure the gaps.

    Args:
        load: a role's Hugging Face model, in the precision to compute in. Called once for each role, and one model is
            held at a time; the learners' weights are then replaced by the recorded ones.
    """
    samples = {i: Sample.of(rollout) for i, rollout in sorted(step.rollouts.items())}
    logprobs = partial(response_logprobs, temperature=recipe.temperature)
    bias, scale = recipe.normalisation
    reference = _each(samples, load("reference"), logprobs)
    rewards = _each(samples, load("reward"), partial(response_reward, bias=bias, scale=scale))
    values = partial(response_values, bias=bias, scale=scale)
    value = _value_again(step, recipe, load("value"), _Scorer(samples, values))
    policy = _policy_again(step, recipe, load("policy"), _Scorer(samples, logprobs))
    scored = {i: Scored(policy.scores[i], reference[i], value.scores[i], rewards[i]) for i in samples}
    return [
        *_score_rows(step, scored, TOLERANCES[recipe.dtype]),
        *_estimate_rows(step, scored, recipe),
        *_learner_rows("policy", step.policy, policy, step, recipe),
        *_learner_rows("value", step.value, value, step, recipe),
    ]


# ---- the step again --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Scorer:
    samples: Mapping[int, Sample]
    score: Callable[[Any, Sample], Tensor]


def _each(samples: Mapping[int, Sample], model: nn.Module, score: Callable[[Any, Sample], Tensor]) -> dict[int, Tensor]:
    model.eval()
    with torch.no_grad():
        return {i: score(model, sample) for i, sample in samples.items()}


def _policy_again(step: RecordedStep, recipe: Recipe, model: nn.Module, scorer: _Scorer) -> _Again:
    def take(optimizer: torch.optim.Optimizer, batch: list[PPOExample], number: int) -> Step:
        rows = step.text[number] if step.text else ()
        text = [Sample(torch.from_numpy(row.astype(np.int64)), 0) for row in rows]
        return policy_step(
            model, optimizer, batch, recipe.clip, recipe.temperature, text, recipe.ptx_coef, recipe.grad_clip
        )

    return _again(step, step.policy, recipe, model, scorer, take)


def _value_again(step: RecordedStep, recipe: Recipe, model: nn.Module, scorer: _Scorer) -> _Again:
    def take(optimizer: torch.optim.Optimizer, batch: list[PPOExample], number: int) -> Step:
        return value_step(model, optimizer, batch, recipe.value_clip, recipe.normalisation, recipe.grad_clip)

    return _again(step, step.value, recipe, model, scorer, take)


def _again(
    step: RecordedStep,
    recorded: RecordedLearner,
    recipe: Recipe,
    model: nn.Module,
    scorer: _Scorer,
    take: Callable[[torch.optim.Optimizer, list[PPOExample], int], Step],
) -> _Again:
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(recorded.weights[name])
    scores = _each(scorer.samples, model, scorer.score)
    optimizer = _adam(parameters, recorded, recipe)
    first = done = take(optimizer, _examples(step, 0), 0)
    losses, norms = [first.losses], [first.gradient_norm]
    for number in range(1, len(step.minibatches)):
        done = take(optimizer, _examples(step, number), number)
        losses.append(done.losses)
        norms.append(done.gradient_norm)
    means = {part: _mean([loss[part] for loss in losses]) for part in first.losses}
    return _Again(scores, means, _mean(norms), first, done.weights)


def _examples(step: RecordedStep, number: int) -> list[PPOExample]:
    return [PPOExample.of(step.experiences[i]) for i in step.minibatches[number]]


def _adam(parameters: Mapping[str, nn.Parameter], recorded: RecordedLearner, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW as the run's stands before the step."""
    optimizer = torch.optim.AdamW(
        parameters.values(), recorded.learning_rate, recipe.betas, recipe.eps, recipe.weight_decay
    )
    if recorded.adam_steps:
        for name, parameter in parameters.items():
            optimizer.state[parameter] = {
                "step": torch.tensor(float(recorded.adam_steps)),
                "exp_avg": recorded.exp_avg[name].to(parameter.dtype),
                "exp_avg_sq": recorded.exp_avg_sq[name].to(parameter.dtype),
            }
    return optimizer


def _mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers)


# ---- the gaps --------------------------------------------------------------------------------------------------------


def _score_rows(step: RecordedStep, scored: Mapping[int, Scored], tolerances: Tolerances) -> list[Row]:
    made = step.experiences
    pairs: dict[str, tuple[Mapping[int, Any], dict[int, Tensor]]] = {
        "policy log-probs": ({i: e.old_logprobs for i, e in made.items()}, {i: s.logprobs for i, s in scored.items()}),
        "reference log-probs": (
            step.scores.reference_logprobs,
            {i: s.reference_logprobs for i, s in scored.items()},
        ),
        "values": ({i: e.old_values for i, e in made.items()}, {i: s.values for i, s in scored.items()}),
        "rewards": (step.scores.rewards, {i: s.reward for i, s in scored.items()}),
    }
    return [_row(name, _named(got), _named(want), tolerances.scores, "absolute") for name, (got, want) in pairs.items()]


def _estimate_rows(step: RecordedStep, scored: Mapping[int, Scored], recipe: Recipe) -> list[Row]:
    tolerance = TOLERANCES[recipe.dtype].estimates
    made = estimate(list(scored.values()), recipe.kl_coef, recipe.kl_kind, recipe.gamma, recipe.lam)
    want = dict(zip(scored, made, strict=True))
    rows = []
    for name in ("advantages", "returns"):
        got = _named({i: getattr(e, name) for i, e in step.experiences.items()})
        rows.append(_row(name, got, _named({i: getattr(e, name) for i, e in want.items()}), tolerance, "absolute"))
    return rows


def _learner_rows(
    role: Literal["policy", "value"], recorded: RecordedLearner, again: _Again, step: RecordedStep, recipe: Recipe
) -> list[Row]:
    tolerances, updates = TOLERANCES[recipe.dtype], len(step.minibatches)
    largest = max(float(g.abs().max()) for g in again.first.gradients.values())
    floor, rate = tolerances.gradient_floor * largest, recorded.learning_rate

    def of_largest(got: Tensor, want: Tensor) -> float:
        return _share(_largest(got, want), max(floor, float(want.abs().max())))

    def rates(got: Tensor, want: Tensor) -> float:
        return _largest(got, want) / rate

    def mean_rates(got: Tensor, want: Tensor) -> float:
        return float((got - want).abs().mean()) / rate

    before, after = (again.first.gradients, again.weights)
    return [
        *_scalar_rows(role, again, step, recipe),
        _row(f"{role} gradients", recorded.gradients, before, tolerances.gradients, "of largest entry", of_largest),
        _row(f"{role} weights", recorded.weights_after, after, tolerances.weights * updates, "rates", rates),
        _row(
            f"{role} weights, mean",
            recorded.weights_after,
            after,
            tolerances.weights_mean * updates,
            "rates",
            mean_rates,
        ),
    ]


def _scalar_rows(role: str, again: _Again, step: RecordedStep, recipe: Recipe) -> list[Row]:
    """Losses and gradient norms, by their names in metrics.jsonl."""
    tolerances = TOLERANCES[recipe.dtype]
    # Whitened advantages add up to nothing: with ratios near 1 the policy's loss is what rounding leaves of them.
    sizes = {"policy": _mean([float(np.abs(e.advantages).mean()) for e in step.experiences.values()])}
    rows = []
    for part, loss in again.losses.items():
        want, size = (loss / recipe.ptx_coef, None) if part == "ptx" else (loss, sizes.get(part))
        rows.append(_scalar(f"{part}/loss", step, want, tolerances.losses, size))
    rows.append(_scalar(f"{role}/grad_norm", step, again.norm, tolerances.norms))
    parts = {"policy": "policy/ppo_grad_norm", "ptx": "ptx/grad_norm"}
    norms = {parts[part]: norm for part, norm in again.first.gradient_norms.items() if part in parts}
    # Measured by the run every so many steps.
    rows += [_scalar(name, step, norm, tolerances.norms) for name, norm in norms.items() if name in step.metrics]
    return rows


def _scalar(name: str, step: RecordedStep, want: float, tolerance: float, size: float | None = None) -> Row:
    got = {name: torch.tensor(step.metrics[name], dtype=torch.float64)} if name in step.metrics else {}
    scale = abs(want) if size is None else max(size, abs(want))
    return _row(
        name,
        got,
        {name: torch.tensor(want, dtype=torch.float64)},
        tolerance,
        "relative",
        lambda a, b: _share(_largest(a, b), scale),
    )


def _row(
    quantity: str,
    got: Tensors,
    want: Tensors,
    tolerance: float,
    unit: str,
    measure: Callable[[Tensor, Tensor], float] | None = None,
) -> Row:
    """Compare by name; what only one side has is infinitely far from the other."""
    largest, differs = 0.0, None
    for name in [*want, *(name for name in got if name not in want)]:
        gap = math.inf
        if name in got and name in want and got[name].shape == want[name].shape:
            gap = (measure or _largest)(got[name].double(), want[name].double())
        if not gap <= tolerance and differs is None:  # written so that a NaN does not pass
            differs = name
        largest = max(largest, math.inf if math.isnan(gap) else gap)
    return Row(quantity, largest, tolerance, unit, differs)


def _largest(got: Tensor, want: Tensor) -> float:
    return float((got - want).abs().max())


def _share(gap: float, size: float) -> float:
    return gap / size if size else (math.inf if gap else 0.0)


def _named(by_sample: Mapping[int, Any]) -> dict[str, Tensor]:
    """Arrays are copied: those that Ray shares between processes cannot be written to, and torch warns of that."""
    rows = sorted(by_sample.items())
    return {f"sample {i}": row if isinstance(row, Tensor) else torch.tensor(row) for i, row in rows}
