"""Data files that were not written for us, or against us: a message of ours or the records, soon."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import pickle
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rayrlhf.data import sources
from rayrlhf.data.prompts import (
    pack_text,
    tokenize_choices,
    tokenize_demonstrations,
    tokenize_prompts,
    tokenize_rankings,
)
from rayrlhf.data.readers import read_choices, read_demonstrations, read_prompts, read_rankings, read_text
from rayrlhf.data.split import drop_implied, split_by_prompt
from rayrlhf.data.tokenizer import train_tokenizer
from rayrlhf.errors import USER_ERRORS, DataError, RayRLHFError

TOKENIZER = train_tokenizer(["Count the red stones."] * 20, 320)
DEADLINE_S = 20.0
RECORD = {"prompt": "a", "response": "b"}
LINE = json.dumps(RECORD).encode() + b"\n"


def tokenized(kind: str, name: str, root: Path) -> Any:
    """From the file to the tokens, as a run does before it starts."""
    if kind == "text":
        return pack_text(TOKENIZER, read_text([name], root), 16)
    if kind == "prompts":
        return tokenize_prompts(TOKENIZER, read_prompts([name], root), 64, "drop")
    if kind == "choices":
        return tokenize_choices(TOKENIZER, read_choices([name], root), 64)
    if kind == "rankings":
        rankings = drop_implied(read_rankings([name], root, "train"))
        return tokenize_rankings(TOKENIZER, rankings, 64, 128, "drop")
    train, _ = split_by_prompt(read_demonstrations([name], root), 0.1, 0)
    return tokenize_demonstrations(TOKENIZER, train, 64, 128, "drop")


KINDS = ("text", "prompts", "choices", "rankings", "demonstrations")


def outcome(kind: str, name: str, root: Path) -> Any:
    """The tokens or the message; any exception that is not ours goes through, and fails the test."""
    start = perf_counter()
    try:
        found = tokenized(kind, name, root)
    except USER_ERRORS as error:
        found = error
    assert perf_counter() - start < DEADLINE_S
    if isinstance(found, RayRLHFError):
        shown = str(found).encode("utf-8")
        assert any(place in str(found) for place in (name, "prompts", "text"))
        assert len(shown) < 20_000
        assert not set(shown) & {*range(9), *range(11, 32), 127}, shown
    else:
        assert all(0 <= token < len(TOKENIZER) for token in token_ids(found))
    return found


def token_ids(found: Any) -> Iterator[int]:
    """All that stand in arrays of numbers, however deep."""
    if isinstance(found, np.ndarray):
        yield from found.reshape(-1).tolist()
    elif is_dataclass(found):
        yield from token_ids([getattr(found, field.name) for field in fields(found)])
    elif isinstance(found, list | tuple):
        for part in found:
            yield from token_ids(part)


def refused(kind: str, name: str, root: Path) -> str:
    found = outcome(kind, name, root)
    assert isinstance(found, RayRLHFError), found
    return found.message


# ---- fuzz

NAMES = st.sampled_from(
    ["prompt", "response", "messages", "chosen", "rejected", "responses", "ranks", "unfinished", "source", "split",
     "choices", "answer", "text", "role", "content"]
)  # fmt: skip
TEXT = st.text(max_size=6) | st.sampled_from(
    ["user", "assistant", "system", "train", "<|endoftext|>", "\ud800", "\x00"]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=10,
)
TURNS = st.lists(st.fixed_dictionaries({"role": TEXT, "content": TEXT}), max_size=3)
RECORDS = st.one_of(
    st.dictionaries(NAMES | TEXT, VALUES, max_size=5),
    st.fixed_dictionaries({"prompt": TEXT | TURNS | VALUES, "response": TEXT | VALUES}),
    st.fixed_dictionaries({"messages": TURNS | VALUES}),
    st.fixed_dictionaries({"prompt": TEXT, "responses": st.lists(TEXT, max_size=4), "ranks": st.lists(VALUES)}),
    st.fixed_dictionaries({"prompt": TEXT, "choices": st.lists(TEXT, max_size=4), "answer": VALUES}),
    st.fixed_dictionaries({"prompt": TEXT, "chosen": TEXT, "rejected": TEXT, "source": VALUES, "split": VALUES}),
    st.fixed_dictionaries({"text": TEXT | VALUES}),
    VALUES,
)  # fmt: skip
FUZZ = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@FUZZ
@given(records=st.lists(RECORDS, max_size=4), kind=st.sampled_from(KINDS), as_array=st.booleans())
def test_records_of_any_shape_are_a_message_or_tokens(
    tmp_path: Path, records: list[Any], kind: str, as_array: bool
) -> None:
    name = "mine.json" if as_array else "mine.jsonl"
    text = json.dumps(records) if as_array else "\n".join(json.dumps(record) for record in records)
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert outcome(kind, name, tmp_path) is not None


@FUZZ
@given(
    data=st.binary(max_size=60)
    | st.lists(st.sampled_from([LINE, b"\n", b"[", b"{", b"]", b"\x00", b"\xff", b"\xef\xbb\xbf", b"\r", b'"\\ud800"']))
    .map(b"".join),
    spot=st.integers(0, 400),
    suffix=st.sampled_from([".jsonl", ".json", ".txt", ".jsonl.gz", ".txt.gz", ".parquet"]),
    zipped=st.booleans(),
)  # fmt: skip
def test_bytes_of_any_kind_are_a_message_or_tokens(
    tmp_path: Path, data: bytes, spot: int, suffix: str, zipped: bool
) -> None:
    """Alone, and in the middle of a whole file."""
    whole = gzip.compress(LINE * 9) if zipped else LINE * 9
    for number, content in enumerate((data, gzip.compress(data), whole[:spot] + data + whole[spot:])):
        name = f"mine{number}{suffix}"
        (tmp_path / name).write_bytes(content)
        assert outcome("text" if suffix.startswith(".txt") else "demonstrations", name, tmp_path) is not None


@FUZZ
@given(spot=st.integers(0, 2000), byte=st.integers(0, 255))
def test_a_parquet_file_with_a_false_byte_is_a_message_or_tokens(tmp_path: Path, spot: int, byte: int) -> None:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"prompt": ["a", "b"] * 20, "response": ["c", None] * 20}), buffer)
    data = bytearray(buffer.getvalue())
    data[spot % len(data)] = byte
    (tmp_path / "mine.parquet").write_bytes(bytes(data))
    assert outcome("demonstrations", "mine.parquet", tmp_path) is not None


# ---- one by one


def archive(kind: str) -> bytes:
    buffer = io.BytesIO()
    if kind.startswith("tar"):
        with tarfile.open(fileobj=buffer, mode="w:gz" if kind == "tar.gz" else "w") as tar:
            for name in ("mine.jsonl", "../../escaped.jsonl"):
                member = tarfile.TarInfo(name)
                member.size = len(LINE)
                tar.addfile(member, io.BytesIO(LINE))
    elif kind == "zip":
        with zipfile.ZipFile(buffer, "w") as file:
            file.writestr("../../escaped.jsonl", LINE)
    else:
        return {"bz2": bz2.compress, "xz": lzma.compress}[kind](LINE)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("kind", "suffix"),
    [("tar", ".jsonl"), ("tar.gz", ".jsonl.gz"), ("zip", ".json"), ("bz2", ".txt"), ("xz", ".jsonl")],
)
def test_an_archive_is_not_unpacked_whatever_its_name(tmp_path: Path, kind: str, suffix: str) -> None:
    name = f"deep/er/mine{suffix}"
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / name).write_bytes(archive(kind))
    message = refused("text" if suffix == ".txt" else "demonstrations", name, tmp_path)
    assert message.endswith(f"mine{suffix}: a {kind.removesuffix('.gz')} archive, expected text")
    assert not list(tmp_path.rglob("escaped*"))


def test_a_small_file_that_unpacks_to_a_disk_full_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_UNPACKED_FREELY", 1 << 20)
    (tmp_path / "mine.jsonl.gz").write_bytes(gzip.compress(b" " * (20 << 20)))
    assert "its 20406 bytes unpack to more than 2040600" in refused("demonstrations", "mine.jsonl.gz", tmp_path)
    (tmp_path / "text.jsonl.gz").write_bytes(gzip.compress(LINE * 30_000))  # much the same text is not a bomb
    assert outcome("demonstrations", "text.jsonl.gz", tmp_path)[1].kept > 20_000


def as_parquet(path: Path, **columns: Any) -> None:
    pq.write_table(pa.table(columns), path)


def test_a_parquet_text_that_is_no_utf8_is_named_by_its_row(tmp_path: Path) -> None:
    offsets = pa.py_buffer(b"".join(n.to_bytes(4, "little") for n in (0, 1, 3)))
    false = pa.Array.from_buffers(pa.string(), 2, [None, offsets, pa.py_buffer(b"a\xff\xfe")])
    as_parquet(tmp_path / "mine.parquet", prompt=false, response=["b", "b"])
    assert "mine.parquet:2: cannot be read: 'utf-8' codec" in refused("demonstrations", "mine.parquet", tmp_path)


def test_a_parquet_date_beyond_the_calendar_is_named_by_its_row(tmp_path: Path) -> None:
    when = pa.array([0, 2**62], pa.timestamp("ms"))
    as_parquet(tmp_path / "mine.parquet", prompt=["a", "a"], response=["b", "b"], when=when)
    assert "mine.parquet:2: cannot be read: " in refused("demonstrations", "mine.parquet", tmp_path)


def test_a_parquet_column_of_images_opens_no_file_that_its_rows_name(tmp_path: Path) -> None:
    """`datasets` would decode it, from any path or address that the file gives."""
    string = {"dtype": "string", "_type": "Value"}
    features = {"prompt": string, "response": string, "image": {"_type": "Image"}}
    table = pa.table({"prompt": ["a"], "response": ["b"], "image": [{"bytes": None, "path": "/no/such/file.png"}]})
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, tmp_path / "mine.parquet")
    assert outcome("demonstrations", "mine.parquet", tmp_path)[1].kept == 1


class Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.marker), "w")


def test_a_pickle_in_a_parquet_file_is_not_loaded(tmp_path: Path) -> None:
    """Where pyarrow once kept Python's types: in the metadata of a column."""
    payload = pickle.dumps(Payload(tmp_path / "executed"))
    metadata = {"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": payload}
    fields = [
        pa.field("prompt", pa.string()),
        pa.field("response", pa.string()),
        pa.field("x", pa.int8(), True, metadata),
    ]
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"]), pa.array([1], pa.int8())], schema=pa.schema(fields))
    pq.write_table(table, tmp_path / "mine.parquet")
    outcome("demonstrations", "mine.parquet", tmp_path)
    assert not (tmp_path / "executed").exists()


