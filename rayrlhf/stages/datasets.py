"""The config's data, read once, checked, and turned into what each stage trains on. Everything here happens before
any actor starts, so that a bad record costs seconds and not a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from transformers import PreTrainedTokenizerBase

from rayrlhf.config import Config
from rayrlhf.data import prompts as tokenized
from rayrlhf.data.chat import load_tokenizer, with_template
from rayrlhf.data.prompts import LMExample, RankingExample
from rayrlhf.data.readers import read_choices, read_demonstrations, read_prompts, read_rankings, read_text
from rayrlhf.data.split import drop_implied, split_by_prompt
from rayrlhf.data.tokenizer import train_tokenizer
from rayrlhf.errors import DataError
from rayrlhf.types import ChoiceQuestion, Prompt, PromptTokens, Ranking

__all__ = ["Datasets", "Prompts", "Split", "block_tokens"]

E = TypeVar("E")


@dataclass(frozen=True, slots=True)
class Split:
    """Training and held-out examples of a stage, and what tokenizing did to them."""

    train: list[Any]
    heldout: list[Any]
    counts: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Prompts:
    """Prompts to sample for, what tokenizing did to them, and the records they are of."""

    tokens: list[PromptTokens]
    counts: dict[str, Any]
    records: dict[int, Prompt]
    """by prompt_id"""

    @property
    def texts(self) -> dict[int, str]:
        """What the user said last, by prompt_id."""
        return {prompt_id: record.prompt[-1][1] for prompt_id, record in self.records.items()}


def _pairs_by_source(rankings: Sequence[Ranking]) -> Counter[str]:
    """Pairs that are no ties, before any is dropped for its length."""
    counts: Counter[str] = Counter()
    for ranking in rankings:
        counts[ranking.source] += sum(a != b for a, b in combinations(ranking.ranks, 2))
    return counts


def block_tokens(config: Config) -> int:
    """Of a block of text: the context of a model from scratch; of a named one, the longest sequence asked of it."""
    if config.model.from_scratch is not None:
        return config.model.from_scratch.context
    return config.data.max_prompt_tokens + max(config.rollout.max_tokens, config.sft.max_response_tokens)


class Datasets:
    """Lazy: a stage that is not run reads nothing."""

    collected: Path | None = None
    """Where `collect` has left its rankings, once it has."""

    def __init__(self, config: Config, tokenizer_path: str | None) -> None:
        """`tokenizer_path` names a finished tokenizer; None trains one on `data.text`."""
        self._config = config
        self._tokenizer_path = tokenizer_path

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        model = self._config.model
        if self._tokenizer_path is not None:
            return load_tokenizer(self._tokenizer_path, model.chat_template, model.trust_remote_code)
        assert model.from_scratch is not None
        texts = [t.text for t in self._texts]
        # Prompts and answers are written in other words than the text: the vocabulary should know both.
        texts += [d.response for d in self._demonstrations] + [t for d in self._demonstrations for _, t in d.prompt]
        trained = train_tokenizer(texts, model.from_scratch.vocab_size)
        return with_template(trained, model.chat_template) if model.chat_template else trained

    @cached_property
    def pretrain(self) -> Split:
        """`data.text` in blocks; every 1/heldout_fraction-th is held out, from all stages that read text."""
        context = block_tokens(self._config)
        blocks = tokenized.pack_text(self.tokenizer, self._texts, context)
        examples = [LMExample(block, 0, "") for block in blocks]
        fraction = self._config.data.heldout_fraction
        held = np.zeros(len(blocks), dtype=bool)
        if fraction and len(blocks) > 1:
            held[:: max(2, round(1 / fraction))] = True
        train = [e for e, h in zip(examples, held, strict=True) if not h]
        heldout = [e for e, h in zip(examples, held, strict=True) if h]
        return Split(train, heldout, {"blocks": len(blocks), "context": context})

    @cached_property
    def sft(self) -> Split:
        data, longest = self._config.data, self._config.sft.max_response_tokens
        train, heldout = split_by_prompt(self._demonstrations, data.heldout_fraction, self._config.run.seed)
        return self._split(tokenized.tokenize_demonstrations, train, heldout, longest)

    @cached_property
    def sft_text(self) -> list[LMExample]:
        """The blocks that `sft.pretrain_mix` mixes in; none where it is off."""
        return self.pretrain.train if self._config.sft.pretrain_mix.coef else []

    @cached_property
    def reward(self) -> Split:
        """Held out: `data.heldout_rankings`, or a share of the prompts where there are none."""
        return self._rankings_within(self._config.reward.max_response_tokens)

    @cached_property
    def dpo(self) -> Split:
        """As `reward`, less what is trained on and is ties throughout: nothing is preferred there."""
        split = self._rankings_within(self._config.dpo.max_response_tokens)
        train = [example for example in split.train if len(set(example.ranks)) > 1]
        if not train:
            raise DataError("data.rankings: every ranking is a tie, dpo has no pair to learn from", "rank some apart")
        return replace(split, train=train, counts=split.counts | {"all_ties": len(split.train) - len(train)})

    @property
    def uses_text(self) -> bool:
        """Whether PPO, in any of its arms, learns from text too."""
        return any(arm.ppo.ptx.coef for arm in self._config.arms().values())

    @cached_property
    def prompts(self) -> Prompts:
        return self._prompts(self._config.data.prompts)

    @cached_property
    def ranking_prompts(self) -> Prompts:
        return self._prompts(self._config.data.ranking_prompts)

    @cached_property
    def heldout_prompts(self) -> Prompts:
        """None where only questions and text are evaluated."""
        if not self._config.data.heldout_prompts:
            return Prompts([], {"kept": 0, "dropped": 0, "truncated": 0}, {})
        return self._prompts(self._config.data.heldout_prompts)

    @cached_property
    def multiple_choice(self) -> tuple[list[RankingExample], list[ChoiceQuestion]]:
        """(each question's choices as sequences, the questions); those longer than a block of text are left out."""
        return tokenized.tokenize_choices(self.tokenizer, self.questions, block_tokens(self._config))

    @cached_property
    def questions(self) -> list[ChoiceQuestion]:
        """Those of `data.multiple_choice`, long ones included."""
        return self._first(read_choices(self._config.data.multiple_choice, self._config.data.root))

    def _prompts(self, sources: Sequence[str]) -> Prompts:
        data = self._config.data
        records = self._first(read_prompts(sources, data.root))
        kept, report = tokenized.tokenize_prompts(
            self.tokenizer, records, data.max_prompt_tokens, data.overlong_prompts
        )
        return Prompts(kept, asdict(report), {p.prompt_id: records[p.prompt_id] for p in kept})

    def _rankings_within(self, longest: int) -> Split:
        train, heldout, implied = self._rankings
        split = self._split(tokenized.tokenize_rankings, train, heldout, longest)
        pairs = dict(sorted(_pairs_by_source(heldout).items()))
        return replace(split, counts=split.counts | {"implied": implied, "heldout_pairs": pairs})

    @property
    def waits_for_rankings(self) -> bool:
        """Whether the rankings are still to be collected."""
        return self._config.collect is not None and self.collected is None

    @cached_property
    def _rankings(self) -> tuple[Sequence[Ranking], Sequence[Ranking], int]:
        """(train, held out, how many judgements of `data.rankings` stood there twice)."""
        data = self._config.data
        if self._config.collect is not None:
            assert self.collected is not None  # the stage that needs them comes after collect
            root = self.collected
            return read_rankings(["rankings.jsonl"], root), read_rankings(["heldout_rankings.jsonl"], root), 0
        records = self._first(read_rankings(data.rankings, data.root, "train"))
        train = drop_implied(records)
        implied = len(records) - len(train)
        if data.heldout_rankings:
            return train, self._first(read_rankings(data.heldout_rankings, data.root, "test")), implied
        return *split_by_prompt(train, data.heldout_fraction, self._config.run.seed), implied

    @cached_property
    def _texts(self) -> list[Any]:
        return self._first(read_text(self._config.data.text, self._config.data.root))

    @cached_property
    def _demonstrations(self) -> list[Any]:
        return self._first(read_demonstrations(self._config.data.demonstrations, self._config.data.root))

    def _split(
        self, tokenize: Callable[..., Any], train: Sequence[Any], heldout: Sequence[Any], longest_response: int
    ) -> Split:
        data = self._config.data
        limits = (data.max_prompt_tokens, data.max_prompt_tokens + longest_response, data.overlong_prompts)
        examples, report = tokenize(self.tokenizer, train, *limits)
        held: list[Any] = []
        counts = {"kept": 0, "dropped": len(heldout), "truncated": 0}
        try:
            held, held_report = tokenize(self.tokenizer, heldout, *limits)
            counts = asdict(held_report)
        except DataError:  # none is left: training goes on without them, unless long prompts are to be refused
            if heldout and data.overlong_prompts == "refuse":
                raise
        return Split(examples, held, asdict(report) | {f"heldout_{k}": v for k, v in counts.items()})

    def _first(self, records: list[E]) -> list[E]:
        """At most `data.max_records` of each source label, in file order."""
        limit = self._config.data.max_records
        if limit is None:
            return records
        seen: dict[str, int] = {}
        kept = []
        for record in records:
            source = getattr(record, "source", "")
            seen[source] = seen.get(source, 0) + 1
            if seen[source] <= limit:
                kept.append(record)
        return kept
