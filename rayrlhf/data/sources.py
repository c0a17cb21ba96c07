"""Where records live: a file, or a Hugging Face dataset, read row by row with the place of each row.

JSON is read by a line reader of our own and not by `datasets`, for two reasons: `datasets` infers one Arrow type
per column, so that a file whose responses all look like dates comes back as timestamps; and it gives no line
numbers. Parquet and hub datasets carry their types with them and go through `datasets`.
"""

from __future__ import annotations

import difflib
import glob
import gzip
import hashlib
import json
import re
import tempfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from rayrlhf.errors import DataError

__all__ = ["DOCUMENT_SEPARATOR", "Row", "check_sources", "documents", "fingerprint_sources", "is_text", "rows"]

DOCUMENT_SEPARATOR = "<|endoftext|>"

_TEXT = (".txt", ".txt.gz")
_JSON_LINES = (".jsonl", ".jsonl.gz")
_EXTENSIONS = (*_JSON_LINES, ".json", ".parquet", *_TEXT)
_HUB_NAME = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(:(?P<split>[\w.\[\]:%+-]+))?")
_CHUNK = 1 << 20
# Text shrinks to a third or a tenth; gzip can shrink zeros to a thousandth, and a small file then fills a disk.
_DEFLATE_RATIO, _PLAUSIBLE_RATIO = 1032, 100
_UNPACKED_FREELY = 1 << 30


@dataclass(frozen=True, slots=True)
class Row:
    """One record as it was found; fields that are null are left out."""

    place: str
    """`file:line` (`dataset:row` where there are no lines), 1-based"""
    fields: dict[str, Any]


def is_text(source: str) -> bool:
    """Whether `source` is a plain text file, which holds documents and not rows."""
    return source.lower().endswith(_TEXT)


def check_sources(sources: Mapping[str, Sequence[str]], root: Path | None) -> None:
    """Check, before anything starts, that every file exists; hub names are not looked up.

    Args:
        sources: dotted config path -> the sources given there.
        root: what relative file names start from; None is the current directory.

    Raises:
        DataError: names every missing file with its dotted path and the nearest file that does exist.
    """
    problems: list[str] = []
    for key, names in sources.items():
        for name in names:
            try:
                _locate(name, root)
            except DataError as error:
                problems.append(f"{key}: {error.message}" + (f" ({error.hint})" if error.hint else ""))
    if problems:
        hint = "relative file names start from data.root, else the environment's RAYRLHF_HUMAN_DATA, else from here"
        raise DataError("\n".join(problems), hint)


def fingerprint_sources(sources: Sequence[str], root: Path | None) -> dict[str, str]:
    """source -> SHA-256 (hex) of the file's bytes; a hub dataset stands for itself, by name.

    Raises:
        DataError: a file is missing or cannot be read.
    """
    prints: dict[str, str] = {}
    for source in sources:
        path = _locate(source, root)
        if path is None:
            prints[source] = source
            continue
        digest = hashlib.sha256()
        with _unreadable(path), path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
        prints[source] = digest.hexdigest()
    return prints


def rows(source: str, root: Path | None) -> Iterator[Row]:
    """The rows of a tabular source, in its order.

    Raises:
        DataError: the source is missing, unreadable, of an unknown kind, or holds no row.
    """
    path = _locate(source, root)
    if path is None:
        found = _hub_rows(source)
    elif is_text(source):
        raise DataError(f"{path}: plain text where records are expected", "give a .jsonl, .json or .parquet file")
    elif path.name.lower().endswith(".parquet"):
        found = _parquet_rows(path)
    elif path.name.lower().endswith(_JSON_LINES):
        found = _json_lines(path)
    else:
        found = _json(path)
    empty = True
    for row in found:
        empty = False
        yield row
    if empty:
        raise DataError(f"{path or source}: holds no records", "take the source out of the config, or fill it")


def documents(source: str, root: Path | None) -> Iterator[str]:
    """The documents of a plain text file: parted by a line that holds only `<|endoftext|>`, blank ones skipped.

    Raises:
        DataError: the file is missing, unreadable, not UTF-8, or holds no document.
    """
    path = _locate(source, root)
    assert path is not None, "is_text() tells text files from hub names"
    empty = True
    parts: list[str] = []
    for line in (*(text for _, text in _lines(path)), DOCUMENT_SEPARATOR):
        if line.strip() != DOCUMENT_SEPARATOR:
            parts.append(line)
            continue
        # The line ends next to a separator belong to the file's layout, not to the document.
        text = "".join(parts).strip("\r\n")
        parts.clear()
        if text.strip():
            empty = False
            yield text
    if empty:
        raise DataError(f"{path}: holds no text", "take the source out of the config, or fill it")


