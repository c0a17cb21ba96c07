"""Checkpoints are whole or they are not used, whatever has happened to them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import xxhash

from rayrlhf.checkpoint import store as store_module
from rayrlhf.checkpoint.store import CheckpointStore

STATE, INPUTS = {"kl_coef": 0.125}, {"sections": {"ppo": {"clip": 0.2}}}


def save(store: CheckpointStore, step: int, score: float | None = None) -> Path:
    folder = store.begin(step)
    (folder / "state" / "policy").mkdir(parents=True)
    (folder / "state" / "policy" / "state-0.safetensors").write_bytes(bytes(range(256)) * step)
    (folder / "model.txt").write_text(f"step {step}")
    return store.finish(step, STATE, INPUTS, score)


def steps(store: CheckpointStore) -> list[int]:
    return sorted(int(folder.name.removeprefix("step-")) for folder in store.root.glob("step-*"))


def test_the_newest_comes_back_with_all_that_was_said_of_it(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 9)
    save(store, 10)
    found = CheckpointStore(tmp_path).newest()
    assert found is not None
    assert (found.step, found.folder) == (10, tmp_path / "step-000010")
    assert (found.state, found.inputs) == (STATE, INPUTS)
    manifest = json.loads((found.folder / "manifest.json").read_text())
    assert manifest["files"]["model.txt"][0] == len("step 10")
    assert sorted(manifest["files"]) == ["model.txt", "state/policy/state-0.safetensors"]


def test_where_there_is_none_nothing_is_found(tmp_path: Path) -> None:
    assert CheckpointStore(tmp_path / "never").newest() is None


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("spoil", [cut_short, flipped, Path.unlink], ids=["cut short", "one bit", "missing"])
def test_a_spoilt_file_is_found_and_the_checkpoint_before_is_used(
    tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 1)
    spoil(save(store, 2) / "state" / "policy" / "state-0.safetensors")
    found = store.newest()
    assert found is not None
    assert found.step == 1
    (reason,) = store.damaged
    assert "step-000002/state/policy/state-0.safetensors" in reason


@pytest.mark.parametrize("text", ["", "{", '{"step": 2}', "[]"])
def test_a_manifest_that_cannot_be_read_is_no_checkpoint(tmp_path: Path, text: str) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 1)
    (save(store, 2) / "manifest.json").write_text(text)
    found = store.newest()
    assert found is not None
    assert found.step == 1
    assert "step-000002" in store.damaged[0]


def test_a_save_that_breaks_off_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 1)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    for name in ("_sized", "flush_tree"):
        with monkeypatch.context() as patch:
            patch.setattr(store_module, name, full)
            with pytest.raises(OSError, match="No space left"):
                save(store, 2)
        found = store.newest()
        assert found is not None
        assert found.step == 1
        assert store.damaged == []


def test_a_step_that_is_saved_again_replaces_itself(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    folder = save(store, 3)
    (folder / "model.txt").write_text("altered")
    save(store, 3)
    assert store.newest() is not None
    assert steps(store) == [3]


def test_the_newest_stay_and_the_best_beside_them(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2, keep_best=1)
    for step, score in enumerate([0.1, 0.9, 0.5, None, 0.2], start=1):
        save(store, step, score)
    assert steps(store) == [2, 4, 5]


def test_a_checkpoint_can_be_moved(tmp_path: Path) -> None:
    save(CheckpointStore(tmp_path / "here"), 4)
    shutil.move(tmp_path / "here", tmp_path / "there")
    found = CheckpointStore(tmp_path / "there").newest()
    assert found is not None
    assert found.step == 4


def test_a_damaged_newer_one_does_not_take_the_place_of_the_next(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    save(store, 5)
    shutil.copytree(tmp_path / "step-000005", tmp_path / "step-000010")
    cut_short(tmp_path / "step-000010" / "model.txt")
    found = store.newest()
    assert found is not None
    store.set_aside(found.step)
    save(store, 7)
    assert steps(store) == [7]
    assert (tmp_path / "damaged-step-000010").is_dir()


def test_what_a_save_that_broke_off_left_goes_with_the_next(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    store.begin(3)
    save(store, 4)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000004"]


def rewritten(folder: Path, **fields: object) -> None:
    """By somebody who knows how a manifest is hashed."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text()) | fields
    del manifest["hash"]
    manifest["hash"] = xxhash.xxh3_128(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(manifest))


