"""Models made, saved and read again: shapes by hand, heads, normalisation, dropout."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification
from transformers.utils import logging

from rayrlhf.config.model import FromScratch
from rayrlhf.errors import ModelError
from rayrlhf.models.build import (
    PolicyModel,
    ScalarModel,
    context_length,
    from_scratch,
    has_residual_dropout,
    load_policy,
    load_scalar,
    new_scalar,
    read_config,
    zero_scalar,
)

logging.disable_progress_bar()
V, D, LAYERS, F, CONTEXT = 300, 16, 2, 40, 32


def spec(architecture: str = "llama", **more) -> FromScratch:
    given = {"hidden_size": D, "layers": LAYERS, "heads": 4, "intermediate_size": F, "context": CONTEXT}
    return FromScratch(architecture=architecture, **(given | more))


def build(architecture: str = "llama", seed: int = 0, **more) -> PolicyModel:
    return from_scratch(spec(architecture, **more), V, eos=2, pad=1, seed=seed)


def size(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())  # a shared parameter counts once


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A saved model of each architecture, the gpt2 one with dropout in its config."""
    root = tmp_path_factory.mktemp("models")
    for architecture in ("llama", "gpt2"):
        lm = build(architecture).lm
        lm.config.attention_dropout = 0.1
        if architecture == "gpt2":
            lm.config.resid_pdrop = lm.config.embd_pdrop = lm.config.attn_pdrop = 0.1
        lm.save_pretrained(root / architecture)
    return {name: str(root / name) for name in ("llama", "gpt2")}


# --------------------------------------------------------------------------------------------- from scratch


@pytest.mark.parametrize("tied", [True, False])
def test_a_llama_has_the_parameters_counted_by_hand(tied):
    attention = 4 * D * D
    layer = attention + 3 * D * F + 2 * D  # gate, up, down; two norms
    head = 0 if tied else V * D
    assert size(build(tie_embeddings=tied)) == V * D + LAYERS * layer + D + head


def test_fewer_key_value_heads_shrink_two_projections():
    # 2 of 4 heads: keys and values take D x D/2 instead of D x D, in each layer
    assert size(build()) - size(build(kv_heads=2)) == LAYERS * 2 * D * D // 2


@pytest.mark.parametrize("tied", [True, False])
def test_a_gpt2_has_the_parameters_counted_by_hand(tied):
    attention = (D * 3 * D + 3 * D) + (D * D + D)
    mlp = (D * F + F) + (F * D + D)
    layer = attention + mlp + 2 * 2 * D  # two layer norms with bias
    head = 0 if tied else V * D
    assert size(build("gpt2", tie_embeddings=tied)) == V * D + CONTEXT * D + LAYERS * layer + 2 * D + head


def test_the_default_width_of_the_mlp_is_8_3_of_the_hidden_size_up_to_32_or_4_times():
    # 16 * 8 / 3 = 42.7 -> 64;  gpt2: 64
    assert build(intermediate_size=None).lm.config.intermediate_size == 64
    assert build("gpt2", intermediate_size=None).lm.transformer.h[0].mlp.c_fc.weight.shape == (16, 64)
    assert build(hidden_size=192, intermediate_size=None).lm.config.intermediate_size == 512


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_head_and_embedding_are_one_tensor_when_tied_and_two_otherwise(architecture):
    for tied in (True, False):
        lm = build(architecture, tie_embeddings=tied).lm
        assert (lm.get_input_embeddings().weight is lm.get_output_embeddings().weight) is tied


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_config_knows_context_and_special_tokens_and_has_no_dropout(architecture):
    config = build(architecture).lm.config
    assert context_length(config) == CONTEXT
    assert (config.eos_token_id, config.pad_token_id, config.vocab_size) == (2, 1, V)
    assert all(not v for k, v in config.to_dict().items() if "pdrop" in k or k == "attention_dropout")


