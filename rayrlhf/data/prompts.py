"""Records -> token arrays within the token limits.

Prompts that are too long are dropped or refused, never cut: a cut prompt asks something else. Responses that are
too long are cut at their end, and then have no EOS, for the text does not end there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Literal

import numpy as np

from rayrlhf.data.chat import encode_prompt, encode_response, encode_text
from rayrlhf.errors import ConfigError, DataError
from rayrlhf.types import ChoiceQuestion, Demonstration, PretrainText, Prompt, PromptTokens, Ranking, Turns

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "LMExample",
    "Overlong",
    "RankingExample",
    "TokenizeReport",
    "pack_text",
    "tokenize_choices",
    "tokenize_demonstrations",
    "tokenize_prompts",
    "tokenize_rankings",
]

Overlong = Literal["drop", "refuse"]
"""What to do with a prompt over the limit."""


@dataclass(frozen=True, slots=True)
class TokenizeReport:
    """What became of the records."""

    kept: int
    """records kept"""
    dropped: int
    """records dropped since their prompt is too long"""
    truncated: int
    """responses (of records kept) cut at the token limit"""


@dataclass(frozen=True, slots=True)
class LMExample:
    """A prompt and the response to learn."""

    tokens: np.ndarray
    """int32 [T]: prompt, response, and EOS unless the response was cut"""
    prompt_tokens: int
    source: str


@dataclass(frozen=True, slots=True)
class RankingExample:
    """One prompt's responses, K of them, best rank 1."""

    responses: tuple[np.ndarray, ...]
    """K times int32 [T_k]: prompt, response, and EOS unless the response was cut"""
    ranks: tuple[int, ...]
    prompt_tokens: int
    source: str
    response_chars: tuple[int, ...]
    """characters of each response as written, before any cut: what a length bias is measured against"""

    def pairs(self) -> Iterator[tuple[int, int]]:
        """(better, worse) indices of every pair that is no tie."""
        for a, b in combinations(range(len(self.ranks)), 2):
            if self.ranks[a] != self.ranks[b]:
                yield (a, b) if self.ranks[a] < self.ranks[b] else (b, a)


def tokenize_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], max_tokens: int, overlong: Overlong
) -> tuple[list[PromptTokens], TokenizeReport]:
    """Prompts of at most `max_tokens` tokens; `prompt_id` is the index in `prompts`.

    Raises:
        DataError: a prompt is too long and `overlong` is "refuse", or nothing is left.
    """
    fitting = _fitting(tokenizer, [prompt.prompt for prompt in prompts], max_tokens, overlong)
    kept = [PromptTokens(index, np.array(tokens, dtype=np.int32)) for index, tokens in fitting.items()]
    return kept, TokenizeReport(len(kept), len(prompts) - len(kept), 0)


def tokenize_demonstrations(
    tokenizer: PreTrainedTokenizerBase,
    demonstrations: Sequence[Demonstration],
    max_prompt_tokens: int,
    max_tokens: int,
    overlong: Overlong,
) -> tuple[list[LMExample], TokenizeReport]:
    """Demonstrations as sequences of at most `max_tokens` tokens, in the order given.

    Raises:
        ConfigError: the limits leave no room for a response.
        DataError: a prompt is too long and `overlong` is "refuse", or nothing is left.
    """
    _check_limits(max_prompt_tokens, max_tokens)
    fitting = _fitting(tokenizer, [record.prompt for record in demonstrations], max_prompt_tokens, overlong)
    kept: list[LMExample] = []
    truncated = 0
    for index, prompt in fitting.items():
        record = demonstrations[index]
        tokens, cut = _join(prompt, encode_response(tokenizer, record.response), max_tokens)
        truncated += cut
        kept.append(LMExample(tokens, len(prompt), record.source))
    return kept, TokenizeReport(len(kept), len(demonstrations) - len(kept), truncated)


