"""`collect`: the SFT model's own responses, ranked by a world's simulated labelers (Ouyang et al. 2022, section 3.2).

prompts ─► engines (K responses each) ─► one labeler a prompt ─► rankings.jsonl           what the reward model learns
held out ─►         "                 ─► the same, and gold   ─► heldout_rankings.jsonl   what it is measured on
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from rayrlhf.config import Config
from rayrlhf.driver.pacing import sample_seed
from rayrlhf.errors import DataError
from rayrlhf.stages.context import StageContext
from rayrlhf.stages.progress import StageProgress
from rayrlhf.stages.roles import RoleSet
from rayrlhf.stages.sampling import Answer, answers, fetch_rollouts, sample
from rayrlhf.types import PromptTokens, SampleRequest
from rayrlhf.worlds.base import World, create_world
from rayrlhf.worlds.labelers import PANEL, Labeler, judge_ranking, ranks

__all__ = ["run_collect"]

Record = dict[str, Any]


def run_collect(context: StageContext, parents: dict[str, str], workspace: Path) -> dict[str, Any]:
    """Sample and rank; leaves rankings.jsonl and heldout_rankings.jsonl in the workspace."""
    context.ensure_ray()
    return asyncio.run(_collect(context, parents["sft"], workspace))


async def _collect(context: StageContext, sft: str, workspace: Path) -> dict[str, Any]:
    config, collect = context.config, context.config.collect
    assert collect is not None  # config/root.py has seen to this, and to the next one
    assert config.world.name is not None
    train, held = context.data.ranking_prompts, context.data.heldout_prompts.tokens[: collect.heldout]
    # Both sorts of prompts go to the same engines, so each keeps its own numbers: the held-out ones come after.
    offset = 1 + max(prompt.prompt_id for prompt in train.tokens)
    shifted = [PromptTokens(p.prompt_id + offset, p.tokens) for p in held]
    requests = _requests(config, [*train.tokens, *shifted])
    roles = RoleSet(context, ("policy", "rollout"), {"policy": sft}, [*train.tokens, *shifted])
    with StageProgress(context.console, "collect") as progress:
        try:
            progress.phase("starting")
            await roles.start()
            pool = roles.pool()
            await pool.publish(version=0)  # the engines prove that they hold the SFT model
            progress.phase("sampling")
            batches = await sample(pool, requests, lambda done, total: progress.step(done, total, {}))
            memory = await roles.memory()
            found = answers(
                context.data.tokenizer, await fetch_rollouts(batches, context.config.cluster.call_timeout_s)
            )
            roles.keep_for("ppo")
        finally:
            await roles.stop()
    progress.phase("ranking")
    world = create_world(config.world.name, config.world.module)
    texts = train.texts | {p + offset: text for p, text in context.data.heldout_prompts.texts.items()}
    rankings = _Rankings(world, texts, _by_prompt(found), config.run.seed)
    for name, ids, gold in (("rankings", train.tokens, False), ("heldout_rankings", shifted, True)):
        lines = "".join(json.dumps(record) + "\n" for p in ids for record in rankings.of(p.prompt_id, gold))
        (workspace / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return rankings.summary() | {"responses": len(found), "memory_gib": memory}


def _requests(config: Config, prompts: Sequence[PromptTokens]) -> list[SampleRequest]:
    """K responses a prompt, K drawn between the config's two."""
    assert config.collect is not None
    rng = random.Random(f"{config.run.seed} collect")
    numbered = [p.prompt_id for p in prompts for _ in range(rng.randint(config.collect.fewest, config.collect.most))]
    return [SampleRequest(i, p, sample_seed(config.run.seed, "collect", p, i)) for i, p in enumerate(numbered)]


def _by_prompt(found: Mapping[int, Answer]) -> dict[int, list[Answer]]:
    rows: dict[int, list[Answer]] = {}
    for sample_id in sorted(found):
        rows.setdefault(found[sample_id].prompt_id, []).append(found[sample_id])
    return rows


class _Rankings:
    """Ranks responses, and counts on the way how labelers, and how the SFT model, compare with the judge."""

    def __init__(
        self, world: World, texts: Mapping[int, str], found: Mapping[int, Sequence[Answer]], seed: int
    ) -> None:
        self._world = world
        self._texts = texts
        self._answers = found
        self._seed = seed
        self._agreed: dict[str, list[int]] = {}
        """labeler -> [pairs ranked as gold ranks them, pairs that neither ties]"""
        self._pairs = self._ties = 0
        self._gold: list[float] = []

    def of(self, prompt_id: int, gold: bool) -> Iterator[Record]:
        """The prompt's ranking by one labeler, and the judge's beside it if asked for; none of fewer than two."""
        prompt, every = self._texts[prompt_id], self._answers.get(prompt_id, ())
        self._gold += [self._world.gold(prompt, answer.text, answer.finished) for answer in every]
        answers = _distinct(every)
        if len(answers) < 2:
            return
        flags = [self._world.flags(prompt, answer.text, answer.finished) for answer in answers]
        scores = [self._world.gold(prompt, answer.text, answer.finished) for answer in answers]
        rng = random.Random(f"{self._seed} {prompt}")
        labeler = rng.choice(PANEL)
        given = judge_ranking(rng, labeler, flags, self._world.weights)
        self._count(labeler, given["ranks"], scores)
        record: Record = {"prompt": prompt, "responses": [answer.text for answer in answers]}
        if unfinished := [number for number, answer in enumerate(answers) if not answer.finished]:
            record["unfinished"] = unfinished
        yield {**record, **given, "source": labeler.name}
        if gold:
            yield {**record, "ranks": ranks([round(score, 6) for score in scores]), "source": "gold"}

    def summary(self) -> dict[str, Any]:
        if not self._pairs:
            raise DataError("collect: no prompt has two different responses to rank", "raise collect.most")
        agreed, decided = (sum(row[i] for row in self._agreed.values()) for i in (0, 1))
        flawless = sum(score > 1 - 1e-9 for score in self._gold)
        return {
            "labeler_agreement": agreed / max(1, decided),
            "labelers": {name: row[0] / max(1, row[1]) for name, row in sorted(self._agreed.items())},
            "ties": self._ties / self._pairs,
            "gold_mean": sum(self._gold) / len(self._gold),
            "fully_right": flawless / len(self._gold),
        }

    def _count(self, labeler: Labeler, given: Sequence[int], scores: Sequence[float]) -> None:
        row = self._agreed.setdefault(labeler.name, [0, 0])
        for a, b in combinations(range(len(given)), 2):
            self._pairs += 1
            self._ties += given[a] == given[b]
            if given[a] != given[b] and abs(scores[a] - scores[b]) > 1e-9:
                row[0] += (given[a] < given[b]) == (scores[a] > scores[b])
                row[1] += 1


def _distinct(answers: Sequence[Answer]) -> list[Answer]:
    """Without repeats and without empty ones: nobody ranks the same words twice."""
    seen: dict[tuple[str, bool], Answer] = {}
    for answer in answers:
        if answer.text:
            seen.setdefault((answer.text, answer.finished), answer)
    return list(seen.values())
