"""Chat templates: turns -> token ids, and the tokenizers that can be used at all.

A prompt and its response are always encoded apart and then joined, so the boundary between them is the same
whether the response was written by a person, sampled by an engine or read back from a file.
"""

from __future__ import annotations

import json
import re
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING

from rayrlhf.errors import DataError, ModelError
from rayrlhf.types import Turns

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "DEFAULT_TEMPLATE",
    "ROLE_TOKENS",
    "encode_prompt",
    "encode_response",
    "encode_text",
    "load_tokenizer",
    "validate_tokenizer",
]

ROLE_TOKENS = ("<|user|>", "<|assistant|>", "<|system|>")

# An assistant's turn in the history ends as a sampled response does, with the EOS.
DEFAULT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{{ '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)

# Of a template's first rendering. One may loop for hours, and Jinja's sandbox does not stop it.
TEMPLATE_DEADLINE_S = 30.0
# For characters that stand in for what a turn may not say to the tokenizer: Unicode gives them no meaning.
_PRIVATE_USE = range(0xE000, 0xF900)

_GENERIC_CLASSES = ("TokenizersBackend", "PreTrainedTokenizerFast", "PreTrainedTokenizer")


def encode_prompt(tokenizer: PreTrainedTokenizerBase, turns: Turns) -> list[int]:
    """Token ids of a conversation, up to and with the words that open the assistant's turn.

    Only the template writes special tokens. One that is spelled out in a turn is read as the characters it is: no text
    ends a turn, or speaks as another role. (A template whose turns are parted by plain words cannot promise as much.)

    Raises:
        ModelError: the tokenizer has no chat template, or its template refuses these turns.
    """
    if not tokenizer.chat_template:
        raise ModelError(f"{_name(tokenizer)} has no chat template", "set model.chat_template")
    spelled = _Spelled(tokenizer, turns)
    text = _render(tokenizer, tuple((role, spelled.hide(text)) for role, text in turns))
    ids: list[int] = []
    characters: dict[str, list[int]] = {}
    for piece, hidden in spelled.pieces(text):
        # The template wrote every special token that belongs there, a BOS included.
        ids += tokenizer.encode(piece, add_special_tokens=False, verbose=False) if piece else []
        if hidden and hidden not in characters:
            characters[hidden] = _as_characters(tokenizer, hidden)
        ids += characters.get(hidden, ())
    return ids


class _Spelled:
    """Special tokens that turns spell out, each hidden behind a stand-in while the template is rendered.

    The rest of the turn stays as it is, since templates look at it: they trim, and part thoughts from the answer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, turns: Turns) -> None:
        self._hidden: list[str] = []
        self._pattern = _control_tokens(
            tokenizer, len(tokenizer), str(tokenizer.chat_template), tuple(tokenizer.all_special_tokens)
        )
        self._normalizer = getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None)
        used = {character for _, text in turns for character in text}
        unused = next((chr(code) for code in _PRIVATE_USE if chr(code) not in used), None)
        if unused is None:
            raise DataError("a prompt has every private-use character of Unicode", "remove it: it is no text")
        self._mark = unused

    def hide(self, text: str) -> str:
        if self._pattern is None:
            return text
        if self._normalizer is not None and not self._pattern.search(text):
            # Some tokenizers look for special tokens in what they made of a text, such as its lower case.
            normalized = self._normalizer.normalize_str(text)
            text = normalized if self._pattern.search(normalized) else text
        return self._pattern.sub(self._stand_in, text)

    def _stand_in(self, match: re.Match[str]) -> str:
        self._hidden.append(match[0])
        return f"{self._mark}{len(self._hidden) - 1}{self._mark}"

    def pieces(self, rendered: str) -> list[tuple[str, str]]:
        """(what the template wrote, the special token that was spelled out after it) until the end."""
        parts = [*re.split(f"{self._mark}([0-9]+){self._mark}", rendered), None]
        return [
            (str(piece), "" if number is None else self._hidden[int(number)])
            for piece, number in zip(parts[::2], parts[1::2], strict=True)
        ]


@lru_cache(maxsize=8)
def _control_tokens(
    tokenizer: PreTrainedTokenizerBase, size: int, template: str, special: tuple[str, ...]
) -> re.Pattern[str] | None:
    """Finds what only the template may say: special tokens, and those others that it parts turns with.

    The arguments after the first are what makes an altered tokenizer another one.
    """
    blank, written = chr(_PRIVATE_USE[0]), ""
    for roles in (("user", "assistant", "user"), ("user",)):  # some templates take no history
        with suppress(ModelError):
            written += _render(tokenizer, tuple((role, blank) for role in roles))
    added = tokenizer.added_tokens_decoder.values()
    found = {token.content for token in added if token.special or (token.content in written and token.content.strip())}
    found |= set(special)
    if (normalizer := getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None)) is not None:
        found |= {normalizer.normalize_str(token.content) for token in added if token.content in found}
    longest_first = sorted(filter(None, found), key=lambda token: (-len(token), token))
    return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None


def _as_characters(tokenizer: PreTrainedTokenizerBase, token: str) -> list[int]:
    ids = _characters(tokenizer, token)
    if tokenizer.added_tokens_decoder.keys() & set(ids):  # one that is not marked as special is still found
        ids = [i for character in token for i in _characters(tokenizer, character)]
    return ids


def _render(tokenizer: PreTrainedTokenizerBase, turns: Turns) -> str:
    messages = [{"role": role, "content": text} for role, text in turns]
    try:
        text: str = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except Exception as error:  # a template is a program: it may divide by zero, or ask for what is not there
        roles = ", ".join(role for role, _ in turns)
        reason = str(error) or type(error).__name__
        message = f"the chat template of {_name(tokenizer)} refuses the turns ({roles}): {reason}"
        raise ModelError(message, "set model.chat_template to one that takes these roles") from None
    return text


def encode_response(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a response and the EOS that ends it; no BOS."""
    return [*encode_text(tokenizer, text), tokenizer.eos_token_id]


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of plain text: special tokens spelled out in it are read as the characters they are.

    Otherwise a document about `<|endoftext|>` would teach the model to stop in the middle of a sentence.
    """
    ids = _characters(tokenizer, text)
    ends = {tokenizer.eos_token_id: tokenizer.eos_token, tokenizer.pad_token_id: tokenizer.pad_token}
    found = [token for number, token in ends.items() if number in ids and isinstance(token, str)]
    if not found:
        return ids
    # A tokenizer may name an EOS that its own list does not mark as special.
    parts = re.split(f"({'|'.join(map(re.escape, found))})", text)
    return [i for part in parts for i in (_as_characters if part in found else _characters)(tokenizer, part)]


def _characters(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True, verbose=False)
    return ids


def validate_tokenizer(tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """Check that responses can end and rows can be padded.

    Args:
        where: what to call the tokenizer in a message, e.g. its path or config key.

    Raises:
        ModelError: there is no EOS, no PAD, or both are the same token.
    """
    if tokenizer.eos_token_id is None:
        hint = 'without one no response ever ends; set "eos_token" in its tokenizer_config.json'
        raise ModelError(f"{where}: the tokenizer has no EOS token", hint)
    cure = 'tokenizer.add_special_tokens({"pad_token": "<|pad|>"}), resize the embeddings, and save both'
    if tokenizer.pad_token_id is None:
        raise ModelError(f"{where}: the tokenizer has no PAD token", f"rows cannot be padded without; {cure}")
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        message = f"{where}: PAD and EOS are the same token, {tokenizer.eos_token!r}"
        raise ModelError(message, f"masking the padding would mask the EOS, and no model learns to stop; {cure}")


def load_tokenizer(
    path: str | Path, chat_template: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Load a tokenizer, settle its chat template, and check that both can be used.

    Args:
        path: a folder, or a Hugging Face model name.
        chat_template: Jinja text, or the path of a file that holds it; replaces the tokenizer's own. None keeps
            the tokenizer's own, or takes DEFAULT_TEMPLATE if it has none and knows all role tokens.
        trust_remote_code: run Python code that comes with the model.

    Raises:
        ModelError: nothing loads from `path`, there is no template that fits, or validate_tokenizer refuses it.
    """
    tokenizer = _load(str(path), trust_remote_code)
    _refuse_swapped_class(tokenizer, Path(path))
    if chat_template is not None:
        with_template(tokenizer, chat_template)
    elif not tokenizer.chat_template:
        known = tokenizer.get_vocab()
        missing = [token for token in ROLE_TOKENS if token not in known]
        if missing:
            message = f"{path}: the tokenizer has no chat template, nor the role tokens {', '.join(missing)}"
            raise ModelError(message, "set model.chat_template, or use an instruction-tuned model's tokenizer")
        tokenizer.chat_template = DEFAULT_TEMPLATE
    validate_tokenizer(tokenizer, str(path))
    _try_template(tokenizer)
    return tokenizer


def with_template(tokenizer: PreTrainedTokenizerBase, chat_template: str) -> PreTrainedTokenizerBase:
    """Give the tokenizer a template (Jinja text or the path of a file) in place of its own, and check that it works.

    Raises:
        ModelError: there is no such file, or the template refuses a plain user turn.
    """
    tokenizer.chat_template = _template_text(chat_template)
    _try_template(tokenizer)
    return tokenizer


def _try_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """A broken template shows here, not in the middle of a run; so does one that never ends."""
    raised: list[Exception] = []

    def attempt() -> None:
        try:
            encode_prompt(tokenizer, (("user", "Hello"),))
        except Exception as error:
            raised.append(error)

    thread = Thread(target=attempt, name="chat template", daemon=True)
    thread.start()
    thread.join(TEMPLATE_DEADLINE_S)
    if thread.is_alive():
        message = f"the chat template of {_name(tokenizer)} has not ended after {TEMPLATE_DEADLINE_S:g} s"
        raise ModelError(message, "set model.chat_template to one that renders at once")
    if raised:
        raise raised[0]


def _load(path: str, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    # Only `name` and `org/name` can be hub names; anything else is a path, and must not be looked up there.
    is_hub_name = path.count("/") <= 1 and not path.startswith(("/", ".", "~"))
    if not is_hub_name and not Path(path).is_dir():
        raise ModelError(f"no such model folder: {path}", "check model.path")
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError and more for a bad folder
        reason = str(error).strip().partition("\n")[0]
        hint = "it must be a folder with tokenizer.json, or the name of a model that can be reached from here"
        absent = "" if Path(path).is_dir() else " (no such folder, so taken for a hub name)"
        raise ModelError(f"cannot load a tokenizer from {path}{absent}: {reason}", hint) from None


def _refuse_swapped_class(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """For some model types (qwen2) transformers puts its own class in the place of a generic tokenizer.

    That class splits text by other rules than tokenizer.json says, so the same text gets other ids than it had
    when the tokenizer was trained; nothing else would ever tell.
    """
    config = folder / "tokenizer_config.json"
    if not config.is_file():
        return
    declared = json.loads(config.read_text(encoding="utf-8")).get("tokenizer_class")
    used = type(tokenizer).__name__
    if declared in _GENERIC_CLASSES and used not in _GENERIC_CLASSES:
        message = f"{folder}: transformers loads {used} in the place of the declared {declared}"
        raise ModelError(message, "its ids would differ; use another model type in config.json (llama, qwen3, gpt2)")


def _template_text(chat_template: str) -> str:
    if "{" in chat_template:
        return chat_template
    file = Path(chat_template).expanduser()
    if not file.is_file():
        hint = "model.chat_template is Jinja text or the path of a file that holds it"
        raise ModelError(f"no such chat template file: {chat_template}", hint)
    return file.read_text(encoding="utf-8")


def _name(tokenizer: PreTrainedTokenizerBase) -> str:
    return tokenizer.name_or_path or "the tokenizer"
