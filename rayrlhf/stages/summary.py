"""Tables on the console: what a run would place, and what it came to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rayrlhf.actors.placement import SAMPLING, TRAINING, plan_ppo, plan_training, required
from rayrlhf.config import Config
from rayrlhf.config.run import StageName
from rayrlhf.errors import printable
from rayrlhf.evaluation.agreement import Row

__all__ = ["show_agreement", "show_counts", "show_evaluation", "show_placement", "show_summary"]


def show_counts(console: Console, counts: Mapping[StageName, Mapping[str, int]]) -> None:
    """What tokenizing left of each stage's records; nothing is dropped in silence."""
    for stage, numbers in counts.items():
        words = ", ".join(f"{n.replace('_', ' ')} {v}" for n, v in numbers.items() if isinstance(v, int))
        console.print(f"{stage:<9} {words}", highlight=False, soft_wrap=True)


def show_placement(console: Console, config: Config, todo: Sequence[str]) -> None:
    """Roles, ranks and what each rank gets; the stages that would run."""
    table = Table(title="placement", title_justify="left")
    for column in ("stage", "role", "ranks", "CPUs a rank", "GPUs a rank", "threads a rank"):
        table.add_column(column, justify="left" if column in ("stage", "role") else "right")
    training = [stage for stage in config.stages() if stage in TRAINING]
    rows = [(", ".join(training), plan_training(config))] if training else []
    for placement in plan_ppo(config):
        stages = [s for s, roles in SAMPLING.items() if s in config.stages() and (not roles or placement.role in roles)]
        rows += [(", ".join(stages), placement)] if stages else []
    for stage, p in rows:
        table.add_row(stage, p.role, str(p.ranks), f"{p.cpus:g}", f"{p.gpus:g}", str(p.threads))
    console.print(table)
    needs = required(config)
    console.print(f"needs at once: {needs['CPU']:g} CPUs, {needs['GPU']:g} GPUs", highlight=False)
    done = [stage for stage in config.stages() if stage not in todo]
    console.print(f"would run: {', '.join(todo) or 'nothing'}; done before: {', '.join(done) or 'nothing'}")


