"""The four model roles as actors: policy and value learn, reference and reward are frozen.

Each method is one phase of the step on one rank. It takes handles of rollouts, scores or experiences (Ray resolves
them to the objects), works on the samples whose ids are its share, and leaves its result in the object store.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch

from rayrlhf.actors.base import Actor, leaves_data, use_rays_network
from rayrlhf.actors.relay import attach_copy
from rayrlhf.data.batching import Cutting
from rayrlhf.data.prompts import LMExample, RankingExample
from rayrlhf.engines.deepspeed import FrozenModel, Learner, LearnerSettings
from rayrlhf.engines.distributed import Rendezvous, all_reduce_sum, join_process_group
from rayrlhf.engines.estimation import EstimateSettings, estimate
from rayrlhf.engines.learning import TextShare, UpdateSettings, update_policy, update_value
from rayrlhf.engines.scoring import check_packing, probe_logprobs, score_logprobs, score_rewards, score_values
from rayrlhf.engines.snapshot import GRADIENTS, WEIGHTS, WEIGHTS_AFTER, save_adam, save_gradients, save_weights
from rayrlhf.engines.state import load_state, save_state
from rayrlhf.engines.tasks import LanguageTask
from rayrlhf.errors import PolicyMovedOn
from rayrlhf.models.build import PolicyModel, ScalarModel, load_policy, load_scalar
from rayrlhf.models.residence import Part
from rayrlhf.rewards.base import SourceSettings
from rayrlhf.supervised.preference import response_logprobs
from rayrlhf.types import Experience, Rollout, Scores
from rayrlhf.weights.buckets import fingerprint, pack
from rayrlhf.weights.probe import ProbeRow
from rayrlhf.weights.publish import SentBucket
from rayrlhf.weights.transports import TRANSPORTS, Meeting, Sender, create_sender
from rayrlhf.worlds.base import World, create_world

__all__ = ["Judge", "ModelSettings", "PolicyActor", "ReferenceActor", "RewardActor", "ValueActor"]


Text = tuple[Sequence[Sequence[int]], bool]
"""For each minibatch the numbers of this rank's text blocks, and whether to measure gradient norms."""


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """What one role's ranks need; filled from the config by the stage."""

    path: str
    dtype: str
    device: str
    trust_remote_code: bool
    cutting: Cutting
    zero_stage: int
    temperature: float
    learner: LearnerSettings | None = None
    estimate: EstimateSettings | None = None
    update: UpdateSettings | None = None
    transport: str = ""
    bucket_bytes: int = 0
    run: str = ""
    samples: int = 0
    """Responses that rank 0 decodes for samples.jsonl."""
    judge: Judge | None = None
    """Where the prompts are a world's."""
    source: SourceSettings | None = None
    """Where the rewards are not one reward model's (see sources.py)."""


@dataclass(frozen=True, slots=True)
class Judge:
    """A world's exact judge, and the text of the prompts that it knows."""

    world: str
    module: str | None
    prompts: dict[int, str]
    """by prompt_id"""


class _ModelActor(Actor):
    engine: Learner | FrozenModel

    def __init__(self, log: str, settings: ModelSettings) -> None:
        super().__init__(log)
        self.settings = settings

    def start(self, rendezvous: Rendezvous) -> None:
        """Join the role's process group and load the model."""
        use_rays_network()
        join_process_group(rendezvous)
        self.engine = self._load()
        if self.settings.cutting.packed:
            check_packing(self.engine, self.settings.dtype)

    def occupy(self, part: Part) -> None:
        """See `Residence`; one that is not started yet has nothing anywhere."""
        if hasattr(self, "engine"):
            self.engine.occupy(part)

    def reload(self, settings: ModelSettings) -> None:
        """Begin again with another model or other settings, in the same process group."""
        del self.engine  # before the next one is built: two at once might not fit
        gc.collect()
        self.settings = settings
        self.engine = self._load()

    def _load(self) -> Learner | FrozenModel:
        raise AssertionError("each role loads its own model")

    @leaves_data
    def score(self, ids: Sequence[int], *chunks: list[Rollout]) -> tuple[dict[int, str], Scores]:
        """This role's `Scores` of the samples `ids`; first those that it could not score, with the reason."""
        rollouts = {r.info.sample_id: r for chunk in chunks for r in chunk}
        spare = min(rollouts.values(), key=lambda r: r.info.tokens)
        scores = self._score([rollouts[i] for i in ids], spare)
        return scores.failed, scores

    def _score(self, rollouts: list[Rollout], spare: Rollout) -> Scores:
        raise AssertionError("each role scores in its own way")


