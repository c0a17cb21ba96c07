"""Training a tokenizer for models built from scratch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from rayrlhf.data.chat import DEFAULT_TEMPLATE, ROLE_TOKENS
from rayrlhf.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["EOS", "PAD", "train_tokenizer"]

EOS = "<|endoftext|>"
PAD = "<|pad|>"

_SPECIAL_TOKENS = (EOS, PAD, *ROLE_TOKENS)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: any text comes back from its ids exactly as it was.

    Args:
        texts: what to learn merges from; the same texts give the same tokenizer.
        vocab_size: the most tokens there may be, the special ones counted; little text may give fewer.

    Raises:
        ModelError: `vocab_size` has no room for all bytes and the special tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    least = len(alphabet) + len(_SPECIAL_TOKENS)
    if vocab_size < least:
        hint = f"it takes 256 bytes and {len(_SPECIAL_TOKENS)} special tokens: give at least {least}"
        raise ModelError(f"a vocabulary of {vocab_size} tokens is too small", hint)
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(_SPECIAL_TOKENS),
        initial_alphabet=alphabet,
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=list(ROLE_TOKENS),
        chat_template=DEFAULT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
