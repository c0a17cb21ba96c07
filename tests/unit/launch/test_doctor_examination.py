"""What is asked of whom, and the command: with stand-ins for Ray, every failure costs its own line and no other."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rayrlhf import cli
from rayrlhf.config import Config, load_config
from rayrlhf.errors import ResourceError
from rayrlhf.launch.doctor import asking, examination, probes
from rayrlhf.launch.doctor.facts import GPU, Clock, Machine, Node, Published, Reduced, Started
from rayrlhf.launch.doctor.findings import Answers, Finding
from rayrlhf.launch.doctor.outposts import Outpost, clock_of
from rayrlhf.launch.doctor.show import as_json, summary

ROOT = Path(__file__).parents[3]
TINY = ROOT / "configs" / "tiny.yaml"


def row(key: str, address: str, alive: bool = True, **resources: float) -> dict[str, Any]:
    return {"NodeID": key, "NodeManagerAddress": address, "Alive": alive, "Resources": resources}


def test_nodes_that_are_up_are_listed_this_one_first() -> None:
    table = [row("1111111", "10.0.0.2", GPU=8.0), row("2222222", "10.0.0.1", CPU=4.0, object_store_memory=2**31)]
    here, other = asking.list_nodes([*table, row("3", "10.0.0.3", alive=False)], "2222222")
    assert here == Node("10.0.0.1", "2222222", "10.0.0.1", 4.0, 0.0, 2.0, True)
    assert (other.name, other.gpus, other.here) == ("10.0.0.2", 8.0, False)


def test_nodes_with_one_address_are_told_apart() -> None:
    nodes = asking.list_nodes([row("aaaaaaaa", "127.0.0.1"), row("bbbbbbbb", "127.0.0.1")], "bbbbbbbb")
    assert [node.name for node in nodes] == ["127.0.0.1 (bbbbbb)", "127.0.0.1 (aaaaaa)"]


def test_the_first_line_of_a_remote_error_is_told() -> None:
    assert asking.named(ValueError("no\nmore")) == "ValueError: no"
    assert asking.named(TimeoutError()) == "TimeoutError"


def test_one_that_hangs_and_one_that_fails_do_not_keep_the_others_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    def get(ref: str, timeout: float) -> str:
        if ref == "broken":
            raise ModuleNotFoundError("No module named 'rayrlhf'")
        return ref.upper()

    fake = SimpleNamespace(wait=lambda refs, num_returns, timeout: (["fine", "broken"], ["hangs"]), get=get)
    monkeypatch.setattr(asking, "ray", fake)
    answers = asking.collect({"a": "fine", "b": "broken", "c": "hangs"}, 7.0)
    assert answers.given == {"a": "FINE"}
    assert answers.failed == {"b": "ModuleNotFoundError: No module named 'rayrlhf'", "c": "no answer within 7 s"}
    assert asking.collect({}, 7.0) == Answers({}, {})


def test_the_quickest_ping_tells_the_clock() -> None:
    # 10 s ahead; the first took a second, all of it on the way back
    assert clock_of([(100.0, 110.0, 101.0), (200.0, 210.05, 200.1)]) == Clock(pytest.approx(10.0), pytest.approx(0.05))


def test_an_outpost_reaches_an_open_port_and_not_a_closed_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from rayrlhf.launch.doctor import outposts

    monkeypatch.setattr(outposts.ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    outpost = Outpost()
    door, closed = outpost.listen(), outpost.meeting_place()
    unreached = outpost.reach({"a": door, "b": closed})
    assert unreached == {"b": f"127.0.0.1:{closed[1]}: Connection refused"}
    assert abs(outpost.now() - time.time()) < 5
    outpost._door.close()


VERSIONS = probes.installed_versions()
FINE = Machine(VERSIONS, shm_total_gib=8.0, shm_free_gib=8.0, open_files=65536)


class Cluster:
    """Two nodes; what each probe answers can be set by the test."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.machines: Answers[Machine] = Answers({"a": FINE, "b": FINE})
        self.asked: list[tuple[str, list[str]]] = []
        self.published: Published | None = Published(0.1, 1.0, 64, 32)
        self.started, self.left = Started(3.0, "cpu"), False
        nodes = [Node("a", "1", "a", 4, 0, 2.0, True), Node("b", "2", "b", 4, 0, 2.0)]
        ray = SimpleNamespace(
            __version__="2.60.0",
            nodes=list,
            get_runtime_context=lambda: SimpleNamespace(get_node_id=lambda: "1"),
        )
        monkeypatch.setattr(examination, "ray", ray)
        monkeypatch.setattr(examination, "join", lambda *_: None)
        monkeypatch.setattr(examination, "resources_of_nodes", lambda: [{"CPU": 4.0}] * 2)
        monkeypatch.setattr(examination, "disconnect", self._leave)
        monkeypatch.setattr(examination, "list_nodes", lambda *_: nodes)
        monkeypatch.setattr(examination, "ask", self._ask)
        monkeypatch.setattr(examination, "Outposts", self._outposts)
        monkeypatch.setattr(examination, "all_reduce", self._all_reduce)
        toy = SimpleNamespace(start_and_publish=lambda *_: (self.started, self.published))
        monkeypatch.setitem(sys.modules, "rayrlhf.launch.doctor.toy", toy)

    def _leave(self) -> None:
        self.left = True

    def _ask(self, nodes: list[Node], function: Any, *arguments: Any, timeout_s: float) -> Answers[Any]:
        self.asked.append((function.__name__, [node.name for node in nodes]))
        if function is probes.measure_machine:
            return self.machines
        try:
            return Answers({node.name: function(*arguments) for node in nodes})
        except OSError as error:
            return Answers({}, {node.name: str(error) for node in nodes})

    def _outposts(self, nodes: list[Node]) -> Any:
        return SimpleNamespace(
            clocks=lambda: Answers({node.name: Clock(0.0, 0.001) for node in nodes}),
            ports=lambda: Answers({node.name: {} for node in nodes}),
            close=lambda: None,
        )

    def _all_reduce(self, backend: str, nodes: list[Node]) -> Answers[Reduced]:
        return Answers({str(i): Reduced(1.0, True) for i, _ in enumerate(nodes)})


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    return Cluster(monkeypatch)


