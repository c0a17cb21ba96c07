import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayrlhf.data.chat import DEFAULT_TEMPLATE, encode_prompt, encode_text
from rayrlhf.data.tokenizer import train_tokenizer
from rayrlhf.errors import ModelError

TEXTS = ["the cat sat on the mat", "\n\n  two  spaces\tand a tab", "日本語のテキスト"] * 10
TOKENIZER = train_tokenizer(TEXTS, 300)


def test_the_special_tokens_come_first_and_are_whole():
    names = ["<|endoftext|>", "<|pad|>", "<|user|>", "<|assistant|>", "<|system|>"]
    assert TOKENIZER.convert_tokens_to_ids(names) == [0, 1, 2, 3, 4]
    assert TOKENIZER.encode("<|user|>", add_special_tokens=False) == [2]
    assert (TOKENIZER.eos_token_id, TOKENIZER.pad_token_id, TOKENIZER.bos_token_id) == (0, 1, None)
    assert TOKENIZER.chat_template == DEFAULT_TEMPLATE


@pytest.mark.parametrize("size", [261, 262, 290])
def test_the_vocabulary_has_the_size_asked_for(size):
    tokenizer = train_tokenizer(TEXTS, size)
    assert len(tokenizer) == size
    assert max(tokenizer.get_vocab().values()) == size - 1


def test_little_text_gives_fewer_tokens_never_more():
    assert len(train_tokenizer(["ab ab"], 5000)) < 5000
    assert len(train_tokenizer([], 5000)) == 261


def test_a_vocabulary_without_room_for_all_bytes_is_refused():
    with pytest.raises(ModelError, match=r"a vocabulary of 260 tokens is too small\n  hint: .* at least 261"):
        train_tokenizer(TEXTS, 260)


def test_the_same_texts_give_the_same_tokenizer():
    again = train_tokenizer(iter(TEXTS), 300)
    assert again.backend_tokenizer.to_str() == TOKENIZER.backend_tokenizer.to_str()


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_comes_back_exactly(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text, add_special_tokens=False)) == text
    assert TOKENIZER.decode(encode_text(TOKENIZER, text)) == text


@pytest.mark.parametrize(
    "text",
    [" lead and trail ", "it ' s , . ! ?", "a\r\n\n\tb", "<|endoftext|> in a text", "é é", "\x00\ufeff🙂", ""],
)
def test_awkward_texts_come_back_exactly(text):
    assert TOKENIZER.decode(encode_text(TOKENIZER, text)) == text
    assert 0 not in encode_text(TOKENIZER, text)


@pytest.mark.parametrize("model_type", [None, "llama", "qwen3", "gpt2", "gpt_neox", "opt"])
def test_a_saved_tokenizer_loads_with_the_same_ids(tmp_path, model_type):
    from transformers import AutoTokenizer

    TOKENIZER.save_pretrained(tmp_path)
    if model_type is not None:
        (tmp_path / "config.json").write_text(f'{{"model_type": "{model_type}"}}')
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = " it's 1234\n\n\n the  mat,日本 <|user|> "
    assert loaded.encode(text) == TOKENIZER.encode(text)
    assert loaded.decode(loaded.encode(text)) == text
    turns = (("system", "s"), ("user", "u"), ("assistant", "a"), ("user", "v"))
    assert encode_prompt(loaded, turns) == encode_prompt(TOKENIZER, turns)
    assert (loaded.eos_token_id, loaded.pad_token_id) == (0, 1)
