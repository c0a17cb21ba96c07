"""`rayrlhf run`: the stages in a row, each at most once for the same inputs.

config ─► preflight ─► pretrain ─► sft ─► reward ─► (dpo) ─► ppo ─► runs/<name>/{model, summary.json, ...}
                          │          │       │         │       │
                          └──────────┴───────┴─────────┴───────┴──► artifacts/<stage>-<hash of its inputs>/
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from pathlib import Path
from time import perf_counter
from typing import Any

from rich.console import Console

from rayrlhf.actors.exporter import RayMetrics
from rayrlhf.checkpoint.artifacts import Artifact, ArtifactStore
from rayrlhf.checkpoint.ledger import LEDGER
from rayrlhf.checkpoint.owner import owned
from rayrlhf.config import Config, dump_config
from rayrlhf.config.run import StageName
from rayrlhf.config.secrets import masked
from rayrlhf.errors import ActorError, ConfigError, RayRLHFError, Stopped, printable
from rayrlhf.evaluation.report import write_report
from rayrlhf.launch.supported import installed_versions, unsupported
from rayrlhf.metrics.sinks import RunSink, Sink, WandbSink, read_jsonl
from rayrlhf.stages import preflight
from rayrlhf.stages.collect import run_collect
from rayrlhf.stages.context import StageContext
from rayrlhf.stages.datasets import Datasets
from rayrlhf.stages.dpo import run_dpo
from rayrlhf.stages.evaluation import run_eval
from rayrlhf.stages.language import run_pretrain, run_sft
from rayrlhf.stages.lineage import Lineage
from rayrlhf.stages.plan import show_and_check
from rayrlhf.stages.ppo import run_ppo_stage
from rayrlhf.stages.resume import check_same, has_checkpoints, let_go
from rayrlhf.stages.reward import run_reward
from rayrlhf.stages.summary import show_counts, show_placement, show_summary
from rayrlhf.stages.world import with_world

__all__ = ["run"]

BODIES: dict[StageName, Callable[[StageContext, dict[str, str], Path], dict[str, Any]]] = {
    "pretrain": run_pretrain,
    "sft": run_sft,
    "collect": run_collect,
    "reward": run_reward,
    "dpo": run_dpo,
    "ppo": run_ppo_stage,
    "eval": run_eval,
}
# What a stage leaves in the run's folder: files, and its policy, the recipe's own or the baseline's beside it.
LEFT: dict[StageName, tuple[str, ...]] = {"ppo": ("trace.json", LEDGER), "eval": ("evaluation.json", "answers.jsonl")}
POLICIES: dict[StageName, str] = {"dpo": "model_dpo", "ppo": "model"}


def run(
    config: Config, console: Console, dry_run: bool = False, verify_step: int | None = None, resume: bool = False
) -> Path:
    """Check everything, then run the stages that are not done yet. Returns the run's folder.

    Args:
        resume: go on with the interrupted run of this name, the stage under way from its newest checkpoint.
        verify_step: the PPO step, counted from 1, that is compared with the reference trainer; the ppo stage is then
            run even if it was done before.

    Raises:
        ConfigError, DataError, ModelError, ResourceError: before any actor starts; ConfigError too when another process
            has the run's folder.
        TrainingError: among others, when that step and the reference trainer's differ.
    """
    if verify_step is not None and resume:
        raise ConfigError(
            "--resume and --verify-step contradict each other: the step may be done already",
            "resume first, or verify a step of a run that starts anew",
        )
    if verify_step is not None:
        preflight.check_verify_step(config, verify_step)
    preflight.check_output(config)
    config = with_world(config)
    preflight.check_files(config)
    preflight.check_models(config)
    store = ArtifactStore((config.run.output / "artifacts").resolve())
    again: list[StageName] = [] if verify_step is None else ["ppo"]
    lineage = Lineage(config, store, again)
    todo = [stage for stage in config.stages() if lineage.finished(stage) is None]
    tokenizer = lineage.model("sft") if config.sft.path else lineage.model("pretrain")
    data = Datasets(config, tokenizer)
    _take_rankings(data, lineage)
    counts = preflight.check_data(data, todo)
    if "sft" in todo:
        preflight.check_selection(config, data)
    if "ppo" in todo:
        preflight.check_ensemble(config, data)
    if "eval" in todo:
        preflight.check_evaluation(config, data)
    preflight.check_world(config, data, todo)
    _check_parents(config, lineage, todo)
    for stage in todo if resume else ():
        check_same(config.run.output / config.run.name, config, stage, lineage.inputs(stage))
    if dry_run:
        console.print(dump_config(config), highlight=False, markup=False, emoji=False, soft_wrap=True)
        show_placement(console, config, todo)
        show_counts(console, counts)
        show_and_check(console, config)
        return config.run.output / config.run.name
    show_counts(console, counts)
    for problem in unsupported():
        console.print(f"[yellow]{problem}[/]")
    return _Run(config, console, store, lineage, data, verify_step, resume).execute()


def _take_rankings(data: Datasets, lineage: Lineage) -> None:
    """Once `collect` is done, its rankings are the data's."""
    collected = lineage.finished("collect")
    data.collected = collected.folder if collected else None


