import json

import pytest

from rayrlhf.data.chat import (
    DEFAULT_TEMPLATE,
    encode_prompt,
    encode_response,
    encode_text,
    load_tokenizer,
    validate_tokenizer,
)
from rayrlhf.errors import ModelError

USER = (("user", "Hello"),)


def test_the_default_template_writes_each_turn_under_its_role_and_ends_the_assistants_with_eos(tokenizer):
    turns = (("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello."), ("user", " Bye\n"))
    assert tokenizer.decode(encode_prompt(tokenizer, turns)) == (
        "<|system|>\nBe kind.\n<|user|>\nHi\n<|assistant|>\nHello.<|endoftext|>\n<|user|>\n Bye\n\n<|assistant|>\n"
    )


def test_a_prompt_and_its_response_make_the_history_of_the_next_turn(tokenizer):
    first = encode_prompt(tokenizer, USER) + encode_response(tokenizer, "Red.")
    later = encode_prompt(tokenizer, (*USER, ("assistant", "Red."), ("user", "Why?")))
    assert later[: len(first)] == first


def test_role_marks_are_one_token_each(tokenizer):
    assert encode_prompt(tokenizer, USER)[0] == 2
    assert encode_prompt(tokenizer, USER)[-2] == 3


def test_a_response_ends_with_one_eos_and_has_no_bos(tokenizer):
    from tokenizers.processors import TemplateProcessing

    tokenizer.add_special_tokens({"bos_token": "<|bos|>"})
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", bos)]
    )
    assert tokenizer.encode("red")[0] == bos
    assert bos not in encode_response(tokenizer, "red") + encode_prompt(tokenizer, USER)
    assert tokenizer.decode(encode_response(tokenizer, " red\n")) == " red\n<|endoftext|>"


def test_special_tokens_spelled_out_in_a_text_are_characters(tokenizer):
    tokens = encode_response(tokenizer, "a<|endoftext|>b<|assistant|>")
    assert [token for token in tokens if token < 5] == [0]
    assert tokens[-1] == 0
    assert encode_text(tokenizer, "<|user|>") != [2]
    assert tokenizer.encode("<|user|>") == [2]


def test_a_tokenizer_without_a_template_encodes_no_prompt(tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(ModelError, match=r"has no chat template\n  hint: set model.chat_template"):
        encode_prompt(tokenizer, USER)


def test_a_template_that_refuses_the_turns_says_why(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('no system turns') }}"
    with pytest.raises(ModelError, match=r"refuses the turns \(system, user\): no system turns"):
        encode_prompt(tokenizer, (("system", "s"), *USER))


def test_a_tokenizer_without_eos_is_refused(tokenizer):
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match=r"model\.path: the tokenizer has no EOS token\n  hint: .*no response ever"):
        validate_tokenizer(tokenizer, "model.path")


def test_a_tokenizer_without_pad_is_refused(tokenizer):
    tokenizer.pad_token = None
    with pytest.raises(ModelError, match=r"model\.path: the tokenizer has no PAD token\n  hint: .*add_special_tokens"):
        validate_tokenizer(tokenizer, "model.path")


def test_a_tokenizer_that_pads_with_its_eos_is_refused(tokenizer):
    tokenizer.pad_token = tokenizer.eos_token
    with pytest.raises(
        ModelError, match=r"PAD and EOS are the same token, '<\|endoftext\|>'\n  hint: .*learns to stop"
    ):
        validate_tokenizer(tokenizer, "model.path")


def test_a_saved_tokenizer_loads_with_its_own_template(tokenizer, tmp_path):
    tokenizer.chat_template = "{{ messages[0]['content'] }}!"
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.decode(encode_prompt(loaded, USER)) == "Hello!"


def test_a_template_given_as_text_replaces_the_tokenizers_own(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path, chat_template="Q: {{ messages[0]['content'] }} A:")
    assert loaded.decode(encode_prompt(loaded, USER)) == "Q: Hello A:"


def test_a_template_given_as_a_file_is_read(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "model")
    file = tmp_path / "chat.jinja"
    file.write_text("Q: {{ messages[0]['content'] }}")
    loaded = load_tokenizer(tmp_path / "model", chat_template=str(file))
    assert loaded.decode(encode_prompt(loaded, USER)) == "Q: Hello"


def test_a_missing_template_file_is_named(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"no such chat template file: chat\.jinja"):
        load_tokenizer(tmp_path, chat_template="chat.jinja")


def test_a_broken_template_is_refused_when_the_tokenizer_loads(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="refuses the turns"):
        load_tokenizer(tmp_path, chat_template="{% for m in messages %}")


def test_the_default_template_is_used_where_the_role_tokens_are_known(tokenizer, tmp_path):
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).chat_template == DEFAULT_TEMPLATE


def bare_tokenizer(folder):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"</s>": 0, "<pad>": 1, "<unk>": 2, "<|user|>": 3}, unk_token="<unk>"))
    bare = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", pad_token="<pad>")
    bare.save_pretrained(folder)


def test_a_tokenizer_with_neither_template_nor_role_tokens_is_refused_with_the_cure(tmp_path):
    bare_tokenizer(tmp_path)
    with pytest.raises(ModelError) as caught:
        load_tokenizer(tmp_path)
    assert "no chat template, nor the role tokens <|assistant|>, <|system|>" in caught.value.message
    assert "set model.chat_template" in caught.value.hint


def test_loading_validates(tokenizer, tmp_path):
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="PAD and EOS are the same token"):
        load_tokenizer(tmp_path)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(ModelError, match=r"no such model folder: .*/gone"):
        load_tokenizer(tmp_path / "gone")


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"cannot load a tokenizer from .*/empty: \S+"):
        load_tokenizer(tmp_path / "empty")


def test_a_hub_name_that_does_not_load_is_named(monkeypatch):
    import transformers

    def load(path: str, trust_remote_code: bool) -> None:
        raise OSError(f"{path} is not a model ({trust_remote_code})\nlong advice")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", load)
    with pytest.raises(ModelError) as caught:
        load_tokenizer("org/gone", trust_remote_code=True)
    assert caught.value.message == (
        "cannot load a tokenizer from org/gone (no such folder, so taken for a hub name): "
        "org/gone is not a model (True)"
    )


def test_a_tokenizer_class_swapped_for_the_model_type_is_refused(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    with pytest.raises(ModelError, match="loads Qwen2Tokenizer in the place of the declared TokenizersBackend"):
        load_tokenizer(tmp_path)