def tokenize_rankings(
    tokenizer: PreTrainedTokenizerBase,
    rankings: Sequence[Ranking],
    max_prompt_tokens: int,
    max_tokens: int,
    overlong: Overlong,
) -> tuple[list[RankingExample], TokenizeReport]:
    """Rankings with every response at most `max_tokens` tokens, prompt included, in the order given.

    A response that was cut stays in its ranking: to leave out the long ones would bias what length is worth.

    Raises:
        ConfigError: the limits leave no room for a response.
        DataError: a prompt is too long and `overlong` is "refuse", or nothing is left.
    """
    _check_limits(max_prompt_tokens, max_tokens)
    fitting = _fitting(tokenizer, [record.prompt for record in rankings], max_prompt_tokens, overlong)
    kept: list[RankingExample] = []
    truncated = 0
    for index, prompt in fitting.items():
        record = rankings[index]
        encoded = [
            # The EOS that encode_response ends with was never sampled for a response that a limit cut.
            encode_response(tokenizer, text)[: -1 if number in record.unfinished else None]
            for number, text in enumerate(record.responses)
        ]
        joined = [_join(prompt, tokens, max_tokens) for tokens in encoded]
        truncated += sum(cut for _, cut in joined)
        kept.append(
            RankingExample(
                responses=tuple(tokens for tokens, _ in joined),
                ranks=record.ranks,
                prompt_tokens=len(prompt),
                source=record.source,
                response_chars=tuple(len(text) for text in record.responses),
            )
        )
    return kept, TokenizeReport(len(kept), len(rankings) - len(kept), truncated)


def tokenize_choices(
    tokenizer: PreTrainedTokenizerBase, questions: Sequence[ChoiceQuestion], max_tokens: int
) -> tuple[list[RankingExample], list[ChoiceQuestion]]:
    """Each question's choices as sequences that go on from its prompt, plain text without a chat template or an EOS.

    Returns:
        (for each question kept a row of its choices, K times int32 [T_k]; the questions kept, those that fit).
    """
    kept: list[RankingExample] = []
    questions_kept = []
    for question in questions:
        prompt = encode_text(tokenizer, question.prompt)
        rows = [np.array([*prompt, *encode_text(tokenizer, f" {c}")], dtype=np.int32) for c in question.choices]
        if prompt and max(map(len, rows)) <= max_tokens:
            lengths = tuple(len(choice) for choice in question.choices)
            kept.append(RankingExample(tuple(rows), (1,) * len(rows), len(prompt), question.source, lengths))
            questions_kept.append(question)
    return kept, questions_kept


def pack_text(tokenizer: PreTrainedTokenizerBase, texts: Iterable[PretrainText], context: int) -> np.ndarray:
    """int32 [N, context]: all documents, an EOS after each, cut into blocks; what fills no whole block is dropped.

    Raises:
        DataError: there is less than one block of text.
    """
    documents = [np.array(encode_response(tokenizer, text.text), dtype=np.int32) for text in texts]
    tokens = np.concatenate(documents) if documents else np.empty(0, dtype=np.int32)
    blocks = len(tokens) // context
    if blocks == 0:
        message = f"the pretraining text has {len(tokens)} tokens, less than one block of {context}"
        raise DataError(message, "give more text, or a smaller context")
    return tokens[: blocks * context].reshape(blocks, context)


def _check_limits(max_prompt_tokens: int, max_tokens: int) -> None:
    if max_tokens <= max_prompt_tokens:
        message = f"sequences of {max_tokens} tokens leave no room for a response to {max_prompt_tokens} prompt tokens"
        raise ConfigError(message, "lower data.max_prompt_tokens, or raise the sequence length")


def _fitting(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Turns], max_tokens: int, overlong: Overlong
) -> dict[int, list[int]]:
    """Index -> token ids of the prompts that fit, in order."""
    if not prompts:
        raise DataError("there are no prompts to tokenize", "check the sources in the data section")
    encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    fitting = {index: tokens for index, tokens in enumerate(encoded) if len(tokens) <= max_tokens}
    too_long = len(prompts) - len(fitting)
    longest = max(len(tokens) for tokens in encoded)
    message = f"{too_long} of {len(prompts)} prompts are longer than {max_tokens} tokens; the longest has {longest}"
    if too_long and overlong == "refuse":
        raise DataError(message, "raise data.max_prompt_tokens, or set data.overlong_prompts: drop")
    if not fitting:
        raise DataError(f"{message}; nothing is left", "raise data.max_prompt_tokens")
    return fitting


def _join(prompt: list[int], response: list[int], max_tokens: int) -> tuple[np.ndarray, bool]:
    """(int32 [T] of at most max_tokens, whether the response was cut)."""
    tokens = np.array([*prompt, *response], dtype=np.int32)
    return tokens[:max_tokens], len(tokens) > max_tokens
