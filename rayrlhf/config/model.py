"""`model`: the base model, named or built from scratch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from rayrlhf.config.base import LARGEST_INT, PathOrName, Positive, PositiveInt, Section, path_or_name

__all__ = ["FromScratch", "ModelConfig"]


class FromScratch(Section):
    """A small causal LM that `pretrain` builds and trains, with its own tokenizer."""

    architecture: Literal["llama", "gpt2"] = "llama"
    vocab_size: Annotated[int, Field(ge=300, le=LARGEST_INT, strict=True)] = 2048
    """Upper bound for the byte-level BPE (256 bytes, 5 special tokens, merges)."""
    hidden_size: PositiveInt = 192
    layers: PositiveInt = 4
    heads: PositiveInt = 4
    kv_heads: PositiveInt | None = None
    """Llama only; None means as many as `heads`."""
    intermediate_size: PositiveInt | None = None
    """None: 8/3 of the hidden size, rounded up to 32 (llama); 4 times (gpt2)."""
    context: PositiveInt = 256
    """Longest sequence (prompt + response) the model can hold."""
    tie_embeddings: bool = True
    initializer_range: Positive = 0.02
    """Standard deviation of the initial weights. Narrow models learn sooner from more, 1/sqrt(hidden_size)."""

    @model_validator(mode="after")
    def _shapes_fit(self) -> FromScratch:
        if self.hidden_size % self.heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of heads {self.heads}")
        if self.architecture == "llama" and (self.hidden_size // self.heads) % 2:
            raise ValueError("hidden_size / heads must be even (rotary positions turn pairs)")
        if self.kv_heads is not None:
            if self.architecture == "gpt2":
                raise ValueError("kv_heads is for llama; gpt2 has as many as heads")
            if self.heads % self.kv_heads:
                raise ValueError(f"heads {self.heads} is not a multiple of kv_heads {self.kv_heads}")
        return self


class ModelConfig(Section):
    path: PathOrName | None = None
    """A Hugging Face name or folder: `pretrain` is then skipped."""
    from_scratch: FromScratch | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of weights and activations in every role; optimizers keep fp32 master weights either way."""
    packed: bool = True
    """Sequences share the rows of a micro-batch, none sees another (checked at every start); else a padded row each."""
    chat_template: str | None = None
    """Jinja text or a file; None takes the tokenizer's own."""
    trust_remote_code: bool = False

    @field_validator("chat_template")
    @classmethod
    def _text_or_a_file(cls, chat_template: str | None) -> str | None:
        if chat_template is None or "{" in chat_template:
            return chat_template
        try:
            return path_or_name(chat_template)
        except ValueError as error:
            taken = "a template in Jinja would have a { in it, so this is taken for the name of a file"
            raise ValueError(f"{error} ({taken})") from None

    @model_validator(mode="after")
    def _one_origin(self) -> ModelConfig:
        if self.path and self.from_scratch:
            raise ValueError("path and from_scratch contradict each other: keep one, and set the other to null")
        if not self.path and not self.from_scratch:
            raise ValueError("name a model with path, or describe one with from_scratch")
        return self