class ReferenceActor(_ModelActor):
    def _load(self) -> FrozenModel:
        s = self.settings
        return FrozenModel(
            load_policy(s.path, s.trust_remote_code, zero_stage=s.zero_stage), s.zero_stage, s.dtype, s.device
        )

    def _score(self, rollouts: list[Rollout], spare: Rollout) -> Scores:
        s = self.settings
        scores = score_logprobs(self.engine, rollouts, spare, s.cutting, s.temperature)
        return Scores(reference_logprobs=scores.logprobs)


class RewardActor(_ModelActor):
    def _load(self) -> FrozenModel:
        s = self.settings
        return FrozenModel(
            load_scalar(s.path, s.trust_remote_code, zero_stage=s.zero_stage), s.zero_stage, s.dtype, s.device
        )

    def _score(self, rollouts: list[Rollout], spare: Rollout) -> Scores:
        return score_rewards(self.engine, rollouts, spare, self.settings.cutting)


class _LearnerActor(_ModelActor):
    engine: Learner

    def update(
        self, minibatches: Sequence[Sequence[int]], text: Text | None, learning_rate: float, *chunks: list[Experience]
    ) -> dict[str, float]:
        """One optimizer step per minibatch; `minibatches` holds this rank's sample ids of each, `text` its blocks."""
        experiences = [e for chunk in chunks for e in chunk]
        place = {e.rollout.info.sample_id: i for i, e in enumerate(experiences)}
        rows = [[place[i] for i in ids] for ids in minibatches]
        spare = min(experiences, key=lambda e: e.rollout.info.tokens)
        return self._update(experiences, rows, spare, learning_rate, text)

    def _update(
        self, experiences: list[Experience], rows: list[list[int]], spare: Experience, rate: float, text: Text | None
    ) -> dict[str, float]:
        raise AssertionError("each role learns in its own way")

    def save(self, folder: str) -> None:
        """Write the weights in Hugging Face format; every rank takes part, rank 0 writes."""
        self.engine.save_pretrained(self._published_module(), Path(folder))

    def save_state(self, folder: str) -> str | None:
        """All that an exact resume needs; every rank writes its own part, if it has one, and says where."""
        path = save_state(self.engine, Path(folder))
        return str(path) if path else None

    def load_state(self, folder: str) -> None:
        load_state(self.engine, Path(folder))

    def record_before(self, folder: str) -> int:
        """Write weights and Adam's state into `folder`, and when it is whole the next gradient.

        Returns:
            How many steps Adam has counted.
        """
        module, path = self._published_module(), Path(folder)
        self.engine.before_step = partial(save_gradients, self.engine, module, path / GRADIENTS)
        save_weights(self.engine, module, path / WEIGHTS)
        return save_adam(self.engine, module, path)

    def record_after(self, folder: str) -> None:
        save_weights(self.engine, self._published_module(), Path(folder) / WEIGHTS_AFTER)

    def _published_module(self) -> Any:
        raise AssertionError("each role knows its Hugging Face module")


