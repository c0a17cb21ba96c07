"""The recipe again, plainly: one process, PyTorch only, written to be checked against the papers, not to be fast.

It shares no code with the product but the records of `rayrlhf.types`, so that agreement between the two means
something. It works one sequence at a time: no padding, no packing, no micro-batches, no ranks. It computes in the
dtype of the models it is given (float64 for a yardstick, float32 for a run's own numbers), with dropout off.

    prompts, responses ── score ──► Scored ── estimate ──► PPOExample ── policy_step, value_step ──► Step
    demonstrations ── sft_step ──► Step                    rankings ── reward_step ──► Step

Shape legend: T tokens of one sequence, P of its prompt, R = T - P of its response, V vocabulary. Token r of the
response stands at place P + r of the sequence, and is predicted by what the model gives at place P + r - 1.

Papers: [O] Ouyang et al. 2022, arXiv 2203.02155. [S16] Schulman et al. 2016, "High-dimensional continuous control
using generalized advantage estimation", arXiv 1506.02438. [S17] Schulman et al. 2017, "Proximal policy optimization
algorithms", arXiv 1707.06347. [S20] Schulman 2020, "Approximating KL divergence", joschu.net/blog/kl-approx.html.
[Z] Ziegler et al. 2019, arXiv 1909.08593, and its code, lm-human-preferences.

The product differs in one place on purpose: it holds log-ratios to +-20 before exp, here they are free.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rayrlhf.types import Experience, Rollout

__all__ = [
    "Comparison", "Estimate", "PPOExample", "Sample", "Scored", "Step", "estimate", "first_difference", "gae",
    "language_loss", "policy_loss", "policy_step", "ranking_loss", "response_logprobs", "response_reward",
    "response_values", "reward_step", "score", "sft_step", "take_step", "token_kl", "token_rewards", "value_loss",
    "value_step", "whiten",
]  # fmt: skip

CausalLM = Any
"""A Hugging Face causal language model: lm(input_ids=[B, T]).logits is [B, T, V]."""
Classifier = Any
"""A Hugging Face sequence-classification model: a backbone `.base_model` and a head `.score` of one output."""
KLKind = Literal["k1", "k2", "k3"]
WHITENING_EPSILON = 1e-8
"""Added to the variance; from `whiten` in the code of [Z]."""


@dataclass(frozen=True)
class Sample:
    """A prompt and its response, or, with `prompt_tokens` 0, a plain text."""

    tokens: Tensor
    """int64 [T]"""
    prompt_tokens: int
    """P"""

    @classmethod
    def of(cls, rollout: Rollout) -> Sample:
        return cls(torch.tensor(rollout.tokens, dtype=torch.long), rollout.prompt_tokens)


@dataclass(frozen=True)
class Scored:
    """What the four models say of one sample, before the step's first update."""

    logprobs: Tensor
    """[R], of the policy"""
    reference_logprobs: Tensor
    """[R], of the SFT model"""
    values: Tensor
    """[R], V_t: the value before token t is sampled"""
    reward: Tensor
    """[], the reward model's, normalised"""


@dataclass(frozen=True)
class Estimate:
    """What one response earned."""

    rewards: Tensor
    """[R], r_t: KL penalty and score"""
    advantages: Tensor
    """[R], whitened over all tokens of the batch"""
    returns: Tensor
    """[R], from the advantages before whitening"""


@dataclass(frozen=True)
class PPOExample:
    """One sample, ready to train on."""

    sample: Sample
    old_logprobs: Tensor
    """[R], as are the rest"""
    advantages: Tensor
    returns: Tensor
    old_values: Tensor

    @classmethod
    def of(cls, experience: Experience) -> PPOExample:
        arrays = (experience.old_logprobs, experience.advantages, experience.returns, experience.old_values)
        return cls(Sample.of(experience.rollout), *(torch.tensor(a) for a in arrays))


@dataclass(frozen=True)
class Comparison:
    """The ranked responses to one prompt."""

    samples: tuple[Sample, ...]
    """K of them"""
    ranks: tuple[int, ...]
    """1 is best, equal ranks are ties"""