def test_a_pickle_in_place_of_data_is_not_loaded(tmp_path: Path) -> None:
    for suffix in (".jsonl", ".json", ".parquet", ".txt", ".jsonl.gz"):
        (tmp_path / f"mine{suffix}").write_bytes(pickle.dumps(Payload(tmp_path / "executed")))
        refused("text" if suffix == ".txt" else "demonstrations", f"mine{suffix}", tmp_path)
    assert not (tmp_path / "executed").exists()


def test_a_data_folder_with_a_script_is_no_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    (tmp_path / "org" / "name" / "name.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')")
    for source in ("org/name", "org/name:train"):
        for root in (None, tmp_path / "elsewhere"):
            with pytest.raises(DataError, match="not a data source: 'org/name"):
                read_prompts([source], root)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (b'{"prompt": "a\x00", "response": "b"}', "mine.jsonl:1: not JSON"),
        (b'{"prompt": "a", "response": "b", "x": ' + b"[" * 100_000, "mine.jsonl:1: not JSON: maximum recursion"),
        (b'{"prompt": "a", "response": "b", "x": ' + b"9" * 5000 + b"}", "mine.jsonl:1: not JSON"),
        (b'{"\\ud800\\u001b[2J": 1}', "found the fields \\ud800\\x1b[2J"),
        (b"{" + b",".join(b'"%d": 1' % n for n in range(9999)) + b"}", "found the fields 0, 1, 2, "),
        (b'{"' + b"x" * 100_000 + b'": 1}', "found the fields xxx"),
        (b'{"messages": [{"role": ["user"], "content": "a"}]}', "`messages[0].role` is ['user'], expected"),
        (b'{"messages": [{"role": "' + b"x" * 100_000 + b'", "content": "a"}]}', "`messages[0].role` is 'xxx"),
        (b'{"messages": [{"\\u001b": "user"}]}', "found fields \\x1b, expected role and content"),
        (b'{"prompt": "\\udcff", "response": "b"}', "`prompt` has half a surrogate pair at character 0"),
        (b'{"prompt": NaN, "response": "b"}', "`prompt` is float, expected a string"),
    ],
)  # fmt: skip
def test_a_bad_record_is_one_short_message(tmp_path: Path, record: bytes, words: str) -> None:
    (tmp_path / "mine.jsonl").write_bytes(record)
    assert words in refused("demonstrations", "mine.jsonl", tmp_path)


