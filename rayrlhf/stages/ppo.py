"""`ppo`: config -> actors -> loop, once for each arm.

The arms (`ppo.arms`) differ in the settings of the step, not in their actors: between two of them the learners begin
again from the SFT and the reward model, and the engines get the policy anew.
"""

from __future__ import annotations

import asyncio
import shutil
import signal
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from rich.markup import escape

from rayrlhf.actors.group import ActorGroup
from rayrlhf.actors.models import Judge
from rayrlhf.actors.placement import plan_ppo
from rayrlhf.actors.roles import LearnerRoles, ScorerRoles, StepPlan, TextPlan
from rayrlhf.algorithms.kl import AdaptiveKL, FixedKL
from rayrlhf.checkpoint.ledger import LEDGER, Accounted, Facts
from rayrlhf.checkpoint.store import Checkpoint
from rayrlhf.config import Config
from rayrlhf.driver.loop import Parts, run_ppo
from rayrlhf.driver.pacing import OverlapPacing, PromptStream, SyncPacing, TextStream
from rayrlhf.driver.together import together
from rayrlhf.engines.schedule import linear_warmup
from rayrlhf.errors import ActorLost, DataLost, Stopped
from rayrlhf.metrics.clock import StepClock
from rayrlhf.metrics.sinks import JsonLines, read_jsonl
from rayrlhf.stages.context import StageContext
from rayrlhf.stages.ledger import Ledger
from rayrlhf.stages.progress import StageProgress
from rayrlhf.stages.roles import RoleSet, first_ratio
from rayrlhf.stages.saving import RECORDS, PolicySaver
from rayrlhf.stages.sources import plan_models
from rayrlhf.stages.verification import VerifiedLearners

__all__ = ["join_arms", "judge_of", "run_ppo_stage"]


def run_ppo_stage(context: StageContext, parents: dict[str, str], workspace: Path) -> dict[str, Any]:
    """PPO of the SFT model against the reward model; leaves model/ and value/ of the last arm in the workspace, and
    model_<arm>/ of the others."""
    context.ensure_ray()
    return asyncio.run(_Run(context, parents, workspace).run())


def judge_of(config: Config, prompts: dict[int, str]) -> Judge | None:
    """The world's judge of these prompts, if there is a world; its file by the full path: actors may live elsewhere."""
    world = config.world
    if world.name is None:
        return None
    is_file = world.module is not None and world.module.endswith(".py")
    return Judge(world.name, str(Path(world.module or "").resolve()) if is_file else world.module, prompts)


class _Run:
    """All arms: their actors from start to end."""

    def __init__(self, context: StageContext, parents: dict[str, str], workspace: Path) -> None:
        self.context = context
        self.workspace = workspace
        prompts = context.data.prompts
        planned = plan_models(context.config, parents, prompts.records)
        roles = [placement.role for placement in plan_ppo(context.config)]
        judge = judge_of(context.config, prompts.texts)
        self.roles = RoleSet(context, roles, planned.models, prompts.tokens, judge, planned)
        self.parents = parents
        self.stop = asyncio.Event()

    async def run(self) -> dict[str, Any]:
        start, arms = perf_counter(), self.context.config.arms()
        results: dict[str, dict[str, Any]] = {}
        with StageProgress(self.context.console, "ppo") as progress:
            clock = StepClock(self.workspace / "trace.json", progress.phase)
            loop, before = asyncio.get_running_loop(), signal.getsignal(signal.SIGTERM)

            def heed() -> None:
                self.stop.set()
                loop.remove_signal_handler(signal.SIGTERM)
                signal.signal(signal.SIGTERM, before)  # a second one does not wait

            try:
                with suppress(ValueError, RuntimeError):  # signals reach the main thread alone
                    loop.add_signal_handler(signal.SIGTERM, heed)
                self.context.on_head_lost = partial(loop.call_soon_threadsafe, self.stop.set)
                progress.phase("starting")
                await self.roles.start(next(iter(arms.values())))
                if self.context.data.uses_text:
                    await self.roles.hold_text(self.text_blocks())
                self.roles.watch()
                ready = perf_counter()
                for number, (name, config) in enumerate(arms.items()):
                    if self.stop.is_set():
                        raise Stopped("stopped between two arms or before the first step", "go on with --resume")
                    last = number + 1 == len(arms)
                    folder = self.workspace if last else self.workspace / "arms" / name
                    arm = _Arm(self, name if len(arms) > 1 else None, config, folder, progress, clock)
                    results[name] = await arm.run(reload=number > 0)
                self.roles.keep_for("eval")
            finally:
                with suppress(OSError):  # the disk may be full
                    clock.close()
                self.context.on_head_lost = None
                await self.roles.stop()
                if loop.remove_signal_handler(signal.SIGTERM):
                    signal.signal(signal.SIGTERM, before)  # asyncio leaves the default, which ends the process as it is
        join_arms(self.workspace, list(results))
        shutil.copy2(self.context.folder / LEDGER, self.workspace / LEDGER)
        counts = self.context.data.prompts.counts
        return results[name] | {"arms": results, "data": counts, "start_seconds": ready - start}

    def text_blocks(self) -> np.ndarray:
        """int32 [blocks, L]: what PPO-ptx reads."""
        return np.stack([example.tokens for example in self.context.data.pretrain.train])


