"""PPO over two hosts with networks of their own gives the losses that it gives on one."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.conftest import COMMAND, ROOT, TINY, FinishedRun
from tests.integration.hosts import Hosts, two_hosts, why_not

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

ROLES = ("policy", "reference", "reward", "value", "rollout")
LEARNED = ("policy/loss", "policy/grad_norm", "value/loss", "value/grad_norm", "reward/mean", "kl/mean")


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    if reason := why_not():
        pytest.skip(reason)
    with two_hosts(tmp_path_factory.mktemp("hosts")) as made:
        yield made


@pytest.fixture(scope="module")
def run(hosts: Hosts, finished: FinishedRun, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Three steps of PPO, driven from host a."""
    output, sft = tmp_path_factory.mktemp("across"), finished.artifact("sft") / "model"

    def call(name: str, places: dict[str, str], *overrides: str) -> list[dict[str, Any]]:
        where = [f"cluster.{role}.resources={{host_{places.get(role, 'a')}: 0.01}}" for role in ROLES if places]
        arguments = [
            "ppo",
            "configs/tiny.yaml",
            *(override for override in TINY if not override.startswith("model.")),
            "model.from_scratch=null",
            f"model.path={sft}",
            f"run.name={name}",
            f"run.output={output}",
            f"cluster.address={hosts.address}",
            f"sft.path={sft}",
            f"reward.path={finished.artifact('reward') / 'model'}",
            "run.deterministic=true",
            "ppo.steps=3",
            *where,
            *overrides,
        ]
        done = subprocess.run(
            hosts.inside("a", *COMMAND, *arguments),
            cwd=ROOT,
            env=hosts.environment,
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        lines = (Path(output) / name / "metrics.jsonl").read_text().splitlines()
        return [record for record in map(json.loads, lines) if record["stage"] == "ppo"]

    return call


def learned(records: list[dict[str, Any]]) -> list[dict[str, float]]:
    assert len(records) == 3
    return [{name: record[name] for name in LEARNED} for record in records]


def test_rollout_on_another_host_learns_the_same_and_every_publish_is_verified(run: Any) -> None:
    at_home = run("home", dict.fromkeys(ROLES, "a"))
    away = run("away", dict.fromkeys(ROLES, "a") | {"rollout": "b"})
    assert learned(away) == learned(at_home)
    assert [record["weights/quarantined"] for record in away] == [0, 0, 0]


def test_learners_across_both_hosts_with_a_sharded_engine_learn_the_same(run: Any) -> None:
    two = ["cluster.policy.ranks=2", "cluster.value.ranks=2", "ppo.zero_stage=3", "rollout.tensor_parallel=2"]
    apart = [f"cluster.{role}.strategy=strict_spread" for role in ("policy", "value")]
    at_home = run("pair-home", dict.fromkeys(ROLES, "a"), *two)
    across = run("pair-across", {}, *two, *apart, "cluster.rollout.resources={host_b: 0.01}")
    for here, there in zip(learned(at_home), learned(across), strict=True):
        assert there == pytest.approx(here, rel=1e-6)


@pytest.mark.slow
def test_a_supervised_stage_across_both_hosts_learns_the_same(
    hosts: Hosts, finished: FinishedRun, tmp_path: Path
) -> None:
    """Each worker's process group goes over Ray's own network, whatever the hosts call themselves."""

    def sft(name: str, strategy: str) -> list[float]:
        arguments = [
            "sft",
            "configs/tiny.yaml",
            *(override for override in TINY if not override.startswith("model.")),
            "model.from_scratch=null",
            f"model.path={finished.artifact('pretrain') / 'model'}",
            f"run.name={name}",
            f"run.output={tmp_path / name}",
            f"cluster.address={hosts.address}",
            f"cluster.train={{ranks: 2, cpus: 1, threads: 1, strategy: {strategy}}}",
        ]
        command, settings = hosts.inside("a", *COMMAND, *arguments), {"cwd": ROOT, "env": hosts.environment}
        done = subprocess.run(command, **settings, capture_output=True, text=True, timeout=200, check=False)  # type: ignore[call-overload]
        assert done.returncode == 0, done.stdout + done.stderr
        lines = (tmp_path / name / name / "metrics.jsonl").read_text().splitlines()
        return [record["loss"] for record in map(json.loads, lines)]

    at_home, across = sft("home", "strict_pack"), sft("across", "strict_spread")
    assert across == pytest.approx(at_home, rel=1e-6)
    assert len(across) > 1