@pytest.mark.parametrize("rank", [b"9" * 4000, b"1e999", b"2147483648", b"-0", b"[]"])
def test_a_rank_that_no_person_gives_is_refused(tmp_path: Path, rank: bytes) -> None:
    (tmp_path / "mine.jsonl").write_bytes(b'{"prompt": "a", "responses": ["b", "c"], "ranks": [1, ' + rank + b"]}")
    assert "mine.jsonl:1: `ranks[1]` is " in refused("rankings", "mine.jsonl", tmp_path)


def test_prompts_empty_enormous_and_strange_are_dropped_refused_or_tokens(tmp_path: Path) -> None:
    said: dict[str, Callable[[Any], bool]] = {
        "\x00": lambda found: found[1].kept == 1,
        "\u202e\u2066\ufeff": lambda found: found[1].kept == 1,
        "\U0010ffff" * 9: lambda found: found[1].kept == 1,
        "<|endoftext|>" * 3: lambda found: found[1].kept == 1,
        "": lambda found: "`prompt` is empty" in found.message,
        " \n\t\u2003": lambda found: "`prompt` is empty" in found.message,
        "word " * 200_000: lambda found: "longer than 64 tokens" in found.message,
        "x" * 500_000: lambda found: "longer than 64 tokens" in found.message,
        "<|user|>" * 100_000: lambda found: "longer than 64 tokens" in found.message,
    }
    for number, (text, fits) in enumerate(said.items()):
        (tmp_path / f"mine{number}.jsonl").write_text(json.dumps({"prompt": text}))
        assert fits(outcome("prompts", f"mine{number}.jsonl", tmp_path)), text[:20]