def test_the_seed_makes_the_weights():
    first, again, other = build(seed=5), build(seed=5), build(seed=6)
    pairs = list(zip(first.parameters(), again.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(first.lm.get_input_embeddings().weight, other.lm.get_input_embeddings().weight)


# ------------------------------------------------------------------------------------------------- policy


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_policy_gives_the_log_probs_of_the_tokens_that_follow(architecture):
    policy = build(architecture).eval()
    tokens = torch.randint(3, V, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        table = policy.lm(tokens).logits.double().log_softmax(-1)
        got = policy(tokens=tokens, positions=torch.tensor([1, 8, 10, 13]))
    expected = [table[r, t - 1, tokens[r, t]] for r, t in ((0, 1), (0, 8), (1, 1), (1, 4))]
    assert got.tolist() == pytest.approx([float(x) for x in expected], abs=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_policy_survives_saving_and_loading(architecture, folders):
    saved, loaded = build(architecture), load_policy(folders[architecture], False)
    assert all(torch.equal(a, b) for a, b in zip(saved.parameters(), loaded.parameters(), strict=True))
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_loading_turns_all_dropout_off(architecture, folders):
    lm = load_policy(folders[architecture], False).lm.train()
    assert {m.p for m in lm.modules() if isinstance(m, torch.nn.Dropout)} <= {0.0}
    assert lm.config.attention_dropout == 0.0
    tokens = torch.tensor([[3, 4, 5, 6]])
    assert torch.equal(lm(tokens).logits, lm(tokens).logits)


def test_residual_dropout_and_no_other_is_on_when_asked_for(folders):
    config = load_policy(folders["gpt2"], False, residual_dropout=0.2).lm.config
    assert (config.resid_pdrop, config.embd_pdrop, config.attn_pdrop) == (0.2, 0.0, 0.0)


def test_residual_dropout_is_refused_where_the_model_has_none(folders):
    assert has_residual_dropout(read_config(folders["gpt2"], False))
    assert not has_residual_dropout(read_config(folders["llama"], False))
    with pytest.raises(ModelError, match="llama model has no residual dropout"):
        load_policy(folders["llama"], False, residual_dropout=0.2)


@pytest.mark.parametrize("path", ["no-such-folder", "./no/such", "/no/such/folder"])
def test_a_folder_that_is_not_there_is_a_model_error(path):
    with pytest.raises(ModelError, match="no such model folder"):
        read_config(path, False)


def test_a_folder_without_a_config_is_a_model_error(tmp_path):
    with pytest.raises(ModelError, match="cannot read the model's config"):
        read_config(str(tmp_path), False)


# ------------------------------------------------------------------------------------------------- scalar


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_new_scalar_model_has_the_backbone_of_its_path_and_one_output(architecture, folders):
    model = new_scalar(folders[architecture], False, seed=0)
    assert model.classifier.score.weight.shape == (1, D)
    assert model.classifier.score.bias is None
    backbone = load_policy(folders[architecture], False).lm.base_model
    pairs = zip(backbone.parameters(), model.classifier.base_model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert (model.bias, model.scale) == (0.0, 1.0)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_head_of_zeros_says_0_everywhere_and_can_learn(architecture, folders):
    model = zero_scalar(folders[architecture], False)
    tokens = torch.randint(3, V, (2, 5), generator=torch.Generator().manual_seed(0))
    values = model(tokens=tokens, positions=torch.arange(10))
    assert values.tolist() == [0.0] * 10
    values.sum().backward()
    assert float(model.classifier.score.weight.grad.abs().max()) > 0
    backbone = load_policy(folders[architecture], False).lm.base_model
    pairs = zip(backbone.parameters(), model.classifier.base_model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_new_head_has_a_standard_deviation_of_1_over_the_root_of_d_plus_1(tmp_path):
    width = 4096
    config = LlamaConfig(
        vocab_size=8, hidden_size=width, intermediate_size=1, num_hidden_layers=0, num_attention_heads=2, pad_token_id=0
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    head = new_scalar(str(tmp_path), False, seed=0).classifier.score.weight.detach().double()
    # 4096 draws: the sample's standard deviation is off by 1 / sqrt(2 * 4096) = 1.1 %; 4 of those are 4.4 %
    assert float(head.std()) * (width + 1) ** 0.5 == pytest.approx(1.0, abs=0.044)
    # and its mean by 1 / sqrt(4096) standard deviations
    assert abs(float(head.mean())) * (width + 1) ** 0.5 < 4 / 64


def test_the_seed_makes_the_head(folders):
    first, again, other = (new_scalar(folders["llama"], False, seed).classifier.score.weight for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_output_is_the_normalised_head_at_the_positions_asked_for(folders):
    model = new_scalar(folders["llama"], False, seed=0)
    tokens = torch.randint(3, V, (2, 5), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        hidden = model.classifier.base_model(tokens).last_hidden_state
        raw = (hidden @ model.classifier.score.weight[0]).reshape(-1)
        positions = torch.tensor([0, 4, 7])
        assert model(tokens=tokens, positions=positions).tolist() == pytest.approx(raw[positions].tolist(), abs=1e-6)
        model.normalise(bias=-1.5, scale=0.5)
        expected = (raw[positions] + 1.5) / 0.5
        assert model(tokens=tokens, positions=positions).tolist() == pytest.approx(expected.tolist(), abs=1e-5)


def test_the_normalisation_is_in_config_json_and_survives_saving_and_loading(folders, tmp_path):
    model = new_scalar(folders["llama"], False, seed=0)
    model.normalise(bias=0.75, scale=2.5)
    model.classifier.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["rayrlhf_reward_normalisation"] == [0.75, 2.5]
    loaded = load_scalar(str(tmp_path), False)
    assert (loaded.bias, loaded.scale) == (0.75, 2.5)
    tokens, positions = torch.tensor([[3, 4, 5]]), torch.tensor([2])
    with torch.no_grad():
        assert torch.equal(loaded(tokens, positions), model(tokens, positions))


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_model_without_a_trained_head_is_refused(architecture, folders):
    with pytest.raises(ModelError, match=r"has no trained reward head \(score\.weight missing\)"):
        load_scalar(folders[architecture], False)


def test_a_classifier_with_two_labels_is_refused(tmp_path):
    config = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, num_labels=2
    )
    LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="num_labels=1"):
        load_scalar(str(tmp_path), False)


def test_a_model_without_a_linear_score_is_refused():
    lm = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=8, n_layer=1, n_head=2, n_positions=8))
    with pytest.raises(ModelError, match="GPT2LMHeadModel has no linear head called `score`"):
        ScalarModel(lm)


def test_a_driver_imports_none_of_what_a_model_is_made_of() -> None:
    """It builds none, and they take as long to import as all the rest."""
    heavy = "{'transformers.modeling_utils', 'torch._dynamo', 'deepspeed', 'vllm', 'datasets'}"
    code = f"import sys, rayrlhf.stages.run; print(sorted({heavy} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
