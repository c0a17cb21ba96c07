import pytest

from rayrlhf.data.tokenizer import train_tokenizer

CORPUS = ["Count the red stones. There are three red stones.", "Name a colour: red, green or blue."] * 20


@pytest.fixture
def tokenizer():
    """A fresh one each time: tests alter it, and training on so little text takes milliseconds."""
    return train_tokenizer(CORPUS, vocab_size=320)
