import gzip
import hashlib
import json
from pathlib import Path

import pytest

from rayrlhf.data.readers import (
    check_sources,
    fingerprint_sources,
    read_demonstrations,
    read_prompts,
    read_text,
)
from rayrlhf.data.sources import rows
from rayrlhf.errors import DataError
from rayrlhf.types import PretrainText


def write(path: Path, text: str) -> str:
    path.write_bytes(text.encode("utf-8"))
    return path.name


def write_parquet(path: Path, records: list[dict]) -> str:
    import datasets

    with path.open("wb") as file:
        datasets.Dataset.from_list(records).to_parquet(file)
    return path.name


def prompts_of(source: str, root: Path) -> list[str]:
    return [record.prompt[0][1] for record in read_prompts([source], root)]


# --- plain text


def test_documents_are_parted_by_lines_that_hold_only_the_separator(tmp_path):
    text = "one\n\nstill one <|endoftext|> inline\n<|endoftext|>\r\n\n  two\n<|endoftext|>\n \n<|endoftext|>\n"
    name = write(tmp_path / "a.txt", text)
    assert read_text([name], tmp_path) == [
        PretrainText("one\n\nstill one <|endoftext|> inline"),
        PretrainText("  two"),
    ]


def test_gzipped_text_reads_as_the_text_does(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress("é\n<|endoftext|>\nb".encode()))
    assert read_text(["a.txt.gz"], tmp_path) == [PretrainText("é"), PretrainText("b")]


def test_a_text_column_is_read_and_its_blank_rows_are_skipped(tmp_path):
    name = write(tmp_path / "a.jsonl", '{"text": "one"}\n{"text": ""}\n{"text": " two"}\n')
    assert read_text([name], tmp_path) == [PretrainText("one"), PretrainText(" two")]


def test_a_text_column_of_blanks_is_refused(tmp_path):
    name = write(tmp_path / "a.jsonl", '{"text": " "}\n')
    with pytest.raises(DataError, match=r"a\.jsonl: every `text` is blank"):
        read_text([name], tmp_path)


def test_a_text_file_with_no_text_is_refused(tmp_path):
    name = write(tmp_path / "a.txt", "\n<|endoftext|>\n\n")
    with pytest.raises(DataError, match=r"a\.txt: holds no text"):
        read_text([name], tmp_path)


def test_a_text_file_where_records_are_expected_is_refused(tmp_path):
    name = write(tmp_path / "a.txt", "hello")
    with pytest.raises(DataError, match=r"a\.txt: plain text where records are expected"):
        read_prompts([name], tmp_path)


# --- JSON lines


def test_blank_lines_count_as_lines_in_an_error(tmp_path):
    name = write(tmp_path / "a.jsonl", '{"prompt": "p"}\n\n  \n{"prompt": oops}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:4: not JSON: Expecting value at column 12"):
        read_prompts([name], tmp_path)


def test_a_line_separator_inside_a_string_does_not_cut_the_line(tmp_path):
    name = write(tmp_path / "a.jsonl", '{"prompt": "a\u2028b\x85c"}\n{"prompt": "d"}\n')
    assert prompts_of(name, tmp_path) == ["a\u2028b\x85c", "d"]


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"prompt": "p"}\r\n{"prompt": "q"}')
    assert prompts_of("a.jsonl", tmp_path) == ["p", "q"]


def test_texts_that_look_like_dates_stay_texts(tmp_path):
    name = write(tmp_path / "a.jsonl", '{"prompt": "when?", "response": "2020-01-01"}\n')
    assert read_demonstrations([name], tmp_path)[0].response == "2020-01-01"


def test_a_line_that_is_no_object_names_the_line(tmp_path):
    name = write(tmp_path / "a.jsonl", '{"prompt": "p"}\n["prompt"]\n')
    with pytest.raises(DataError, match=r"a\.jsonl:2: found list, expected a JSON object"):
        read_prompts([name], tmp_path)


def test_json_nested_too_deeply_names_the_line(tmp_path):
    name = write(tmp_path / "a.jsonl", "[" * 100_000 + "\n")
    with pytest.raises(DataError, match=r"a\.jsonl:1: not JSON"):
        read_prompts([name], tmp_path)


