"""The numbers of an evaluation, from its rows: one prompt a row, every arm's answer in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rayrlhf.evaluation.comparison import (
    best_of_n_kl,
    distinct_n,
    length_controlled_win_rate,
    mean,
    win_rate,
)
from rayrlhf.types import ChoiceQuestion

__all__ = ["choice", "summarise"]

Row = Mapping[str, Any]
# Whose wins are accounted for length: the first of these that there is.
JUDGES = ("gold", "heldout_reward", "reward")


def summarise(
    rows: Sequence[Row], measures: Mapping[str, Mapping[str, Any]], base: str, resamples: int, seed: int
) -> dict[str, Any]:
    """Everything by measure, then by arm; intervals are 95 % bootstrap intervals over prompts.

    Args:
        rows: {prompt_id, prompt, kind, answers: {arm: {text, tokens, reward, truncated, kl?, gold?, flags?,
            heldout_reward?}}}.
        measures: by arm, what was measured without prompts: pretrain_loss, choices (`choice` of each question).
        base: the arm that the others are compared with.
    """
    arms = list(rows[0]["answers"]) if rows else []
    columns = {arm: [row["answers"][arm] for row in rows] for arm in arms}
    result: dict[str, Any] = {"prompts": len(rows), "base": base}
    for arm, found in measures.items():
        for name, value in _measured(found, resamples, seed).items():
            result.setdefault(name, {})[arm] = value
    for arm, column in columns.items():
        for name, value in _of_one(arm, column, resamples, seed).items():
            result.setdefault(name, {})[arm] = value
        if arm != base:
            for name, value in _against(column, columns[base], resamples, seed).items():
                result.setdefault(name, {})[f"{arm}_vs_{base}"] = value
    if rows and "gold" in columns[base][0]:
        result["gold_by_kind"] = _by_kind(rows, arms)
    return result


def choice(question: ChoiceQuestion, logprobs: Sequence[float]) -> dict[str, Any]:
    """Whether the right choice is the likeliest, as it is and per character of its text (long ones are unlikely).

    Both are usual (Gao et al., lm-evaluation-harness: acc, acc_norm); chance is what guessing gives.
    """
    per_character = [logprob / len(text) for logprob, text in zip(logprobs, question.choices, strict=True)]
    return {
        "source": question.source,
        "right": _argmax(logprobs) == question.answer,
        "right_by_character": _argmax(per_character) == question.answer,
        "chance": 1 / len(question.choices),
    }


def _argmax(values: Sequence[float]) -> int:
    return max(range(len(values)), key=lambda i: values[i])


def _of_one(arm: str, column: Sequence[Mapping[str, Any]], resamples: int, seed: int) -> dict[str, Any]:
    found: dict[str, Any] = {
        "length_mean": mean([len(answer["tokens"]) for answer in column], resamples, seed),
        "truncated": sum(answer["truncated"] for answer in column) / len(column),
        "distinct_2": distinct_n([answer["text"] for answer in column]),
    }
    if all("reward" in answer for answer in column):
        found["reward_mean"] = mean([answer["reward"] for answer in column], resamples, seed)
    if all("kl" in answer for answer in column):
        found["kl_per_response"] = mean([sum(answer["kl"]) for answer in column], resamples, seed)
    elif arm.startswith("best_of_"):
        bound = best_of_n_kl(int(arm.removeprefix("best_of_")))
        found["kl_per_response"] = {"value": bound, "ci95": [bound, bound], "bound": True}
    if all("gold" in answer for answer in column):
        found["gold_mean"] = mean([answer["gold"] for answer in column], resamples, seed)
        flags = {flag: sum(answer["flags"][flag] for answer in column) / len(column) for flag in column[0]["flags"]}
        whole = sum(all(answer["flags"].values()) for answer in column) / len(column)
        found["flags"] = flags | {"all": whole}
    return found


def _measured(measures: Mapping[str, Any], resamples: int, seed: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if "pretrain_loss" in measures:
        found["pretrain_loss"] = measures["pretrain_loss"]
    if "choices" in measures:
        found["cloze_accuracy"] = mean([float(row["right"]) for row in measures["choices"]], resamples, seed)
        found["choices_by_source"] = {
            source: {"questions": len(own)}
            | {key: sum(row[key] for row in own) / len(own) for key in ("right", "right_by_character", "chance")}
            for source, own in _by("source", measures["choices"]).items()
        }
    return found


def _against(
    column: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]], resamples: int, seed: int
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in ("reward", "heldout_reward"):
        if name in column[0]:
            scores, others = [a[name] for a in column], [b[name] for b in other]
            found[f"{name}_win_rate"] = win_rate(scores, others, resamples, seed)
    if "gold" in column[0]:
        scores, others = [a["gold"] for a in column], [b["gold"] for b in other]
        found["gold_win_rate"] = win_rate(scores, others, resamples, seed)
    judge = next((name for name in JUDGES if name in column[0]), None)
    if judge is not None:
        scores, others = [a[judge] for a in column], [b[judge] for b in other]
        lengths, other_lengths = [len(a["tokens"]) for a in column], [len(b["tokens"]) for b in other]
        found["length_controlled_win_rate"] = length_controlled_win_rate(
            scores, others, lengths, other_lengths, resamples, seed
        )
    return found


def _by_kind(rows: Sequence[Row], arms: Sequence[str]) -> dict[str, dict[str, float]]:
    """Mean gold of each kind of prompt, by arm."""
    return {
        kind: {arm: sum(row["answers"][arm]["gold"] for row in own) / len(own) for arm in arms}
        for kind, own in _by("kind", rows).items()
    }


def _by(key: str, rows: Sequence[Row]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row[key], []).append(row)
    return dict(sorted(groups.items()))
