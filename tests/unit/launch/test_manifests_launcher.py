"""The file for Ray's cluster launcher, read by Ray's own code."""

from __future__ import annotations

import re

import jsonschema
import pytest
from ray.autoscaler._private.util import prepare_config, validate_config

from tests.unit.launch.made_values import read, rendered, values


def test_rays_own_validator_takes_the_launcher_file(example: dict[str, str], mixed: dict[str, str]) -> None:
    for text in (example["ray-launcher.yaml"], mixed["ray-launcher.yaml"]):
        validate_config(prepare_config(read(text)))
    wrong = read(example["ray-launcher.yaml"]) | {"available_node_typos": {}}
    with pytest.raises(jsonschema.ValidationError, match="available_node_typos"):
        validate_config(prepare_config(wrong))


def test_a_launcher_for_machines_that_are_there_has_their_addresses() -> None:
    provider = {"type": "local", "head_ip": "10.0.0.1", "worker_ips": ["10.0.0.2", "10.0.0.3"]}
    made = values(launcher={"provider": provider, "docker": False, "ssh_user": "me"})
    prepared = prepare_config(read(rendered("ray-launcher.yaml", made)))
    validate_config(prepared)
    assert prepared["available_node_types"]["local.cluster.node"]["min_workers"] == 2
    assert "/home/me/.ray/auth_token" in prepared["file_mounts"]


def test_the_launcher_starts_ray_with_its_token_and_the_dashboard_on_the_head_alone(mixed: dict[str, str]) -> None:
    found = read(mixed["ray-launcher.yaml"])
    starts = [found["head_start_ray_commands"][-1], found["worker_start_ray_commands"][-1]]
    assert all(re.search(r"RAY_AUTH_MODE=token (\S+=\S+ )*ray start ", command) for command in starts)
    assert "--dashboard-host=127.0.0.1" in starts[0]
    assert found["file_mounts"]["/home/ray/.ray/auth_token"] == "~/.ray/auth_token"
    assert found["available_node_types"]["gpu"]["docker"]["worker_image"] == "registry.example/rlhf:gpu"
    assert found["available_node_types"]["gpu"]["min_workers"] == 2


def test_root_has_its_home_elsewhere() -> None:
    made = values(launcher={"ssh_user": "root", "docker": False})
    assert read(rendered("ray-launcher.yaml", made))["file_mounts"] == {"/root/.ray/auth_token": "~/.ray/auth_token"}