def test_a_line_that_is_not_utf8_is_named_with_the_byte(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"prompt": "p"}\n\n{"prompt": "caf\xe9"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:3: not UTF-8: byte 0xe9 at byte 15 of the line\n  hint: save"):
        read_prompts(["a.jsonl"], tmp_path)


def test_a_text_that_is_not_utf8_is_named_with_its_line(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"fine\n\xff\n")
    with pytest.raises(DataError, match=r"a\.txt:2: not UTF-8"):
        read_text(["a.txt"], tmp_path)


def test_a_gzip_file_cut_off_is_named_with_the_line(tmp_path):
    whole = gzip.compress(b'{"prompt": "p"}\n' * 3)
    (tmp_path / "a.jsonl.gz").write_bytes(whole[:-6])
    with pytest.raises(DataError, match=r"a\.jsonl\.gz:4: the gzip data is corrupt or cut off here: .*\n  hint: fetch"):
        read_prompts(["a.jsonl.gz"], tmp_path)


def test_a_gzip_file_with_altered_bytes_is_named(tmp_path):
    whole = bytearray(gzip.compress(b"".join(b'{"prompt": "p%d"}\n' % i for i in range(2000))))
    whole[len(whole) // 2] ^= 0xFF
    (tmp_path / "a.jsonl.gz").write_bytes(bytes(whole))
    with pytest.raises(DataError, match=r"a\.jsonl\.gz:\d+: "):
        read_prompts(["a.jsonl.gz"], tmp_path)


def test_a_file_that_only_claims_to_be_gzip_is_named(tmp_path):
    write(tmp_path / "a.jsonl.gz", '{"prompt": "p"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl\.gz:1: the gzip data is corrupt"):
        read_prompts(["a.jsonl.gz"], tmp_path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
@pytest.mark.parametrize("text", ["", "\n \n"])
def test_an_empty_file_is_refused(tmp_path, name, text):
    write(tmp_path / name, text)
    with pytest.raises(DataError, match=r"a\.jsonl?: holds no records"):
        read_prompts([name], tmp_path)


def test_a_file_that_cannot_be_opened_is_named(tmp_path, monkeypatch):
    name = write(tmp_path / "a.jsonl", '{"prompt": "p"}\n')

    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(DataError, match=r"a\.jsonl: cannot be read: Permission denied"):
        read_prompts([name], tmp_path)
    with pytest.raises(DataError, match=r"a\.jsonl: cannot be read: Permission denied"):
        fingerprint_sources([name], tmp_path)


# --- JSON arrays


def test_a_json_array_gives_each_record_the_line_it_starts_on(tmp_path):
    name = write(tmp_path / "a.json", '\n[{"a": 1},\n\n {"a":\n 2}\n , {"a": null}]\n')
    found = [(row.place, row.fields) for row in rows(name, tmp_path)]
    path = tmp_path / "a.json"
    assert found == [(f"{path}:2", {"a": 1}), (f"{path}:4", {"a": 2}), (f"{path}:6", {})]


def test_a_json_file_may_hold_one_record_a_line(tmp_path):
    name = write(tmp_path / "a.json", '{"prompt": "p"}\n{"prompt": "q"}\n')
    assert prompts_of(name, tmp_path) == ["p", "q"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"a": 1}\n{"a": 2}]', r"a\.json:2: not JSON: found '\{', expected ',' or '\]'"),
        ('[{"a": 1}\n\n', r"a\.json:3: not JSON: found the end of the file, expected"),
        ('[{"a": 1},\n]', r"a\.json:2: not JSON: Expecting value"),
        ('[{"a": 1},\n{"a": x}]', r"a\.json:2: not JSON: Expecting value at column 7"),
        ('[{"a": 1}]\n\n[]', r"a\.json:3: not JSON: found '\[' after the array's end"),
        ("[\n3]", r"a\.json:2: found int, expected a JSON object"),
        ("[\n]", r"a\.json: holds no records"),
    ],
)
def test_a_broken_json_array_names_the_line(tmp_path, text, message):
    name = write(tmp_path / "a.json", text)
    with pytest.raises(DataError, match=message):
        list(rows(name, tmp_path))


# --- Parquet and hub datasets


def test_parquet_reads_as_json_does_with_nulls_left_out(tmp_path):
    records = [
        {"prompt": "p", "response": "r", "source": "s", "messages": None},
        {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]},
    ]
    name = write_parquet(tmp_path / "odd [1]*.parquet", records)
    write(tmp_path / "a.jsonl", "".join(json.dumps(record) + "\n" for record in records))
    assert read_demonstrations([name], tmp_path) == read_demonstrations(["a.jsonl"], tmp_path)


def test_an_altered_parquet_file_is_read_anew_and_errors_name_the_row(tmp_path):
    name = write_parquet(tmp_path / "a.parquet", [{"prompt": "old"}])
    assert prompts_of(name, tmp_path) == ["old"]
    write_parquet(tmp_path / "a.parquet", [{"prompt": "new"}, {"prompt": " "}])
    with pytest.raises(DataError, match=r"a\.parquet:2: `prompt` is empty"):
        read_prompts([name], tmp_path)


def test_a_broken_parquet_file_is_named_and_progress_bars_come_back(tmp_path):
    import datasets

    datasets.enable_progress_bars()
    name = write(tmp_path / "a.parquet", "no parquet")
    with pytest.raises(DataError, match=r"a\.parquet: not a readable Parquet file: .*"):
        read_prompts([name], tmp_path)
    assert datasets.is_progress_bar_enabled()


