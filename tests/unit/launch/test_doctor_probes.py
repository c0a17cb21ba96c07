"""Probes on this machine: what they measure is what is there, and they leave nothing behind."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from rayrlhf.config import Config, config_from
from rayrlhf.launch.doctor import probes
from rayrlhf.launch.doctor.facts import GPU, Place, Wanted
from rayrlhf.launch.doctor.wanted import checkpoints_gib, wanted, why_no_data, why_no_models

# In /proc nobody can make a file, root neither.
UNWRITABLE = "/proc/rayrlhf"


def test_this_machine_has_the_tested_versions_and_shared_memory() -> None:
    machine = probes.measure_machine()
    assert machine.versions["ray"] == "2.60.0"
    assert machine.shm_total_gib >= machine.shm_free_gib > 0
    assert machine.open_files is None or machine.open_files > 100


def test_gpus_are_read_as_the_driver_lists_them() -> None:
    listed = "NVIDIA H100 80GB HBM3, 81559, 570.86.15\nNVIDIA H100 80GB HBM3, 81559, 570.86.15\n"
    assert probes.read_gpus(listed) == (GPU("NVIDIA H100 80GB HBM3", 81559 / 1024, "570.86.15"),) * 2
    assert probes.read_gpus("") == ()
    assert probes.read_gpus("No devices were found\n") == ()


def test_a_folder_that_takes_files_is_measured_and_left_as_it_was(tmp_path: Path) -> None:
    storage = probes.measure_storage(str(tmp_path / "not" / "yet"))
    assert storage.folder == str(tmp_path)
    assert storage.problem == ""
    assert storage.free_gib > 0
    assert storage.write_mib_per_s > 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("output", [UNWRITABLE, "/etc/passwd/runs"])
def test_a_place_that_takes_no_file_is_named_with_the_reason(output: str) -> None:
    storage = probes.measure_storage(output)
    assert storage.folder == str(Path(output).parent)
    assert storage.problem in ("No such file or directory", "Not a directory", "Permission denied")
    with pytest.raises(OSError):
        probes.leave_file(output, "x")


def test_a_full_disk_is_not_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes.shutil, "disk_usage", lambda _: type("", (), {"free": 2**20})())
    monkeypatch.setattr(probes, "_write_speed", lambda _: pytest.fail("it was written to"))
    assert probes.measure_storage(str(tmp_path)).free_gib == 2**-10


def test_a_file_is_seen_as_it_was_written_or_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "SEEN_S", 0.0)
    path = Path(probes.leave_file(str(tmp_path / "runs"), "mark"))
    assert path.parent == tmp_path
    assert probes.look_for_file(str(path), "mark") == ""
    assert probes.look_for_file(str(path), "other") == "another one"
    probes.remove_file(str(path))
    assert probes.look_for_file(str(path), "mark") == "not there"
    assert probes.look_for_file(str(tmp_path), "mark") == "not readable (Is a directory)"


def model(folder: Path, *files: str) -> str:
    folder.mkdir()
    for name in files:
        (folder / name).touch()
    return str(folder)


def test_models_are_found_or_said_what_is_missing(tmp_path: Path) -> None:
    whole = model(tmp_path / "whole", "config.json")
    save_file({"w": np.zeros(1)}, Path(whole) / "model.safetensors")
    bare, no_weights = model(tmp_path / "bare"), model(tmp_path / "no-weights", "config.json")
    asked = {"a": whole, "b": bare, "c": no_weights, "d": str(tmp_path / "none")}
    found = {p.key: p.where or p.problem for p in probes.measure_inputs(Wanted("", models=asked)).models}
    assert found == {
        "a": "folder",
        "b": "the folder has no config.json",
        "c": f"{no_weights}: holds no weights (model.safetensors, or model.safetensors.index.json and its shards)",
        "d": "no such folder",
    }


def hub(monkeypatch: pytest.MonkeyPatch, cache: Path, offline: bool, says: Exception | None) -> None:
    from huggingface_hub import HfApi, constants

    def repo_info(*_: Any, **__: Any) -> None:
        if says:
            raise says

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(HfApi, "repo_info", repo_info)


def test_hub_names_are_looked_for_in_the_cache_then_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Wanted("", models={"model.path": "org/name"}, data={"data.prompts": ("org/p:train",)}, data_root="/")
    hub(monkeypatch, tmp_path, False, None)
    inputs = probes.measure_inputs(asked)
    assert inputs.models == (Place("model.path", "org/name", "hub"),)
    assert inputs.data == (Place("data.prompts", "org/p:train", "hub"),)
    hub(monkeypatch, tmp_path, True, None)
    assert probes.measure_inputs(asked).models[0].problem == "not in the cache, and HF_HUB_OFFLINE is set"
    for name in ("models--org--name", "datasets--org--p"):
        (tmp_path / name / "snapshots" / "0123").mkdir(parents=True)
    begun = probes.measure_inputs(asked)  # a download that ended before its first file
    assert {p.problem for p in (*begun.models, *begun.data)} == {"not in the cache, and HF_HUB_OFFLINE is set"}
    for name in ("models--org--name", "datasets--org--p"):
        (tmp_path / name / "snapshots" / "0123" / "config.json").touch()
    inputs = probes.measure_inputs(asked)
    assert [p.where for p in (*inputs.models, *inputs.data)] == ["cache", "cache"]


def test_no_secret_of_a_hub_error_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub(monkeypatch, tmp_path, False, ConnectionError("https://me:hf_secret@proxy refused"))
    [place] = probes.measure_inputs(Wanted("", models={"model.path": "org/name"})).models
    assert place.problem == "not in the cache, and the hub says ConnectionError"


def test_a_missing_data_file_is_told_in_the_readers_words(tmp_path: Path) -> None:
    asked = Wanted("", data={"data.prompts": ("p.jsonl",)}, data_root=str(tmp_path))
    assert probes.measure_inputs(asked).data_problem.startswith(f"data.prompts: no such file: {tmp_path}/p.jsonl")
    (tmp_path / "p.jsonl").touch()
    assert probes.measure_inputs(asked).data_problem == ""


def config(**sections: Any) -> Config:
    return config_from({"world": {"name": "instructions"}, **sections}, environ={})


SCRATCH: dict[str, Any] = {"from_scratch": {"vocab_size": 1024, "hidden_size": 64, "layers": 2, "heads": 2}}


def test_a_config_asks_for_its_folders_by_their_full_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m").mkdir()
    tree = {"run": {"stages": ["ppo"]}, "model": {"path": "org/name"}, "data": {"prompts": "p.jsonl", "root": "d"}}
    asked = wanted(config_from({**tree, "sft": {"path": "m"}, "reward": {"path": "org/judge"}}, environ={}))
    assert asked.output == str(tmp_path / "runs")
    assert asked.models == {"model.path": "org/name", "sft.path": str(tmp_path / "m"), "reward.path": "org/judge"}
    assert asked.data == {"data.prompts": ("p.jsonl",)}
    assert asked.data_root == str(tmp_path / "d")


def test_why_there_is_no_model_or_data_to_look_for() -> None:
    scratch, named = config(model=SCRATCH), config(model={"path": "org/name"}, data={"prompts": ["p.jsonl"]})
    assert why_no_models(scratch) == "model.from_scratch: the run makes its own"
    assert why_no_data(scratch) == "world instructions writes it"
    assert (why_no_models(named), why_no_data(named)) == ("", "")


def test_a_models_folder_that_may_not_be_looked_into_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m").mkdir()
    monkeypatch.setattr(probes.os, "access", lambda path, _: path != tmp_path / "m")  # root may look into all
    inputs = probes.measure_inputs(Wanted("", {"model.path": str(tmp_path / "m")}))
    assert inputs.models == (Place("model.path", str(tmp_path / "m"), problem="the folder cannot be read"),)


def test_room_for_checkpoints_follows_from_the_models_size(tmp_path: Path) -> None:
    stages = {"name": "x", "stages": ["ppo"]}
    # 64 * 1024 embeddings + 2 layers of 4 * 64^2 + 8 * 64^2 = 163,840 parameters; two learners of three checkpoints.
    made = config(
        model=SCRATCH, run={**stages, "stages": ["pretrain", "sft", "reward", "ppo"]}, checkpoint={"every": 5}
    )
    assert checkpoints_gib(made) == pytest.approx(163_840 * (2 * 3 * 16 + 5 * 4) / 2**30, rel=0.01)
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(bytes(2000))
    (folder / "config.json").write_text('{"dtype": "bfloat16"}')
    given = config(model={"path": str(folder)}, sft={"path": str(folder)}, reward={"path": str(folder)}, run=stages)
    assert checkpoints_gib(given) == 1000 * (2 * 4) / 2**30
    assert checkpoints_gib(config(model={"path": "org/name"})) is None
    assert os.listdir(tmp_path) == ["m"]
