"""What is published under which name."""

import pytest
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from rayrlhf.weights.buckets import publish_names


def llama(tied: bool) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=11,
            hidden_size=8,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            tie_word_embeddings=tied,
        )
    )


def gpt2(tied: bool) -> GPT2LMHeadModel:
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=11, n_embd=8, n_layer=1, n_head=2, n_positions=16, tie_word_embeddings=tied)
    )


@pytest.mark.parametrize(
    ("build", "embedding"), [(llama, "model.embed_tokens.weight"), (gpt2, "transformer.wte.weight")]
)
def test_a_tied_head_goes_under_both_of_its_names(build, embedding):
    names = dict(publish_names(build(tied=True)))
    assert names["lm_head.weight"] is names[embedding]


@pytest.mark.parametrize(
    ("build", "embedding"), [(llama, "model.embed_tokens.weight"), (gpt2, "transformer.wte.weight")]
)
def test_an_untied_head_is_a_parameter_of_its_own(build, embedding):
    names = dict(publish_names(build(tied=False)))
    assert names["lm_head.weight"] is not names[embedding]


@pytest.mark.parametrize("tied", [True, False])
def test_the_names_of_a_llama_are_those_of_its_checkpoint(tied):
    layer = "model.layers.0."
    assert [name for name, _ in publish_names(llama(tied))] == [
        "model.embed_tokens.weight",
        *(f"{layer}self_attn.{p}_proj.weight" for p in "qkvo"),
        *(f"{layer}mlp.{p}_proj.weight" for p in ("gate", "up", "down")),
        f"{layer}input_layernorm.weight",
        f"{layer}post_attention_layernorm.weight",
        "model.norm.weight",
        "lm_head.weight",
    ]


@pytest.mark.parametrize("build", [llama, gpt2])
def test_every_name_comes_once_and_every_parameter_is_covered(build):
    module = build(tied=True)
    named = publish_names(module)
    assert len({name for name, _ in named}) == len(named)
    assert {id(p) for _, p in named} == {id(p) for p in module.parameters()}
