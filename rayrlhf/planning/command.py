"""`rayrlhf plan`: from a file to a plan, or to the best of many."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from rayrlhf.config import Config, load_config
from rayrlhf.errors import ConfigError, ResourceError
from rayrlhf.planning.assumptions import Assumptions, assumptions_for
from rayrlhf.planning.form import is_form, read_form, workload_of_form
from rayrlhf.planning.hardware import Hardware, hardware_named
from rayrlhf.planning.plan import Plan, make_plan, too_long
from rayrlhf.planning.reading import workload_of
from rayrlhf.planning.search import overrides_of, search, smallest
from rayrlhf.planning.show import show_assumptions, show_placements, show_plan
from rayrlhf.planning.workload import Workload

__all__ = ["Asked", "asked_of", "numbers", "plan_and_print", "plan_asked", "plan_of", "print_plans", "read_asked"]

FALLBACK = {"cuda": "h100-80g", "cpu": "cpu"}


@dataclass(frozen=True, slots=True)
class Asked:
    """A workload, and what it is planned on."""

    work: Workload
    hardware: Hardware
    assume: Assumptions
    nodes: int | None
    is_placed: bool = True
    """False: somebody has to look for a placement"""
    others: tuple[Workload, ...] = ()
    """arms of PPO that take less than `work`, with the same roles, one after the other"""


def read_asked(
    path: Path, overrides: Sequence[str], hardware: str | None, nodes: int | None, assume: Mapping[str, float]
) -> Asked:
    """Of a config, or of a form that is filled in.

    Raises:
        ConfigError, ModelError: what the file or the options say cannot be used.
    """
    if not is_form(path):
        return asked_of(load_config(path, overrides), hardware, nodes, assume)
    if overrides:
        raise ConfigError(f"{path} is a form: it takes no section.key=value", "change the file, or use --assume")
    form = read_form(path)
    device = hardware_named(hardware or form.hardware)
    if not device.is_gpu:
        raise ConfigError(
            f"{path}: a form's placement is one of GPUs, and {device.name} is none",
            "take another --hardware, or plan a config with cluster.device: cpu",
        )
    known = _assumptions(device, {f"{path}: assumptions": form.assumptions, "--assume": assume})
    return Asked(workload_of_form(form), device, known, nodes or form.nodes, form.placement is not None)


def asked_of(
    config: Config, hardware: str | None = None, nodes: int | None = None, assume: Mapping[str, float] | None = None
) -> Asked:
    device = hardware_named(hardware or config.plan.hardware or FALLBACK[config.cluster.device])
    if device.is_gpu != (config.cluster.device == "cuda"):
        raise ConfigError(
            f"hardware {device.name} is a {device.device.kind} and cluster.device is {config.cluster.device}",
            f"set cluster.device={'cuda' if device.is_gpu else 'cpu'}, or take other hardware",
        )
    known = _assumptions(device, {"plan.assume": config.plan.assume, "--assume": assume or {}})
    arms = [workload_of(arm, known) for arm in config.arms().values()]
    if len(arms) > 1:  # the longest first
        arms.sort(key=lambda work: -make_plan(work, device, known).seconds)
    return Asked(arms[0], device, known, nodes or config.plan.nodes, others=tuple(arms[1:]))


def plan_of(asked: Asked) -> Plan:
    """As it is placed."""
    return make_plan(asked.work, asked.hardware, asked.assume, asked.nodes, asked.others)


def plan_asked(asked: Asked, look: bool) -> list[Plan]:
    """The plan of what is asked; with `look`, or where nothing is placed, of the best placements found.

    Raises:
        ResourceError: no placement fits.
    """
    if asked.is_placed and not look:
        return [plan_of(asked)]
    if asked.nodes is None:
        found = smallest(asked.work, asked.hardware, asked.assume)
    else:
        found = search(asked.work, asked.hardware, asked.assume, asked.nodes)
    if not found:
        there = f"{asked.nodes} nodes of {asked.hardware.per_node}" if asked.nodes else "512"
        if long := too_long(asked.work):
            raise ResourceError(f"no placement fits: {long[0].message}", "shorter prompts or responses, another model")
        raise ResourceError(
            f"no placement fits on {there} {asked.hardware.device.title}", "take more --nodes, or other --hardware"
        )
    return found


def print_plans(console: Console, plans: Sequence[Plan], as_json: bool, asked: Asked | None) -> None:
    """The first of `plans` in full, of the others a line each.

    Args:
        asked: what they were searched for; None: nobody searched.
    """
    best = plans[0]
    own = plan_of(asked) if asked and asked.is_placed else None
    if as_json:
        tree = best.as_json()
        if asked:
            tree["placements"] = [_placement(plan, asked) for plan in plans]
        if own:
            tree["configured"] = {"fits": own.fits, **_placement(own, None)}
        _print_json(console, tree)
        return
    show_assumptions(console, best)
    if asked:
        show_placements(console, plans, own)
    show_plan(console, best)
    if asked:
        keys = overrides_of(best, asked.work)
        console.print("as keys of the config:", *keys, sep="\n  ", highlight=False, markup=False)


def plan_and_print(asked: Asked, look: bool, as_json: bool) -> bool:
    """Whether it fits, or anything was found that does."""
    try:
        plans = plan_asked(asked, look)
    except ResourceError as error:
        shortfalls: list[dict[str, object]] = [{"roles": [], "over": None, "message": error.message}]
        if as_json:
            _print_json(Console(), {"fits": False, "shortfalls": shortfalls, "placements": []})
        else:
            Console(stderr=True).print(str(error), highlight=False, markup=False, soft_wrap=True)
        return False
    print_plans(Console(), plans, as_json, asked if look or not asked.is_placed else None)
    return plans[0].fits


def _print_json(console: Console, tree: Mapping[str, object]) -> None:
    console.print(json.dumps(tree), highlight=False, markup=False, emoji=False, soft_wrap=True)


def _placement(plan: Plan, asked: Asked | None) -> dict[str, object]:
    gpus, seconds = plan.devices, plan.time.seconds
    keys = overrides_of(plan, asked.work if asked else None)
    return {"gpus": gpus, "step_seconds": seconds, "gpu_hours": plan.gpu_hours, "overrides": keys}


def numbers(options: Sequence[str]) -> dict[str, float]:
    """`name=value` options; ConfigError for others."""
    values = {}
    for option in options:
        name, _, text = option.partition("=")
        try:
            values[name.strip()] = float(text)
        except ValueError:
            raise ConfigError(f"--assume {option!r}: expected name=number", "as --assume mfu_train=0.45") from None
    return values


def _assumptions(device: Hardware, changes: Mapping[str, Mapping[str, float]]) -> Assumptions:
    known = assumptions_for(device.device.kind).changed(device.assumptions, f"{device.file}: assumptions")
    for source, values in changes.items():
        known = known.changed(values, source)
    return known
