"""`rayrlhf eval RUN|MODEL...`: an evaluation outside a run, of a run's policies and of any other models."""

from __future__ import annotations

import json
from collections.abc import Sequence
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
        subjects: a run's folder first or none, then model folders or Hugging Face names; the first policy is what the
            others are compared with: the run's SFT model, or the first model.
        overrides: `section.key=value`, over the run's config.
        output: where evaluation.json, answers.jsonl and logs go; `<run>/eval` or `runs/eval` when None.

    Raises:
        ConfigError: nothing to evaluate, or the run has no SFT model to compare with.
    """
    run = Path(subjects[0]) if subjects and (Path(subjects[0]) / "config.yaml").is_file() else None
    named = {_arm_name(path): absolute(path) for path in subjects[1 if run else 0 :]}
    if run is not None:
        config = load_config(run / "config.yaml", [*overrides, "run.stages=[eval]"])
        models, reward = _of_run(run)
    elif named:
        model = next(iter(named.values()))
        config = config_from({"model": {"path": model}}, [*overrides, "run.stages=[eval]"])
        models, reward = {}, config.reward.path
    else:
        raise ConfigError("eval: nothing to evaluate", "name a run's folder, a model folder or a Hugging Face model")
    models |= named
    folder = (output or (run / "eval" if run else config.run.output / "eval")).resolve()
    return _evaluate(with_world(config), models, reward, folder, console)


def _of_run(run: Path) -> tuple[dict[str, str], str | None]:
    """(the policies by arm, SFT first; the reward model), as the run's summary names them."""
    stages = json.loads((run / "summary.json").read_text(encoding="utf-8"))["stages"]
    config = load_config(run / "config.yaml")
    sft = config.sft.path or stages.get("sft", {}).get("model")
    if sft is None:
        raise ConfigError(
            f"{run}: the run has no SFT model to compare with", "add sft to its run.stages, or set sft.path"
        )
    left = {"dpo": run / "model_dpo", "ppo": run / "model"}
    parents = {"sft": absolute(sft)} | {stage: str(path.resolve()) for stage, path in left.items() if path.is_dir()}
    reward = config.reward.path or stages.get("reward", {}).get("model")
    return arm_models(config, parents), absolute(reward) if reward else None


def _arm_name(path: str) -> str:
    """The last two parts of a path, for a table: `mine/model`."""
    return "/".join(Path(path).parts[-2:])


def _evaluate(config: Config, models: dict[str, str], reward: str | None, folder: Path, console: Console) -> Path:
    preflight.check_files(config)
    data = Datasets(config, next(iter(models.values())))
    folder.mkdir(parents=True, exist_ok=True)
    context = StageContext(config, data, folder, RunSink(folder, None), console)
    try:
        result: dict[str, Any] = evaluate_models(context, models, reward, folder)
    finally:
        context.close()
    show_evaluation(console, result)
    console.print(f"evaluation.json and answers.jsonl are in {folder}", highlight=False, markup=False, soft_wrap=True)
    return folder
