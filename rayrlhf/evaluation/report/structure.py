"""Runs as one plain JSON structure: everything the page shows, and nothing that it would have to work out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rayrlhf.evaluation.report import arms as arms_of
from rayrlhf.evaluation.report.answers import plain, prompt_table, sample_rows, scores_by_arm
from rayrlhf.evaluation.report.densities import spread
from rayrlhf.evaluation.report.folder import RunFolder
from rayrlhf.evaluation.report.series import Columns, finite, ppo_columns, rounded, supervised_columns, thinned
from rayrlhf.evaluation.report.signs import Arm, look

__all__ = ["differences", "structure"]

Json = dict[str, Any]


def structure(runs: Sequence[RunFolder]) -> Json:
    """The page's data.

    Args:
        runs: one or more; several are compared, in the order given.
    """
    names = _labels(runs)
    return {
        "title": " · ".join(names),
        "runs": [_run(run, name) for run, name in zip(runs, names, strict=True)],
        "differences": differences(runs) if len(runs) > 1 else [],
    }


def differences(runs: Sequence[RunFolder]) -> list[Json]:
    """Config keys whose values are not the same in all runs; the run's own name and place aside."""
    keys = dict.fromkeys(key for run in runs for key in run.config if key not in ("run.name", "run.output"))
    rows = [
        {"key": key, "values": [_shown(run.config[key]) if key in run.config else None for run in runs]} for key in keys
    ]
    return [row for row in rows if len(set(row["values"])) > 1]


def _labels(runs: Sequence[RunFolder]) -> list[str]:
    """Names, told apart by their folders where two are the same."""
    names = [run.name for run in runs]
    return [name if names.count(name) == 1 else f"{name} ({run.path})" for name, run in zip(names, runs, strict=True)]


def _run(run: RunFolder, name: str) -> Json:
    trained = ppo_columns(run.metrics)
    evaluation = _mapping(run.summary.get("evaluation"))
    answered = dict.fromkeys(arm for record in run.answers for arm in _mapping(record.get("answers")))
    names = arms_of.arm_names(evaluation, trained, answered)
    rows = arms_of.headline(evaluation, names, trained)
    prompts = finite(evaluation.get("prompts"))
    scores = {score: scores_by_arm(run.answers, names, score) for score in ("reward", "gold")}
    table = prompt_table(run.answers, names)
    samples = sample_rows(run.samples)
    return {
        "name": name,
        "folder": str(run.path),
        "seed": finite(run.summary.get("seed", run.config.get("run.seed"))),
        "status": str(run.summary.get("status") or "unknown"),
        "versions": {str(k): str(v) for k, v in _mapping(run.summary.get("versions")).items()},
        "config": [[key, _shown(value)] for key, value in run.config.items()],
        "stages": [_stage(stage, result) for stage, result in _mapping(run.summary.get("stages")).items()],
        "arms": [{"name": arm, "label": arms_of.label(arm)} for arm in names],
        "headline": rows,
        "reading": arms_of.reading(rows, trained, prompts),
        "prompts": prompts,
        "temperature": finite(evaluation.get("temperature")),
        "flags": _flags(evaluation),
        "reward_accuracy": _accuracy(evaluation),
        "ppo": [{"arm": arm, "columns": thinned(columns)} for arm, columns in trained.items()],
        "supervised": [{"stage": s, "columns": thinned(c)} for s, c in supervised_columns(run.metrics).items()],
        "kl_target": finite(run.config.get("ppo.kl.target")),
        "sft_point": _sft_point(rows),
        "spread": {score: spread(arms) for score, arms in scores.items()},
        "answers": table,
        "samples": samples,
        **_signs(run, evaluation, trained),
        "notes": [*_failure(run), *run.notes, *(table["notes"] if table else [])],
        "missing": _missing(run, evaluation, trained, table, samples),
    }


def _failure(run: RunFolder) -> list[str]:
    """What ended the run, where it did not end by itself."""
    if run.summary.get("status") != "failed":
        return []
    return [f"The run failed: {run.summary.get('error') or 'no error was recorded'}"]


def _stage(name: str, result: Any) -> Json:
    result = _mapping(result)
    return {
        "name": name,
        "key": str(result.get("key") or ""),
        "parents": {str(k): str(v) for k, v in _mapping(result.get("parents")).items()},
        "seconds": finite(result.get("seconds")),
        "cached": result.get("cached") is True,
        "memory": _memory([result, *_mapping(result.get("arms")).values()]),
        "facts": _facts(name, result),
    }


def _memory(results: Sequence[Any]) -> Json:
    """role -> GiB of its largest rank, over the stage and its arms; the largest role first."""
    most: dict[str, float] = {}
    for result in results:
        for key, value in _mapping(_mapping(result).get("memory_gib")).items():
            role, gib = key.removeprefix("memory/").removesuffix("_gib"), finite(value)
            if gib is not None:
                most[role] = max(gib, most.get(role, 0.0))
    return {role: rounded(gib, 3) for role, gib in sorted(most.items(), key=lambda item: -item[1])}


