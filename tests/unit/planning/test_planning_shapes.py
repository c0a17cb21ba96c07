"""Parameter counts: the published ones, and those of transformers on the meta device."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from rayrlhf.config.model import FromScratch
from rayrlhf.errors import ModelError
from rayrlhf.models.build import from_scratch
from rayrlhf.planning.catalogue import known_models, shape_named
from rayrlhf.planning.defaults import DEFAULTS
from rayrlhf.planning.form import lora_parameters
from rayrlhf.planning.shapes import from_scratch_config, shape_of

SMALL = {"hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 6, "vocab_size": 311}
LLAMA = {**SMALL, "num_key_value_heads": 2, "intermediate_size": 200}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {**LLAMA, "tie_word_embeddings": True}),
    ("llama", {**LLAMA, "head_dim": 32, "attention_bias": True, "mlp_bias": True}),
    ("mistral", LLAMA),
    ("qwen2", LLAMA),
    ("qwen3", {**LLAMA, "head_dim": 24}),
    ("mixtral", {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2}),
    (
        "qwen2_moe",
        {
            **LLAMA,
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 48,
            "shared_expert_intermediate_size": 80,
            "decoder_sparse_step": 2,
        },
    ),
    (
        "qwen3_moe",
        {
            **LLAMA,
            "head_dim": 16,
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 48,
            "mlp_only_layers": [1],
        },
    ),
    ("gpt2", {"n_embd": 96, "n_layer": 3, "n_head": 6, "vocab_size": 311, "n_positions": 64}),
    (
        "gpt2",
        {"n_embd": 96, "n_layer": 3, "n_head": 6, "vocab_size": 311, "n_inner": 100, "tie_word_embeddings": False},
    ),
    ("opt", {**SMALL, "ffn_dim": 200, "max_position_embeddings": 64, "word_embed_proj_dim": 96}),
    (
        "opt",
        {
            **SMALL,
            "ffn_dim": 200,
            "max_position_embeddings": 64,
            "word_embed_proj_dim": 48,
            "do_layer_norm_before": False,
        },
    ),
    ("gpt_neox", {**SMALL, "intermediate_size": 200, "max_position_embeddings": 64}),
]


def count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(("family", "keys"), CASES)
def test_parameters_are_those_of_transformers_with_either_head(family: str, keys: dict[str, Any]) -> None:
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model(family, num_labels=1, **ids, **keys)
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(config)
        classifier = AutoModelForSequenceClassification.from_config(config)
    shape = shape_of(config.to_dict(), family)
    assert shape.parameters == count(lm)
    assert shape.as_scalar().parameters == count(classifier)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("openai-community/gpt2", 124_439_808),
        ("openai-community/gpt2-xl", 1_557_611_200),
        ("facebook/opt-350m", 331_196_416),
        ("facebook/opt-1.3b", 1_315_758_080),
        ("EleutherAI/pythia-6.9b", 6_857_302_016),
        ("meta-llama/Llama-2-7b-hf", 6_738_415_616),
        ("meta-llama/Llama-2-13b-hf", 13_015_864_320),
        ("meta-llama/Llama-2-70b-hf", 68_976_648_192),
        ("meta-llama/Meta-Llama-3-8B", 8_030_261_248),
        ("mistralai/Mistral-7B-v0.1", 7_241_732_096),
        ("mistralai/Mixtral-8x7B-v0.1", 46_702_792_704),
        ("Qwen/Qwen2.5-7B", 7_615_616_512),
        ("Qwen/Qwen3-30B-A3B", 30_532_122_624),
    ],
)
def test_parameters_are_the_published_ones(name: str, parameters: int) -> None:
    """As the models' checkpoints hold them."""
    assert shape_named(name, "model.path").parameters == parameters


def test_a_mixture_uses_its_chosen_experts() -> None:
    assert shape_named("mistralai/Mixtral-8x7B-v0.1", "model.path").active == 12_879_925_248, "12.9B of 46.7B"
    shape = shape_named("meta-llama/Llama-2-7b-hf", "model.path")
    assert shape.active == shape.parameters