# ---------------------------------------------------------------------------------------------------- finding


def _locate(source: str, root: Path | None) -> Path | None:
    """The path of a file source, None for a hub name; DataError where it is neither."""
    path = (root or Path()) / Path(source).expanduser()
    if source.lower().endswith(_EXTENSIONS):
        if path.is_file():
            return path
        raise DataError(f"no such file: {path}", "it is a folder" if path.is_dir() else _nearest(path))
    if (match := _HUB_NAME.fullmatch(source)) and not path.exists() and not Path(match["name"]).exists():
        return None  # `datasets` would take a folder of that name, where we are, for it
    kinds = ", ".join(_EXTENSIONS)
    raise DataError(f"not a data source: {source!r}", f"give a file ({kinds}) or a Hugging Face dataset org/name:split")


def _nearest(path: Path) -> str:
    if not path.parent.is_dir():
        return f"the folder {path.parent} does not exist"
    names = sorted(entry.name for entry in path.parent.iterdir() if entry.is_file())
    if not names:
        return f"the folder {path.parent} holds no files"
    near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.6)
    return f"did you mean {near[0]}?" if near else "no file there has a name like it"


# ---------------------------------------------------------------------------------------------------- JSON, text


@contextmanager
def _unreadable(path: Path) -> Iterator[None]:
    try:
        yield
    except gzip.BadGzipFile:
        raise  # an OSError too, but of the content: the reader knows the line
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}", "check the file's permissions") from None


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """(1-based number, text with its line end), through `datasets`' own reader of text.

    Not through its JSON reader: that guesses types (a column of answers like "2020-01-01" becomes timestamps), cannot
    take a prompt that is sometimes a string and sometimes turns, and cannot name a line.
    """
    with _unreadable(path), path.open("rb") as file:
        zipped = file.read(2) == b"\x1f\x8b"
    if path.name.lower().endswith(".gz") != zipped:
        _find_fault(path)
    _refuse_archive(path)
    with tempfile.TemporaryDirectory(prefix="rayrlhf-") as cache:
        try:
            table = _load("text", path, cache, keep_linebreaks=True)
        except Exception as error:
            _find_fault(path)
            with _open(path) as file:
                if not file.read(1):  # `datasets` has no table without a row
                    return
            raise DataError(f"{path}: cannot be read: {error.__cause__ or error}") from None
        for number, row in enumerate(table, start=1):
            yield number, row["text"].removeprefix("\ufeff") if number == 1 else row["text"]


def _refuse_archive(path: Path) -> None:
    """`datasets` would unpack any archive, whatever its name, and read what lies in it; and gzip of any size."""
    from datasets.utils.extract import Extractor

    try:
        kind = Extractor.infer_extractor_format(path)
    except Exception:  # it looks into a .gz that is cut off, which is said elsewhere
        kind = "gzip"
    if kind not in ("", None, "gzip"):
        hint = "unpack it, and name the file that lies in it; of compressed files, .gz is read"
        raise DataError(f"{path}: a {kind} archive, expected text", hint)
    packed = path.stat().st_size
    if kind != "gzip" or packed * _DEFLATE_RATIO <= _UNPACKED_FREELY:
        return
    limit, unpacked = max(_UNPACKED_FREELY, packed * _PLAUSIBLE_RATIO), 0
    with suppress(EOFError, gzip.BadGzipFile, zlib.error), _unreadable(path), gzip.open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            unpacked += len(chunk)
            if unpacked > limit:
                hint = "text of that kind holds nothing to learn; if it is meant, unpack it and name the file"
                raise DataError(f"{path}: its {packed} bytes unpack to more than {limit}", hint)


def _find_fault(path: Path) -> None:
    """Raise DataError with the line at which the bytes of a file stop making sense, if they do."""
    number = 0
    try:
        with _unreadable(path), _open(path) as file:
            for line in file:
                number += 1
                line.decode("utf-8")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        message = f"{path}:{number + 1}: the gzip data is corrupt or cut off here: {error}"
        raise DataError(message, "fetch or compress the file again") from None
    except UnicodeDecodeError as error:
        message = (
            f"{path}:{number}: not UTF-8: byte 0x{error.object[error.start]:02x} at byte {error.start} of the line"
        )
        raise DataError(message, "save the file as UTF-8; a compressed file must end in .gz") from None


def _open(path: Path) -> IO[bytes]:
    if path.name.lower().endswith(".gz"):
        return cast(IO[bytes], gzip.open(path, "rb"))
    return path.open("rb")


