"""Which parameters travel together."""

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from rayrlhf.engines.deepspeed import Learner

LAYER = [f"model.layers.0.self_attn.{p}_proj.weight" for p in "qkvo"] + [
    f"model.layers.0.mlp.{p}_proj.weight" for p in ("gate", "up", "down")
]
NORMS = [
    "model.layers.0.input_layernorm.weight",
    "model.layers.0.post_attention_layernorm.weight",
    "model.norm.weight",
]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.mark.parametrize(
    ("tied", "order"),
    [(True, [*LAYER, *NORMS, EMBEDDING, HEAD]), (False, [EMBEDDING, *LAYER, *NORMS, HEAD])],
    ids=["tied", "untied"],
)
def test_both_names_of_a_tied_head_are_in_one_bucket_and_the_last(tied, order):
    config = LlamaConfig(
        vocab_size=500,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=tied,
    )
    buckets = Learner.bucket_names(None, LlamaForCausalLM(config), 2048)
    assert [name for bucket in buckets for name in bucket] == order
    # 500 rows of 32 bytes are more than a bucket
    assert buckets[-1] == ([EMBEDDING, HEAD] if tied else [HEAD])
    # 2048 / 4, / 2, whole: matrices of 256 and 512 bytes, norms of 32 that take 64
    first = 0 if tied else 1
    assert [len(bucket) for bucket in buckets[first:-1]] == ([2, 3, 5] if tied else [4, 6])