def test_gpt3s_sizes_come_out() -> None:
    """Brown et al. 2020, table 2.1, in billions; tables of tokens and positions included."""
    sizes = {name: shape_named(f"gpt3-{name}", "").parameters / 1e9 for name in ("1.3b", "6b", "13b", "175b")}
    assert sizes == pytest.approx({"1.3b": 1.3, "6b": 6.7, "13b": 13.0, "175b": 175.0}, rel=0.02)


@pytest.mark.parametrize(
    "spec",
    [
        FromScratch(hidden_size=96, layers=3, heads=6, kv_heads=2, vocab_size=400),
        FromScratch(architecture="gpt2", hidden_size=96, layers=2, heads=4, vocab_size=400, tie_embeddings=False),
    ],
)
def test_a_model_from_scratch_has_the_parameters_that_are_built(spec: FromScratch) -> None:
    built = from_scratch(spec, vocab_size=400, eos=1, pad=0, seed=0)
    assert shape_of(from_scratch_config(spec), "model.from_scratch").parameters == count(built)


def test_a_folder_with_a_reward_models_config_is_a_scalar_model(tmp_path: Path) -> None:
    config = {**known_models()["openai-community/gpt2"], "architectures": ["GPT2ForSequenceClassification"]}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    shape = shape_named(str(tmp_path), "reward.path")
    assert (shape.scalar, shape.parameters) == (True, 124_439_808 + 768)


def test_what_cannot_be_read_is_named_with_the_nearest_model() -> None:
    with pytest.raises(ModelError, match=r"model\.path: lama-2-7b-hf(.|\n)*did you mean meta-llama/Llama-2-7b-hf"):
        shape_named("lama-2-7b-hf", "model.path")
    with pytest.raises(ModelError, match=r"of a bloom model are not known(.|\n)*llama, mistral"):
        shape_of({"model_type": "bloom"}, "model.path")
    with pytest.raises(ModelError, match="the config of a gpt2 model has no n_embd"):
        shape_of({"model_type": "gpt2"}, "model.path")


def test_adapters_of_rank_16_beside_every_matrix_of_llama_2_7b() -> None:
    """16 x 32 layers x (4 x (4096 + 4096) + 3 x (4096 + 11008)): what PEFT prints for them, 39,976,960."""
    assert lora_parameters(shape_named("meta-llama/Llama-2-7b-hf", ""), 16) == 39_976_960


LEFT_OUT = {**SMALL, "num_attention_heads": 32, "hidden_size": 512, "intermediate_size": 200}


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen2_moe", "qwen3_moe"])
def test_keys_that_a_config_leaves_out_are_what_transformers_takes_for_them(family: str) -> None:
    config = AutoConfig.for_model(family, **LEFT_OUT)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    counted = shape_of({"model_type": family, **LEFT_OUT}, family)
    assert counted.parameters == sum(parameter.numel() for parameter in model.parameters())
    for key, value in DEFAULTS.get(family, {}).items():
        assert getattr(config, key) == value, key


def test_a_decoder_with_cross_attention_is_not_counted_as_one_without() -> None:
    config = {"model_type": "gpt2", "n_embd": 96, "n_layer": 3, "n_head": 6, "vocab_size": 311, "n_positions": 64}
    with pytest.raises(ModelError, match="add_cross_attention"):
        shape_of({**config, "add_cross_attention": True}, "m")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_attention_heads", 0),
        ("intermediate_size", None),
        ("vocab_size", "large"),
        ("num_key_value_heads", -2),
        ("num_hidden_layers", True),
        ("head_dim", 2.5),
    ],
)
def test_a_size_that_is_none_is_named(key: str, value: object) -> None:
    with pytest.raises(ModelError, match=f"m: {key} is ") as error:
        shape_of({"model_type": "llama", **LLAMA, key: value}, "m")
    assert error.value.hint == "a whole number above 0"
