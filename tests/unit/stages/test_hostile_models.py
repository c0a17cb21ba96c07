"""Models that carry a program: each is refused with its file and the cure, and the program has not run."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from rayrlhf.config import config_from
from rayrlhf.data.tokenizer import train_tokenizer
from rayrlhf.errors import USER_ERRORS, ModelError, RayRLHFError
from rayrlhf.models.build import load_policy, load_scalar, new_scalar
from rayrlhf.stages import preflight


class Payload:
    """Unpickled, it leaves a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.marker), "w")


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "executed"


def test_the_payload_works(marker: Path) -> None:
    pickle.loads(pickle.dumps(Payload(marker)))
    assert marker.exists()


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """policy/ and reward/: a small model and its tokenizer, as the stages write them."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = train_tokenizer(["Count the red stones."] * 20, 320)
    shape = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=512,
        eos_token_id=0,
        bos_token_id=0,
        pad_token_id=1,
    )
    LlamaForCausalLM(shape).save_pretrained(folder / "policy")
    shape.num_labels = 1
    LlamaForSequenceClassification(shape).save_pretrained(folder / "reward")
    for name in ("policy", "reward"):
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture
def models(clean: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(clean, tmp_path / "models"))


def check(models: Path, *overrides: str) -> None:
    tree = {
        "model": {"path": str(models / "policy")},
        "data": {name: ["x.jsonl"] for name in ("demonstrations", "rankings", "prompts", "heldout_prompts")},
    }
    preflight.check_models(config_from(tree, overrides, {}))


def outcome(models: Path, *overrides: str) -> RayRLHFError | None:
    """The message that a person would get; None where nothing is wrong."""
    try:
        check(models, *overrides)
    except USER_ERRORS as error:
        return error
    return None


def alter(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def with_bin(folder: Path, marker: Path) -> None:
    torch.save({"lm_head.weight": Payload(marker)}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def with_raw_pickle(folder: Path, marker: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(marker)))
    (folder / "model.safetensors").unlink()


def with_bin_shards(folder: Path, marker: Path) -> None:
    with_bin(folder, marker)
    (folder / "pytorch_model.bin").rename(folder / "pytorch_model-00001-of-00001.bin")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "pytorch_model-00001-of-00001.bin"}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def with_false_name(folder: Path, marker: Path) -> None:
    (folder / "model.safetensors").write_bytes(pickle.dumps(Payload(marker)))


def with_false_extra(folder: Path, marker: Path) -> None:
    (folder / "extra.safetensors").write_bytes(pickle.dumps(Payload(marker)))


def with_index_to(name: str) -> Callable[[Path, Path], None]:
    def plant(folder: Path, marker: Path) -> None:
        with_raw_pickle(folder, marker)
        shutil.copy(folder / "pytorch_model.bin", folder.parent / "outside.safetensors")
        index = {"metadata": {}, "weight_map": {"lm_head.weight": name}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return plant


def with_index(text: str) -> Callable[[Path, Path], None]:
    def plant(folder: Path, marker: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_text(text)

    return plant


def with_adapter(folder: Path, marker: Path) -> None:
    adapter = {"peft_type": "LORA", "base_model_name_or_path": "org/evil"}
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
    torch.save(Payload(marker), folder / "adapter_model.bin")


def without_weights(folder: Path, marker: Path) -> None:
    (folder / "model.safetensors").unlink()


WEIGHTS = {
    "pytorch_model.bin": (with_bin, "pytorch_model.bin: pickled weights", "save_pretrained"),
    "a raw pickle": (with_raw_pickle, "pytorch_model.bin: pickled weights", "save_pretrained"),
    "pickled shards": (with_bin_shards, "pytorch_model-00001-of-00001.bin: pickled weights", "save_pretrained"),
    "a pickle by another name": (with_false_name, "model.safetensors: not a safetensors file", "fetch or save"),
    "a pickle beside the weights": (with_false_extra, "extra.safetensors: not a safetensors file", "fetch or save"),
    "an index to a pickle": (with_index_to("pytorch_model.bin"), "names 'pytorch_model.bin', expected", "fetch"),
    "an index to elsewhere": (with_index_to("../outside.safetensors"), "names '../outside.safetensors'", "fetch"),
    "an index to nothing": (with_index_to("gone.safetensors"), "gone.safetensors is missing", "fetch"),
    "an index of junk": (with_index("[1]"), "cannot be read as an index", "fetch"),
    "a deep index": (with_index("[" * 100_000), "cannot be read as an index", "fetch"),
    "an adapter": (with_adapter, "adapter_config.json: an adapter", "merge it"),
    "nothing": (without_weights, "holds no weights", "check the folder"),
}


def test_clean_models_pass(models: Path) -> None:
    check(models, f"reward.path={models / 'reward'}", f"sft.path={models / 'policy'}")


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("key", ["model.path", "sft.path", "reward.path", "eval.reward_model"])
def test_planted_weights_are_refused_before_anything_starts(models: Path, marker: Path, kind: str, key: str) -> None:
    plant, message, cure = WEIGHTS[kind]
    folder = shutil.copytree(models / ("reward" if "reward" in key else "policy"), models / "planted")
    plant(folder, marker)
    stages = "run.stages=[sft,reward,ppo,eval]"
    with pytest.raises(ModelError) as caught:
        check(models, f"{key}={folder}", stages)
    assert caught.value.message.startswith(key)
    assert message in caught.value.message
    assert cure in caught.value.hint
    assert not marker.exists()


def test_planted_weights_of_an_epochs_judge_or_an_evaluated_model_are_refused(models: Path, marker: Path) -> None:
    with_bin(models / "reward", marker)
    with pytest.raises(ModelError, match=r"sft\.select\.reward_model: .*pytorch_model\.bin"):
        check(models, "sft.select.by=reward", f"sft.select.reward_model={models / 'reward'}")
    config = config_from({"model": {"path": str(models / "policy")}, "data": {"heldout_prompts": "x.jsonl"}},
                         ["run.stages=[eval]"], {})  # fmt: skip
    with_bin(models / "policy", marker)
    with pytest.raises(ModelError, match=r"eval: mine: .*pytorch_model\.bin"):
        preflight.check_compared(config, None, {"mine": str(models / "policy")}, None)  # type: ignore[arg-type]
    assert not marker.exists()


@pytest.mark.parametrize("kind", WEIGHTS)
def test_whoever_loads_weights_checks_them_again(models: Path, marker: Path, kind: str) -> None:
    """In the actors, on a host where the folder may be another."""
    plant, message, _ = WEIGHTS[kind]
    plant(models / "policy", marker)
    for load in (load_policy, load_scalar, lambda path, trust: new_scalar(path, trust, 0)):
        with pytest.raises(ModelError, match=message):
            load(str(models / "policy"), False)
    assert not marker.exists()


def plant_code(folder: Path, marker: Path) -> None:
    source = f"open({str(marker)!r}, 'w')\nclass Evil: pass\nclass EvilConfig: pass\n"
    for name in ("modeling_evil.py", "configuration_evil.py", "tokenization_evil.py", "custom_generate/generate.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(source)


def test_code_that_comes_with_a_model_is_not_run(models: Path, marker: Path) -> None:
    folder = models / "policy"
    plant_code(folder, marker)
    remote = {"AutoConfig": "configuration_evil.EvilConfig", "AutoModelForCausalLM": "modeling_evil.Evil"}
    alter(folder / "config.json", auto_map=remote)
    check(models)  # transformers knows a llama itself
    alter(folder / "config.json", auto_map=remote, model_type="evil", architectures=["Evil"])
    with pytest.raises(ModelError, match=r"model\.path: .*cannot read the model's config(.|\n)*trust_remote_code"):
        check(models)
    assert not marker.exists()


def test_code_that_comes_with_a_tokenizer_is_not_run(models: Path, marker: Path) -> None:
    folder = models / "policy"
    plant_code(folder, marker)
    code = {"AutoTokenizer": ["tokenization_evil.Evil", "tokenization_evil.Evil"]}
    alter(folder / "tokenizer_config.json", auto_map=code, tokenizer_class="Evil")
    with pytest.raises(ModelError, match=r"model\.path: cannot load a tokenizer"):
        check(models)
    assert not marker.exists()


def test_attention_code_from_the_hub_is_refused(models: Path) -> None:
    alter(models / "policy" / "config.json", attn_implementation="evil/kernel")
    assert AutoConfig.from_pretrained(models / "policy")._attn_implementation == "evil/kernel"
    with pytest.raises(ModelError, match=r"model\.path: .*attention code from the hub, evil/kernel"):
        check(models)


def test_a_template_that_comes_with_a_model_does_not_climb_out(models: Path, marker: Path) -> None:
    template = "{{ cycler.__init__.__globals__.os.system('touch " + str(marker) + "') }}"
    (models / "policy" / "chat_template.jinja").write_text(template)
    with pytest.raises(ModelError, match=r"model\.path: the chat template of .*policy refuses"):
        check(models)
    assert not marker.exists()


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "3", '"x"', "{}", "[" * 100_000, "\ud800", '{"model": 1}', "\x00"]
)
def test_junk_in_a_models_files_is_one_message(models: Path, name: str, text: str) -> None:
    (models / "policy" / name).write_bytes(text.encode("utf-8", "surrogatepass"))
    problem = outcome(models)
    if problem is not None:
        assert problem.message.startswith("model.path: ")
        assert str(models / "policy") in problem.message


@pytest.mark.parametrize(
    "fields",
    [
        {"hidden_size": "wide"},
        {"hidden_size": None},
        {"hidden_size": 0, "head_dim": None},
        {"num_attention_heads": 0, "head_dim": None},
        {"num_attention_heads": -1},
        {"vocab_size": "many"},
        {"vocab_size": None},
        {"max_position_embeddings": "x"},
        {"max_position_embeddings": 10**400},
        {"max_position_embeddings": [1]},
        {"architectures": 3},
        {"architectures": []},
        {"model_type": 7},
        {"model_type": "bert"},
        {"model_type": None},
        {"logits_scaling": "x"},
        {"num_labels": "x"},
        {"quantization_config": 7},
        {"rope_parameters": 7},
    ],
    ids=str,
)
def test_a_config_with_false_values_is_one_message_or_passes(models: Path, fields: dict[str, Any]) -> None:
    """Any other exception fails the test; where it is refused, the message says which model's it is."""
    for model in ("policy", "reward"):
        alter(models / model / "config.json", **fields)
        error = outcome(models, f"reward.path={models / 'reward'}")
        assert error is None or any(place in error.message for place in ("model.path", "reward.path", str(models)))