def join_arms(workspace: Path, arms: Sequence[str]) -> None:
    """Bring what the other arms left in arms/<name>/ beside the last one's: models by name, records in order."""
    others = [workspace / "arms" / name for name in arms[:-1]]
    for file in ("metrics.jsonl", "samples.jsonl"):
        parts = [*(folder / file for folder in others), workspace / file]
        text = "".join(part.read_text(encoding="utf-8") for part in parts if part.exists())
        if text:
            (workspace / file).write_text(text, encoding="utf-8")
    for folder in others:
        for model in folder.glob("model*"):  # and its average, where there is one
            model.rename(workspace / model.name.replace("model", f"model_{folder.name}", 1))
    shutil.rmtree(workspace / "arms", ignore_errors=True)


class _Arm:
    """One PPO run on actors that are there."""

    def __init__(
        self,
        stage: _Run,
        name: str | None,
        config: Config,
        folder: Path,
        progress: StageProgress,
        clock: StepClock,
    ) -> None:
        """`name` marks the arm's records where there are several."""
        self.stage = stage
        self.context = stage.context
        self.clock = clock
        self.roles = stage.roles
        self.name = name
        self.config = config
        self.folder = folder
        self.progress = progress

    async def run(self, reload: bool) -> dict[str, Any]:
        """`reload`: the learners hold what another arm left."""
        start = perf_counter()
        self.folder.mkdir(parents=True, exist_ok=True)
        sink = _StageSink(self.context, self.progress, self.name, self.config.ppo.steps, self.folder)
        try:
            await self._until_done(sink, reload)
        finally:
            sink.close()
        history = read_jsonl(self.folder / "metrics.jsonl")  # from disk: the driver keeps nothing per step
        return _summary(history) | {"seconds": perf_counter() - start}

    def _saver(self) -> PolicySaver:
        return PolicySaver(self.roles.groups, self.context, self.config, self.folder, self.name)

    async def _until_done(self, sink: _StageSink, reload: bool) -> None:
        """The loop, and the models' files; once more from the newest checkpoint, or from the start, each time that a
        learner is lost."""
        found = await self._restore(None, sink) if self.context.resume else None
        if found:
            sink.write_again(found.folder)
        while True:
            try:
                if reload and not found:
                    self.progress.phase("reloading")
                    await together(*(self.roles.reload(role, self.config) for role in self._learners()))
                await self._loop(sink, found)
                self.progress.phase("saving")
                return await self._saver().save_to(self.folder)
            except (ActorLost, DataLost) as lost:
                found = await self._restore(lost, sink)
                reload = True

    async def _restore(self, lost: ActorLost | DataLost | None, sink: _StageSink) -> Checkpoint | None:
        """Bring the learners back to the newest checkpoint, and take back the records after it.

        Raises:
            ActorError: it is no learner, or it may not be replaced again.
        """
        if lost is not None:
            self.progress.phase("recovering")
        await self.roles.settled()  # a role may have gone with the same node
        while True:
            if isinstance(lost, DataLost):
                await self.roles.again("data of the step", lost)
            elif lost is not None:
                if lost.role not in self._learners():
                    raise lost
                await self.roles.replace(lost.role, lost)
            try:
                found = await self._saver().resume()
                break
            except ActorLost as another:  # both may go with their node
                lost = another
        sink.roll_back(found.step if found else 0)
        return found

    def _learners(self) -> list[str]:
        return [role for role in ("policy", "value") if role in self.roles.groups]

    async def _loop(self, sink: _StageSink, found: Checkpoint | None) -> None:
        """PPO from a checkpoint that the learners hold, or from the start."""
        ppo, groups, saver = self.config.ppo, self.roles.groups, self._saver()
        saver.go_on_from(found)
        done, state = (found.step, found.state) if found else (0, {})
        ledger = self._ledger()
        accounted = ledger.start_from(found)
        pool = self.roles.pool()
        plan = self._step_plan(state.get("text_drawn", 0))
        saver.text, saver.ledger = plan.text.stream if plan.text else None, ledger
        learners = LearnerRoles(groups["policy"], groups.get("value"), plan)
        parts = Parts(
            rollout=pool,
            scorers=ScorerRoles(*self._scoring_groups(), self.roles.replace),
            learners=self._verified(learners) if self.context.verify_step else learners,
            weights=pool,
            checkpoints=saver,
            ledger=ledger,
            sink=sink,
            clock=self.clock,
            gauges=partial(self.roles.memory, without="rollout"),  # which says it with each publish
            stop=self.stage.stop,
        )
        coef = state.get("kl_coef", ppo.kl.coef)
        kl = AdaptiveKL(coef, ppo.kl.target, ppo.kl.horizon) if ppo.kl.target else FixedKL(coef)
        done = await run_ppo(parts, self._pacing(done, accounted), kl, done)
        # A later arm may be cut short: this one is done.
        if self.name is not None and self.config.checkpoint.every and await saver.save(done, kl.coef, {}, due=True):
            ledger.checkpoint(done)
        ledger.end(done)

    def _verified(self, learners: LearnerRoles) -> VerifiedLearners:
        stage, blocks = self.stage, self.stage.text_blocks() if self.config.ppo.ptx.coef else None
        return VerifiedLearners(self.context, stage.parents, self.roles, learners, blocks, self.progress.phase)

    def _ledger(self) -> Ledger:
        ppo, prompts = self.config.ppo, [p.prompt_id for p in self.context.data.prompts.tokens]
        facts = Facts.of(self.config.run.seed, prompts, ppo.samples_per_prompt, ppo.batch_size)
        return Ledger(self.context.folder, facts, self.name)

    def _pacing(self, done: int, accounted: Accounted) -> SyncPacing | OverlapPacing:
        """`done` steps are, in which these samples were."""
        ppo, prompts = self.config.ppo, [p.prompt_id for p in self.context.data.prompts.tokens]
        stream = PromptStream(prompts, self.config.run.seed, ppo.samples_per_prompt, accounted)
        batches = (stream, ppo.batch_size, ppo.steps, self.clock)
        if ppo.pacing.kind == "sync":
            return SyncPacing(*batches, done, ppo.max_failed)
        return OverlapPacing(*batches, ppo.pacing.max_staleness, done, ppo.max_failed)

    def _scoring_groups(self) -> tuple[list[ActorGroup], list[ActorGroup]]:
        """The frozen roles and those that learn; not the policy where the engine's log-probs stand for its own."""
        groups = self.roles.groups
        learning = ("value",) if self.config.ppo.old_logprobs == "rollout" else ("policy", "value")
        return [groups[r] for r in ("reference", "reward")], [groups[r] for r in learning if r in groups]

    def _step_plan(self, text_drawn: int) -> StepPlan:
        config, ppo = self.config, self.config.ppo
        text = None
        if ppo.ptx.coef:
            stream = TextStream(len(self.context.data.pretrain.train), config.run.seed, text_drawn)
            text = TextPlan(stream, ppo.ptx.examples_per_episode, ppo.ptx.norms_every)

        def rates(step: int) -> tuple[float, float]:
            value = linear_warmup(step, ppo.value_learning_rate, ppo.warmup_steps)
            return linear_warmup(step - ppo.value_warmup_steps, ppo.learning_rate, ppo.warmup_steps), value

        limit = first_ratio(config)
        return StepPlan(
            minibatch_size=ppo.minibatch_size,
            epochs=ppo.epochs,
            seed=config.run.seed,
            samples_per_prompt=ppo.samples_per_prompt,
            value_warmup_steps=ppo.value_warmup_steps,
            first_kl_limit=min(limit.largest, limit.mean),
            learning_rates=rates,
            text=text,
        )


