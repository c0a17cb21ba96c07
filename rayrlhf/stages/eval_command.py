"""`rayrlhf eval RUN|MODEL...`: an evaluation outside a run, of a run's policies and of any other models."""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from rayrlhf.config import Config, config_from, load_config
from rayrlhf.errors import ConfigError
from rayrlhf.metrics.sinks import RunSink
from rayrlhf.stages import preflight
from rayrlhf.stages.context import StageContext
from rayrlhf.stages.datasets import Datasets
from rayrlhf.stages.evaluation import arm_models, evaluate_models
from rayrlhf.stages.lineage import absolute
from rayrlhf.stages.summary import show_evaluation
from rayrlhf.stages.world import with_world

__all__ = ["evaluate"]


def evaluate(subjects: Sequence[str], overrides: Sequence[str], output: Path | None, console: Console) -> Path:
    """Evaluate what a run left, other models beside it, or models alone. Returns the folder of the results.

    Args:
        subjects: folders of runs, model folders or Hugging Face names; the first policy is what the others are compared
            with: the first run's SFT model, or the first model. A run that comes first gives the config too.
        overrides: `section.key=value`, over the run's config.
        output: where evaluation.json, answers.jsonl and logs go; `<run>/eval` or `runs/eval` when None.

    Raises:
        ConfigError: nothing to evaluate, or the run has no SFT model to compare with.
    """
    for subject in subjects:
        _check_spelling(Path(subject))
    run = Path(subjects[0]) if subjects and (Path(subjects[0]) / "config.yaml").is_file() else None
    others = subjects[1 if run else 0 :]
    if run is not None:
        config = load_config(run / "config.yaml", [*overrides, "run.stages=[eval]"])
        models, reward = _of_run(run)
        if "sft" not in models:
            hint = "add sft to its run.stages, or set sft.path"
            raise ConfigError(f"{run}: the run has no SFT model to compare with", hint)
    elif others:
        config = config_from({"model": {"path": absolute(others[0])}}, [*overrides, "run.stages=[eval]"])
        models, reward = {}, config.reward.path
    else:
        raise ConfigError("eval: nothing to evaluate", "name a run's folder, a model folder or a Hugging Face model")
    runs = [path for path in others if (Path(path) / "config.yaml").is_file()]
    models |= _of_further(list(map(Path, runs)), models)
    models |= _named([absolute(path) for path in others if path not in runs], models)
    folder = (output or (run / "eval" if run else config.run.output / "eval")).resolve()
    return _evaluate(with_world(config), models, reward, folder, console)


def _check_spelling(path: Path) -> None:
    """Raise ConfigError for a path that is not there but whose folder is: no hub has a model of such a name."""
    if not path.exists() and path.parent != Path(".") and path.parent.is_dir():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir() if p.is_dir()], n=1)
        hint = f"did you mean {path.parent / near[0]}?" if near else f"look into {path.parent}"
        raise ConfigError(f"eval: {path}: no such folder", hint)


def _of_run(run: Path) -> tuple[dict[str, str], str | None]:
    """(the policies by arm, SFT first if there is one; the reward model), as the run's summary names them."""
    stages = _stages(run / "summary.json")
    config = load_config(run / "config.yaml")
    sft = config.sft.path or stages.get("sft", {}).get("model")
    left = {"dpo": run / "model_dpo", "ppo": run / "model"}
    parents = {stage: str(path.resolve()) for stage, path in left.items() if path.is_dir()}
    if sft is not None:
        parents["sft"] = absolute(sft)
    reward = config.reward.path or stages.get("reward", {}).get("model")
    return arm_models(config, parents), absolute(reward) if reward else None


def _of_further(runs: Sequence[Path], taken: Mapping[str, str]) -> dict[str, str]:
    """The policies of further runs as `run/arm`, but none that is compared already, such as a shared SFT model."""
    found: dict[str, str] = {}
    for run in runs:
        name = str(run) if [other.name for other in runs].count(run.name) > 1 else run.name
        left, _ = _of_run(run)
        found |= {f"{name}/{arm}": path for arm, path in left.items() if path not in {**taken, **found}.values()}
    return found


def _stages(summary: Path) -> dict[str, Any]:
    """Each stage's result; a run that is still going, or was killed, has written none."""
    try:
        stages = json.loads(summary.read_text(encoding="utf-8"))["stages"]
    except FileNotFoundError:
        hint = "wait for its end, or run it again: finished stages are not run twice"
        raise ConfigError(f"{summary}: the run has left no summary, it is still going or was killed", hint) from None
    except (ValueError, KeyError, TypeError, RecursionError):
        stages = None
    named = list(stages.values()) if isinstance(stages, dict) else [None]
    if not all(isinstance(stage, dict) and isinstance(stage.get("model", ""), str) for stage in named):
        raise ConfigError(f"{summary}: not the summary of a run", "run it again: finished stages are not run twice")
    return dict(stages)


def _named(paths: Sequence[str], taken: Collection[str]) -> dict[str, str]:
    """Each model by the last two parts of its path, `mine/model`; by the whole path where that names another too."""
    short = ["/".join(Path(path).parts[-2:]) for path in paths]
    clashes = {name for name in short if name in taken or short.count(name) > 1}
    return {path if name in clashes else name: path for path, name in zip(paths, short, strict=True)}


def _evaluate(config: Config, models: dict[str, str], reward: str | None, folder: Path, console: Console) -> Path:
    preflight.check_files(config)
    preflight.check_models(config)
    data = Datasets(config, next(iter(models.values())))
    preflight.check_compared(config, data, models, reward)
    preflight.check_evaluation(config, data)
    preflight.check_world(config, data, ["eval"])
    folder.mkdir(parents=True, exist_ok=True)
    context = StageContext(config, data, folder, RunSink(folder), console)
    try:
        result: dict[str, Any] = evaluate_models(context, models, reward, folder)
    finally:
        context.close()
    show_evaluation(console, result)
    console.print(f"evaluation.json and answers.jsonl are in {folder}", highlight=False, markup=False, soft_wrap=True)
    return folder