@pytest.mark.parametrize(("source", "split"), [("org/name", "train"), ("org/name-2.1:test[:5%]", "test[:5%]")])
def test_a_hub_name_loads_its_split(monkeypatch, source, split):
    import datasets

    calls = []

    def load(name: str, split: str) -> datasets.Dataset:
        calls.append((name, split))
        return datasets.Dataset.from_list([{"prompt": "p", "id": 1}, {"prompt": None, "id": 2}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(DataError) as caught:
        read_prompts([source], None)
    assert calls == [(source.split(":")[0], split)]
    missing = "`prompt` is missing or null, expected a string or a list of turns; found the fields id"
    assert caught.value.message == f"{source}:2: {missing}"


def test_a_hub_dataset_that_does_not_load_says_why(monkeypatch):
    import datasets

    def load(name: str, split: str) -> None:
        raise ValueError('Unknown split "tst"')

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(DataError, match=r'cannot load split \'tst\' of org/name: ValueError: Unknown split "tst"'):
        read_prompts(["org/name:tst"], None)


# --- finding and fingerprints


def test_absolute_names_ignore_the_root_and_relative_ones_without_a_root_start_here(tmp_path, monkeypatch):
    name = write(tmp_path / "a.jsonl", '{"prompt": "p"}\n')
    assert prompts_of(str(tmp_path / name), Path("/nowhere")) == ["p"]
    monkeypatch.chdir(tmp_path)
    assert [record.prompt for record in read_prompts([name], None)] == [(("user", "p"),)]


def test_every_missing_file_is_named_with_its_key_and_the_nearest_name(tmp_path):
    write(tmp_path / "prompts.jsonl", "{}")
    write(tmp_path / "rankings.jsonl.gz", "")
    sources = {
        "data.prompts": ["prompts.jsonl", "org/name", "org/name:test"],
        "data.rankings": ["ranking.jsonl"],
        "data.text": ["away/a.txt"],
    }
    with pytest.raises(DataError) as caught:
        check_sources(sources, tmp_path)
    assert caught.value.message.splitlines() == [
        f"data.rankings: no such file: {tmp_path}/ranking.jsonl (did you mean rankings.jsonl.gz?)",
        f"data.text: no such file: {tmp_path}/away/a.txt (the folder {tmp_path}/away does not exist)",
    ]
    assert "data.root" in caught.value.hint
    assert "RAYRLHF_HUMAN_DATA" in caught.value.hint


def test_only_a_name_that_is_alike_is_suggested(tmp_path):
    write(tmp_path / "Makefile", "")
    with pytest.raises(DataError, match=r"prompts\.jsonl\.gz \(no file there has a name like it\)"):
        check_sources({"data.prompts": ["prompts.jsonl.gz"]}, tmp_path)


def test_a_missing_file_in_an_empty_folder_says_so(tmp_path):
    with pytest.raises(DataError, match="holds no files"):
        check_sources({"data.text": ["a.txt"]}, tmp_path)


def test_a_folder_with_a_files_name_is_told(tmp_path):
    (tmp_path / "a.jsonl").mkdir()
    with pytest.raises(DataError, match="it is a folder"):
        check_sources({"data.text": ["a.jsonl"]}, tmp_path)


def test_what_exists_passes_the_check(tmp_path):
    write(tmp_path / "A.JSONL", "{}")
    check_sources({"data.prompts": ["A.JSONL", "org/name"], "data.text": []}, tmp_path)


@pytest.mark.parametrize("source", ["data.csv", "a/b/c", "folder/table", "org/name:"])
def test_what_is_neither_file_nor_hub_name_is_refused(tmp_path, source):
    (tmp_path / "folder").mkdir()
    write(tmp_path / "folder" / "table", "")
    with pytest.raises(DataError, match=r"not a data source: .*\n  hint: .*give a file \(\.jsonl|not a data source"):
        read_prompts([source], tmp_path)


def test_a_missing_file_is_a_data_error_when_read_too(tmp_path):
    with pytest.raises(DataError, match=r"no such file: .*gone\.jsonl"):
        read_prompts(["gone.jsonl"], tmp_path)


def test_a_fingerprint_is_the_hash_of_the_bytes_and_a_hub_name_stands_for_itself(tmp_path):
    content = "x" * 3_000_000
    name = write(tmp_path / "a.txt", content)
    assert fingerprint_sources([name, "org/name:test"], tmp_path) == {
        "a.txt": hashlib.sha256(content.encode()).hexdigest(),
        "org/name:test": "org/name:test",
    }


def test_importing_the_readers_imports_no_heavy_library():
    import subprocess
    import sys

    heavy = "{'torch', 'datasets', 'transformers', 'tokenizers', 'ray'}"
    modules = "readers, split, chat, tokenizer, prompts, batching"
    code = f"import sys; from rayrlhf.data import {modules}; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