@dataclass(frozen=True)
class Step:
    """What one optimizer step did. Parameters go by their `named_parameters()` name, a tied one by its first."""

    losses: dict[str, float]
    """each part of the loss as it enters the sum, coefficient included"""
    gradient_norms: dict[str, float]
    """of each part alone, likewise"""
    gradients: dict[str, Tensor]
    """of the sum, before clipping"""
    gradient_norm: float
    """of the sum, before clipping: sqrt of the sum of squares over all parameters"""
    weights: dict[str, Tensor]
    """after the step"""

    @property
    def loss(self) -> float:
        return sum(self.losses.values())


def response_logprobs(lm: CausalLM, sample: Sample, temperature: float = 1.0) -> Tensor:
    """log pi(token | what precedes it) of each response token: [R], differentiable.

    pi = softmax(logits / temperature): what was sampled from (temperature 1 in [O]).
    """
    logits = lm(input_ids=sample.tokens[None], use_cache=False).logits[0]  # [T, V]
    logprobs = torch.log_softmax(logits / temperature, dim=-1)
    return torch.stack([logprobs[t - 1, sample.tokens[t]] for t in _response_places(sample)])


def response_values(classifier: Classifier, sample: Sample, bias: float = 0.0, scale: float = 1.0) -> Tensor:
    """V_t, what the value model gives where token t is predicted: [R], differentiable.

    bias, scale: the normalisation of the reward model that the value model was started from ([O] appendix C.4).
    """
    places = [t - 1 for t in _response_places(sample)]
    return (_head(classifier, sample)[places] - bias) / scale


def response_reward(classifier: Classifier, sample: Sample, bias: float = 0.0, scale: float = 1.0) -> Tensor:
    """The normalised score, (x - bias) / scale at the last token of the response: [], differentiable.

    The bias makes the labelers' demonstrations score 0 on average ([O] section 3.5).
    """
    return (_head(classifier, sample)[-1] - bias) / scale


def score(
    sample: Sample,
    policy: CausalLM,
    reference: CausalLM,
    value: Classifier,
    reward: Classifier,
    temperature: float = 1.0,
    value_normalisation: tuple[float, float] = (0.0, 1.0),
    reward_normalisation: tuple[float, float] = (0.0, 1.0),
) -> Scored:
    """All that PPO needs to know of a sample; a normalisation is (bias, scale). No gradients."""
    with torch.no_grad():
        return Scored(
            response_logprobs(policy.eval(), sample, temperature),
            response_logprobs(reference.eval(), sample, temperature),
            response_values(value.eval(), sample, *value_normalisation),
            response_reward(reward.eval(), sample, *reward_normalisation),
        )


def _head(classifier: Classifier, sample: Sample) -> Tensor:
    """The scalar head at every place of the sequence: [T]."""
    hidden = classifier.base_model(input_ids=sample.tokens[None], use_cache=False).last_hidden_state[0]  # [T, D]
    outputs: Tensor = classifier.score(hidden)
    return outputs[:, 0]


def _response_places(sample: Sample) -> range:
    if sample.prompt_tokens < 1:
        raise ValueError("the first token of a sequence is predicted by nothing; a response needs a prompt")
    return range(sample.prompt_tokens, len(sample.tokens))


def token_kl(logprobs: Tensor, reference_logprobs: Tensor, kind: KLKind = "k1") -> Tensor:
    """Estimate KL(pi || pi_ref) at each token: [R].

    With q = pi_ref / pi: k1 = -log q (the penalty of [O] eq. 2), k2 = (log q)^2 / 2, k3 = (q - 1) - log q ([S20]).
    """
    log_q = reference_logprobs - logprobs
    return {"k1": -log_q, "k2": log_q**2 / 2, "k3": (log_q.exp() - 1) - log_q}[kind]


def token_rewards(reward: Tensor, kl: Tensor, kl_coef: float) -> Tensor:
    """r_t = -kl_coef * KL_t, plus the reward model's score at the last token: [R].

    With k1 they sum to r(x, y) - beta log(pi(y|x) / pi_SFT(y|x)): [O] eq. 2, placed by token as in the code of [Z].
    """
    rewards = -kl_coef * kl
    rewards[-1] += reward
    return rewards


def gae(rewards: Tensor, values: Tensor, gamma: float = 1.0, lam: float = 0.95) -> tuple[Tensor, Tensor]:
    """Advantages A_t and returns A_t + V_t of one response, [R] each.

    delta_t = r_t + gamma V_{t+1} - V_t, with V = 0 after the last token
    A_t = sum over l >= 0 of (gamma lam)^l delta_{t+l}          [S16] eq. 16
    """
    next_values = torch.cat([values[1:], values.new_zeros(1)])
    deltas = rewards + gamma * next_values - values
    weights = torch.tensor([(gamma * lam) ** power for power in range(len(deltas))], dtype=deltas.dtype)
    advantages = torch.stack([(weights[: len(deltas) - t] * deltas[t:]).sum() for t in range(len(deltas))])
    return advantages, advantages + values