def _json_lines(path: Path) -> Iterator[Row]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise _malformed(place, error) from None
        yield _row(place, value)


def _json(path: Path) -> Iterator[Row]:
    """A `.json` file: an array of records, or one record a line."""
    text = "".join(line for _, line in _lines(path))
    start = _skip_space(text, 0)
    if text[start : start + 1] == "[":
        yield from _json_array(path, text, start + 1)
    else:
        yield from _json_lines(path)


def _json_array(path: Path, text: str, position: int) -> Iterator[Row]:
    """Element by element, and not with `json.loads`, so that each row knows the line it starts on."""
    decoder = json.JSONDecoder()
    line = 1 + text.count("\n", 0, position)
    first = _skip_space(text, position)
    follows = "," if text[first : first + 1] != "]" else "]"
    position = first + 1 if follows == "]" else position
    while follows == ",":
        start = _skip_space(text, position)
        line += text.count("\n", position, start)
        try:
            value, end = decoder.raw_decode(text, start)
        except (ValueError, RecursionError) as error:
            raise _malformed(f"{path}:{getattr(error, 'lineno', line)}", error) from None
        yield _row(f"{path}:{line}", value)
        position = _skip_space(text, end)
        line += text.count("\n", start, position)
        follows = text[position : position + 1]
        if follows not in (",", "]"):
            found = repr(follows) if follows else "the end of the file"
            raise DataError(f"{path}:{line}: not JSON: found {found}, expected ',' or ']'", "mend the array")
        position += 1
    rest = _skip_space(text, position)
    if rest < len(text):
        place = f"{path}:{line + text.count(chr(10), position, rest)}"
        raise DataError(f"{place}: not JSON: found {text[rest]!r} after the array's end", "keep one array in the file")


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _malformed(place: str, error: Exception) -> DataError:
    what = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
    return DataError(f"{place}: not JSON: {what}", "mend it: .jsonl holds one object a line, .json may hold an array")


def _row(place: str, value: object) -> Row:
    if not isinstance(value, dict):
        hint = "one record is one {...}; an array of records goes in a .json file"
        raise DataError(f"{place}: found {type(value).__name__}, expected a JSON object", hint)
    return Row(place, {key: field for key, field in value.items() if field is not None})


# ---------------------------------------------------------------------------------------------------- datasets


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    import datasets

    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def _load(kind: str, path: Path, cache: str, **options: Any) -> Any:
    """A file as a table. `cache` is a folder of its own, gone afterwards: an altered file is always read anew."""
    import datasets

    with _no_progress_bars():
        return datasets.load_dataset(
            kind,
            # `data_files` takes patterns, so a name with [ or * in it has to be escaped.
            data_files=glob.escape(str(path.absolute())),
            split="train",
            cache_dir=cache,
            download_config=datasets.DownloadConfig(cache_dir=cache),
            keep_in_memory=True,
            **options,
        )


def _parquet_rows(path: Path) -> Iterator[Row]:
    with tempfile.TemporaryDirectory(prefix="rayrlhf-") as cache:
        try:
            table = _load("parquet", path, cache)
        except Exception as error:
            cause = error.__cause__ or error
            raise DataError(f"{path}: not a readable Parquet file: {cause}", "write or fetch the file again") from None
        yield from _table_rows(str(path), table)


def _table_rows(source: str, table: Any) -> Iterator[Row]:
    """As Arrow holds them: decoded by `datasets`, a column that says it holds images would open what its rows name."""
    number = 1
    for batch in table.with_format("arrow").iter(batch_size=1000):
        try:
            values = batch.to_pylist()
        except Exception:  # bytes that are no text, a date beyond the calendar: which row is it?
            values = [_value(f"{source}:{number + i}", batch.slice(i, 1)) for i in range(len(batch))]
        for value in values:
            yield _row(f"{source}:{number}", value)
            number += 1


def _value(place: str, row: Any) -> Any:
    try:
        return row.to_pylist()[0]
    except Exception as error:
        raise DataError(f"{place}: cannot be read: {error}", "mend the row, or leave the column out") from None


def _hub_rows(source: str) -> Iterator[Row]:
    import datasets

    match = _HUB_NAME.fullmatch(source)
    assert match is not None, "_locate() lets only hub names through"
    split = match["split"] or "train"
    try:
        with _no_progress_bars():
            table = datasets.load_dataset(match["name"], split=split)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        hint = "check the name, the split (org/name:split) and the network; or give a local file"
        raise DataError(f"{source}: cannot load split {split!r} of {match['name']}: {reason}", hint) from None
    yield from _table_rows(source, table)
