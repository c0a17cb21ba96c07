"""Artifacts: complete or not there, found by the hash of what went into them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayrlhf.checkpoint.artifacts import Artifact, ArtifactStore, content_key, hash_model_folder

KEY = "0123456789ab"


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path / "artifacts")


def finish(store: ArtifactStore, key: str = KEY, result: dict[str, object] | None = None) -> Artifact:
    workspace = store.workspace("sft", key)
    (workspace / "model").mkdir()
    (workspace / "model" / "weights").write_text("w", encoding="utf-8")
    return store.finish(workspace, "sft", key, {"seed": 0}, {"pretrain": "ba9876543210"}, result or {"loss": 1.5})


def test_a_finished_artifact_is_found_again_with_its_result_its_parents_and_its_files(store: ArtifactStore) -> None:
    finished = finish(store)
    found = store.find("sft", KEY)
    assert found == finished
    assert found.result == {"loss": 1.5}
    assert found.parents == {"pretrain": "ba9876543210"}
    assert found.folder == store.root / "sft-0123456789ab"
    assert (Path(found.model) / "weights").read_text(encoding="utf-8") == "w"


def test_the_record_on_disk_holds_stage_key_inputs_parents_and_result(store: ArtifactStore) -> None:
    record = json.loads((finish(store).folder / "artifact.json").read_text(encoding="utf-8"))
    assert record == {
        "stage": "sft",
        "key": "0123456789ab",
        "parents": {"pretrain": "ba9876543210"},
        "inputs": {"seed": 0},
        "result": {"loss": 1.5},
    }


def test_another_stage_or_another_key_is_not_found(store: ArtifactStore) -> None:
    assert store.find("sft", KEY) is None
    finish(store)
    assert store.find("reward", KEY) is None
    assert store.find("sft", "0123456789ac") is None


def test_a_stage_that_was_cut_off_is_not_found_and_leaves_nothing_to_the_next_attempt(store: ArtifactStore) -> None:
    workspace = store.workspace("sft", KEY)
    (workspace / "model").mkdir()
    (workspace / "artifact.json").write_text('{"result": {}, "parents": {}}', encoding="utf-8")
    assert store.find("sft", KEY) is None
    again = store.workspace("sft", KEY)
    assert again != workspace, "two runs may be at the same stage at once"
    assert list(again.iterdir()) == []


def test_finishing_leaves_no_partial_folder_behind(store: ArtifactStore) -> None:
    finish(store)
    assert [path.name for path in store.root.iterdir()] == ["sft-0123456789ab"]


def test_finishing_a_second_time_replaces_the_first(store: ArtifactStore) -> None:
    finish(store)
    finish(store, result={"loss": 0.5})
    found = store.find("sft", KEY)
    assert found is not None
    assert found.result == {"loss": 0.5}


@pytest.mark.parametrize("content", [b"", b"{", b'{"result": {}', b"\xff\xfe", b"null and more"])
def test_a_record_that_is_no_json_counts_as_not_there(store: ArtifactStore, content: bytes) -> None:
    (finish(store).folder / "artifact.json").write_bytes(content)
    assert store.find("sft", KEY) is None


def test_a_record_cut_off_anywhere_counts_as_not_there(store: ArtifactStore) -> None:
    file = finish(store).folder / "artifact.json"
    whole = file.read_bytes()
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        assert store.find("sft", KEY) is None


@pytest.mark.parametrize("content", ["{}", "[]", "null", '{"result": {}}'])
def test_a_record_without_its_fields_counts_as_not_there(store: ArtifactStore, content: str) -> None:
    (finish(store).folder / "artifact.json").write_text(content, encoding="utf-8")
    assert store.find("sft", KEY) is None


def test_a_folder_without_a_record_counts_as_not_there(store: ArtifactStore) -> None:
    (finish(store).folder / "artifact.json").unlink()
    assert store.find("sft", KEY) is None


# ---- keys


def test_a_content_key_is_twelve_hex_digits_that_never_change() -> None:
    assert content_key({}) == "44136fa355b3"  # SHA-256 of "{}"
    assert re.fullmatch("[0-9a-f]{12}", content_key({"a": [1, 2.5, None, {"b": Path("x")}]}))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=5), children, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(max_size=5), JSON, max_size=5))
def test_a_content_key_does_not_depend_on_the_order_of_the_inputs(inputs: dict[str, object]) -> None:
    assert content_key(dict(reversed(inputs.items()))) == content_key(inputs)


@given(st.dictionaries(st.text(max_size=5), JSON, max_size=5), st.integers())
def test_one_more_input_gives_another_content_key(inputs: dict[str, object], value: int) -> None:
    assert content_key(inputs | {"one more": value}) != content_key(inputs)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}", encoding="utf-8")
    (folder / "weights").write_bytes(b"\0" * 100)
    return folder


def test_the_hash_of_a_model_folder_stays_while_its_files_do_wherever_it_lies(model: Path) -> None:
    before = hash_model_folder(str(model))
    assert re.fullmatch("[0-9a-f]{12}", before)
    assert hash_model_folder(str(model.rename(model.with_name("moved")))) == before


def test_the_hash_of_a_model_folder_changes_with_one_byte_of_one_file(model: Path) -> None:
    before = hash_model_folder(str(model))
    (model / "weights").write_bytes(b"\0" * 99 + b"\1")
    assert hash_model_folder(str(model)) != before


def test_the_hash_of_a_model_folder_changes_with_a_file_more_or_another_name(model: Path) -> None:
    before = hash_model_folder(str(model))
    (model / "weights").rename(model / "other")
    renamed = hash_model_folder(str(model))
    (model / "added").touch()
    assert len({before, renamed, hash_model_folder(str(model))}) == 3


def test_a_model_that_is_no_folder_stands_for_itself_by_name() -> None:
    assert hash_model_folder("org/name") == "org/name"
