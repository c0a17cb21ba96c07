"""The file for Ray's cluster launcher, read by Ray's own code."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from ray.autoscaler._private.util import prepare_config, validate_config

from rayrlhf.errors import ConfigError
from rayrlhf.launch.manifests import render
from tests.unit.launch.made_values import read, rendered, values


def test_rays_own_validator_takes_the_launcher_file(example: dict[str, str], mixed: dict[str, str]) -> None:
    for text in (example["ray-launcher.yaml"], mixed["ray-launcher.yaml"]):
        validate_config(prepare_config(read(text)))
    wrong = read(example["ray-launcher.yaml"]) | {"available_node_typos": {}}
    with pytest.raises(jsonschema.ValidationError, match="available_node_typos"):
        validate_config(prepare_config(wrong))


def for_machines(addresses: int, **changes: Any) -> str:
    """The launcher file for so many workers that are there."""
    provider = {"type": "local", "head_ip": "10.0.0.1", "worker_ips": [f"10.0.0.{2 + i}" for i in range(addresses)]}
    made = values(**{"launcher": {"provider": provider, "docker": False, "ssh_user": "me"}} | changes)
    return render(made, None, ["launcher"])["ray-launcher.yaml"]


def test_a_launcher_for_machines_that_are_there_has_their_addresses() -> None:
    prepared = prepare_config(read(for_machines(2)))
    validate_config(prepared)
    assert prepared["available_node_types"]["local.cluster.node"]["min_workers"] == 2
    assert "/home/me/.ray/auth_token" in prepared["file_mounts"]


@pytest.mark.parametrize(
    ("group", "least", "most"), [({"nodes": 2}, 2, 2), ({"nodes": 1, "most": 3}, 1, 3), ({"nodes": 1, "most": 9}, 1, 5)]
)
def test_a_run_may_need_fewer_machines_than_are_there(group: dict[str, int], least: int, most: int) -> None:
    prepared = prepare_config(read(for_machines(5, workers={"cpu": group})))
    validate_config(prepared)
    node = prepared["available_node_types"]["local.cluster.node"]
    assert (node["min_workers"], node["max_workers"], prepared["max_workers"]) == (least, most, most)


def test_fewer_machines_than_a_run_needs_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"launcher\.provider\.worker_ips names 1 machine, and the groups of workers need 2"
    ):
        for_machines(1)


def test_machines_that_are_there_have_the_resources_of_their_group() -> None:
    """The launcher tells such nodes nothing: `ray start` does."""
    workers = {"cpu": {"nodes": 1, "resources": {"fast_disk": 2}}, "more": {"nodes": 1, "resources": {"fast_disk": 2}}}
    start = read(for_machines(2, workers=workers))["worker_start_ray_commands"][-1]
    assert '--resources={"fast_disk": 2}' in shlex.split(start)
    assert "--resources" not in read(for_machines(2))["worker_start_ray_commands"][-1]
    workers["more"]["resources"] = {}
    with pytest.raises(ConfigError, match=r"workers\.cpu\.resources and workers\.more\.resources differ"):
        for_machines(2, workers=workers)


def test_the_launcher_starts_ray_with_its_token_and_the_dashboard_on_the_head_alone(mixed: dict[str, str]) -> None:
    found = read(mixed["ray-launcher.yaml"])
    starts = [found["head_start_ray_commands"][-1], found["worker_start_ray_commands"][-1]]
    assert all(re.search(r"RAY_AUTH_MODE=token (\S+=\S+ )*ray start ", command) for command in starts)
    assert "--dashboard-host=127.0.0.1" in starts[0]
    assert found["file_mounts"]["/home/ray/.ray/auth_token"] == "~/.ray/auth_token"
    assert found["available_node_types"]["gpu"]["docker"]["worker_image"] == "registry.example/rlhf:gpu"
    assert found["available_node_types"]["gpu"]["min_workers"] == 2


def test_a_prometheus_on_the_heads_machine_reads_the_list_that_ray_writes_in_the_container(
    mixed: dict[str, str],
) -> None:
    [scrape] = read(mixed["prometheus.yaml"])["scrape_configs"]
    [path] = scrape["file_sd_configs"][0]["files"]
    prepared = prepare_config(read(mixed["ray-launcher.yaml"]))
    options = shlex.split(" ".join(prepared["docker"]["run_options"] + prepared["docker"]["head_run_options"]))
    volumes = [options[i + 1].split(":") for i, word in enumerate(options) if word == "--volume"]
    assert str(Path(path).parent) in [there for here, there in volumes if here == there]
    # Docker would make it for root alone, and Ray is not root.
    assert prepared["initialization_commands"][0] == "mkdir --parents --mode=1777 /tmp/ray"
    bare = read(rendered("ray-launcher.yaml", values(launcher={"docker": False})))
    assert (bare["initialization_commands"], "docker" in bare) == ([], False)


def test_root_has_its_home_elsewhere() -> None:
    made = values(launcher={"ssh_user": "root", "docker": False})
    assert read(rendered("ray-launcher.yaml", made))["file_mounts"] == {"/root/.ray/auth_token": "~/.ray/auth_token"}