def tiny(output: Path) -> Config:
    return load_config(TINY, [f"run.output={output}"], environ={})


def examine(config: Config | None, quick: bool = False, address: str | None = None) -> dict[str, Finding]:
    findings = examination.examine(config, address, quick, lambda _: None)
    assert tuple(f.name for f in findings) == examination.NAMES
    return {f.name: f for f in findings}


def test_a_cluster_that_is_well_passes_every_check(cluster: Cluster, tmp_path: Path) -> None:
    found = examine(tiny(tmp_path))
    assert {name for name, f in found.items() if f.status == "skipped"} == {"GPUs", "model", "data", "NCCL"}
    assert {f.status for f in found.values()} <= {"pass", "skipped", "warn"}
    assert found["checkpoint path"].status in ("pass", "warn")
    assert found["shared files"].status == "pass"
    assert list(tmp_path.iterdir()) == []
    assert cluster.left


def test_a_node_that_does_not_answer_is_named_once_and_asked_no_more(cluster: Cluster, tmp_path: Path) -> None:
    cluster.machines = Answers({"a": FINE}, {"b": "no answer within 90 s"})
    found = examine(tiny(tmp_path))
    assert [name for name, f in found.items() if f.status == "fail"] == ["nodes"]
    assert found["nodes"].found == "b: no answer within 90 s"
    assert cluster.asked[0] == ("measure_machine", ["a", "b"])
    assert {tuple(nodes) for _, nodes in cluster.asked[1:]} == {("a",)}