class ValueActor(_LearnerActor):
    def _update(
        self, experiences: list[Experience], rows: list[list[int]], spare: Experience, rate: float, text: Text | None
    ) -> dict[str, float]:
        assert self.settings.update is not None
        return update_value(self.engine, experiences, rows, spare, self.settings.update, rate)

    def _load(self) -> Learner:
        s = self.settings
        assert s.learner is not None
        return Learner(load_scalar(s.path, s.trust_remote_code, zero_stage=s.zero_stage), s.learner)

    def _score(self, rollouts: list[Rollout], spare: Rollout) -> Scores:
        return score_values(self.engine, rollouts, spare, self.settings.cutting)

    def _published_module(self) -> Any:
        module = self.engine.module
        assert isinstance(module, ScalarModel)
        return module.classifier


class PolicyActor(_LearnerActor):
    _sender: Sender | None = None
    _tokenizer: Any = None
    _world: World | None = None
    _learned = False
    """since the last publish began"""

    def hold_text(self, blocks: np.ndarray) -> None:
        """Pretraining text for PPO-ptx: int32 [blocks, L], a view of the object store."""
        self._blocks = blocks

    def _update(
        self, experiences: list[Experience], rows: list[list[int]], spare: Experience, rate: float, text: Text | None
    ) -> dict[str, float]:
        assert self.settings.update is not None
        self._learned = True
        share = TextShare(self._blocks, *text) if text else None
        return update_policy(self.engine, experiences, rows, spare, self.settings.update, rate, share)

    def text_loss(self, blocks: Sequence[LMExample]) -> float:
        """Mean loss per token of held-out text."""
        return LanguageTask(blocks).evaluate(self.engine, self.settings.cutting)

    def choice_logprobs(self, questions: Sequence[RankingExample]) -> list[list[float]]:
        """Log-prob of each choice after its question, summed over its tokens."""
        return response_logprobs(self.engine, questions, self.settings.cutting, lambda record: None, "choices")

    def save_average(self, folder: str) -> None:
        """As `save`, of the averaged weights."""
        assert self.engine.average is not None
        with self.engine.average.in_place():
            self.save(folder)

    def _load(self) -> Learner:
        s = self.settings
        assert s.learner is not None
        learner = Learner(load_policy(s.path, s.trust_remote_code, zero_stage=s.zero_stage), s.learner)
        if self._sender is None and (learner.rank == 0 or TRANSPORTS[s.transport].every_rank):
            self._sender = create_sender(s.transport, s.run)
        if self._tokenizer is None and (learner.rank == 0 or s.judge):
            from transformers import AutoTokenizer

            self._tokenizer = AutoTokenizer.from_pretrained(s.path, trust_remote_code=s.trust_remote_code)
        if self._world is None and s.judge:
            self._world = create_world(s.judge.world, s.judge.module)
        return learner

    def _score(self, rollouts: list[Rollout], spare: Rollout) -> Scores:
        return score_logprobs(self.engine, rollouts, spare, self.settings.cutting, self.settings.temperature)

    @leaves_data
    def estimate(
        self, ids: Sequence[int], kl_coef: float, version: int, n_rollouts: int, *chunks: Any
    ) -> tuple[tuple[dict[str, float], list[dict[str, Any]]], list[Experience]]:
        """Metrics over all ranks, and a few samples as text; then the experience of the samples `ids`.

        Args:
            version: of the policy as it is now.
            n_rollouts: how many of `chunks` are rollouts; the rest are scores of every role and rank.
        """
        rollouts = {r.info.sample_id: r for chunk in chunks[:n_rollouts] for r in chunk}
        scores = Scores()
        for part in chunks[n_rollouts:]:
            scores.merge(part)
        assert self.settings.estimate is not None
        experiences, metrics = estimate(
            [rollouts[i] for i in ids], scores, self.settings.estimate, kl_coef, self.engine.device, version
        )
        gold = self._gold([rollouts[i] for i in ids])
        if gold is not None:
            scored = torch.tensor([sum(gold.values()), len(gold)], dtype=torch.float64, device=self.engine.device)
            total = all_reduce_sum(scored)
            metrics["reward/gold"] = float(total[0] / total[1])
        return (metrics, self._texts(experiences, scores, gold or {})), experiences

    def _gold(self, rollouts: Sequence[Rollout]) -> dict[int, float] | None:
        """The judge's score of each response by sample_id; it is reported, and nothing learns from it."""
        if self._world is None or self.settings.judge is None:
            return None
        prompts = self.settings.judge.prompts
        scores = {}
        for rollout in rollouts:
            info = rollout.info
            text = self._tokenizer.decode(rollout.tokens[rollout.prompt_tokens :], skip_special_tokens=True)
            scores[info.sample_id] = self._world.gold(prompts[info.prompt_id], text, not info.truncated)
        return scores

    def meet(self, meeting: Meeting) -> None:
        assert self._sender is not None  # asked of ranks that send
        self._sender.meet(meeting)

    def start_publish(self, version: int, elsewhere: bool, again: bool = False) -> SentBucket | None:
        """Cut the weights into buckets; the first of them, as `next_bucket`.

        Args:
            elsewhere: an engine is on another node than this role's rank 0.
            again: the version was published before, and engines come late to it.

        Raises:
            PolicyMovedOn: these weights are not that version any more.
        """
        if again:
            self._check_same()
        self._learned = False
        self._version, self._elsewhere, self._sent = version, elsewhere, 0
        asked = self._published_module(), self.settings.bucket_bytes
        self._last = len(self.engine.bucket_names(*asked)) - 1
        self._buckets = self.engine.named_buckets(*asked)
        return self.next_bucket()

    def next_bucket(self) -> SentBucket | None:
        """Gather, pack and fingerprint one bucket. Every rank takes part; those that send have something to say."""
        self._check_same()
        start, index = perf_counter(), self._sent
        tensors, last = next(self._buckets), index == self._last
        self._sent += 1
        try:
            if self._sender is None:
                return None
            header, buffer = pack(tensors, self._version, index, self._sender.reserve)
        finally:
            if last:
                self._buckets.close()  # lets a gathered bucket go
        packed = perf_counter()
        digest = fingerprint(header, buffer)  # of bytes that nobody else is at yet
        printed = perf_counter()
        ticket = self._sender.send(header)
        if self._elsewhere:
            ticket = attach_copy(ticket, buffer)
        gather_s = perf_counter() - start - (printed - packed)
        return SentBucket(ticket, digest, header.nbytes, last, gather_s, printed - packed)

    def probe(self, rows: Sequence[ProbeRow]) -> list[float]:
        self._check_same()
        return probe_logprobs(self.engine, rows)

    def _check_same(self) -> None:
        """With batches drawn ahead, an update may have been asked for between two calls of a late publish."""
        if self._learned:
            if hasattr(self, "_buckets"):
                self._buckets.close()
            raise PolicyMovedOn("the policy has learned since that version was published")

    def close(self) -> None:
        """Give shared memory back."""
        if self._sender is not None:
            self._sender.close()

    def _published_module(self) -> Any:
        module = self.engine.module
        assert isinstance(module, PolicyModel)
        return module.lm

    def _texts(self, experiences: list[Experience], scores: Scores, gold: Mapping[int, float]) -> list[dict[str, Any]]:
        if self.engine.rank:
            return []
        texts = []
        for experience in experiences[: self.settings.samples]:
            rollout, info = experience.rollout, experience.rollout.info
            prompt, response = rollout.tokens[: rollout.prompt_tokens], rollout.tokens[rollout.prompt_tokens :]
            log_ratio = experience.old_logprobs - scores.reference_logprobs[info.sample_id]
            texts.append(
                {
                    "sample_id": info.sample_id,
                    "prompt_id": info.prompt_id,
                    "version": int(rollout.versions[0]),
                    "prompt": self._tokenizer.decode(prompt),
                    "response": self._tokenizer.decode(response),
                    "reward": scores.rewards[info.sample_id],
                    "kl_k1": float(log_ratio.sum()),
                    "response_tokens": info.response_tokens,
                    "truncated": info.truncated,
                    **({"gold": gold[info.sample_id]} if gold else {}),
                }
            )
        return texts
