"""Where rewards come from, when it is not one reward model: each of these stands in the place of `RewardActor`.

EnsembleActor   several reward models on the role's ranks, combined
SourceActor     something that reads text (rewards/): a Python function or a service; no model, no device

Without a reward model the value model starts from the SFT model: FreshValueActor.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from rayrlhf.actors.models import ModelSettings, RewardActor, ValueActor, _ModelActor
from rayrlhf.algorithms.ensembles import combine
from rayrlhf.config.rewards import RewardSourceConfig
from rayrlhf.engines.deepspeed import FrozenModel, Learner
from rayrlhf.engines.distributed import Rendezvous
from rayrlhf.engines.scoring import check_packing, score_rewards
from rayrlhf.models.build import load_scalar, zero_scalar
from rayrlhf.models.residence import Part
from rayrlhf.rewards.base import Failure, Outcome, RewardRequest, RewardSource, SourceSettings, outcome
from rayrlhf.rewards.function import FunctionSource, load_function
from rayrlhf.rewards.http import HTTPSource
from rayrlhf.rewards.retry import Retries
from rayrlhf.types import Rollout, Scores

__all__ = ["EnsembleActor", "FreshValueActor", "SourceActor", "combined", "requests_of"]


class EnsembleActor(RewardActor):
    """`engine` is the first of its models."""

    _members: Sequence[FrozenModel] = ()

    def start(self, rendezvous: Rendezvous) -> None:
        super().start(rendezvous)
        for member in self._members[1:]:
            if self.settings.cutting.packed:
                check_packing(member, self.settings.dtype)

    def occupy(self, part: Part) -> None:
        for member in self._members:
            member.occupy(part)

    def reload(self, settings: ModelSettings) -> None:
        self._members = ()  # all of them go before the next are built
        super().reload(settings)

    def _load(self) -> FrozenModel:
        s, source = self.settings, _source_of(self.settings)
        self._members = [
            FrozenModel(
                load_scalar(path, s.trust_remote_code, zero_stage=s.zero_stage), s.zero_stage, s.dtype, s.device
            )
            for path in source.members
        ]
        return self._members[0]

    def _score(self, rollouts: list[Rollout], spare: Rollout) -> Scores:
        each = [score_rewards(member, rollouts, spare, self.settings.cutting) for member in self._members]
        return combined(each, _source_of(self.settings).config)


def combined(each: Sequence[Scores], config: RewardSourceConfig) -> Scores:
    """One reward for each response that every member of an ensemble has scored; the others have failed."""
    scores = Scores()
    for number, member in enumerate(each):
        for sample, reason in member.failed.items():
            scores.failed.setdefault(sample, f"ensemble: models[{number}]: {reason.removeprefix('model: ')}")
    whole = [sample for sample in each[0].rewards if sample not in scores.failed]
    if whole:
        scores_MB = torch.tensor([[member.rewards[sample] for sample in whole] for member in each], dtype=torch.float32)
        answers = combine(scores_MB, config.how, config.weight).tolist()
        _enter(scores, whole, [outcome(answer, "ensemble: the score") for answer in answers])
    return scores


class SourceActor(_ModelActor):
    """A rank of the role `reward` that sends the text of responses somewhere. Its path names the tokenizer's model."""

    _source: RewardSource | None = None
    _rank = 0

    def start(self, rendezvous: Rendezvous) -> None:
        """Nothing is computed together, so no process group is joined."""
        for name in ("httpx", "httpcore"):  # which would log addresses, and headers when they are to say more
            logging.getLogger(name).setLevel(logging.WARNING)
        self._rank = rendezvous.rank
        self._runner = asyncio.Runner()
        self._open()

    def occupy(self, part: Part) -> None:
        """It is on no device."""

    def reload(self, settings: ModelSettings) -> None:
        self.close()
        self.settings = settings
        self._open()

    def close(self) -> None:
        if self._source is not None:
            self._runner.run(self._source.close())
            self._source = None

    def _open(self) -> None:
        from transformers import AutoTokenizer

        s, source = self.settings, _source_of(self.settings)
        self._tokenizer = AutoTokenizer.from_pretrained(s.path, trust_remote_code=s.trust_remote_code)
        retries = Retries.of(source.config, source.seed + self._rank)  # ranks that fail at once come back apart
        if source.config.kind == "http":
            self._source = HTTPSource(source.config, source.token, retries)
        else:
            assert source.config.function is not None
            self._source = FunctionSource(load_function(source.config.function), source.config, retries)

    def _score(self, rollouts: list[Rollout], spare: Rollout) -> Scores:
        assert self._source is not None  # it was started
        requests = requests_of(rollouts, _source_of(self.settings), self._tokenizer)
        scores = Scores()
        _enter(scores, [r.sample_id for r in requests], self._runner.run(self._source.score(requests)))
        return scores


def requests_of(rollouts: Sequence[Rollout], source: SourceSettings, tokenizer: Any) -> list[RewardRequest]:
    """The prompts as their records have them, the responses as the tokenizer reads them, without special tokens."""
    requests = []
    for rollout in rollouts:
        info, prompt = rollout.info, source.prompts[rollout.info.prompt_id]
        text = tokenizer.decode(rollout.tokens[rollout.prompt_tokens :], skip_special_tokens=True)
        requests.append(RewardRequest(info.sample_id, prompt.prompt, text, not info.truncated, prompt.source))
    return requests


class FreshValueActor(ValueActor):
    """Its head is of zeros, on the policy's backbone."""

    def _load(self) -> Learner:
        s = self.settings
        assert s.learner is not None
        return Learner(zero_scalar(s.path, s.trust_remote_code, zero_stage=s.zero_stage), s.learner)


def _enter(scores: Scores, samples: Sequence[int], found: Sequence[Outcome]) -> None:
    answers: Mapping[int, Outcome] = dict(zip(samples, found, strict=True))
    scores.rewards.update({sample: answer for sample, answer in answers.items() if not isinstance(answer, Failure)})
    scores.failed.update({sample: answer.reason for sample, answer in answers.items() if isinstance(answer, Failure)})


def _source_of(settings: ModelSettings) -> SourceSettings:
    assert settings.source is not None
    return settings.source
