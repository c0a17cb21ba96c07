"""A plan on the console: roles, phases, what it rests on."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from rayrlhf.planning.hardware import GIB
from rayrlhf.planning.memory import set_peak
from rayrlhf.planning.plan import Plan, nodes_taken
from rayrlhf.planning.workload import Role

__all__ = ["show_assumptions", "show_placements", "show_plan", "show_training"]


def show_plan(console: Console, plan: Plan) -> None:
    console.print(_roles(plan))
    for roles in plan.work.device_sets():
        if len(roles) > 1:
            held = set_peak({name: plan.memory[name] for name in roles}) / GIB
            console.print(f"{', '.join(roles)} take turns on the same GPUs: {held:.1f} GiB at most", highlight=False)
    console.print(_phases(plan))
    console.print(_whole(plan), highlight=False, soft_wrap=True)
    for warning in plan.warnings:
        console.print(f"[yellow]{warning}[/]", highlight=False, soft_wrap=True)
    for shortfall in plan.shortfalls:
        console.print(f"[red]does not fit:[/] {shortfall.message}", highlight=False, soft_wrap=True)


def show_training(console: Console, plan: Plan) -> None:
    """Of a run without PPO: the memory of its workers. How long they take is not planned."""
    assert plan.work.train is not None  # there are supervised stages
    table = _table(plan)
    table.add_row(*_row(plan, plan.work.train))
    console.print(table)
    for shortfall in plan.shortfalls:
        console.print(f"[red]does not fit:[/] {shortfall.message}", highlight=False, soft_wrap=True)


def show_assumptions(console: Console, plan: Plan) -> None:
    table = Table(title="what this rests on (--assume name=value changes it)", title_justify="left")
    table.add_column("assumption", no_wrap=True)
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("unit")
    table.add_column("source")
    for name, found in plan.assume.known.items():
        table.add_row(name, f"{found.value:g}", found.unit, found.source)
    device = plan.hardware.device
    flops = plan.hardware.flops(plan.work.dtype) / 1e12
    unit = "GPU" if plan.work.gpu else "core"
    words = f"{flops:g} TFLOPS {plan.work.dtype} and {device.memory_gb_s:g} GB/s a {unit}"
    table.add_row("hardware", plan.hardware.name, words, device.source)
    for place in ("within", "between", "host"):
        link = getattr(plan.hardware, place)
        table.add_row(f"link {place}", f"{link.gb_s:g}", "GB/s in one direction", link.source)
    console.print(table)


def show_placements(console: Console, plans: Sequence[Plan], own: Plan | None) -> None:
    """The fastest first; whoever is slower takes fewer GPUs. Last, and apart, the config's `own`."""
    table = Table(title="placements that fit", title_justify="left")
    for column in ("GPUs", "s a step", "days", "GPU-hours"):
        table.add_column(column, justify="right")
    for column in ("ranks (ZeRO)", "on shared GPUs"):
        table.add_column(column)
    table.columns[0].no_wrap = True
    for plan in [*plans, *([own] if own else [])]:
        if plan is own:
            table.add_section()
            table.add_row("", "", "", "", "the config's own" + ("" if own.fits else ", which does not fit"), "")
        ranks = ", ".join(_ranks(role) for role in plan.work.roles.values())
        sets = " | ".join(", ".join(roles) for roles in plan.work.shared)
        days = f"{plan.seconds / 86400:.2g}"
        table.add_row(f"{plan.devices:g}", f"{plan.time.seconds:.3g}", days, f"{plan.gpu_hours:,.0f}", ranks, sets)
    console.print(table)


def _ranks(role: Role) -> str:
    if role.name == "rollout":
        return f"rollout {role.ranks} x {role.devices:g}"
    return f"{role.name} {role.ranks} ({role.zero_stage})"


def _roles(plan: Plan) -> Table:
    table = _table(plan)
    for role in [*plan.work.roles.values(), *([plan.work.train] if plan.work.train else [])]:
        table.add_row(*_row(plan, role))
    return table


def _table(plan: Plan) -> Table:
    unit = "GPU" if plan.work.gpu else "process"
    table = Table(title=f"{plan.hardware.device.title}: GiB a {unit}", title_justify="left")
    table.add_column("role", no_wrap=True)
    for column in ("size", "ranks", "ZeRO", "model", "grads", "Adam", "work", "sum"):
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _row(plan: Plan, role: Role) -> list[str]:
    memory = plan.memory[role.name]
    parts = memory.parts()
    groups = {
        "weights": ("weights", "hpZ copy", "key/value cache"),
        "gradients": ("gradients",),
        "optimizer": ("optimizer", "float32 weights", "average"),
        "working": (*memory.moment, "sync buckets"),
    }
    sums = {name: sum(parts.get(part, 0.0) for part in members) for name, members in groups.items()}
    ranks = f"{role.ranks}x{role.devices:g}" if role.name == "rollout" and role.devices != 1 else str(role.ranks)
    zero = "" if role.name == "rollout" else str(role.zero_stage)
    cells = [_gib(sums[name]) for name in groups]
    return [role.name, _count(role.shape.parameters), ranks, zero, *cells, _gib(memory.peak)]


def _phases(plan: Plan) -> Table:
    table = Table(title="a step", title_justify="left")
    table.add_column("phase", no_wrap=True)
    table.add_column("seconds", justify="right")
    table.add_column("of them")
    for phase, seconds in plan.time.phases.items():
        roles = plan.time.by_role.get(phase, {})
        parts = ", ".join(f"{role} {took:.3g}" for role, took in roles.items()) if len(roles) > 1 else ""
        if phase == "generate":
            made = plan.time.generation
            parts = f"prompts {made.prefill:.3g}, the last half of the places {made.tail:.3g}; {made.places} at once"
        if seconds or phase != "move":
            table.add_row(phase, f"{seconds:.3g}", parts)
    return table


def _whole(plan: Plan) -> str:
    step, steps = plan.time.seconds, plan.work.steps
    words = f"{step:.3g} s a step, {steps} steps: {_duration(plan.seconds)}"
    if plan.work.gpu:
        taken = nodes_taken(plan.work, plan.hardware)
        there = f"{taken} of {plan.nodes}" if taken < plan.nodes else f"{plan.nodes}"
        nodes = f"{there} node{'s' if plan.nodes > 1 else ''}"
        words += f" on {plan.devices:g} GPUs ({nodes}), {plan.gpu_hours:,.1f} GPU-hours"
    return f"{words} (ppo alone; generating and learning overlap)" if plan.work.overlap else f"{words} (ppo alone)"


def _duration(seconds: float) -> str:
    if seconds < 3600:
        return f"{seconds / 60:.1f} minutes"
    return f"{seconds / 3600:.1f} hours" if seconds < 2 * 86400 else f"{seconds / 86400:.1f} days"


def _gib(nbytes: float) -> str:
    gib = nbytes / GIB
    return "" if nbytes == 0 else f"{gib:.1f}" if gib >= 10 else f"{gib:.2f}"


def _count(number: int) -> str:
    return f"{number / 1e9:.2f}B" if number >= 1e9 else f"{number / 1e6:.1f}M"