def whiten(rows: Sequence[Tensor]) -> list[Tensor]:
    """Shift and scale to mean 0, variance 1 over all tokens of all rows ([R_i] each): (x - mean) / sqrt(var + 1e-8).

    The variance is the population's. Source: `whiten` in the code of [Z].
    """
    tokens = torch.cat(list(rows))
    mean = tokens.mean()
    variance = ((tokens - mean) ** 2).mean()
    return [(row - mean) / torch.sqrt(variance + WHITENING_EPSILON) for row in rows]


def estimate(
    batch: Sequence[Scored], kl_coef: float, kind: KLKind = "k1", gamma: float = 1.0, lam: float = 0.95
) -> list[Estimate]:
    """Token rewards, whitened advantages and returns of a whole batch, in its order."""
    rewards = [token_rewards(s.reward, token_kl(s.logprobs, s.reference_logprobs, kind), kl_coef) for s in batch]
    pairs = [gae(r, s.values, gamma, lam) for r, s in zip(rewards, batch, strict=True)]
    white = whiten([advantages for advantages, _ in pairs])
    return [Estimate(r, w, returns) for r, w, (_, returns) in zip(rewards, white, pairs, strict=True)]


def policy_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip: float = 0.2) -> Tensor:
    """-sum over t of min(ratio_t A_t, clip(ratio_t, 1 - clip, 1 + clip) A_t), ratio = pi / pi_old: [].  [S17] eq. 7."""
    ratio = torch.exp(logprobs - old_logprobs)
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages).sum()


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float = 0.2) -> Tensor:
    """0.5 sum over t of max((V_t - return_t)^2, (V_clipped_t - return_t)^2): [].

    V_clipped stays within `clip` of the old value. Source: `vf_loss` in the code of [Z].
    """
    clipped = torch.clamp(values, old_values - clip, old_values + clip)
    return 0.5 * torch.maximum((values - returns) ** 2, (clipped - returns) ** 2).sum()


def language_loss(lm: CausalLM, sample: Sample) -> Tensor:
    """-sum over t of log pi(token_t | before) over what follows the prompt, a text's first token left out: []."""
    return -response_logprobs(lm, Sample(sample.tokens, max(1, sample.prompt_tokens))).sum()


def ranking_loss(scores: Sequence[Tensor], ranks: Sequence[int]) -> Tensor:
    """-1/|P| sum over (w, l) in P of log sigmoid(score_w - score_l), P a prompt's pairs without its ties: [].

    [O] eq. 1, where |P| = C(K, 2); no pairs give 0.
    """
    pairs = [(i, j) if ranks[i] < ranks[j] else (j, i) for i, j in combinations(range(len(ranks)), 2)]
    losses = [-nn.functional.logsigmoid(scores[i] - scores[j]) for i, j in pairs if ranks[i] != ranks[j]]
    return torch.stack(losses).mean() if losses else 0 * scores[0]


def policy_step(
    lm: CausalLM,
    optimizer: Optimizer,
    minibatch: Sequence[PPOExample],
    clip: float = 0.2,
    temperature: float = 1.0,
    pretraining: Sequence[Sample] = (),
    ptx_coef: float = 0.0,
    max_norm: float = 0,
) -> Step:
    """One step on PPO's loss, and with `pretraining` on PPO-ptx's: loss_PPO + ptx_coef * loss_LM ([O] eq. 2).

    Each loss is a mean over all tokens of its own minibatch. The two gradients add up before the one optimizer step.
    """
    tokens = sum(len(e.old_logprobs) for e in minibatch)

    def ppo(e: PPOExample) -> Tensor:
        return policy_loss(response_logprobs(lm, e.sample, temperature), e.old_logprobs, e.advantages, clip) / tokens

    objectives: dict[str, Iterable[Tensor]] = {"policy": map(ppo, minibatch)}
    if pretraining:
        objectives["ptx"] = (ptx_coef * term for term in _language_terms(lm, pretraining))
    return take_step(lm, optimizer, objectives, max_norm)


