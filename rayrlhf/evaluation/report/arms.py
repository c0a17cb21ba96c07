"""The arms of a run side by side: the headline table, and the sentence that reads it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from rayrlhf.evaluation.report.series import Columns, finite

__all__ = ["MEASURES", "Estimate", "arm_names", "arm_numbers", "headline", "label", "reading", "training_ends"]

Estimate = dict[str, float | None]
"""value, and lo and hi where there is a 95 % interval."""

# Columns of the headline table. The first four compare with SFT.
MEASURES = (
    *("gold_win_rate", "heldout_reward_win_rate", "reward_win_rate", "length_controlled_win_rate"),
    *("gold_mean", "reward_mean"),
    *("kl_per_response", "length_mean", "pretrain_loss", "cloze_accuracy", "distinct_2"),
)
NARROW = "\u202f"  # a space that does not break: a number stays with its unit
LABELS = {"sft": "SFT", "ppo": "PPO", "ppo_ptx": "PPO-ptx", "dpo": "DPO"}
# What a training step says of the same things, for a run without an evaluation.
IN_TRAINING = {
    "gold_mean": "reward/gold",
    "reward_mean": "reward/mean",
    "kl_per_response": "kl/mean",
    "length_mean": "response/length_mean",
}


def label(arm: str) -> str:
    """An arm's name as people write it."""
    if best := re.fullmatch(r"best_of_(\d+)", arm):
        return f"Best of {best[1]}"
    return LABELS.get(arm, arm.replace("_", " "))


def arm_names(evaluation: Mapping[str, Any], trained: Iterable[str], answered: Iterable[str]) -> list[str]:
    """Every arm once: SFT first, then those that were trained, then the others as the evaluation lists them."""
    judged = [name for measure in MEASURES for name in _mapping(evaluation.get(measure))]
    names = dict.fromkeys([*trained, *(name.removesuffix("_vs_sft") for name in judged), *answered])
    return ["sft", *(name for name in names if name != "sft")] if "sft" in names else list(names)


def arm_numbers(evaluation: Mapping[str, Any], arm: str) -> dict[str, Estimate]:
    """measure -> estimate, of what the evaluation has of an arm."""
    found: dict[str, Estimate] = {}
    for measure in MEASURES:
        table = _mapping(evaluation.get(measure))
        cell = table.get(arm, table.get(f"{arm}_vs_sft"))
        if (estimate := _estimate(cell)) is not None:
            found[measure] = estimate
    return found


def training_ends(columns: Columns) -> dict[str, Estimate]:
    """measure -> mean over the last tenth of the steps."""
    last = max(1, len(columns["step"]) // 10)
    ends: dict[str, Estimate] = {}
    for measure, metric in IN_TRAINING.items():
        values = [v for v in columns.get(metric, [])[-last:] if v is not None]
        if values:
            ends[measure] = {"value": sum(values) / len(values)}
    return ends


def headline(
    evaluation: Mapping[str, Any], names: Iterable[str], trained: Mapping[str, Columns]
) -> list[dict[str, Any]]:
    """A row an arm; an arm that was not evaluated shows the end of its training, and says so."""
    rows = []
    for name in names:
        cells, held_out = arm_numbers(evaluation, name), True
        if not cells and name in trained:
            cells, held_out = training_ends(trained[name]), False
        if cells:
            rows.append({"arm": name, "label": label(name), "held_out": held_out, "cells": cells})
    return rows


def reading(rows: list[dict[str, Any]], trained: Mapping[str, Columns], prompts: float | None) -> str:
    """The table in a sentence, made of its numbers alone."""
    judges = {
        "gold_win_rate": "the gold judge",
        "heldout_reward_win_rate": "a reward model that was not trained against",
        "reward_win_rate": "the reward model's own score",
    }
    for measure, judge in judges.items():
        won = [row for row in rows if measure in row["cells"] and row["arm"] != "sft"]
        if won:
            return _read_win_rates(won, rows, measure, judge, prompts)
    return " ".join(_read_training(arm, columns) for arm, columns in trained.items()).strip()


def _read_win_rates(
    won: list[dict[str, Any]], rows: list[dict[str, Any]], measure: str, judge: str, prompts: float | None
) -> str:
    won = sorted(won, key=lambda row: -row["cells"][measure]["value"])
    best, cells = won[0], won[0]["cells"]
    rate = cells[measure]
    over = f"{prompts:.0f} held-out prompts" if prompts else "the held-out prompts"
    interval = (
        f" (95{NARROW}% interval {_number(rate['lo'])} to {_number(rate['hi'])})" if rate.get("lo") is not None else ""
    )
    verb = "wins against SFT on"
    if rate.get("lo") is not None and rate["lo"] <= 0.5 <= rate["hi"]:
        verb = "cannot be told apart from SFT: it wins on"
    text = f"By {judge}, {best['label']} {verb} {_percent(rate['value'])} of {over}{interval}"
    if "length_controlled_win_rate" in cells:
        text += f", {_percent(cells['length_controlled_win_rate']['value'])} at equal length"
    if "kl_per_response" in cells:
        text += f", {cells['kl_per_response']['value']:.1f} nats per response away from it"
    if len(won) > 1:
        text += "; " + ", ".join(f"{row['label']} on {_percent(row['cells'][measure]['value'])}" for row in won[1:])
    losses = [
        f"{r['cells']['pretrain_loss']['value']:.2f} ({r['label']})" for r in rows if "pretrain_loss" in r["cells"]
    ]
    if len(losses) > 1:
        text += f"; the loss on pretraining text is {', '.join(losses)}"
    return f"{text}."


def _read_training(arm: str, columns: Columns) -> str:
    """What training alone can say: there was no evaluation."""
    ends = training_ends(columns)
    first = training_ends({name: column[: max(1, len(column) // 10)] for name, column in columns.items()})
    if "reward_mean" not in ends or "reward_mean" not in first:
        return ""
    before, after = first["reward_mean"]["value"] or 0.0, ends["reward_mean"]["value"] or 0.0
    word = "rises" if after > before else "falls"
    steps = len(columns["step"])
    text = f"Over {steps} {'step' if steps == 1 else 'steps'} of {label(arm)} the mean reward {word} "
    text += f"from {before:.2f} to {after:.2f}".replace("-", "\N{MINUS SIGN}")
    if "kl_per_response" in ends:
        text += f", {ends['kl_per_response']['value']:.1f} nats per response away from SFT"
    return f"{text}."


def _estimate(cell: Any) -> Estimate | None:
    """A number, or {"value", "ci95": [lo, hi]}."""
    if not isinstance(cell, Mapping):
        cell = {"value": cell}
    value = finite(cell.get("value"))
    if value is None:
        return None
    interval = cell.get("ci95")
    if isinstance(interval, list) and len(interval) == 2 and None not in map(finite, interval):
        return {"value": value, "lo": finite(interval[0]), "hi": finite(interval[1])}
    return {"value": value}


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _percent(share: float | None) -> str:
    return f"{_number(share)}{NARROW}%"


def _number(share: float | None) -> str:
    return f"{100 * (share or 0.0):.1f}"
