"""One PPO-ptx step of two responses, small enough for pencil and calculator: every number printed, in order.

    .venv/bin/python examples/one_ppo_step.py

Each number comes from `rayrlhf.algorithms`, the functions that a run uses. Beside each call the same number is worked
by hand, in plain Python floats, and the script stops if the two differ. Both ways start from the round numbers below
and never exchange a result. docs/one_step.md explains the output.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import exp, isclose, log, nan, sqrt
from typing import NamedTuple

import torch
from torch import Tensor

from rayrlhf import algorithms

TOKENS = ["A1", "A2", "A3", "B1", "B2"]  # response A has three tokens, response B two
LAST = [False, False, True, False, True]
MASK = torch.tensor([[True, True, True], [True, True, False]])
T = range(5)

LOG_PI = [-1.0, -2.0, -0.5, -1.5, -0.7]  # of the policy that sampled
LOG_REF = [-1.2, -1.6, -0.9, -2.0, -0.6]  # of the reference
VALUES = [0.4, 0.5, 0.8, 0.1, -0.2]  # before each token is sampled
SCORES = [1.0, -0.5]  # of the reward model, for A and B
NEW_LOG_PI = [-0.7, -2.1, -0.8, -1.2, -1.0]  # after some update of the policy
NEW_VALUES = [0.7, 0.6, 0.7, 0.0, 0.05]  # after some update of the value model
LOG_TEXT = [-2.0, -1.0, -3.0, -2.5]  # of four tokens of pretraining text

BETA, GAMMA, LAM, CLIP, PTX_COEF = 0.1, 1.0, 0.95, 0.2, 0.5


class Twice(NamedTuple):
    """Some numbers twice over: as the product computes them and as a person would."""

    product: Tensor
    """[B, R], or [N] where there is no padding"""
    by_hand: list[float]
    """of A1, A2, A3, B1, B2, or as the product's [N]"""


def numbers(column: Twice | Sequence[float]) -> Sequence[float]:
    """Return what is printed of a column: where there are two, the product's, at valid tokens."""
    if not isinstance(column, Twice):
        return column
    product = column.product[MASK] if column.product.dim() == 2 else column.product
    return [float(x) for x in product]


def same(product: Tensor, by_hand: list[float]) -> Twice:
    """Pair a result with the one worked by hand, which must be equal up to float32's rounding."""
    both = Twice(product, by_hand)
    for ours, hand in zip(numbers(both), by_hand, strict=True):
        assert isclose(ours, hand, rel_tol=1e-5, abs_tol=1e-6), f"the product has {ours:.7g}, by hand it is {hand:.7g}"
    return both


def given(row: list[float]) -> Twice:
    """Lay one number a token out as [B, R]; NaN as padding shows that no function reads it."""
    return same(torch.tensor([row[:3], [*row[3:], nan]]), row)


def table(heading: str, names: str, *columns: Twice | list[float], rows: Sequence[str] = TOKENS) -> None:
    title, *formulas = (line.strip() for line in heading.splitlines())
    print(f"\n{title}", *formulas, sep="\n    ")
    print("\n" + 9 * " " + "".join(f"{name:>11}" for name in names.split(", ")))
    for row, *cells in zip(rows, *map(numbers, columns), strict=True):
        print(f"    {row:5}" + "".join(f"{x:11.4f}" for x in cells))


def total(name: str, working: str, product: Tensor, by_hand: float) -> Twice:
    """Print one number of a whole batch with its working."""
    both = same(product.reshape(1), [by_hand])
    print(f"    {name} = {working} = {numbers(both)[0]:.5f}")
    return both


def token_by_token(loss: Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]]) -> dict[str, Tensor]:
    """Ask a loss for each token's term: the mean over a mask of that token alone. Values: [5]."""
    alone = []
    for row, place in MASK.nonzero().tolist():
        mask = torch.zeros_like(MASK)
        mask[row, place] = True
        value, stats = loss(mask)
        alone.append({"term": value, **stats})
    return {name: torch.stack([token[name] for token in alone]) for name in alone[0]}


