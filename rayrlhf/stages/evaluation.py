"""`eval`: every policy of a run answers the same held-out prompts; rewards, gold, KL, text loss, choices, side by side.

policy (one arm after the other) ─► publish ─► engines answer ─► policy, reference, reward score ─► rows by prompt
        └──► held-out text, multiple choice                                                           │
                                                     evaluation.json, answers.jsonl, a table ◄────────┘
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import ray

from rayrlhf.actors.group import fetched
from rayrlhf.actors.pool import EnginePool
from rayrlhf.actors.roles import score_with
from rayrlhf.config import Config
from rayrlhf.driver.pacing import sample_seed
from rayrlhf.driver.protocols import RolloutBatch
from rayrlhf.errors import TrainingError
from rayrlhf.evaluation.summary import choice, summarise
from rayrlhf.stages.context import StageContext
from rayrlhf.stages.lineage import absolute
from rayrlhf.stages.progress import StageProgress
from rayrlhf.stages.roles import RoleSet
from rayrlhf.stages.sampling import answers, fetch_rollouts, sample
from rayrlhf.types import Prompt, PromptTokens, Rollout, SampleRequest, Scores
from rayrlhf.worlds.base import World, create_world

__all__ = ["BASE", "arm_models", "evaluate_models", "run_eval"]

BASE = "sft"
"""The arm of a run that its others are compared with."""


def run_eval(context: StageContext, parents: dict[str, str], workspace: Path) -> dict[str, Any]:
    """Evaluate what the run has made; leaves evaluation.json and answers.jsonl in the workspace."""
    return evaluate_models(context, arm_models(context.config, parents), parents.get("reward"), workspace)


def evaluate_models(
    context: StageContext, models: Mapping[str, str], reward: str | None, workspace: Path
) -> dict[str, Any]:
    """As `run_eval`, of any models by the name of their arm.

    The first is what the others are compared with, and what KL is measured from. Without a `reward` model there are no
    rewards but those of `eval.reward_model`, and no best-of-n; without held-out prompts nothing is sampled.
    """
    context.ensure_ray()
    return asyncio.run(_Evaluation(context, models, reward, workspace).run())


def arm_models(config: Config, parents: Mapping[str, str]) -> dict[str, str]:
    """Folder of each policy by arm: SFT, DPO if there is one, the PPO arms in their order.

    `parents["ppo"]` is the last arm's; those of the others lie beside it, wherever that is.
    """
    models = {name: parents[name] for name in (BASE, "dpo") if name in parents}
    if "ppo" in parents:
        *others, last = config.arms()
        folder = Path(parents["ppo"])
        models |= {name: str(folder.with_name(f"model_{name}")) for name in others}
        models[last] = str(folder)
    return models


@dataclass
class _Arm:
    """What one arm said, and what is said of it."""

    rollouts: dict[int, Rollout]
    scores: Scores
    batches: Sequence[RolloutBatch]
    heldout_rewards: dict[int, float] = field(default_factory=dict)
    """of `eval.reward_model`, by sample_id"""
    measures: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def answer_to(self) -> dict[int, int]:
        """prompt_id -> sample_id"""
        return {rollout.info.prompt_id: sample_id for sample_id, rollout in self.rollouts.items()}


class _Evaluation:
    def __init__(self, context: StageContext, models: Mapping[str, str], reward: str | None, workspace: Path) -> None:
        self.context = context
        self.config = context.config
        self.models = models
        self.workspace = workspace
        self.pool: EnginePool | None = None
        self.base = next(iter(models))
        self.prompts: list[PromptTokens] = []
        self.records: dict[int, Prompt] = {}
        if self.config.data.heldout_prompts:
            found = context.data.heldout_prompts
            self.prompts = found.tokens[: self.config.eval.prompts]
            self.records = {p.prompt_id: found.records[p.prompt_id] for p in self.prompts}
        named = {"policy": models[self.base]}
        judge = self.config.eval.reward_model
        loaded = reward or (absolute(judge) if judge else None)
        if self.prompts:
            named |= {"reference": models[self.base]} | ({"reward": loaded} if loaded else {})
        # One that only judges at the end scores nothing before.
        self.scorers = tuple(role for role in named if role != "reward" or reward)
        self.roles = RoleSet(context, (*named, *(("rollout",) if self.prompts else ())), named, self.prompts)

    async def run(self) -> dict[str, Any]:
        arms: dict[str, _Arm] = {}
        with StageProgress(self.context.console, "eval") as progress:
            try:
                progress.phase("starting")
                await self.roles.start()
                for version, (name, model) in enumerate(self.models.items()):
                    progress.phase(name)
                    if version:
                        await self.roles.reload("policy", self.config, model)
                    await self._evaluate(name, version, arms)
                    progress.step(version + 1, len(self.models), {})
                if self.config.eval.reward_model is not None and self.prompts:
                    progress.phase("judging")
                    await self._judge_again(arms, self.config.eval.reward_model)
                memory = await self.roles.memory()
            finally:
                await self.roles.stop()
        return self._write(arms) | {"memory_gib": memory}

    async def _evaluate(self, name: str, version: int, arms: dict[str, _Arm]) -> None:
        """The policy that is loaded now, and best-of-n of the first one."""
        best_of = self.config.eval.best_of
        if self.prompts:
            pool = self.pool = self.pool or self.roles.pool()
            await pool.publish(version)
            arms[name] = await self._answer(pool)
            if name == self.base and best_of > 1 and "reward" in self.scorers:
                arms[f"best_of_{best_of}"] = await self._best_of(pool)
        else:
            arms[name] = _Arm({}, Scores(), ())
        arms[name].measures = await self._measure()

    def _requests(self, repeats: int, purpose: str) -> list[SampleRequest]:
        """Every arm draws with the same seeds: what differs is the policy."""
        seed = self.config.run.seed
        return [
            SampleRequest(i * repeats + n, p.prompt_id, sample_seed(seed, purpose, p.prompt_id, n))
            for i, p in enumerate(self.prompts)
            for n in range(repeats)
        ]

    async def _answer(self, pool: EnginePool) -> _Arm:
        requests = self._requests(1, "eval")
        batches = await sample(pool, requests, lambda done, total: None, self.config.eval.temperature)
        scores = await self._score(batches, self.scorers)
        return _Arm(await self._fetched(batches), scores, batches)

    async def _best_of(self, pool: EnginePool) -> _Arm:
        """Of several responses to a prompt the one that the reward model scores highest."""
        batches = await sample(pool, self._requests(self.config.eval.best_of, "best-of"), lambda done, total: None)
        scores = await self._score(batches, ("reward",))
        rollouts, chosen = await self._fetched(batches), dict[int, int]()
        for sample_id in sorted(rollouts):
            prompt = rollouts[sample_id].info.prompt_id
            if prompt not in chosen or scores.rewards[sample_id] > scores.rewards[chosen[prompt]]:
                chosen[prompt] = sample_id
        return _Arm({i: rollouts[i] for i in chosen.values()}, scores, batches)

    async def _fetched(self, batches: Sequence[RolloutBatch]) -> dict[int, Rollout]:
        return await fetch_rollouts(batches, self.config.cluster.call_timeout_s)

    async def _judge_again(self, arms: Mapping[str, _Arm], model: str) -> None:
        """Every response once more, by a reward model that no policy was trained against."""
        await self.roles.reload("reward", self.config, absolute(model))
        for arm in arms.values():
            arm.heldout_rewards = (await self._score(arm.batches, ("reward",))).rewards

    async def _score(self, batches: Sequence[RolloutBatch], roles: Sequence[str]) -> Scores:
        groups, scores = [self.roles.groups[role] for role in roles], Scores()
        for batch in batches:
            for handle in (await score_with(groups, batch, self.roles.replace)).handles:
                scores.merge(await fetched(handle, "eval: scores", self.config.cluster.call_timeout_s))
        if scores.failed:
            sample, reason = next(iter(scores.failed.items()))
            raise TrainingError(
                f"eval: {len(scores.failed)} responses have no reward, such as sample {sample}: {reason}",
                "the reward model is broken: train it anew, or name another",
            )
        return scores

    async def _measure(self) -> dict[str, Any]:
        """What needs the policy itself: the loss on held-out text, and multiple choice."""
        policy, data, measures = self.roles.groups["policy"], self.context.data, dict[str, Any]()
        if self.config.data.text:
            blocks = data.pretrain.heldout[: self.config.eval.text_blocks]
            if blocks:
                measures["pretrain_loss"] = (await policy.call("text_loss", ray.put(blocks)))[0]
        if self.config.data.multiple_choice:
            examples, questions = data.multiple_choice
            if questions:
                logprobs = (await policy.call("choice_logprobs", ray.put(examples)))[0]
                measures["choices"] = [choice(q, row) for q, row in zip(questions, logprobs, strict=True)]
        return measures

    def _write(self, arms: Mapping[str, _Arm]) -> dict[str, Any]:
        world = self._world()
        rows = [self._row(prompt.prompt_id, arms, world) for prompt in self.prompts]
        measures = {name: arm.measures for name, arm in arms.items() if arm.measures}
        result = summarise(rows, measures, self.base, self.config.eval.bootstrap, self.config.run.seed)
        result |= {"temperature": self._temperature(), "models": dict(self.models)}
        with open(self.workspace / "answers.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (self.workspace / "evaluation.json").write_text(json.dumps(result, indent=2), encoding="utf-8")
        return result

    def _temperature(self) -> float:
        asked = self.config.eval.temperature
        return self.config.rollout.temperature if asked is None else asked

    def _world(self) -> World | None:
        world = self.config.world
        return create_world(world.name, world.module) if world.name else None

    def _row(self, prompt_id: int, arms: Mapping[str, _Arm], world: World | None) -> dict[str, Any]:
        """One prompt with every arm's answer to it."""
        record = self.records[prompt_id]
        prompt = record.prompt[-1][1]
        row: dict[str, Any] = {"prompt_id": prompt_id, "prompt": prompt, "kind": record.source, "answers": {}}
        for name, arm in arms.items():
            row["answers"][name] = self._judged(prompt, arm, arm.answer_to[prompt_id], world)
        return row

    def _judged(self, prompt: str, arm: _Arm, sample_id: int, world: World | None) -> dict[str, Any]:
        tokenizer, rollout = self.context.data.tokenizer, arm.rollouts[sample_id]
        said = answers(tokenizer, {sample_id: rollout})[sample_id]
        ids = [int(t) for t in rollout.tokens[rollout.prompt_tokens :]]
        answer: dict[str, Any] = {
            "text": said.text,
            "tokens": [tokenizer.decode([token]) for token in ids],
            "truncated": rollout.info.truncated,
        }
        if sample_id in arm.scores.rewards:
            answer["reward"] = arm.scores.rewards[sample_id]
        if arm.heldout_rewards:
            answer["heldout_reward"] = arm.heldout_rewards[sample_id]
        if sample_id in arm.scores.logprobs:
            kl = arm.scores.logprobs[sample_id] - arm.scores.reference_logprobs[sample_id]
            answer["kl"] = [round(float(x), 4) for x in kl]
        if world is not None:
            answer["gold"] = world.gold(prompt, said.text, said.finished)
            answer["flags"] = world.flags(prompt, said.text, said.finished)
        return answer
