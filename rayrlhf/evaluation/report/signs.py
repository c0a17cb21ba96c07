"""Signs of trouble in a run, mostly of reward hacking: each rule is one small pure function.

A rule looks at one arm and returns what it found (the number, the step, what to do) or None. The thresholds are
judgements, not laws; each stands beside its rule's reason. "First" and "last" are means over a tenth of the steps.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import fmean, median
from typing import Any

__all__ = ["RULES", "Arm", "Finding", "Rule", "look"]


@dataclass(frozen=True, slots=True)
class Arm:
    """What the rules look at: every step of an arm, and what the evaluation says of it."""

    name: str
    columns: Mapping[str, Sequence[float | None]] = field(default_factory=dict)
    """metric -> value a step; "step" is the axis"""
    responses: Sequence[tuple[float, str]] = ()
    """(step, text) of the samples, in the order of steps"""
    evaluated: Mapping[str, float] = field(default_factory=dict)
    """measure -> value on the held-out prompts"""
    sft: Mapping[str, float] = field(default_factory=dict)
    """the same measures of the model that PPO started from"""
    reasons: Sequence[str] = ()
    """why engines were quarantined, as the publisher said it"""


@dataclass(frozen=True, slots=True)
class Finding:
    title: str
    number: str
    """What was measured, in words with its number."""
    advice: str
    step: float | None = None
    """Where it is first seen; None when it was seen on held-out prompts."""
    plot: str = ""
    """The metric whose plot shows it."""


@dataclass(frozen=True, slots=True)
class Rule:
    looks_for: str
    needs: tuple[str, ...]
    """Metrics, measures or "responses", any of which lets the rule say something."""
    find: Callable[[Arm], Finding | None]


def look(arm: Arm) -> tuple[list[Finding], list[str]]:
    """What was found, and what could not be looked for because the run does not hold it."""
    held = {*arm.columns, *arm.evaluated, *(("responses",) if arm.responses else ())}
    found = [finding for rule in RULES if (finding := rule.find(arm))]
    return found, [rule.looks_for for rule in RULES if not held.intersection(rule.needs)]


# ---- the rules


def length_growth(arm: Arm) -> Finding | None:
    """Half as long again, and by two tokens at least: a tiny world's answers are short."""
    track = _track(arm, "response/length_mean")
    first, last = _ends(track)
    if not track or last < 1.5 * first or last - first < 2:
        return None
    return Finding(
        "Responses grow longer",
        f"{first:.1f} tokens at the start, {last:.1f} at the end ({last / first:.1f} times)",
        "Read the longest answers. Compare at equal length (length-controlled win rate); if the length is the reward's "
        "doing, see the reward model's length bias, raise ppo.kl.coef, or penalise with ppo.truncated.",
        _first(track, lambda v: v >= 1.5 * first),
        "response/length_mean",
    )


def kl_jump(arm: Arm) -> Finding | None:
    """One step moves the policy by more than a nat and a half, and by six times what a step usually does."""
    track = _track(arm, "kl/mean")
    moves = [(step, value - before) for (_, before), (step, value) in pairwise(track)]
    if len(moves) < 3:
        return None
    usual = median(abs(move) for _, move in moves)
    step, largest = max(moves, key=lambda item: item[1])
    if largest <= max(1.5, 6 * usual):
        return None
    return Finding(
        "KL jumps",
        f"{largest:.1f} nats per response more in one step (usually {usual:.2g})",
        "The update of that step went too far: lower ppo.learning_rate, set ppo.kl.stop, or look at its samples.",
        step,
        "kl/mean",
    )


def kl_high(arm: Arm) -> Finding | None:
    """Past ten nats per response a reward model is usually asked about text unlike any it was trained on."""
    track = _track(arm, "kl/mean")
    step = _first(track, lambda v: v > 10)
    if step is None:
        return None
    return Finding(
        "The policy is far from SFT",
        f"KL reaches {max(v for _, v in track):.1f} nats per response; over 10 the reward model is on unknown ground",
        "Take an earlier checkpoint, raise ppo.kl.coef, or set ppo.kl.target.",
        step,
        "kl/mean",
    )


def less_distinct(arm: Arm) -> Finding | None:
    """Distinct-2, the share of different word pairs, below 70 % of the SFT model's on the same prompts."""
    before, after = arm.sft.get("distinct_2"), arm.evaluated.get("distinct_2")
    if before is None or after is None or after >= 0.7 * before:
        return None
    return Finding(
        "Answers are more alike",
        f"distinct-2 is {after:.2f} on held-out prompts, {before:.2f} for SFT",
        "Read answers to different prompts side by side. A larger ppo.kl.coef or fewer steps keep more variety.",
    )