@pytest.mark.parametrize("fields", [{"state": {"kl_coef": 0.9}}, {"files": {}}, {"inputs": {}}, {"hash": "0" * 32}])
def test_a_manifest_that_was_altered_is_found_by_its_own_hash(tmp_path: Path, fields: dict[str, object]) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 4)
    path = save(store, 5) / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    found = store.newest()
    assert found is not None
    assert found.step == 4
    assert "manifest cannot be read (it is not what was saved)" in store.damaged[0]


def named(name: str) -> dict[str, object]:
    """A manifest that names /etc/passwd or the like, with the right size and hash."""
    return {"files": {name: [len("secret"), xxhash.xxh3_128(b"secret").hexdigest()]}}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (lambda outside: named("../../outside"), "lies outside"),
        (lambda outside: named(str(outside)), "lies outside"),
        (lambda outside: named("link"), "lies outside"),
        (lambda outside: named("linked_folder/outside"), "lies outside"),
        (lambda outside: {"files": ["model.txt"]}, "files is no object"),
        (lambda outside: {"files": {"model.txt": 3}}, "cannot be read"),
        (lambda outside: {"files": {"model.txt": ["6", 7]}}, "has no size and hash"),
        (lambda outside: {"files": {"x" * 5000: [1, "0"]}}, "cannot be read"),
        (lambda outside: {"files": {"a\0b": [1, "0"]}}, "is missing"),
        (lambda outside: {"step": 10**400}, "its step is 1000"),
        (lambda outside: {"step": "5"}, "its step is 5"),
        (lambda outside: {"step": 5.0}, "its step is 5.0"),
        (lambda outside: {"step": 4}, "its step is 4"),
        (lambda outside: {"state": [1]}, "state is no object"),
        (lambda outside: {"state": {"kl_coef": float("nan")}}, "kl_coef of the state is no number"),
        (lambda outside: {"state": {"text_drawn": 10**400}}, "text_drawn of the state is no number"),
        (lambda outside: {"inputs": None}, "inputs is no object"),
    ],
)
def test_a_manifest_that_lies_is_passed_over_and_nothing_outside_is_taken(
    tmp_path: Path, fields: Callable[[Path], dict[str, object]], words: str
) -> None:
    outside = tmp_path / "outside"
    outside.write_text("secret")
    store = CheckpointStore(tmp_path / "checkpoints")
    save(store, 4)
    folder = save(store, 5)
    (folder / "link").symlink_to(outside)
    (folder / "linked_folder").symlink_to(tmp_path)
    rewritten(folder, **fields(outside))
    found = store.newest()
    assert found is not None
    assert found.step == 4
    assert words in store.damaged[0]


@pytest.mark.parametrize("text", ["", "[]", "null", "7", "{}", "[" * 100_000, "\ud800"])
def test_a_manifest_of_junk_is_passed_over_and_does_not_stop_the_next_save(tmp_path: Path, text: str) -> None:
    store = CheckpointStore(tmp_path, keep=1, keep_best=2)
    save(store, 4, score=1.0)
    (save(store, 5, score=2.0) / "manifest.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    (tmp_path / "step-of-another").mkdir()
    found = store.newest()
    assert found is not None
    assert (found.step, len(store.damaged)) == (4, 1)
    save(store, 6, score=0.5)
    assert store.newest() is not None


def test_a_run_of_a_million_steps_goes_on_from_its_newest(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 1)
    (tmp_path / "step-000001").rename(tmp_path / "step-999999")
    rewritten(tmp_path / "step-999999", step=999_999)
    save(store, 2)
    (tmp_path / "step-000002").rename(tmp_path / "step-1000000")
    rewritten(tmp_path / "step-1000000", step=1_000_000)
    found = store.newest()
    assert found is not None
    assert found.step == 1_000_000
