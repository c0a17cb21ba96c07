"""The tables at the end of a run, as they read on the console."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from typing import Any

from rich.console import Console

from rayrlhf.metrics.sinks import to_json
from rayrlhf.stages.summary import show_summary

ROW = {
    "pairs": 12,
    "pairs_before_dropping": 15,
    "accuracy": 0.75,
    "longer_wins": 0.5,
    "ece": 0.0625,
    "length_bias": 0.375,
    "length_bias_of_labels": -0.125,
    "accuracy_by_k": {2: {"pairs": 12, "accuracy": 0.75}},
}


def shown(**rows: dict[str, Any]) -> list[list[str]]:
    """The words of each line that has any, of a summary whose rows have been through JSON, as in a run."""
    accuracy = json.loads(to_json(rows))
    stage = {"memory_gib": {"memory/train_gib": 1.25}, "cached": True, "train_loss": 0.5, "accuracy": accuracy}
    stage["model"] = "runs/artifacts/reward-1/model"
    written = StringIO()
    show_summary(Console(file=written, width=160), {"name": "mine", "stages": {"reward": stage}}, Path("runs/mine"))
    text = written.getvalue()
    lines = [
        [cell.strip() for cell in line.strip("│┃").split("│" if "│" in line else "┃")] for line in text.split("\n")
    ]
    return [line for line in lines if any(line)]


def test_each_source_has_calibration_and_length_bias_beside_that_of_the_labels() -> None:
    lines = shown(people=ROW)
    assert ["source", "pairs", "of", "accuracy", "longer wins", "ECE", "length bias", "labels' own"] in lines
    assert ["people", "12", "15", "0.750", "0.500", "0.062", "0.375", "-0.125"] in lines


def test_what_could_not_be_computed_is_a_dash() -> None:
    unknown = {"length_bias": float("nan"), "length_bias_of_labels": float("nan")}
    assert ["people", "12", "15", "0.750", "0.500", "0.062", "-", "-"] in shown(people=ROW | unknown)


def test_accuracy_by_the_number_of_responses_is_shown_where_there_are_several_numbers() -> None:
    mixed = {10: {"pairs": 45, "accuracy": 0.6}, 4: {"pairs": 6, "accuracy": 0.5}}
    lines = shown(people=ROW, others=ROW | {"accuracy_by_k": mixed})
    assert ["source", "K = 2", "K = 4", "K = 10"] in lines
    assert ["people", "0.750 (12)", "-", "-"] in lines
    assert ["others", "-", "0.500 (6)", "0.600 (45)"] in lines


def test_a_source_is_shown_as_it_is_named_not_as_markup_or_a_terminals_command() -> None:
    """Sources come from the field of a data file."""
    lines = shown(**{"[/people]": ROW, "[red]x[/]": ROW, "\x1b[2J\udc80": ROW, "": ROW})
    assert [line[0] for line in lines if line[1:3] == ["12", "15"]] == [
        "[/people]",
        "[red]x[/]",
        "\\x1b[2J\\udc80",
        "-",
    ]


def test_pairs_alone_need_no_table_by_their_number() -> None:
    assert not any("K = 2" in line for line in shown(people=ROW, others=ROW))


def test_each_stage_says_how_much_memory_its_processes_took() -> None:
    written = StringIO()
    ppo = {"cached": True, "memory_gib": {"memory/policy_gib": 2.056, "memory/driver_gib": 0.5}, "model": "m"}
    numbers = {"reward/mean": 0.0, "kl/mean": 0.0, "response/length_mean": 1.0}
    summary = {"name": "mine", "stages": {"ppo": ppo | {"first": numbers, "last": numbers}}}
    show_summary(Console(file=written, width=100), summary, Path("runs/mine"))
    assert "ppo       GiB of memory: policy 2.06, driver 0.50\n" in written.getvalue()


def test_each_stage_says_where_its_model_is() -> None:
    assert ["reward    model: runs/artifacts/reward-1/model"] in shown(people=ROW)


def test_what_saving_took_stands_beside_the_seconds_of_its_stage() -> None:
    written = StringIO()
    stage = {"cached": False, "memory_gib": {}, "train_loss": 0.5, "seconds": 41.2}
    stages = {"reward": stage | {"saves": 3, "save_seconds": 0.1234}, "pretrain": stage | {"saves": 0}}
    show_summary(Console(file=written, width=100), {"name": "mine", "stages": stages}, Path("runs/mine"))
    assert "41 (3 saves: 0.12) │" in written.getvalue()
    assert written.getvalue().count("saves") == 1
