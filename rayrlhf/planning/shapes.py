"""A model as numbers: the exact parameter count, and what memory and time are made of, from its Hugging Face config
alone. No weights are read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from rayrlhf.config.model import FromScratch
from rayrlhf.errors import ModelError
from rayrlhf.planning.defaults import DEFAULTS

__all__ = ["ModelShape", "from_scratch_config", "shape_of"]

Config = Mapping[str, Any]
SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("max_position_embeddings", "n_embd", "n_layer", "n_head", "n_positions", "ffn_dim"),
    *("moe_intermediate_size", "shared_expert_intermediate_size", "num_experts_per_tok", "decoder_sparse_step"),
)
OPTIONAL_SIZES = ("num_key_value_heads", "head_dim", "n_inner", "word_embed_proj_dim")


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A decoder-only transformer. Parameters are counted in numbers, not bytes."""

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    context: int | None
    """longest sequence, where the config says"""
    embeddings: int
    """tables that are looked up: tokens, positions"""
    in_layers: int
    """all layers, of a mixture every expert"""
    multiplied: int
    """of `in_layers`, the matrices that one token goes through: of a mixture the chosen experts'"""
    final: int
    """after the last layer: norm, projection"""
    head: int
    """the matrix that makes logits (or a scalar) of a position"""
    tied: bool
    """the head is the token table: counted once"""
    largest_layer: int
    largest_tensor: int
    mlp_width: int
    """inner width that one token uses: of all its experts together"""
    gated: bool
    """the MLP multiplies two projections, as Llama's"""
    rms_norm: bool
    experts: int = 0
    """per layer; 0 for a dense model"""
    experts_per_token: int = 0
    in_experts: int = 0
    """of `in_layers`, what is in routed experts"""
    expert_width: int = 0
    """inner width of one routed expert"""
    scalar: bool = False
    """a reward or value model"""

    @property
    def parameters(self) -> int:
        return self.embeddings + self.in_layers + self.final + (0 if self.tied else self.head)

    @property
    def active(self) -> int:
        """Parameters that one token uses."""
        unused = self.in_experts * (self.experts - self.experts_per_token) // self.experts if self.experts else 0
        return self.parameters - unused

    @property
    def kv_entries(self) -> int:
        """Keys and values that one token leaves in the cache, over all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim

    def as_scalar(self) -> ModelShape:
        """The same backbone under a linear head of one output without a bias: a reward or value model."""
        if self.scalar:
            return self
        return replace(self, head=self.head // self.vocab, tied=False, scalar=True)


def from_scratch_config(spec: FromScratch) -> dict[str, Any]:
    """The Hugging Face config that `pretrain` builds a model of, its vocabulary at the upper bound."""
    common = {"vocab_size": spec.vocab_size, "tie_word_embeddings": spec.tie_embeddings}
    if spec.architecture == "gpt2":
        sizes = {"n_embd": spec.hidden_size, "n_layer": spec.layers, "n_head": spec.heads, "n_positions": spec.context}
        return {"model_type": "gpt2", "n_inner": spec.intermediate_size, **sizes, **common}
    return {
        "model_type": "llama",
        "hidden_size": spec.hidden_size,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads or spec.heads,
        "intermediate_size": spec.intermediate_size or math.ceil(spec.hidden_size * 8 / 3 / 32) * 32,
        "max_position_embeddings": spec.context,
        **common,
    }


def shape_of(config: Config, name: str) -> ModelShape:
    """The shape that a Hugging Face config describes.

    Args:
        name: what messages call it.

    Raises:
        ModelError: an architecture whose parameters are not known here, or a config that lacks one of its sizes.
    """
    family = str(config.get("model_type"))
    if family not in _FAMILIES:
        raise ModelError(
            f"{name}: the parameters of a {family} model are not known to the plan", f"one of {', '.join(_FAMILIES)}"
        )
    config = {**DEFAULTS.get(family, {}), **config}
    _check_sizes(config, name)
    try:
        shape = _FAMILIES[family](config, name)
    except KeyError as missing:
        raise ModelError(f"{name}: the config of a {family} model has no {missing.args[0]}") from None
    architecture = next(iter(config.get("architectures") or [""]))
    return shape.as_scalar() if architecture.endswith("ForSequenceClassification") else shape


def _check_sizes(config: Config, name: str) -> None:
    for key in (*SIZES, *OPTIONAL_SIZES):
        value = config.get(key, 1)
        if value is None and key in OPTIONAL_SIZES:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ModelError(f"{name}: {key} is {value!r}", "a whole number above 0")
    if config.get("add_cross_attention"):
        raise ModelError(
            f"{name}: add_cross_attention is set: the plan knows decoders that attend to themselves alone",
            "leave it out",
        )


@dataclass(frozen=True, slots=True)
class _Layer:
    """Parameters of one layer."""

    attention: int
    attention_rest: int
    """biases and norms of queries and keys"""
    norms: int
    mlp: int
    """matrices outside routed experts: a dense MLP, or router and shared expert"""
    mlp_rest: int
    experts: int = 0

    @property
    def total(self) -> int:
        return self.attention + self.attention_rest + self.norms + self.mlp + self.mlp_rest + self.experts


def _llama_like(config: Config, name: str) -> ModelShape:
    """Llama, Mistral, Qwen 2 and 3, and the mixtures built on them."""
    family = config["model_type"]
    hidden, layers, heads = config["hidden_size"], config["num_hidden_layers"], config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or hidden // heads
    queries, keys = heads * head_dim, kv_heads * head_dim
    qkv_bias = config.get("qkv_bias", True) if family in ("qwen2", "qwen2_moe") else config.get("attention_bias", False)
    out_bias = bool(config.get("attention_bias", False)) and family not in ("qwen2", "qwen2_moe")
    rest = (queries + 2 * keys) * bool(qkv_bias) + hidden * out_bias
    rest += 2 * head_dim * (family in ("qwen3", "qwen3_moe"))  # norms of queries and keys
    attention = hidden * (2 * queries + 2 * keys)
    inner = config["intermediate_size"]
    mlp_bias = (2 * inner + hidden) * bool(config.get("mlp_bias", False))
    dense = _Layer(attention, rest, 2 * hidden, 3 * hidden * inner, mlp_bias)
    made = [_mixture(config, dense) if _is_mixture(config, index) else dense for index in range(layers)]
    experts, chosen = _experts(config), int(config.get("num_experts_per_tok") or 0)
    routed = sum(layer.experts for layer in made)
    share = chosen / experts if experts else 0.0
    width = (dense.mlp // (3 * hidden)) if not routed else _mixture_width(config)
    return ModelShape(
        name=name,
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab=config["vocab_size"],
        context=config.get("max_position_embeddings"),
        embeddings=config["vocab_size"] * hidden,
        in_layers=sum(layer.total for layer in made),
        multiplied=sum(layer.attention + layer.mlp for layer in made) + round(routed * share),
        final=hidden,
        head=config["vocab_size"] * hidden,
        tied=bool(config.get("tie_word_embeddings", False)),
        largest_layer=max(layer.total for layer in made),
        # The experts of a layer are one tensor, of two projections.
        largest_tensor=max(
            config["vocab_size"] * hidden,
            hidden * inner,
            2 * experts * _expert_width(config) * hidden if routed else 0,
        ),
        mlp_width=width,
        gated=True,
        rms_norm=True,
        experts=experts if routed else 0,
        experts_per_token=chosen if routed else 0,
        in_experts=routed,
        expert_width=_expert_width(config) if routed else 0,
    )


def _experts(config: Config) -> int:
    return int(config.get("num_local_experts") or config.get("num_experts") or 0)


def _is_mixture(config: Config, index: int) -> bool:
    """Whether layer `index` has routed experts (Mixtral: all; Qwen's mixtures may have dense layers between)."""
    if not _experts(config) or config["model_type"] not in ("mixtral", "qwen2_moe", "qwen3_moe"):
        return False
    if index in (config.get("mlp_only_layers") or ()):
        return False
    return (index + 1) % int(config.get("decoder_sparse_step") or 1) == 0


def _expert_width(config: Config) -> int:
    return int(config["intermediate_size" if config["model_type"] == "mixtral" else "moe_intermediate_size"])


def _shared_width(config: Config) -> int:
    return int(config["shared_expert_intermediate_size"]) if config["model_type"] == "qwen2_moe" else 0


def _mixture_width(config: Config) -> int:
    return int(config["num_experts_per_tok"]) * _expert_width(config) + _shared_width(config)


def _mixture(config: Config, dense: _Layer) -> _Layer:
    hidden, experts, shared = config["hidden_size"], _experts(config), _shared_width(config)
    router = hidden * experts + (3 * hidden * shared + hidden if shared else 0)
    routed = experts * 3 * hidden * _expert_width(config)
    return replace(dense, mlp=router, mlp_rest=0, experts=routed)


def _gpt2(config: Config, name: str) -> ModelShape:
    hidden, context = config["n_embd"], config["n_positions"]
    inner = config.get("n_inner") or 4 * hidden
    layer = _Layer(4 * hidden**2, 4 * hidden, 4 * hidden, 2 * hidden * inner, inner + hidden)
    sizes = _Sizes(hidden, config["n_layer"], config["n_head"], inner, context, positions=context)
    return _plain(config, name, layer, sizes, tied_by_default=True)


def _opt(config: Config, name: str) -> ModelShape:
    hidden, inner, context = config["hidden_size"], config["ffn_dim"], config["max_position_embeddings"]
    biased, affine = config.get("enable_bias", True), config.get("layer_norm_elementwise_affine", True)
    rest, mlp_rest = (4 * hidden, inner + hidden) if biased else (0, 0)
    layer = _Layer(4 * hidden**2, rest, 4 * hidden * bool(affine), 2 * hidden * inner, mlp_rest)
    layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    # Positions are offset by two (padding), as fairseq had them.
    sizes = _Sizes(hidden, layers, heads, inner, context, positions=context + 2)
    shape = _plain(config, name, layer, sizes, tied_by_default=True)
    narrow = config.get("word_embed_proj_dim") or hidden
    projections = 2 * narrow * hidden if narrow != hidden else 0  # in and out
    normed = config.get("do_layer_norm_before", True) and not config.get("_remove_final_layer_norm", False)
    return replace(
        shape,
        embeddings=config["vocab_size"] * narrow + (context + 2) * hidden,
        final=(2 * hidden if normed and affine else 0) + projections,
        head=config["vocab_size"] * narrow,
    )


def _gpt_neox(config: Config, name: str) -> ModelShape:
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    rest = 4 * hidden if config.get("attention_bias", True) else 0
    layer = _Layer(4 * hidden**2, rest, 4 * hidden, 2 * hidden * inner, inner + hidden)
    layers, heads, context = (
        config[key] for key in ("num_hidden_layers", "num_attention_heads", "max_position_embeddings")
    )
    sizes = _Sizes(hidden, layers, heads, inner, context, positions=0)
    return _plain(config, name, layer, sizes, tied_by_default=False)


@dataclass(frozen=True, slots=True)
class _Sizes:
    hidden: int
    layers: int
    heads: int
    inner: int
    """the MLP's width"""
    context: int
    positions: int
    """embeddings of positions that are learned"""


def _plain(config: Config, name: str, layer: _Layer, sizes: _Sizes, *, tied_by_default: bool) -> ModelShape:
    """GPT's kind: LayerNorm, two matrices in the MLP, as many heads for keys as for queries."""
    vocab, hidden = config["vocab_size"], sizes.hidden
    return ModelShape(
        name=name,
        hidden=hidden,
        layers=sizes.layers,
        heads=sizes.heads,
        kv_heads=sizes.heads,
        head_dim=hidden // sizes.heads,
        vocab=vocab,
        context=sizes.context,
        embeddings=(vocab + sizes.positions) * hidden,
        in_layers=sizes.layers * layer.total,
        multiplied=sizes.layers * (layer.attention + layer.mlp),
        final=2 * hidden,
        head=vocab * hidden,
        tied=bool(config.get("tie_word_embeddings", tied_by_default)),
        largest_layer=layer.total,
        largest_tensor=max(vocab * hidden, hidden * sizes.inner),
        mlp_width=sizes.inner,
        gated=False,
        rms_norm=False,
    )


_FAMILIES = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen2_moe", "qwen3_moe"), _llama_like),
    "gpt2": _gpt2,
    "opt": _opt,
    "gpt_neox": _gpt_neox,
}
