"""The reference trainer against numbers worked out by hand, in float64.

The language model is a table of bigram logits and the scalar model a table of one number a token under a head of one
weight, so that every log-prob, value and gradient can be written down.

One sample serves most tests: tokens [0, 1 | 0, 2], the response being 0 (predicted from 1) and 2 (predicted from 0).
"""

from __future__ import annotations

import ast
from math import exp, log, sqrt
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import rayrlhf.reference as reference
from rayrlhf.reference import Comparison, PPOExample, Sample, Scored
from rayrlhf.types import Experience, Rollout, RolloutInfo

WEIGHTS = [[1.0, 2.0, 1.0], [4.0, 1.0, 1.0], [1.0, 1.0, 2.0]]
"""Row = the token before; the next token's probability is its share of the row."""
SAMPLE = Sample(torch.tensor([0, 1, 0, 2]), 2)


class Bigrams(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(vector(WEIGHTS).log())
        self.tied = self.table  # a second name for it, as of a tied head

    def forward(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
        return SimpleNamespace(logits=self.table[input_ids])


class Backbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(vector([1.0, 2.0, 3.0]))

    def forward(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=self.table[input_ids].unsqueeze(-1))


class Scorer(nn.Module):
    """Raw output of a token: half of (1, 2, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.base_model = Backbone()
        self.score = nn.Linear(1, 1, bias=False, dtype=torch.float64)
        nn.init.constant_(self.score.weight, 0.5)


def vector(numbers: list) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def assert_close(got: Tensor, want: list) -> None:
    torch.testing.assert_close(got.detach(), vector(want), rtol=1e-12, atol=1e-12)


def sgd(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), rate)


def ppo_example() -> PPOExample:
    """Policy: ratio 1 at the first token, 1.5 (past the clip) at the second. Values are 1 and 0.5."""
    return PPOExample(
        SAMPLE,
        old_logprobs=vector([log(4 / 6), log(1 / 4) - log(1.5)]),
        advantages=vector([2.0, 1.0]),
        returns=vector([1.0, 1.5]),
        old_values=vector([0.5, 0.5]),
    )


# Gradient of log p(0 | 1) by the logits of row 1.
ROW = [1 / 3, -1 / 6, -1 / 6]
ZERO = [0.0, 0.0, 0.0]


class TestWhatTheModelsSay:
    def test_logprobs_are_of_the_response_tokens_given_the_token_before(self) -> None:
        assert_close(reference.response_logprobs(Bigrams(), SAMPLE), [log(4 / 6), log(1 / 4)])

    def test_the_temperature_divides_the_logits(self) -> None:
        # softmax(log w / 2) is sqrt(w) over its sum: (2, 1, 1) / 4 and (1, sqrt 2, 1) / (2 + sqrt 2).
        got = reference.response_logprobs(Bigrams(), SAMPLE, temperature=2.0)
        assert_close(got, [log(1 / 2), -log(2 + sqrt(2))])

    def test_values_are_read_before_each_token_and_the_reward_at_the_last(self) -> None:
        assert_close(reference.response_values(Scorer(), SAMPLE), [1.0, 0.5])
        assert_close(reference.response_reward(Scorer(), SAMPLE), 1.5)

    def test_normalisation_is_bias_then_scale(self) -> None:
        assert_close(reference.response_values(Scorer(), SAMPLE, bias=0.5, scale=2.0), [0.25, 0.0])
        assert_close(reference.response_reward(Scorer(), SAMPLE, bias=0.5, scale=2.0), 0.5)

    def test_score_gathers_all_four(self) -> None:
        policy, lm, scorer = Bigrams(), Bigrams(), Scorer()
        with torch.no_grad():
            lm.table[1] = vector([1.0, 1.0, 2.0]).log()
        got = reference.score(SAMPLE, policy, lm, scorer, scorer, 1.0, (0.5, 2.0), (0.5, 2.0))
        assert_close(got.logprobs, [log(4 / 6), log(1 / 4)])
        assert_close(got.reference_logprobs, [log(1 / 4), log(1 / 4)])
        assert_close(got.values, [0.25, 0.0])
        assert_close(got.reward, 0.5)
        assert not got.logprobs.requires_grad

    def test_a_response_needs_a_prompt(self) -> None:
        with pytest.raises(ValueError, match="needs a prompt"):
            reference.response_logprobs(Bigrams(), Sample(torch.tensor([0, 1]), 0))

    def test_records_of_the_product_are_read(self) -> None:
        row = np.array([0, 1, 0, 2], dtype=np.int32)
        row.flags.writeable = False  # as Ray hands them out
        rollout = Rollout(RolloutInfo(0, 0, 4, 2, False), row, np.zeros(2, np.float32), np.zeros(2, np.int32))
        arrays = [np.array([i, i + 1], dtype=np.float32) for i in (1, 3, 5, 7)]
        made = PPOExample.of(Experience(rollout, *arrays))
        assert made.sample.tokens.tolist() == [0, 1, 0, 2]
        assert made.sample.prompt_tokens == 2
        got = [made.old_logprobs, made.advantages, made.returns, made.old_values]
        assert [t.tolist() for t in got] == [[1, 2], [3, 4], [5, 6], [7, 8]]


class TestFromScoresToAdvantages:
    @pytest.mark.parametrize(
        ("kind", "want"),
        [("k1", log(2)), ("k2", log(2) ** 2 / 2), ("k3", 1 / 2 - 1 + log(2))],  # q = 1/2
    )
    def test_token_kl(self, kind: str, want: float) -> None:
        assert_close(reference.token_kl(vector([log(1 / 2)]), vector([log(1 / 4)]), kind), [want])

    def test_the_score_is_added_at_the_last_token(self) -> None:
        assert_close(reference.token_rewards(vector(3.0), vector([1.0, -2.0]), 0.1), [-0.1, 3.2])

    def test_gae(self) -> None:
        # delta_1 = 2 - 1 = 1, delta_0 = 1 + 0.5 * 1 - 0.5 = 1; A_1 = 1, A_0 = 1 + 0.25 * 1.
        advantages, returns = reference.gae(vector([1.0, 2.0]), vector([0.5, 1.0]), gamma=0.5, lam=0.5)
        assert_close(advantages, [1.25, 1.0])
        assert_close(returns, [1.75, 2.0])

    def test_gae_with_lambda_0_is_the_td_error_and_with_1_the_return_minus_the_value(self) -> None:
        rewards, values = vector([1.0, 2.0, 4.0]), vector([0.5, 1.0, -1.0])
        assert_close(reference.gae(rewards, values, 1.0, 0.0)[0], [1.5, 0.0, 5.0])
        assert_close(reference.gae(rewards, values, 1.0, 1.0)[0], [6.5, 5.0, 5.0])

    def test_whitening_counts_all_tokens_alike(self) -> None:
        # 1, 2, 3 have mean 2 and population variance 2/3.
        std = sqrt(2 / 3 + 1e-8)
        first, second = reference.whiten([vector([1.0, 2.0]), vector([3.0])])
        assert_close(first, [-1 / std, 0.0])
        assert_close(second, [1 / std])

    def test_estimate_chains_them(self) -> None:
        even = Scored(vector([0.0, 0.0]), vector([0.0, 0.0]), vector([0.5, 1.0]), vector(2.0))
        apart = Scored(vector([-1.0]), vector([-3.0]), vector([0.0]), vector(1.0))
        # Rewards [0, 2] and 1 - 0.5 * 2 = 0. With gamma = lambda = 1, A = return - value: [1.5, 1] and 0.
        first, second = reference.estimate([even, apart], 0.5, gamma=1.0, lam=1.0)
        assert_close(first.rewards, [0.0, 2.0])
        assert_close(second.rewards, [0.0])
        assert_close(first.returns, [2.0, 2.0])
        assert_close(second.returns, [0.0])
        mean, std = 2.5 / 3, sqrt((1.5**2 + 1) / 3 - (2.5 / 3) ** 2 + 1e-8)
        assert_close(first.advantages, [(1.5 - mean) / std, (1 - mean) / std])
        assert_close(second.advantages, [-mean / std])


class TestPolicyStep:
    def test_loss_gradient_and_weights_under_sgd(self) -> None:
        # First token: -1 * 2. Second: min(1.5, 1.2) * 1, and no gradient. Mean over 2 tokens.
        lm = Bigrams()
        before = lm.table.detach().clone()
        step = reference.policy_step(lm, sgd(lm, 0.5), [ppo_example()], clip=0.2)
        assert step.loss == pytest.approx(-1.6, rel=1e-12)
        assert list(step.gradients) == ["table"]  # the tied name is not counted twice
        assert_close(step.gradients["table"], [ZERO, [-g for g in ROW], ZERO])
        assert step.gradient_norm == pytest.approx(sqrt(1 / 6), rel=1e-12)
        assert_close(step.weights["table"] - before, [ZERO, [g / 2 for g in ROW], ZERO])

    def test_a_negative_advantage_is_clipped_from_below_only(self) -> None:
        old = vector([log(2 / 3) - log(0.5), log(1 / 4) - log(1.5)])  # ratios 0.5 and 1.5
        assert_close(reference.policy_loss(vector([log(2 / 3), log(1 / 4)]), old, vector([-1.0, -1.0])), 0.8 + 1.5)

    def test_the_mean_is_over_the_tokens_of_all_samples(self) -> None:
        lm, short = Bigrams(), Sample(torch.tensor([1, 0]), 1)
        one = PPOExample(short, vector([log(4 / 6)]), vector([4.0]), vector([0.0]), vector([0.0]))
        step = reference.policy_step(lm, sgd(lm, 0.5), [ppo_example(), one])
        assert step.loss == pytest.approx(-(2 + 1.2 + 4) / 3, rel=1e-12)
        assert_close(step.gradients["table"][1], [-(2 + 4) / 3 * g for g in ROW])

    def test_adamw(self) -> None:
        # A first step moves each weight by rate * g / (|g| + eps), after the decay by 1 - rate * decay.
        lm = Bigrams()
        before = lm.table.detach().clone()
        optimizer = torch.optim.AdamW(lm.parameters(), 0.5, (0.9, 0.95), eps=1 / 3, weight_decay=0.1)
        step = reference.policy_step(lm, optimizer, [ppo_example()])
        assert_close(step.weights["table"] - 0.95 * before, [ZERO, [1 / 4, -1 / 6, -1 / 6], ZERO])

    def test_ptx_adds_its_gradient_in_the_same_step(self) -> None:
        # -log p(0 | 1), three times over: the policy's gradient direction, three times as long.
        lm = Bigrams()
        before = lm.table.detach().clone()
        text = Sample(torch.tensor([1, 0]), 0)
        step = reference.policy_step(lm, sgd(lm, 0.5), [ppo_example()], pretraining=[text], ptx_coef=3.0)
        assert step.losses == pytest.approx({"policy": -1.6, "ptx": -3 * log(4 / 6)}, rel=1e-12)
        assert step.loss == pytest.approx(-1.6 - 3 * log(4 / 6), rel=1e-12)
        assert step.gradient_norms == pytest.approx({"policy": sqrt(1 / 6), "ptx": 3 * sqrt(1 / 6)}, rel=1e-12)
        assert step.gradient_norm == pytest.approx(4 * sqrt(1 / 6), rel=1e-12)
        assert_close(step.gradients["table"], [ZERO, [-4 * g for g in ROW], ZERO])
        assert_close(step.weights["table"] - before, [ZERO, [2 * g for g in ROW], ZERO])

    def test_clipping_scales_the_step_not_the_report(self) -> None:
        lm = Bigrams()
        before = lm.table.detach().clone()
        step = reference.policy_step(lm, sgd(lm, 1.0), [ppo_example()], max_norm=0.1)
        assert_close(step.gradients["table"][1], [-g for g in ROW])
        moved = step.weights["table"] - before
        assert float(moved.norm()) == pytest.approx(0.1, rel=1e-5)

    def test_an_optimizer_keeps_its_state_between_steps(self) -> None:
        lm = Bigrams()
        optimizer = torch.optim.SGD(lm.parameters(), 0.5, momentum=0.9)
        first = reference.policy_step(lm, optimizer, [ppo_example()])
        second = reference.policy_step(lm, optimizer, [ppo_example()])
        momentum = 0.9 * first.gradients["table"] + second.gradients["table"]
        torch.testing.assert_close(second.weights["table"], first.weights["table"] - 0.5 * momentum)


def test_value_step() -> None:
    # Values [1, 0.5] from old [0.5, 0.5]: clipped [0.7, 0.5]. Returns [1, 1.5]: 0.5 * mean(max(0, 0.09), 1).
    # Only the second token has a gradient: (0.5 - 1.5) / 2 by its value, which is weight * table[0].
    model = Scorer()
    step = reference.value_step(model, sgd(model, 1.0), [ppo_example()], clip=0.2)
    assert step.loss == pytest.approx(0.2725, rel=1e-12)
    assert_close(step.gradients["base_model.table"], [-0.25, 0.0, 0.0])
    assert_close(step.gradients["score.weight"], [[-0.5]])
    assert_close(step.weights["base_model.table"], [1.25, 2.0, 3.0])
    assert_close(step.weights["score.weight"], [[1.0]])


def test_value_step_reads_normalised_values() -> None:
    # Values [0.25, 0]: clipped to [0.3, 0.3]; errors (0.75, 0.7) and (1.5, 1.2); the gradient is divided by scale.
    model = Scorer()
    step = reference.value_step(model, sgd(model, 1.0), [ppo_example()], 0.2, normalisation=(0.5, 2.0))
    assert step.loss == pytest.approx(0.5 * (0.75**2 + 1.5**2) / 2, rel=1e-12)
    assert_close(step.gradients["score.weight"], [[(-0.75 * 2 - 1.5 * 1) / 2 / 2]])


def test_sft_step_learns_responses_only() -> None:
    # log p(0 | 1), log p(2 | 0) and, from the second sample, log p(1 | 2); the prompt's own tokens count nothing.
    lm = Bigrams()
    step = reference.sft_step(lm, sgd(lm, 1.0), [SAMPLE, Sample(torch.tensor([0, 2, 1]), 2)])
    assert step.loss == pytest.approx(-(log(4 / 6) + 2 * log(1 / 4)) / 3, rel=1e-12)
    assert_close(
        step.gradients["table"],
        [[g / 3 for g in (1 / 4, 1 / 2, -3 / 4)], [-g / 3 for g in ROW], [g / 3 for g in (1 / 4, -3 / 4, 1 / 2)]],
    )


def test_a_text_without_prompt_is_learned_from_its_second_token_on() -> None:
    assert_close(reference.language_loss(Bigrams(), Sample(torch.tensor([1, 0, 2]), 0)), -log(4 / 6) - log(1 / 4))


def comparison(last: list[int], ranks: tuple[int, ...]) -> Comparison:
    """Responses of one token, whose scores are 0.5, 1 and 1.5 for tokens 0, 1 and 2."""
    return Comparison(tuple(Sample(torch.tensor([2, token]), 1) for token in last), ranks)


def test_reward_step() -> None:
    # Prompt 1: pairs (1, 0.5) and (1.5, 0.5), its tie dropped. Prompt 2: all tied, not counted. Prompt 3: (0.5, 1).
    model = Scorer()
    batch = [comparison([0, 1, 2], (2, 1, 1)), comparison([0, 2], (1, 1)), comparison([1, 0], (2, 1))]
    step = reference.reward_step(model, sgd(model, 1.0), batch)

    def miss(gap: float) -> float:
        return log(1 + exp(-gap))

    assert step.loss == pytest.approx(((miss(0.5) + miss(1.0)) / 2 + miss(-0.5)) / 2, rel=1e-12)

    def slope(gap: float) -> float:
        """d miss / d gap"""
        return -1 / (1 + exp(gap))

    # Gaps are weight * (1, 2) in prompt 1 and weight * -1 in prompt 3.
    want = ((slope(0.5) * 1 + slope(1.0) * 2) / 2 + slope(-0.5) * -1) / 2
    assert_close(step.gradients["score.weight"], [[want]])
    assert_close(step.weights["score.weight"], [[0.5 - want]])


def test_ties_alone_lose_nothing() -> None:
    scores = [vector(1.0), vector(2.0)]
    assert_close(reference.ranking_loss(scores, (1, 1)), 0.0)


class TestFirstDifference:
    want = {"a": vector([1.0, -100.0]), "b": vector([1.0]), "c": vector([0.0])}  # noqa: RUF012

    def test_none_when_all_agree_and_extra_names_do_not_matter(self) -> None:
        got = {"x": vector([9.0]), "a": vector([1.5, -100.0]), "b": vector([1.0]), "c": vector([0.0])}
        assert reference.first_difference(got, self.want, 0.01) is None

    def test_the_first_in_the_order_of_want_is_named_with_its_gap(self) -> None:
        got = {"c": vector([5.0]), "b": vector([1.5]), "a": vector([1.0, -100.0])}
        message = reference.first_difference(got, self.want, 0.01)
        assert message == "b differs by 0.5 where its largest entry is 1"

    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            ({"c": vector([1e-9])}, "c differs by 1e-09 where its largest entry is 0"),
            ({"b": vector([float("nan")])}, "b differs by nan where its largest entry is 1"),
            ({"b": vector([[1.0]])}, "b has shape (1, 1), expected (1,)"),
        ],
    )
    def test_other_differences(self, changed: dict[str, Tensor], message: str) -> None:
        assert reference.first_difference(self.want | changed, self.want, 0.01) == message

    def test_missing(self) -> None:
        assert reference.first_difference({"a": self.want["a"]}, self.want, 0.01) == "b is missing"


def test_the_reference_stands_alone_and_is_short() -> None:
    source = Path(reference.__file__).read_text()
    assert len(source.splitlines()) < 400
    nodes = list(ast.walk(ast.parse(source)))
    imported = {alias.name for n in nodes if isinstance(n, ast.Import) for alias in n.names}
    froms = [n for n in nodes if isinstance(n, ast.ImportFrom)]
    assert not any(n.level for n in froms)
    imported |= {n.module for n in froms if n.module}
    allowed = {"__future__", "collections", "dataclasses", "itertools", "typing", "torch", "numpy"}
    assert {name for name in imported if name.split(".")[0] not in allowed} == {"rayrlhf.types"}
    for node in nodes:
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 40, node.name