def _facts(stage: str, result: Mapping[str, Any]) -> list[str]:
    """What the stage came to, in a few words."""
    before, after = finite(result.get("heldout_loss_before")), finite(result.get("heldout_loss"))
    facts = []
    if before is not None and after is not None:
        facts.append(f"held-out loss {before:.2f} → {after:.2f}")
    elif (loss := finite(result.get("train_loss"))) is not None:
        facts.append(f"train loss {loss:.3f}")
    parameters = finite(result.get("parameters"))
    if stage == "pretrain" and parameters:
        facts.append(f"{parameters / 1e6:.1f}M parameters")
    pairs = {source: finite(_mapping(row).get("accuracy")) for source, row in _mapping(result.get("accuracy")).items()}
    facts += [f"accuracy {value:.2f} on {source or 'held-out'}" for source, value in pairs.items() if value is not None]
    if arms := _mapping(result.get("arms")):
        return facts + [_spent(arms_of.label(arm), _mapping(numbers)) for arm, numbers in arms.items()]
    if stage == "ppo" and finite(result.get("steps")):
        facts.append(_spent("", result))
    return facts


def _spent(name: str, numbers: Mapping[str, Any]) -> str:
    """ "PPO: 60 steps, 120 s"."""
    steps, seconds = finite(numbers.get("steps")), finite(numbers.get("seconds"))
    words = [
        f"{steps:.0f} steps" if steps is not None else "",
        f"{seconds:.0f} s" if name and seconds is not None else "",
    ]
    return ": ".join(filter(None, (name, ", ".join(filter(None, words)))))


def _flags(evaluation: Mapping[str, Any]) -> Json:
    """flag -> arm -> share of its answers."""
    table: Json = {}
    for arm, flags in _mapping(evaluation.get("flags")).items():
        for flag, share in _mapping(flags).items():
            cell = arms_of.arm_numbers({"gold_mean": {arm: share}}, arm).get("gold_mean")
            if cell:
                table.setdefault(flag, {})[arm] = cell["value"]
    return table


def _accuracy(evaluation: Mapping[str, Any]) -> Json:
    shares = {name: finite(value) for name, value in _mapping(evaluation.get("reward_accuracy")).items()}
    return {name: share for name, share in shares.items() if share is not None}


def _sft_point(rows: list[Json]) -> Json | None:
    """Where every path starts: KL 0, and SFT's own scores on the held-out prompts."""
    for row in rows:
        if row["arm"] == "sft" and row["held_out"]:
            values = {name: _mapping(row["cells"].get(f"{name}_mean")).get("value") for name in ("reward", "gold")}
            return values if any(value is not None for value in values.values()) else None
    return None


def _signs(run: RunFolder, evaluation: Mapping[str, Any], trained: Mapping[str, Columns]) -> Json:
    """Findings of every arm but SFT, those of training first; and what could not be looked for in any."""
    found: list[Json] = []
    unchecked: list[set[str]] = []
    names = [n for n in arms_of.arm_names(evaluation, trained, ()) if n != "sft"]
    for name in names:
        findings, missing = look(_arm(name, run, evaluation, trained))
        found += [
            {
                **{k: getattr(f, k) for k in ("title", "number", "advice", "step", "plot")},
                "arm": name,
                "label": arms_of.label(name),
            }
            for f in findings
        ]
        if name in trained:
            unchecked.append(set(missing))
    left_out = set.intersection(*unchecked) if unchecked else set()
    return {"findings": found, "unchecked": sorted(left_out), "looked": len(names)}


def _arm(name: str, run: RunFolder, evaluation: Mapping[str, Any], trained: Mapping[str, Columns]) -> Arm:
    own = [s for s in run.samples if str(s.get("arm") or "ppo") == name and finite(s.get("step")) is not None]
    reasons = [
        str(reason)
        for record in run.metrics
        if record.get("stage") == "ppo" and str(record.get("arm") or "ppo") == name
        for reason in _mapping(record.get("weights/quarantine_reasons")).values()
    ]

    def numbers(arm: str) -> dict[str, float]:
        estimates = arms_of.arm_numbers(evaluation, arm).items()
        return {measure: e["value"] for measure, e in estimates if e["value"] is not None}

    return Arm(
        name=name,
        columns=trained.get(name, {}),
        responses=sorted(((s["step"], plain(s.get("response"))) for s in own), key=lambda item: item[0]),
        evaluated=numbers(name),
        sft=numbers("sft"),
        reasons=reasons,
    )


def _missing(
    run: RunFolder,
    evaluation: Mapping[str, Any],
    trained: Mapping[str, Columns],
    table: Json | None,
    samples: list[Json],
) -> Json:
    """section -> why it is not there, in a sentence."""
    missing: Json = {}
    if not trained:
        missing["training"] = "metrics.jsonl has no step of PPO: the run did not reach it, or was not asked to."
    if not any(arms_of.arm_numbers(evaluation, arm) for arm in arms_of.arm_names(evaluation, (), ())):
        missing["evaluation"] = "There is no evaluation on held-out prompts, and no number of any arm from training."
    if not any("reward/gold" in columns for columns in trained.values()):
        missing["gold"] = "There is no gold score: the run's data are not of a world with a judge."
    if table is None:
        missing["answers"] = "There is no answers.jsonl: held-out prompts were not answered."
    if not samples:
        missing["samples"] = "There is no samples.jsonl, or nothing in it."
    return missing


def _shown(value: Any) -> str:
    """As YAML has it, on one line."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