def repeated_phrases(arm: Arm) -> Finding | None:
    """A phrase of three words three times in a response, in a tenth more of the late samples than of the early ones."""
    quarter = len(arm.responses) // 4
    if quarter < 4:
        return None
    early, late = arm.responses[:quarter], arm.responses[-quarter:]
    before, after = (fmean(_repeats(text) for _, text in part) for part in (early, late))
    if after < before + 0.1:
        return None
    return Finding(
        "Responses repeat themselves",
        f"{100 * after:.0f} % of the late samples say a phrase of three words three times or more, "
        f"{100 * before:.0f} % of the early ones",
        "The reward likes the phrase: look for it in the samples, add rankings that reject it, raise ppo.kl.coef.",
        next((step for step, text in late if _repeats(text)), None),
    )


def logprob_gap_growth(arm: Arm) -> Finding | None:
    """Three times the gap of the start, and large enough to be more than rounding."""
    track = _track(arm, "rollout/logprob_gap")
    first, last = _ends(track)
    if not track or last < 3 * first or last < 1e-3:
        return None
    return Finding(
        "Engine and trainer drift apart",
        f"their log-probs differ by {last:.2g} nats a token at the end, {first:.2g} at the start",
        "The engine samples from other weights or in another precision than is trained: check model.dtype and "
        "weights.probe_tolerance, or set ppo.importance_cap.",
        _first(track, lambda v: v >= max(3 * first, 1e-3)),
        "rollout/logprob_gap",
    )


