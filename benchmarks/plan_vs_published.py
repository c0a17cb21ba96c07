"""The plan beside PPO runs that others have published: planned over measured, row by row.

    python benchmarks/plan_vs_published.py
    python benchmarks/plan_vs_published.py --json

Leave-one-out: the plan of a row times the geometric mean of measured over planned of its source's other rows, which is
what it would say after it had been set right on those.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from rayrlhf.config.load import read_yaml, validated
from rayrlhf.planning.assumptions import assumptions_for
from rayrlhf.planning.form import Form, workload_of_form
from rayrlhf.planning.hardware import hardware_named
from rayrlhf.planning.plan import Plan, make_plan

SECONDS = {"seconds": 1, "hours": 3600}
FILE = Path(__file__).with_name("published.yaml")


def main(as_json: Annotated[bool, typer.Option("--json", help="JSON and nothing else.")] = False) -> None:
    rows = [row for name, source in read_yaml(FILE).items() for row in compare(name, source)]
    if not as_json:
        show(rows)
    print(json.dumps({"rows": rows}))


def compare(name: str, source: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each run of this source."""
    unit = SECONDS[source["unit"]]
    plans = {row: plan_of(source, given) for row, given in source["rows"].items()}
    ratios = {row: plans[row].seconds / unit / source["rows"][row]["measured"] for row in plans}
    found = []
    for row, plan in plans.items():
        others = [math.log(ratio) for other, ratio in ratios.items() if other != row]
        found.append(
            {
                "source": name,
                "run": row,
                "unit": source["unit"],
                "measured": source["rows"][row]["measured"],
                "planned": plan.seconds / unit,
                "planned_over_measured_ratio": ratios[row],
                "left_out_ratio": ratios[row] / math.exp(sum(others) / len(others)),
                "fits": plan.fits,
                "phases": dict(plan.time.phases),
            }
        )
    return found


def plan_of(source: dict[str, Any], row: dict[str, Any]) -> Plan:
    tree = {
        "workload": {**source["workload"], "models": row["models"]},
        "placement": {**source["placement"], **row["gpus"]},
        "hardware": source["hardware"],
        "assumptions": source["assumptions"],
    }
    form = validated(Form, tree, str(FILE))
    assume = assumptions_for("gpu").changed(form.assumptions, FILE.name)
    return make_plan(workload_of_form(form), hardware_named(form.hardware), assume)


def show(rows: list[dict[str, Any]]) -> None:
    table = Table(title="planned beside published", title_justify="left")
    for column in ("source", "run", "measured", "planned", "planned / measured", "left out", "phases (s a step)"):
        table.add_column(column)
    for row in rows:
        numbers = [f"{row[name]:.3g}" for name in ("measured", "planned")]
        ratios = [f"{row[name]:.2f}" for name in ("planned_over_measured_ratio", "left_out_ratio")]
        phases = ", ".join(f"{name} {seconds:.3g}" for name, seconds in row["phases"].items())
        table.add_row(row["source"], row["run"], f"{numbers[0]} {row['unit']}", numbers[1], *ratios, phases)
    Console(width=150).print(table)


if __name__ == "__main__":
    typer.run(main)
