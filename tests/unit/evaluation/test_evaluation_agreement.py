"""A step against the reference trainer: what agrees passes, and every planted fault is named where it was planted.

The "run" is the reference itself in float32, so that each test knows of one fault exactly. That the product agrees is
for tests/integration/test_verify_step.py.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from rayrlhf import reference
from rayrlhf.evaluation.agreement import Recipe, RecordedLearner, RecordedStep, Row, compare_step
from rayrlhf.types import Experience, Rollout, RolloutInfo, Scores

RATE = 1e-3
RECIPE = Recipe(
    dtype="float32",
    temperature=0.8,
    kl_coef=0.1,
    kl_kind="k1",
    gamma=0.99,
    lam=0.9,
    clip=0.2,
    value_clip=0.2,
    ptx_coef=2.5,
    normalisation=(0.3, 1.7),
    betas=(0.9, 0.95),
    eps=1e-5,
    weight_decay=0.1,
    grad_clip=0.5,
)
MINIBATCHES = [[12, 10], [11, 13]]
TEXT = [[np.array([4, 9, 2, 7, 7], np.int32)], [np.array([3, 3, 8, 1], np.int32), np.array([6, 5, 4], np.int32)]]
Experiences = dict[int, Experience]


@cache
def model(role: str) -> nn.Module:
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_labels=1
    )
    torch.manual_seed({"policy": 1, "reference": 2, "value": 3, "reward": 4}[role])
    return (LlamaForCausalLM if role in ("policy", "reference") else LlamaForSequenceClassification)(config)


def load(role: str) -> nn.Module:
    return copy.deepcopy(model(role)).double()


def rollouts() -> dict[int, Rollout]:
    rng = np.random.default_rng(5)
    made = {}
    for i, (prompt, response) in zip((13, 10, 12, 11), ((2, 5), (1, 3), (4, 1), (3, 6)), strict=True):
        info = RolloutInfo(i, i, prompt + response, response, truncated=False)
        tokens = rng.integers(2, 32, prompt + response).astype(np.int32)
        made[i] = Rollout(info, tokens, np.zeros(response, np.float32), np.zeros(response, np.int32))
    return made


def tensors(module: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def learned(
    role: str, take: Callable[[nn.Module, Any, int], reference.Step]
) -> tuple[RecordedLearner, list[reference.Step]]:
    """One warm-up step, so that Adam has a state, then a step for each minibatch."""
    module = copy.deepcopy(model(role))
    optimizer = torch.optim.AdamW(module.parameters(), RATE, RECIPE.betas, RECIPE.eps, RECIPE.weight_decay)
    take(module, optimizer, 0)
    # The weights of the step are those of before: only Adam's state is wanted.
    module.load_state_dict(model(role).state_dict())
    names = [name for name, _ in module.named_parameters()]
    adam = copy.deepcopy(list(optimizer.state.values()))
    before = tensors(module)
    steps = [take(module, optimizer, number) for number in range(2)]
    averages = {key: {n: s[key] for n, s in zip(names, adam, strict=True)} for key in ("exp_avg", "exp_avg_sq")}
    after = {"gradients": steps[0].gradients, "weights_after": steps[-1].weights}
    return RecordedLearner(RATE, 1, before, **averages, **after), steps


def a_step(tamper: Callable[[Experiences], Experiences] = lambda made: made) -> RecordedStep:
    """A whole step; `tamper` changes the experience before anybody learns from it."""
    made = rollouts()
    samples = {i: reference.Sample.of(r) for i, r in made.items()}
    models = [copy.deepcopy(model(role)) for role in ("policy", "reference", "value", "reward")]
    norm = RECIPE.normalisation
    scored = {i: reference.score(s, *models, RECIPE.temperature, norm, norm) for i, s in samples.items()}
    estimates = reference.estimate(list(scored.values()), RECIPE.kl_coef, RECIPE.kl_kind, RECIPE.gamma, RECIPE.lam)
    experiences = tamper(
        {
            i: Experience(made[i], s.logprobs.numpy(), e.advantages.numpy(), e.returns.numpy(), s.values.numpy())
            for (i, s), e in zip(scored.items(), estimates, strict=True)
        }
    )
    scores = Scores(
        reference_logprobs={i: s.reference_logprobs.numpy() for i, s in scored.items()},
        rewards={i: float(s.reward) for i, s in scored.items()},
    )

    def batch(number: int) -> list[reference.PPOExample]:
        return [reference.PPOExample.of(experiences[i]) for i in MINIBATCHES[number]]

    def policy(module: nn.Module, optimizer: Any, number: int) -> reference.Step:
        text = [reference.Sample(torch.tensor(row).long(), 0) for row in TEXT[number]]
        return reference.policy_step(module, optimizer, batch(number), 0.2, RECIPE.temperature, text, 2.5, 0.5)

    def value(module: nn.Module, optimizer: Any, number: int) -> reference.Step:
        return reference.value_step(module, optimizer, batch(number), 0.2, norm, 0.5)

    (of_policy, policy_steps), (of_value, value_steps) = learned("policy", policy), learned("value", value)
    metrics = {
        "policy/loss": np.mean([s.losses["policy"] for s in policy_steps]),
        "ptx/loss": np.mean([s.losses["ptx"] for s in policy_steps]) / RECIPE.ptx_coef,
        "policy/grad_norm": np.mean([s.gradient_norm for s in policy_steps]),
        "ptx/grad_norm": policy_steps[0].gradient_norms["ptx"],
        "policy/ppo_grad_norm": policy_steps[0].gradient_norms["policy"],
        "value/loss": np.mean([s.losses["value"] for s in value_steps]),
        "value/grad_norm": np.mean([s.gradient_norm for s in value_steps]),
    }
    return RecordedStep(made, scores, experiences, MINIBATCHES, TEXT, metrics, of_policy, of_value)


@pytest.fixture(scope="module")
def step() -> RecordedStep:
    return a_step()


def found(step: RecordedStep, recipe: Recipe = RECIPE) -> dict[str, str]:
    """What differs, and where first."""
    return {row.quantity: row.differs for row in compare_step(step, recipe, load) if row.differs is not None}


def with_entry(tensor: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """With its largest entry changed."""
    changed = tensor.clone()
    flat = changed.view(-1)
    i = int(flat.abs().argmax())
    flat[i] = change(flat[i])
    return changed


def test_a_step_in_float32_agrees_with_the_reference_in_float64(step: RecordedStep) -> None:
    rows: dict[str, Row] = {row.quantity: row for row in compare_step(step, RECIPE, load)}
    assert {name: row.differs for name, row in rows.items() if row.differs} == {}
    assert list(rows) == [
        *("policy log-probs", "reference log-probs", "values", "rewards", "advantages", "returns"),
        *("policy/loss", "ptx/loss", "policy/grad_norm", "policy/ppo_grad_norm", "ptx/grad_norm"),
        *("policy gradients", "policy weights", "policy weights, mean"),
        *("value/loss", "value/grad_norm", "value gradients", "value weights", "value weights, mean"),
    ]
    assert all(row.gap < row.tolerance / 5 for row in rows.values())
    assert rows["policy weights"].tolerance == 4.0, "two learning rates for each of two minibatches"


def test_norms_of_the_parts_are_compared_only_where_the_run_measured_them(step: RecordedStep) -> None:
    metrics = {name: v for name, v in step.metrics.items() if name not in ("ptx/grad_norm", "policy/ppo_grad_norm")}
    rows = compare_step(replace(step, metrics=metrics), RECIPE, load)
    assert not [row for row in rows if row.quantity in ("ptx/grad_norm", "policy/ppo_grad_norm")]


def test_a_wrong_advantage_is_named_and_what_was_learned_from_it_agrees() -> None:
    def tamper(made: Experiences) -> Experiences:
        wrong = made[11].advantages.copy()
        wrong[-1] += 0.01
        return made | {11: replace(made[11], advantages=wrong)}

    assert found(a_step(tamper)) == {"advantages": "sample 11"}


def test_one_flipped_gradient_entry_is_named(step: RecordedStep) -> None:
    name = "model.layers.0.self_attn.v_proj.weight"
    gradients = dict(step.policy.gradients)
    gradients[name] = with_entry(gradients[name], lambda g: -g)
    assert found(replace(step, policy=replace(step.policy, gradients=gradients))) == {"policy gradients": name}


def test_one_weight_five_learning_rates_off_is_named(step: RecordedStep) -> None:
    name = "model.embed_tokens.weight"
    weights = dict(step.value.weights_after)
    weights[name] = with_entry(weights[name], lambda w: w + 5 * RATE)
    assert found(replace(step, value=replace(step.value, weights_after=weights))) == {"value weights": name}


def test_weights_that_went_on_from_another_adam_step_differ_on_average(step: RecordedStep) -> None:
    assert "policy weights, mean" in found(replace(step, policy=replace(step.policy, adam_steps=3)))


def test_weights_learned_at_another_rate_differ(step: RecordedStep) -> None:
    assert "policy weights, mean" in found(replace(step, policy=replace(step.policy, learning_rate=1.2 * RATE)))


def test_another_weight_of_the_text_shows_in_the_gradients_of_the_policy_alone(step: RecordedStep) -> None:
    differs = found(step, replace(RECIPE, ptx_coef=2.6))
    assert {"policy/grad_norm", "ptx/grad_norm", "policy gradients"} <= set(differs)
    assert not [name for name in differs if name.startswith("value")]


@pytest.mark.parametrize(
    ("change", "first"),
    [
        ({"temperature": 1.0}, "policy log-probs"),
        ({"normalisation": (0.0, 1.7)}, "values"),
        ({"kl_coef": 0.2}, "advantages"),
        ({"kl_kind": "k2"}, "advantages"),
        ({"lam": 0.95}, "advantages"),
    ],
    ids=lambda x: x if isinstance(x, str) else next(iter(x)),
)
def test_a_run_that_took_another_setting_differs_first_where_the_setting_enters(
    step: RecordedStep, change: dict[str, Any], first: str
) -> None:
    assert next(iter(found(step, replace(RECIPE, **change)))) == first


def test_text_of_another_minibatch_shows_in_the_text_loss(step: RecordedStep) -> None:
    assert "ptx/loss" in found(replace(step, text=[TEXT[0], TEXT[0]]))


def test_a_reward_of_another_sample_is_named(step: RecordedStep) -> None:
    scores = Scores(reference_logprobs=step.scores.reference_logprobs, rewards=dict(step.scores.rewards))
    scores.rewards[12] = scores.rewards[10]
    assert found(replace(step, scores=scores)) == {"rewards": "sample 12"}


def test_what_is_missing_misshapen_or_not_a_number_differs(step: RecordedStep) -> None:
    name, gradients = "lm_head.weight", step.policy.gradients
    without = {n: g for n, g in gradients.items() if n != name}
    for spoilt in (without, without | {name: gradients[name].T}, without | {name: gradients[name] * float("nan")}):
        changed = replace(step, policy=replace(step.policy, gradients=spoilt))
        row = next(row for row in compare_step(changed, RECIPE, load) if row.quantity == "policy gradients")
        assert (row.differs, row.gap) == (name, float("inf"))


def test_a_tensor_only_the_run_has_differs(step: RecordedStep) -> None:
    gradients = {**step.policy.gradients, "extra": torch.zeros(2)}
    assert found(replace(step, policy=replace(step.policy, gradients=gradients))) == {"policy gradients": "extra"}


def test_rounding_where_the_true_gradient_is_zero_is_no_difference(step: RecordedStep) -> None:
    """As in a bias that softmax ignores; here a parameter that nothing uses."""

    class WithUnused(LlamaForSequenceClassification):
        def __init__(self, config: LlamaConfig) -> None:
            super().__init__(config)
            self.unused = nn.Parameter(torch.ones(3))

    def load_with_unused(role: str) -> nn.Module:
        module = load(role)
        if role == "value":
            other = WithUnused(module.config).double()
            other.load_state_dict({**module.state_dict(), "unused": torch.ones(3)})
            return other
        return module

    def grown(mapping: Any, fill: float) -> dict[str, Tensor]:
        return {"unused": torch.full((3,), fill), **mapping}

    after = (1 - RATE * RECIPE.weight_decay) ** 2
    value = replace(
        step.value,
        weights=grown(step.value.weights, 1.0),
        exp_avg=grown(step.value.exp_avg, 0.0),
        exp_avg_sq=grown(step.value.exp_avg_sq, 0.0),
        weights_after=grown(step.value.weights_after, after),
        gradients=grown(step.value.gradients, 1e-11),
    )
    rows = compare_step(replace(step, value=value), RECIPE, load_with_unused)
    assert not [row.quantity for row in rows if row.differs]
