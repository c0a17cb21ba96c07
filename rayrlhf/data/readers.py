"""Rows -> records. Every record that cannot be used is named by file and line, with what was found and expected.

    read_text             text                                          -> PretrainText
    read_demonstrations   prompt + response, or messages                -> Demonstration
    read_rankings         prompt + chosen + rejected, or
                          prompt + responses + ranks                    -> Ranking
    read_prompts          prompt                                        -> Prompt

A prompt is a string (one user turn) or a list of {role, content} that ends with the user's turn. Fields that are
not named here are ignored. A source is a file (relative ones start from `root`, or from the current directory)
or a Hugging Face dataset `org/name` or `org/name:split`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path

from rayrlhf.config.limits import shown
from rayrlhf.data.sources import Row, check_sources, documents, fingerprint_sources, is_text, rows
from rayrlhf.errors import DataError
from rayrlhf.types import ChoiceQuestion, Demonstration, PretrainText, Prompt, Ranking, Turns

__all__ = [
    "check_sources",
    "fingerprint_sources",
    "read_choices",
    "read_demonstrations",
    "read_prompts",
    "read_rankings",
    "read_text",
]

MOST_NAMES, MOST_CHARACTERS = 20, 80
ROLES = ("system", "user", "assistant")


def read_text(sources: Sequence[str], root: Path | None) -> list[PretrainText]:
    """Documents of plain text: text files parted by `<|endoftext|>` lines, or a `text` column; blank ones skipped.

    Raises:
        DataError: a source cannot be read, a row has no `text`, or a source holds no text at all.
    """
    texts: list[PretrainText] = []
    for source in sources:
        if is_text(source):
            texts += [PretrainText(text) for text in documents(source, root)]
            continue
        # Blank rows are common in published text columns (every empty line of WikiText is one).
        found = [text for row in rows(source, root) if (text := _string(row, "text")).strip()]
        if not found:
            raise DataError(f"{source}: every `text` is blank", "take the source out of the config, or fill it")
        texts += [PretrainText(text) for text in found]
    return texts


def read_demonstrations(sources: Sequence[str], root: Path | None) -> list[Demonstration]:
    """Prompts with the response a person wrote.

    Raises:
        DataError: a source cannot be read, or a record is malformed, empty, or ends with another's turn.
    """
    return [_demonstration(row) for source in sources for row in rows(source, root)]


def read_rankings(sources: Sequence[str], root: Path | None, split: str | None = None) -> list[Ranking]:
    """Comparisons and rankings; `split` keeps the records whose `split` field equals it, or that have none.

    Raises:
        DataError: a source cannot be read, a record is malformed, or `split` leaves nothing of a source.
    """
    rankings: list[Ranking] = []
    for source in sources:
        kept: list[Ranking] = []
        seen: set[str] = set()
        for row in rows(source, root):
            named = _string(row, "split") if "split" in row.fields else None
            if split is None or named is None or named == split:
                kept.append(_ranking(row))
            else:
                seen.add(named)
        if not kept:
            found = _listed(shown(name) for name in sorted(seen))
            raise DataError(f"{source}: no record with split {split!r}; found {found}", "give one of those")
        rankings += kept
    return rankings


def read_prompts(sources: Sequence[str], root: Path | None) -> list[Prompt]:
    """Prompts to sample responses for.

    Raises:
        DataError: a source cannot be read, or a record has no usable `prompt`.
    """
    return [Prompt(_prompt(row), _source(row)) for source in sources for row in rows(source, root)]


def read_choices(sources: Sequence[str], root: Path | None) -> list[ChoiceQuestion]:
    """Multiple-choice questions: prompt, choices, and answer, the number of the right one from 0.

    Raises:
        DataError: a source cannot be read, or a record is malformed.
    """
    return [_choices(row) for source in sources for row in rows(source, root)]


# ---------------------------------------------------------------------------------------------------- records


def _choices(row: Row) -> ChoiceQuestion:
    choices = tuple(_checked(row, f"choices[{i}]", value) for i, value in enumerate(_list(row, "choices")))
    answer = _field(row, "answer", "a number")
    if len(choices) < 2:
        raise DataError(f"{row.place}: `choices` has {len(choices)} of them, expected 2 or more", "mend the record")
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        message = f"{row.place}: `answer` is {shown(answer)}, expected the number of a choice, 0 to {len(choices) - 1}"
        raise DataError(message, "count the choices from 0")
    return ChoiceQuestion(_filled(row, "prompt"), choices, answer, _source(row))


def _demonstration(row: Row) -> Demonstration:
    if "messages" not in row.fields:
        return Demonstration(_prompt(row), _filled(row, "response"), _source(row))
    if "prompt" in row.fields or "response" in row.fields:
        raise DataError(f"{row.place}: has `messages` and also `prompt` or `response`", "keep one of the two forms")
    turns = _turns(row, "messages")
    role, response = turns[-1]
    if role != "assistant":
        message = f"{row.place}: `messages` ends with a turn of {role!r}, expected 'assistant'"
        raise DataError(message, "the last turn is the response to learn; remove the turns after it")
    return Demonstration(_ending_with_user(row, "messages", turns[:-1]), response, _source(row))


def _ranking(row: Row) -> Ranking:
    prompt = _prompt(row)
    if "responses" not in row.fields and "ranks" not in row.fields:
        return Ranking(prompt, (_filled(row, "chosen"), _filled(row, "rejected")), (1, 2), _source(row))
    if "chosen" in row.fields or "rejected" in row.fields:
        raise DataError(f"{row.place}: is both a comparison and a ranking", "keep chosen/rejected or responses/ranks")
    responses = tuple(
        _checked(row, f"responses[{index}]", value) for index, value in enumerate(_list(row, "responses"))
    )
    ranks = tuple(_rank(row, index, value) for index, value in enumerate(_list(row, "ranks")))
    if len(responses) < 2:
        message = f"{row.place}: `responses` has {len(responses)} of them, expected 2 or more"
        raise DataError(message, "one response cannot be ranked; remove the record")
    if len(ranks) != len(responses):
        message = f"{row.place}: {len(responses)} `responses` but {len(ranks)} `ranks`"
        raise DataError(message, "give one rank per response, 1 for the best; equal ranks are ties")
    return Ranking(prompt, responses, ranks, _source(row), _unfinished(row, len(responses)))


def _unfinished(row: Row, responses: int) -> frozenset[int]:
    """Numbers, from 0, of the responses that a limit cut; the field may be missing."""
    numbers = _list(row, "unfinished") if "unfinished" in row.fields else []
    for value in numbers:
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < responses:
            message = (
                f"{row.place}: `unfinished` has {shown(value)}, expected numbers of responses from 0 to {responses - 1}"
            )
            raise DataError(message, "name the responses that were cut before their end, or leave the field out")
    return frozenset(n for n in numbers if isinstance(n, int))


def _rank(row: Row, index: int, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**31:
        message = f"{row.place}: `ranks[{index}]` is {shown(value)}, expected a positive whole number"
        raise DataError(message, "1 is the best; equal ranks are ties")
    return value


def _prompt(row: Row) -> Turns:
    if isinstance(row.fields.get("prompt"), list):
        return _ending_with_user(row, "prompt", _turns(row, "prompt"))
    return (("user", _filled(row, "prompt", "a string or a list of turns")),)


def _turns(row: Row, name: str) -> Turns:
    values = _list(row, name)
    if not values:
        raise DataError(f"{row.place}: `{name}` has no turns", "give at least one {role, content}")
    return tuple(_turn(row, f"{name}[{index}]", value) for index, value in enumerate(values))


def _turn(row: Row, name: str, value: object) -> tuple[str, str]:
    if not isinstance(value, dict) or "role" not in value or "content" not in value:
        found = f"fields {_listed(value)}" if isinstance(value, dict) else type(value).__name__
        message = f"{row.place}: `{name}` is not a turn: found {found}, expected role and content"
        raise DataError(message, 'a turn is {"role": "user", "content": "..."}')
    role = value["role"]
    if role not in ROLES:
        message = f"{row.place}: `{name}.role` is {shown(role)}, expected one of {', '.join(ROLES)}"
        raise DataError(message, "rename the role, or leave the turn out")
    return role, _checked(row, f"{name}.content", value["content"])


def _ending_with_user(row: Row, name: str, turns: Turns) -> Turns:
    if not turns or turns[-1][0] != "user":
        found = f"a turn of {turns[-1][0]!r}" if turns else "nothing"
        message = f"{row.place}: the prompt in `{name}` ends with {found}, expected a turn of 'user'"
        raise DataError(message, "a response answers the user: remove what follows the user's last turn")
    return turns


# ---------------------------------------------------------------------------------------------------- fields


def _source(row: Row) -> str:
    return _string(row, "source") if "source" in row.fields else ""


def _filled(row: Row, name: str, expected: str = "a string") -> str:
    return _checked(row, name, _field(row, name, expected), expected)


def _string(row: Row, name: str) -> str:
    value = _field(row, name, "a string")
    if not isinstance(value, str):
        raise _wrong_type(row, name, value, "a string")
    _encodable(row, name, value)
    return value


def _list(row: Row, name: str) -> list[object]:
    value = _field(row, name, "a list")
    if not isinstance(value, list):
        raise _wrong_type(row, name, value, "a list")
    return value


def _listed(names: Iterable[str]) -> str:
    """Names out of a file, the first of very many, cut where they are long."""
    return ", ".join(name[:MOST_CHARACTERS] for name in islice(names, MOST_NAMES)) or "none"


def _field(row: Row, name: str, expected: str) -> object:
    if name not in row.fields:
        found = _listed(row.fields)
        message = f"{row.place}: `{name}` is missing or null, expected {expected}; found the fields {found}"
        raise DataError(message, f"add `{name}`, or check that the file is of the kind this setting takes")
    return row.fields[name]


def _checked(row: Row, name: str, value: object, expected: str = "a string") -> str:
    """A text that can be tokenized: a string, not blank, and valid Unicode."""
    if not isinstance(value, str):
        raise _wrong_type(row, name, value, expected)
    if not value.strip():
        raise DataError(f"{row.place}: `{name}` is empty", "fill it, or remove the record")
    _encodable(row, name, value)
    return value


def _encodable(row: Row, name: str, value: str) -> None:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        # JSON may escape half a surrogate pair; a tokenizer would fail on it far from here.
        message = f"{row.place}: `{name}` has half a surrogate pair at character {error.start}"
        raise DataError(message, "the text was cut inside a character; mend or remove it") from None


def _wrong_type(row: Row, name: str, value: object, expected: str) -> DataError:
    return DataError(f"{row.place}: `{name}` is {type(value).__name__}, expected {expected}", "mend the record")