class _StageSink:
    """The loop's records: to the run's sinks, the artifact, and the progress bar."""

    def __init__(
        self, context: StageContext, progress: StageProgress, arm: str | None, steps: int, folder: Path
    ) -> None:
        self._context = context
        # The artifact's own copies: a later run that finds the stage done shows the same records.
        self._kept = (JsonLines(folder / "metrics.jsonl"), JsonLines(folder / "samples.jsonl"))
        self._progress = progress
        self._arm = {} if arm is None else {"arm": arm}
        self._steps = steps

    def write(self, record: Mapping[str, Any]) -> None:
        self._context.sink.write({"stage": "ppo", **self._arm, **record})
        self._kept[0].write({**self._arm, **record})
        for engine, reason in record["weights/quarantine_reasons"].items():
            self._context.console.print(
                f"[yellow]{engine} is left out, its weights are not verified:[/] {escape(reason)}"
            )
        names = {"reward/mean": "reward", "reward/gold": "gold", "kl/mean": "kl", "response/length_mean": "length"}
        shown = {word: record[name] for name, word in names.items() if name in record}
        self._progress.step(record["step"], self._steps, shown, **self._arm)

    def write_again(self, checkpoint: Path) -> None:
        """The records of the steps that a checkpoint covers."""
        metrics, samples = (read_jsonl(checkpoint / name) for name in RECORDS)
        for record in metrics:
            self._context.sink.write({"stage": "ppo", **record})
            self._kept[0].write(record)
        for sample in samples:
            self._context.sink.write_sample(sample)
            self._kept[1].write(sample)

    def roll_back(self, step: int) -> None:
        """Take back the records of later steps: those steps are done again."""

        def stays(record: Mapping[str, Any]) -> bool:
            mine = record.get("arm") == self._arm.get("arm") and record.get("stage", "ppo") == "ppo"
            return not mine or record["step"] <= step

        for file in self._kept:
            file.keep(stays)
        self._context.sink.keep(stays)

    def write_samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        for sample in samples:
            record = {**self._arm, "step": step, **sample}
            self._context.sink.write_sample(record)
            self._kept[1].write(record)

    def close(self) -> None:
        for file in self._kept:
            file.close()


def _summary(history: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Means over the first and the last tenth of the steps, seconds per phase, memory per role."""
    tenth = max(1, len(history) // 10)

    def mean(key: str, rows: Sequence[Mapping[str, float]]) -> float:
        return sum(row[key] for row in rows) / len(rows)

    memory = dict.fromkeys(key for row in history for key in row if key.startswith("memory/"))
    names = [n for n in ("reward/mean", "reward/gold", "kl/mean", "response/length_mean") if n in history[0]]
    return {
        "steps": len(history),
        "first": {n: mean(n, history[:tenth]) for n in names},
        "last": {n: mean(n, history[-tenth:]) for n in names},
        "seconds_per_step": {k: mean(k, history) for k in history[0] if k.startswith("time/")},
        # A role that was lost just then is missing from a step's record.
        "memory_gib": {k: max(row[k] for row in history if k in row) for k in memory},
    }