def test_where_no_node_answers_the_rest_is_skipped(cluster: Cluster, tmp_path: Path) -> None:
    cluster.machines = Answers({}, {"a": "no answer", "b": "no answer"})
    found = examine(tiny(tmp_path))
    assert found["nodes"].status == "fail"
    assert found["clock"] == Finding("clock", "skipped", "no node answers")


def test_without_a_config_what_needs_one_is_skipped_with_the_reason(cluster: Cluster) -> None:
    found = examine(None)
    without = {name for name, f in found.items() if f.found == "no CONFIG was given"}
    assert without == {"resources", "checkpoint path", "shared files", "model", "data"}
    assert found["publish"].status == "pass"


def test_gpus_of_several_nodes_sum_over_nccl_and_nodes_without_are_left_out(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = [Node("a", "1", "a", 4, 8, 2.0, True), Node("b", "2", "b", 4, 0, 2.0), Node("c", "3", "c", 4, 8, 2.0)]
    asked: dict[str, list[str]] = {}

    def reduce(backend: str, members: list[Node]) -> Answers[Reduced]:
        asked[backend] = [node.name for node in members]
        return Answers({node.name: Reduced(20.0, True) for node in members})

    monkeypatch.setattr(examination, "list_nodes", lambda *_: nodes)
    monkeypatch.setattr(examination, "all_reduce", reduce)
    cluster.machines = Answers({node.name: FINE for node in nodes})
    found = examine(None)
    assert asked == {"gloo": ["a", "b", "c"], "nccl": ["a", "c"]}
    assert (found["NCCL"].status, found["NCCL"].found) == ("pass", "all-reduce of 16 MiB over 2 nodes: 20 GiB/s")
    nodes[2:], cluster.machines = [], Answers({"a": FINE, "b": FINE})
    examine(None)
    assert asked["nccl"] == ["a", "a"]  # two GPUs of one node


def test_quick_leaves_out_what_takes_its_time(cluster: Cluster) -> None:
    found = examine(None, quick=True)
    assert {name for name, f in found.items() if f.found == "left out by --quick"} == {
        "gloo",
        "NCCL",
        "vLLM",
        "publish",
    }


def test_a_checkpoint_path_that_cannot_be_written_fails(cluster: Cluster) -> None:
    found = examine(tiny(Path("/proc/rayrlhf")))
    assert found["checkpoint path"].status == "fail"
    assert found["shared files"].status == "skipped"


def test_resources_that_the_cluster_lacks_fail(cluster: Cluster, tmp_path: Path) -> None:
    config = load_config(TINY, [f"run.output={tmp_path}", "cluster.train.cpus=100"], environ={})
    found = examine(config)
    assert found["resources"].status == "fail"
    assert "asks for 100 CPUs, the cluster has 8" in found["resources"].found


def test_a_secret_in_what_was_found_is_masked(cluster: Cluster) -> None:
    cluster.machines = Answers({"a": FINE}, {"b": "ProxyError: https://me:letmein@proxy refused"})
    assert examine(None)["nodes"].found == "b: ProxyError: https://me:***@proxy refused"


def test_an_engine_that_does_not_start_leaves_the_publish_out(cluster: Cluster) -> None:
    cluster.started, cluster.published = Started(0.0, "cpu", "on a: the actor died", "see the logs"), None
    found = examine(None)
    assert found["vLLM"].status == "fail"
    assert found["publish"].status == "skipped"


@pytest.mark.parametrize(
    ("error", "found", "cure"),
    [
        (
            ResourceError("cluster.address x: no Ray cluster answers", "start one"),
            "no Ray cluster answers",
            "start one",
        ),
        (RuntimeError("Version mismatch: the cluster was started with"), "RuntimeError: Version mismatch", "Python"),
    ],
)
def test_a_ray_that_cannot_be_joined_fails_and_the_rest_is_skipped(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, error: Exception, found: str, cure: str
) -> None:
    def join(*_: Any) -> None:
        raise error

    monkeypatch.setattr(examination, "join", join)
    first, *rest = examine(None, address="10.0.0.1:6379").values()
    assert first.status == "fail"
    assert found in first.found
    assert cure in first.cure
    assert {f.status for f in rest} == {"skipped"}


def test_the_toy_goes_where_a_gpu_can_be_used_unless_the_config_says_cpu() -> None:
    a, b = Node("a", "1", "a", here=True), Node("b", "2", "b", gpus=1.0)
    usable = Answers({"a": FINE, "b": Machine(VERSIONS, gpus=(GPU("H100", 80.0, "570"),))})
    broken = Answers({"a": FINE, "b": Machine(VERSIONS, gpus=(GPU("H100", 80.0, "570"),), torch_problem="no CUDA")})
    assert examination.toy_place([a, b], usable, "cuda") == (b, "cuda")
    assert examination.toy_place([a, b], usable, None) == (b, "cuda")
    assert examination.toy_place([a, b], usable, "cpu") == (a, "cpu")
    assert examination.toy_place([a, b], broken, None) == (a, "cpu")


FINDINGS = [
    Finding("nodes", "pass", "all is well", "", {"nodes": 2}),
    Finding("ports", "warn", "[b] slow", "open them"),
    Finding("model", "skipped", "none"),
]
BAD = [*FINDINGS, Finding("gloo", "fail", "no route", "mend")]


def test_the_summary_counts_and_the_json_has_it_all() -> None:
    assert summary(FINDINGS) == "nothing found that would stop a run: 1 pass, 1 warn, 1 skipped"
    assert summary(BAD) == "a run would fail here: 1 pass, 1 warn, 1 fail, 1 skipped"
    report = json.loads(as_json(BAD))
    assert {key: report[key] for key in ("ok", "pass", "warn", "fail", "skipped")} == {
        "ok": False,
        "pass": 1,
        "warn": 1,
        "fail": 1,
        "skipped": 1,
    }
    assert report["checks"][0] == {
        "name": "nodes",
        "status": "pass",
        "found": "all is well",
        "cure": "",
        "figures": {"nodes": 2},
    }


def command(monkeypatch: pytest.MonkeyPatch, findings: list[Finding], *arguments: str) -> int:
    monkeypatch.setattr(examination, "examine", lambda *_: findings)
    monkeypatch.setattr(sys, "argv", ["rayrlhf", "doctor", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def test_the_command_shows_a_table_with_the_cures_and_one_line_and_exits_by_what_was_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, FINDINGS) == 0
    out = capsys.readouterr().out
    assert "[b] slow" in out, "brackets are no markup"
    assert "→ open them" in out
    assert out.splitlines()[-1] == summary(FINDINGS)
    assert command(monkeypatch, BAD) == 1


def test_json_is_all_of_stdout_and_the_table_goes_to_stderr(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, BAD, "--json") == 1
    shown = capsys.readouterr()
    assert shown.out == as_json(BAD) + "\n"
    assert "→ mend" in shown.err


def test_a_config_that_cannot_be_read_exits_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, [], str(tmp_path / "none.yaml")) == 2
    shown = capsys.readouterr()
    assert (shown.out, "none.yaml" in shown.err) == ("", True)


def test_a_config_that_cannot_be_read_is_a_finding_where_json_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.yaml").write_text("modl: {path: x}\n")
    assert command(monkeypatch, [], str(tmp_path / "bad.yaml"), "--json") == 2
    shown = capsys.readouterr()
    [line] = shown.out.splitlines()
    report = json.loads(line)
    [check] = report["checks"]
    assert (report["ok"], report["fail"]) == (False, 1)
    assert (check["name"], check["status"]) == ("config", "fail")
    assert "bad.yaml: modl: unknown key; did you mean model?" in check["found"]
    assert "ConfigError: " in shown.err