def kl_penalty() -> Twice:
    d = [LOG_PI[t] - LOG_REF[t] for t in T]
    policy, reference = given(LOG_PI), given(LOG_REF)
    k1 = same(algorithms.kl_estimate(policy.product, reference.product, "k1"), d)
    k2 = same(algorithms.kl_estimate(policy.product, reference.product, "k2"), [x**2 / 2 for x in d])
    k3 = same(algorithms.kl_estimate(policy.product, reference.product, "k3"), [exp(-x) - 1 + x for x in d])
    heading = """1. KL to the reference, token by token  [Schulman 2020; k1: Ouyang et al. 2022, eq. 2]
        k1 = d = log_pi - log_ref,    k2 = d^2 / 2,    k3 = exp(-d) - 1 + d"""
    table(heading, "log_pi, log_ref, k1 = d, k2, k3", policy, reference, k1, k2, k3)
    return k1


def rewards_of(kl: Twice) -> Twice:
    penalty, score = [-BETA * k for k in kl.by_hand], [0.0, 0.0, SCORES[0], 0.0, SCORES[1]]
    product = algorithms.token_rewards(torch.tensor(SCORES), kl.product, MASK, BETA)
    rewards = same(product, [penalty[t] + score[t] for t in T])
    heading = f"""2. Token rewards  [Ouyang et al. 2022, eq. 2]
        r = -beta k1, plus the score at the last token; beta = {BETA}"""
    table(heading, "k1, (-beta k1), (score), r", kl, penalty, score, rewards)
    return rewards


def advantages_of(rewards: Twice) -> tuple[Twice, Twice]:
    delta, a = [0.0] * 5, [0.0] * 5
    for t in reversed(T):
        next_value, next_a = (0.0, 0.0) if LAST[t] else (VALUES[t + 1], a[t + 1])
        delta[t] = rewards.by_hand[t] + GAMMA * next_value - VALUES[t]
        a[t] = delta[t] + GAMMA * LAM * next_a
    values = given(VALUES)
    deltas = same(algorithms.gae(rewards.product, values.product, MASK, GAMMA, lam=0.0)[0], delta)
    both = algorithms.gae(rewards.product, values.product, MASK, GAMMA, LAM)
    advantages, returns = same(both[0], a), same(both[1], [a[t] + VALUES[t] for t in T])
    heading = f"""3. Advantages and returns (GAE)  [Schulman et al. 2016, eq. 16]
        delta = r + gamma V_next - V,    A = delta + gamma lam A_next,    return = A + V
        gamma = {GAMMA}, lam = {LAM}; after the last token V_next and A_next are 0"""
    table(heading, "r, V, delta, A, return", rewards, values, deltas, advantages, returns)
    return advantages, returns


def whitened(advantages: Twice) -> Twice:
    a = advantages.by_hand
    mean = sum(a) / 5
    off = [x - mean for x in a]
    squares = [x**2 for x in off]
    variance = sum(squares) / 5
    ranks = zip(advantages.product, MASK, strict=True)  # as if A and B were on two ranks, whose moments add up
    moments = torch.stack([torch.stack(algorithms.masked_moments(*rank)) for rank in ranks]).sum(0)
    product = algorithms.whiten_with_moments(advantages.product, MASK, *moments)
    white = same(product, [x / sqrt(variance + 1e-8) for x in off])
    heading = """4. Whitening, over all tokens of the batch  [`whiten` in the code of Ziegler et al. 2019]
        white = (A - mean) / sqrt(variance + 1e-8), the population's variance"""
    table(heading, "A, (A - mean), (squared), white", advantages, off, squares, white)
    total("mean", "sum of A / 5", algorithms.masked_mean(advantages.product, MASK), mean)
    total("variance", "sum of (squared) / 5", algorithms.masked_var(advantages.product, MASK), variance)
    return white