def show_summary(console: Console, summary: Mapping[str, Any], folder: Path) -> None:
    """One row a stage, held-out pairs per source, and where each model and everything else is."""
    table = Table(title=f"run {summary['name']}", title_justify="left")
    table.add_column("stage")
    table.add_column("seconds", justify="right")
    table.add_column("result")
    for stage, result in summary["stages"].items():
        seconds = "cached" if result["cached"] else f"{result['seconds']:.0f}{_saves(result)}"
        table.add_row(stage, seconds, _describe(stage, result))
    console.print(table)
    for stage, result in summary["stages"].items():
        parts = [f"{name.split('/')[1].removesuffix('_gib')} {gib:.2f}" for name, gib in result["memory_gib"].items()]
        console.print(f"{stage:<9} GiB of memory: {', '.join(parts)}", highlight=False, soft_wrap=True)
    for stage, name in (("reward", "reward model"), ("dpo", "dpo's implicit reward")):
        if accuracy := summary["stages"].get(stage, {}).get("accuracy"):
            console.print(_accuracy_table(name, accuracy))
            if len(sizes := _ranking_sizes(accuracy)) > 1:
                console.print(_accuracy_by_k_table(name, accuracy, sizes))
    if "prompts" in summary.get("evaluation", {}):
        show_evaluation(console, summary["evaluation"])
    for stage, result in summary["stages"].items():
        if "model" in result:
            console.print(f"{stage:<9} model: {result['model']}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"records, samples and logs are in {folder}", highlight=False, markup=False, soft_wrap=True)


def _saves(result: Mapping[str, Any]) -> str:
    """What a supervised stage's checkpoints took of its seconds."""
    return f" ({result['saves']} saves: {result['save_seconds']:.2g})" if result.get("saves") else ""


# measure -> what it is called; a missing one has no row
_ARM_ROWS = {
    "gold_win_rate": "gold win rate",
    "length_controlled_win_rate": "at equal length",
    "heldout_reward_win_rate": "held-out reward wins",
    "reward_win_rate": "reward wins",
    "gold_mean": "gold",
    "reward_mean": "reward",
    "kl_per_response": "KL, nats a response",
    "length_mean": "tokens a response",
    "pretrain_loss": "loss on text",
    "cloze_accuracy": "choices right",
    "distinct_2": "distinct-2",
}


def show_evaluation(console: Console, evaluation: Mapping[str, Any]) -> None:
    """The arms side by side; multiple choice by source where there are several."""
    console.print(_arms_table(evaluation))
    for arm, sources in evaluation.get("choices_by_source", {}).items():
        for source, row in sources.items():
            if source:
                right = f"right {row['right']:.3f}, by character {row['right_by_character']:.3f}"
                words = f"{row['questions']} questions, {right}, chance {row['chance']:.3f}"
                label = f"{arm}: {printable(source)}: {words}"
                console.print(label, highlight=False, markup=False, soft_wrap=True)


def _arms_table(evaluation: Mapping[str, Any]) -> Table:
    """One column an arm; a win rate is against the base, and what follows +- is half of its 95 % interval."""
    rows = {name: heading for name, heading in _ARM_ROWS.items() if name in evaluation}
    arms = dict.fromkeys(arm for name in rows if not name.endswith("win_rate") for arm in evaluation[name])
    base = evaluation["base"]
    title = f"{evaluation['prompts']} held-out prompts, temperature {evaluation['temperature']:g}; wins are over "
    table = Table(title=title + _label(base), title_justify="left")
    table.add_column("")
    for arm in arms:
        table.add_column(_label(arm.replace("_", " ")), justify="right")
    for name, heading in rows.items():
        cells = [evaluation[name].get(f"{arm}_vs_{base}", evaluation[name].get(arm)) for arm in arms]
        table.add_row(heading, *(_with_interval(cell) for cell in cells))
    flags: Mapping[str, Mapping[str, float]] = evaluation.get("flags", {})
    for flag in dict.fromkeys(flag for held in flags.values() for flag in held):
        cells = [flags.get(arm, {}).get(flag) for arm in arms]
        table.add_row(
            "flawless (all flags)" if flag == "all" else f"flag: {_label(flag)}",
            *(_with_interval(cell) for cell in cells),
        )
    return table


def _label(name: str) -> str:
    """What a data file, a folder or a world calls something, as text: neither markup nor a terminal's commands."""
    return escape(printable(name)) or "-"


def _with_interval(cell: Any) -> str:
    if not isinstance(cell, Mapping):
        return _three_digits(cell)
    if cell.get("bound"):
        return f"< {cell['value']:.3f}"
    low, high = cell["ci95"]
    return f"{cell['value']:.3f} ±{(high - low) / 2:.3f}"


def show_agreement(console: Console, title: str, rows: Sequence[Row]) -> None:
    """How far a step and the reference trainer's are apart, a row per quantity."""
    table = Table(title=title, title_justify="left")
    table.add_column("quantity")
    for column in ("largest gap", "tolerance"):
        table.add_column(column, justify="right")
    table.add_column("unit")
    table.add_column("")
    for row in rows:
        verdict = "ok" if row.differs is None else "[red]DIFFERS[/]"
        table.add_row(row.quantity, f"{row.gap:.1e}", f"{row.tolerance:g}", row.unit, verdict)
    console.print(table)
    for row in rows:
        if row.differs is not None:
            console.print(f"{row.quantity}: first in {row.differs}", highlight=False, markup=False, soft_wrap=True)


def _describe(stage: str, result: Mapping[str, Any]) -> str:
    if stage in ("pretrain", "sft"):
        if "heldout_loss" not in result:
            return f"train loss {result['train_loss']:.3f}"
        kept = f", kept from step {result['selected']['step']}" if "selected" in result else ""
        return f"held-out loss {result['heldout_loss_before']:.3f} -> {result['heldout_loss']:.3f}{kept}"
    if stage == "collect":
        agreed, right = result["labeler_agreement"], result["fully_right"]
        return f"labelers agree with gold {agreed:.3f}, ties {result['ties']:.3f}, SFT fully right {right:.3f}"
    if stage == "reward":
        return f"train loss {result['train_loss']:.3f}"
    if stage == "eval":
        return f"{result['prompts']} prompts"
    if stage == "dpo":
        margin, won = result["train_margin"], result["train_accuracy"]
        return f"train loss {result['train_loss']:.3f}, implicit reward margin {margin:.3g}, accuracy {won:.3f}"
    first, last = result["first"], result["last"]
    words = {"reward/mean": "reward", "kl/mean": "kl", "response/length_mean": "length"}
    return ", ".join(f"{word} {first[name]:.3g} -> {last[name]:.3g}" for name, word in words.items())


def _accuracy_table(name: str, accuracy: Mapping[str, Mapping[str, Any]]) -> Table:
    table = Table(title=f"{name} on held-out pairs", title_justify="left")
    table.add_column("source", no_wrap=True, min_width=10)
    for column in ("pairs", "of", "accuracy", "longer wins", "ECE", "length bias", "labels' own"):
        table.add_column(column, justify="right")
    for source, row in accuracy.items():
        pairs = f"{row['pairs']:.0f}", f"{row['pairs_before_dropping']:.0f}"
        numbers = ("accuracy", "longer_wins", "ece", "length_bias", "length_bias_of_labels")
        table.add_row(_label(source), *pairs, *(_three_digits(row[name]) for name in numbers))
    return table


def _accuracy_by_k_table(name: str, accuracy: Mapping[str, Mapping[str, Any]], sizes: Sequence[str]) -> Table:
    table = Table(title=f"{name}: accuracy by how many responses were ranked at once (pairs)", title_justify="left")
    table.add_column("source", no_wrap=True, min_width=10)
    for k in sizes:
        table.add_column(f"K = {k}", justify="right")
    for source, row in accuracy.items():
        cells = [row["accuracy_by_k"].get(k) for k in sizes]
        table.add_row(_label(source), *(f"{_three_digits(c['accuracy'])} ({c['pairs']})" if c else "-" for c in cells))
    return table


def _ranking_sizes(accuracy: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Every K of any source, as JSON writes it: a string."""
    return sorted({k for row in accuracy.values() for k in row["accuracy_by_k"]}, key=int)


def _three_digits(number: float | None) -> str:
    return "-" if number is None else f"{number:.3f}"