def _check_parents(config: Config, lineage: Lineage, todo: Sequence[StageName]) -> None:
    """Each stage to run finds what it starts from: made in this chain before it, or there already."""
    for stage in todo:
        lineage.parent_models(stage, to_come=config.stages())


def _evaluation(stages: Mapping[str, Any]) -> dict[str, Any]:
    """What the run says of its models: eval's numbers, and the reward model's accuracy by source."""
    own = ("seconds", "memory_gib", "cached", "key", "parents")
    evaluation = {name: value for name, value in stages.get("eval", {}).items() if name not in own}
    accuracy = {source: row["accuracy"] for source, row in stages.get("reward", {}).get("accuracy", {}).items()}
    if "gold" in accuracy:
        accuracy["heldout"] = accuracy["gold"]
    if "labeler_agreement" in stages.get("collect", {}):
        accuracy["labeler_agreement"] = stages["collect"]["labeler_agreement"]
    return evaluation | {"reward_accuracy": accuracy}


class _Run:
    def __init__(
        self,
        config: Config,
        console: Console,
        store: ArtifactStore,
        lineage: Lineage,
        data: Datasets,
        verify_step: int | None,
        resume: bool,
    ) -> None:
        self.config = config
        self.console = console
        self.store = store
        self.lineage = lineage
        self.data = data
        self.verify_step = verify_step
        self.resume = resume
        self.folder = (config.run.output / config.run.name).resolve()

    def execute(self) -> Path:
        with owned(self.folder, lambda line: self.console.print(line, markup=False, highlight=False, soft_wrap=True)):
            return self._execute()

    def _execute(self) -> Path:
        self._prepare_folder()
        sink = RunSink(self.folder, self._other_sinks())
        context = StageContext(self.config, self.data, self.folder, sink, self.console, self.resume, self.verify_step)
        summary: dict[str, Any] = {
            "name": self.config.run.name,
            "seed": self.config.run.seed,
            "versions": installed_versions(),
            "status": "stopped",
            "stages": {},
            "evaluation": {},
        }
        try:
            for stage in self.config.stages():
                if context.asked_to_end:
                    raise Stopped(f"stopped before {stage}", "go on with --resume")
                summary["stages"][stage] = self._stage(context, stage)
            summary["status"] = "done"
        except Stopped as stopped:
            if not context.head_lost:
                raise
            summary["status"], summary["error"] = "failed", f"the Ray head is lost: {stopped.message}"
            raise ActorError(f"the Ray head is lost: {stopped.message}", stopped.hint) from None
        except RayRLHFError as error:
            summary["status"], summary["error"] = "failed", masked(f"{type(error).__name__}: {error}")
            raise
        finally:
            summary["evaluation"] = _evaluation(summary["stages"])
            self._write_summary(summary)
            context.close()
            self._report()
        show_summary(self.console, summary, self.folder)
        return self.folder

    def _stage(self, context: StageContext, stage: StageName) -> dict[str, Any]:
        """Run the stage, or take what an earlier run left; either way its records end up in this run's files."""
        key, parents = self.lineage.key(stage), self.lineage.parent_keys(stage)
        artifact, start = self.lineage.finished(stage), perf_counter()
        cached = artifact is not None
        if artifact is None:
            context.inputs = self.lineage.inputs(stage)
            workspace = self.store.workspace(stage, key)
            try:
                result = BODIES[stage](context, self.lineage.parent_models(stage), workspace)
                result["seconds"] = perf_counter() - start
                artifact = self.store.finish(workspace, stage, key, self.lineage.inputs(stage), parents, result)
                _take_rankings(self.data, self.lineage)
                let_go(self.folder, stage)
            finally:
                shutil.rmtree(workspace, ignore_errors=True)  # finish has renamed it, unless the stage failed
        else:
            self.console.print(f"{stage:<9} done before with the same inputs ({artifact.folder.name})", highlight=False)
            self._replay(context, artifact)
        place = artifact.model
        if stage in POLICIES:
            place = str(self.folder / POLICIES[stage])
            # Copies, not links: whoever edits the run's model must not change the artifact that other runs reuse.
            for model in artifact.folder.glob("model*"):
                target = self.folder / model.name.replace("model", POLICIES[stage], 1)
                shutil.copytree(model, target, dirs_exist_ok=True)
        for name in LEFT.get(stage, ()):
            shutil.copy2(artifact.folder / name, self.folder / name)
        where = {"model": place} if Path(place).is_dir() else {}
        return {**artifact.result, "cached": cached, "key": key, "parents": parents, **where}

    def _write_summary(self, summary: Mapping[str, Any]) -> None:
        """On a full disk too: what ended the run must not be hidden by that."""
        path = self.folder / "summary.json"
        try:
            path.write_text(json.dumps(summary, indent=2, default=str), encoding="utf-8")
        except OSError as problem:
            self.console.print(f"{path} could not be written: {problem}", markup=False, highlight=False, soft_wrap=True)

    def _report(self) -> None:
        """The page of the run, of a stopped one too. It comes last and can be made again: nothing may fail for it."""
        try:
            path = write_report([self.folder])
        except Exception as problem:
            self.console.print(
                f"the report could not be written: {printable(str(problem))}", markup=False, highlight=False
            )
        else:
            self.console.print(f"the report is in {path}", markup=False, highlight=False, soft_wrap=True)

    def _replay(self, context: StageContext, artifact: Artifact) -> None:
        if (artifact.folder / "metrics.jsonl").exists():
            for record in read_jsonl(artifact.folder / "metrics.jsonl"):
                if isinstance(record, dict) and "step" in record:
                    context.sink.write({"stage": artifact.stage, **record})
        if (artifact.folder / "samples.jsonl").exists():
            for record in read_jsonl(artifact.folder / "samples.jsonl"):
                context.sink.write_sample(record)

    def _prepare_folder(self) -> None:
        """A fresh folder; an earlier run of this name moves aside, whole, unless it is resumed or only shown again."""
        todo = [stage for stage in self.config.stages() if self.lineage.finished(stage) is None]
        resumable = self.resume and has_checkpoints(self.folder, todo)
        if self.resume and todo and not resumable:
            self.console.print("there is no checkpoint to go on from: starting anew", highlight=False)
        if not resumable and self.folder.exists() and todo:
            numbers = (n for n in count(1) if not self.folder.with_name(f"{self.folder.name}.{n}").exists())
            aside = self.folder.with_name(f"{self.folder.name}.{next(numbers)}")
            self.folder.rename(aside)
            self.console.print(f"the earlier run of this name is now {aside}", highlight=False, soft_wrap=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in ("metrics.jsonl", "samples.jsonl", "summary.json", "trace.json", *(() if resumable else (LEDGER,))):
            (self.folder / name).unlink(missing_ok=True)
        (self.folder / "config.yaml").write_text(dump_config(self.config), encoding="utf-8")

    def _other_sinks(self) -> list[Sink]:
        tracking, name, sinks = self.config.tracking, self.config.run.name, list[Sink]()
        if tracking.wandb != "off":
            settings = self.config.model_dump(mode="json")
            wandb = WandbSink(tracking.wandb, tracking.project, name, self.folder, settings)
            if wandb.mode != tracking.wandb:
                self.console.print("wandb: no login found, writing offline (`wandb sync` uploads it later)")
            sinks.append(wandb)
        if tracking.ray_metrics:
            sinks.append(RayMetrics(name))
        return sinks