def policy_loss(white: Twice) -> Twice:
    new, old, a = given(NEW_LOG_PI), given(LOG_PI), white.by_hand
    ratio = [exp(NEW_LOG_PI[t] - LOG_PI[t]) for t in T]
    c = [min(max(r, 1 - CLIP), 1 + CLIP) for r in ratio]
    free, held = [ratio[t] * a[t] for t in T], [c[t] * a[t] for t in T]
    term = [-min(free[t], held[t]) for t in T]

    def loss(mask: Tensor, tokens: int | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        return algorithms.ppo_policy_loss(new.product, old.product, white.product, mask, CLIP, denominator=tokens)

    each = token_by_token(loss)
    ratios, terms = same(each["ratio_mean"], ratio), same(each["term"], term)
    binds = same(each["clip_fraction"], [float(held[t] < free[t]) for t in T])
    heading = f"""5. Policy loss  [Schulman et al. 2017, eq. 7]
        ratio = exp(log_new - log_pi),    c = ratio held to [{1 - CLIP}, {1 + CLIP}]
        term = -min(ratio white, c white);    binds: 1 where the clip raised it, and the token gets no gradient"""
    names = "log_new, ratio, (c), white, (r white), (c white), term, binds"
    table(heading, names, new, ratios, c, white, free, held, terms, binds)
    only_a, only_b = MASK & torch.tensor([[True], [False]]), MASK & torch.tensor([[False], [True]])
    total("share of A", "its terms / 5", loss(only_a, tokens=5)[0], sum(term[:3]) / 5)
    total("share of B", "its terms / 5", loss(only_b, tokens=5)[0], sum(term[3:]) / 5)
    whole, stats = loss(MASK)
    kl = sum(r - 1 - log(r) for r in ratio) / 5
    total("approx_kl", "sum of (ratio - 1 - log ratio) / 5", stats["approx_kl"], kl)
    return total("policy loss", "sum of terms / 5", whole, sum(term) / 5)


def value_loss(returns: Twice) -> None:
    new, old, goal = given(NEW_VALUES), given(VALUES), returns.by_hand
    c = [min(max(NEW_VALUES[t], VALUES[t] - CLIP), VALUES[t] + CLIP) for t in T]
    free, held = [(NEW_VALUES[t] - goal[t]) ** 2 for t in T], [(c[t] - goal[t]) ** 2 for t in T]
    term = [max(free[t], held[t]) / 2 for t in T]

    def loss(mask: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return algorithms.ppo_value_loss(new.product, old.product, returns.product, mask, CLIP)

    each = token_by_token(loss)
    terms, binds = same(each["term"], term), same(each["clip_fraction"], [float(held[t] > free[t]) for t in T])
    heading = f"""6. Value loss  [`vf_loss` in the code of Ziegler et al. 2019]
        c = V_new held to [V - {CLIP}, V + {CLIP}],    e = (V_new - return)^2,    e_c = (c - return)^2
        term = max(e, e_c) / 2;    binds: 1 where e_c is the larger, and the token gets no gradient"""
    names = "V, V_new, (c), return, (e), (e_c), term, binds"
    table(heading, names, old, new, c, returns, free, held, terms, binds)
    total("value loss", "sum of terms / 5", loss(MASK)[0], sum(term) / 5)


def ptx(ppo: Twice) -> None:
    text, mask = same(torch.tensor(LOG_TEXT), LOG_TEXT), torch.ones(4, dtype=torch.bool)
    heading = f"""7. Pretraining term (ptx), and the policy's whole loss  [Ouyang et al. 2022, eq. 2]
        lm = -mean of log_pi,    loss = policy loss + coef lm; coef = {PTX_COEF}"""
    table(heading, "log_pi", text, rows=["T1", "T2", "T3", "T4"])
    lm = total("lm", "-sum of log_pi / 4", algorithms.lm_loss(text.product, mask), -sum(LOG_TEXT) / 4)
    loss, by_hand = ppo.product + PTX_COEF * lm.product, ppo.by_hand[0] + PTX_COEF * lm.by_hand[0]
    total("loss", "policy loss + coef lm", loss, by_hand)


def ranking() -> None:
    scores, ranks = [1.0, 0.5, 0.0], [1, 2, 2]
    gaps = [scores[0] - scores[1], scores[0] - scores[2]]  # the second and the third tie: no pair
    terms = [-log(1 / (1 + exp(-gap))) for gap in gaps]
    heading = f"""8. Ranking loss of the reward model, K = 3  [Ouyang et al. 2022, eq. 1]
        responses x, y, z with scores {scores} and ranks {ranks}: y and z tie, and make no pair
        term = -log sigmoid(gap),    gap = score of the better - score of the worse"""
    table(heading, "(gap), (term)", gaps, terms, rows=["x, y", "x, z"])
    loss = algorithms.ranking_loss(torch.tensor(scores), torch.tensor(ranks), torch.tensor([0, 0, 0]))
    total("loss", "sum of terms / 2", loss, sum(terms) / 2)


def dpo() -> None:
    # Log-probs of whole responses, at the start of training and later.
    chosen, rejected, c_ref, r_ref = [-12.0, -11.0], [-15.0, -16.0], [-12.0, -12.0], [-15.0, -15.0]
    m = [(chosen[i] - c_ref[i]) - (rejected[i] - r_ref[i]) for i in (0, 1)]
    pairs = [[torch.tensor([column[i]]) for column in (chosen, rejected, c_ref, r_ref)] for i in (0, 1)]
    product = torch.stack([algorithms.dpo_loss(pc, pr, rc, rr, BETA) for pc, pr, rc, rr in pairs])
    loss = same(product, [-log(1 / (1 + exp(-BETA * x))) for x in m])
    heading = f"""9. DPO loss  [Rafailov et al. 2023, eq. 7]
        loss = -log sigmoid(beta m),    m = (chosen - c_ref) - (rejected - r_ref); beta = {BETA}"""
    names = "chosen, c_ref, rejected, r_ref, (m), loss"
    table(heading, names, chosen, c_ref, rejected, r_ref, m, loss, rows=["start", "later"])


def groups() -> None:
    scores, prompts = [2.0, 0.0, 1.0, 1.0, 3.0], [1, 1, 1, 1, 2]
    mean = sum(scores[:4]) / 4
    variance = sum((s - mean) ** 2 for s in scores[:4]) / 4
    relative = [(s - mean) / sqrt(variance + 1e-8) for s in scores[:4]] + [0.0]
    others = [(sum(scores[:4]) - s) / 3 for s in scores[:4]] + [scores[4]]
    group = torch.tensor(scores), torch.tensor(prompts)
    grpo = same(algorithms.group_relative(*group), relative)
    rloo = same(algorithms.leave_one_out(*group), [scores[i] - others[i] for i in T])
    heading = f"""10. Advantages without a value model  [Shao et al. 2024, section 4.1.2; Ahmadian et al. 2024]
        four responses to one prompt, p, with mean {mean} and variance {variance}; one to another, q
        grpo = (score - mean) / sqrt(variance + 1e-8),    rloo = score - mean of the others (alone: of itself)"""
    rows = ["p1", "p2", "p3", "p4", "q1"]
    table(heading, "score, grpo, (others), rloo", same(group[0], scores), grpo, others, rloo, rows=rows)


def main() -> None:
    print("Two responses, A of three tokens and B of two. Columns in brackets are working steps, by hand only.")
    advantages, returns = advantages_of(rewards_of(kl_penalty()))
    ppo = policy_loss(whitened(advantages))
    value_loss(returns)
    ptx(ppo)
    ranking()
    dpo()
    groups()
    print("\nThe product and the arithmetic by hand agree on every number.")


if __name__ == "__main__":
    main()