def value_step(
    classifier: Classifier,
    optimizer: Optimizer,
    minibatch: Sequence[PPOExample],
    clip: float = 0.2,
    normalisation: tuple[float, float] = (0.0, 1.0),
    max_norm: float = 0,
) -> Step:
    """One step on the clipped value loss, a mean over all tokens of the minibatch."""
    tokens = sum(len(e.old_values) for e in minibatch)

    def term(e: PPOExample) -> Tensor:
        values = response_values(classifier, e.sample, *normalisation)
        return value_loss(values, e.old_values, e.returns, clip) / tokens

    return take_step(classifier, optimizer, {"value": map(term, minibatch)}, max_norm)


def sft_step(lm: CausalLM, optimizer: Optimizer, batch: Sequence[Sample], max_norm: float = 0) -> Step:
    """One step on the next-token loss of the responses ([O] section 3.5), a mean over all of their tokens."""
    return take_step(lm, optimizer, {"sft": _language_terms(lm, batch)}, max_norm)


def reward_step(classifier: Classifier, optimizer: Optimizer, batch: Sequence[Comparison], max_norm: float = 0) -> Step:
    """One step on the ranking loss ([O] eq. 1), a mean over the prompts that have any pair but ties."""
    prompts = [c for c in batch if len(set(c.ranks)) > 1]

    def term(c: Comparison) -> Tensor:
        return ranking_loss([response_reward(classifier, s) for s in c.samples], c.ranks) / len(prompts)

    return take_step(classifier, optimizer, {"reward": map(term, prompts)}, max_norm)


def take_step(
    model: nn.Module, optimizer: Optimizer, objectives: Mapping[str, Iterable[Tensor]], max_norm: float = 0
) -> Step:
    """Minimise the sum of all objectives by one optimizer step, with dropout off.

    objectives: for each part of the loss its terms, which add up to it; each is computed when asked for, so that
        only one sequence's graph is alive.
    max_norm: gradients are scaled down to this norm; 0 leaves them.
    """
    model.eval()
    parameters = dict(model.named_parameters())
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    losses, norms = dict[str, float](), dict[str, float]()
    for part, terms in objectives.items():
        losses[part], gradients = _gradients(parameters, terms)
        norms[part] = _norm(gradients.values())
        total = {name: total[name] + gradients[name] for name in parameters}
    for name, parameter in parameters.items():
        parameter.grad = total[name].clone()
    if max_norm:
        nn.utils.clip_grad_norm_(parameters.values(), max_norm)
    optimizer.step()
    return Step(losses, norms, total, _norm(total.values()), {n: p.detach().clone() for n, p in parameters.items()})


def _gradients(parameters: Mapping[str, nn.Parameter], terms: Iterable[Tensor]) -> tuple[float, dict[str, Tensor]]:
    """The sum of `terms` and its gradient."""
    loss, total = 0.0, {name: torch.zeros_like(p) for name, p in parameters.items()}
    for term in terms:
        loss += float(term.detach())
        gradients = torch.autograd.grad(term, list(parameters.values()), materialize_grads=True)
        total = {name: total[name] + g for name, g in zip(parameters, gradients, strict=True)}
    return loss, total


def _language_terms(lm: CausalLM, samples: Sequence[Sample]) -> Iterator[Tensor]:
    tokens = sum(len(s.tokens) - max(1, s.prompt_tokens) for s in samples)
    return (language_loss(lm, s) / tokens for s in samples)


def _norm(tensors: Iterable[Tensor]) -> float:
    return float(sum(float((t.double() ** 2).sum()) for t in tensors) ** 0.5)


def first_difference(got: Mapping[str, Tensor], want: Mapping[str, Tensor], tolerance: float) -> str | None:
    """Name the first tensor, in the order of `want`, that is missing, misshapen, or off by more than
    tolerance * (its largest entry in `want`); None when there is none. Names only `got` has are not looked at."""
    for name, expected in want.items():
        if name not in got:
            return f"{name} is missing"
        if (shape := tuple(got[name].shape)) != tuple(expected.shape):
            return f"{name} has shape {shape}, expected {tuple(expected.shape)}"
        gap = float((got[name].double() - expected.double()).abs().max())
        largest = float(expected.double().abs().max())
        if not gap <= tolerance * largest:  # written so that a NaN does not pass
            return f"{name} differs by {gap:.3g} where its largest entry is {largest:.3g}"
    return None