def reward_up_gold_down(arm: Arm) -> Finding | None:
    """Gold falls from its peak by more than its noise while the reward goes on rising (Gao et al. 2023)."""
    steps, reward, gold = _both(arm, "reward/mean", "reward/gold")
    if len(steps) < 10:
        return None
    width = max(3, len(steps) // 10)
    smooth_reward, smooth_gold = _running(reward, width), _running(gold, width)
    peak = max(range(len(smooth_gold)), key=lambda i: smooth_gold[i])
    noise = fmean(abs(a - b) for a, b in pairwise(gold)) / width**0.5
    fall = smooth_gold[peak] - smooth_gold[-1]
    if fall <= max(2 * noise, 0.02 * abs(smooth_gold[peak])) or smooth_reward[-1] <= smooth_reward[peak]:
        return None
    return Finding(
        "Reward rises while gold falls",
        f"gold falls from {smooth_gold[peak]:.2f} to {smooth_gold[-1]:.2f} while the reward rises from "
        f"{smooth_reward[peak]:.2f} to {smooth_reward[-1]:.2f}",
        "The policy exploits the reward model from here on. Stop at this step, or raise ppo.kl.coef; label what the "
        "policy now writes and train the reward model again.",
        steps[peak + (width - 1) // 2],
        "reward/gold",
    )


def worse_gold_than_sft(arm: Arm) -> Finding | None:
    """On held-out prompts the reward model prefers the arm to SFT and the gold judge does not."""
    names = ("reward_mean", "gold_mean")
    if any(name not in table for name in names for table in (arm.evaluated, arm.sft)):
        return None
    reward, gold = (arm.evaluated[name] - arm.sft[name] for name in names)
    if reward <= 0 or gold >= 0:
        return None
    return Finding(
        "The reward model is fooled on held-out prompts",
        f"reward {reward:+.2f} against SFT, gold {gold:+.2f}",
        "What was learned is the reward model's weakness. Look at the answers that gained reward and lost gold.",
    )


def wins_by_length(arm: Arm) -> Finding | None:
    """Five points of the win rate or more go away at equal length."""
    judges = ("gold_win_rate", "heldout_reward_win_rate", "reward_win_rate")
    rate = next((arm.evaluated[name] for name in judges if name in arm.evaluated), None)
    equal = arm.evaluated.get("length_controlled_win_rate")
    if rate is None or equal is None or rate - equal < 0.05:
        return None
    return Finding(
        "Part of the win is length",
        f"wins on {100 * rate:.1f} % of the prompts, on {100 * equal:.1f} % at equal length",
        "Report the length-controlled rate, and see the reward model's length bias beside its labels' own.",
    )


def many_truncated(arm: Arm) -> Finding | None:
    """A fifth of the responses end because of the limit, not because they were done."""
    track = _track(arm, "response/truncated_fraction")
    _, last = _ends(track)
    if not track or last <= 0.2:
        return None
    return Finding(
        "Many responses are cut",
        f"{100 * last:.0f} % reach rollout.max_tokens at the end",
        "Raise rollout.max_tokens, or choose what a cut response is worth with ppo.truncated.",
        _first(track, lambda v: v > 0.2),
        "response/truncated_fraction",
    )


def critic_worse_than_constant(arm: Arm) -> Finding | None:
    """At the end: a critic that starts cold is below 0 for a while, and that is no sign of anything."""
    track = _track(arm, "value/explained_variance")
    _, last = _ends(track)
    if not track or last >= 0:
        return None
    since = track[-1][0]
    for step, value in reversed(track):
        if value >= 0:
            break
        since = step
    return Finding(
        "The value model explains nothing",
        f"explained variance is {last:.2f} at the end; below 0 is worse than a constant",
        "Raise ppo.value_learning_rate, or give the critic a head start with ppo.value_warmup_steps.",
        since,
        "value/explained_variance",
    )


def quarantined_engines(arm: Arm) -> Finding | None:
    """Any at all: the step went on with fewer engines than there are."""
    track = _track(arm, "weights/quarantined")
    step = _first(track, lambda v: v > 0)
    if step is None:
        return None
    count, most = sum(v > 0 for _, v in track), max(v for _, v in track)
    why = f": {arm.reasons[0]}" if arm.reasons else ""
    engines, publishes = f"{most:.0f} engine{'s' * (most > 1)}", f"{count} publish{'es' * (count > 1)}"
    return Finding(
        "Engines were quarantined",
        f"up to {engines} left out after {publishes}{why}",
        "Their weights could not be verified. See logs/rollout-*.log of that step, and weights/quarantine_reasons.",
        step,
        "weights/quarantined",
    )


RULES = (
    Rule("length growth", ("response/length_mean",), length_growth),
    Rule("a KL jump", ("kl/mean",), kl_jump),
    Rule("KL over 10 nats", ("kl/mean",), kl_high),
    Rule("a drop in distinct-2", ("distinct_2",), less_distinct),
    Rule("repeated phrases", ("responses",), repeated_phrases),
    Rule("log-prob gap growth", ("rollout/logprob_gap",), logprob_gap_growth),
    Rule("reward up while gold falls", ("reward/gold",), reward_up_gold_down),
    Rule("gold below SFT on held-out prompts", ("gold_mean",), worse_gold_than_sft),
    Rule("wins by length", ("length_controlled_win_rate",), wins_by_length),
    Rule("truncated responses", ("response/truncated_fraction",), many_truncated),
    Rule("explained variance below 0", ("value/explained_variance",), critic_worse_than_constant),
    Rule("quarantined engines", ("weights/quarantined",), quarantined_engines),
)


# ---- what the rules are made of


def _track(arm: Arm, name: str) -> list[tuple[float, float]]:
    """(step, value) where there is a value."""
    values = arm.columns.get(name, ())
    return [
        (s, v) for s, v in zip(arm.columns.get("step", ()), values, strict=False) if s is not None and v is not None
    ]


def _ends(track: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Means over the first and the last tenth, as in summary.json."""
    tenth = max(1, len(track) // 10)
    values = [value for _, value in track] or [0.0]
    return fmean(values[:tenth]), fmean(values[-tenth:])


def _first(track: Sequence[tuple[float, float]], holds: Callable[[float], bool]) -> float | None:
    return next((step for step, value in track if holds(value)), None)


def _both(arm: Arm, one: str, other: str) -> tuple[list[float], list[float], list[float]]:
    """Steps that have both metrics, and the two."""
    second = dict(_track(arm, other))
    rows = [(step, value, second[step]) for step, value in _track(arm, one) if step in second]
    return [r[0] for r in rows], [r[1] for r in rows], [r[2] for r in rows]


def _running(values: Sequence[float], width: int) -> list[float]:
    """Means of `width` neighbours."""
    return [fmean(values[i : i + width]) for i in range(len(values) - width + 1)]


def _repeats(text: str) -> bool:
    words: list[Any] = text.lower().split()
    phrases = Counter(zip(words, words[1:], words[2:], strict=False))
    return max(phrases.values(), default=0) >= 3
