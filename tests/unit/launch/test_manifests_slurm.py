"""The Slurm script as text; what it does is in tests/integration/test_slurm_script.py."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from rayrlhf.errors import ConfigError
from tests.unit.launch.made_values import linter, rendered, values


def test_shellcheck_has_nothing_to_say_about_the_slurm_script(mixed: dict[str, str], example: dict[str, str]) -> None:
    command = [linter("shellcheck", "Debian: shellcheck"), "--exclude=SC1091", "-"]  # what `setup` sources is elsewhere
    for text in (mixed["slurm.sh"], example["slurm.sh"]):
        done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout


def test_the_slurm_script_is_bash_and_asks_for_what_the_values_say(mixed: dict[str, str]) -> None:
    subprocess.run(["bash", "-n"], input=mixed["slurm.sh"], text=True, check=True)
    directives = re.findall(r"^#SBATCH (\S+)$", mixed["slurm.sh"], flags=re.M)
    assert {"--nodes=2", "--gpus-per-node=8", "--cpus-per-task=96", "--mem=768G", "--ntasks-per-node=1"} <= set(
        directives
    )
    assert {"--signal=B:TERM@300", "--partition=a100", "--account=me", "--qos=high"} <= set(directives)
    # sbatch reads no directive after the first line that is none of comments.
    assert "#SBATCH" not in mixed["slurm.sh"].split("set -euo pipefail")[1]
    assert "--resources='{\"fast_disk\": 1}'" in mixed["slurm.sh"]


def test_slurm_needs_one_group_with_nodes() -> None:
    made = values(workers={"a": {"nodes": 1}, "b": {"nodes": 1}})
    with pytest.raises(ConfigError, match=r"slurm: one group of workers must have nodes \(a, b have\)"):
        rendered("slurm.sh", made)


def test_a_node_without_an_address_of_its_own_is_named(tmp_path: Path) -> None:
    stubs = {"scontrol": "echo first", "hostname": "echo 127.0.1.1 ::1"}
    for name, body in stubs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "first"}
    done = subprocess.run(
        ["bash"], input=rendered("slurm.sh"), env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "slurm.sh: first knows no IPv4 address of its own but 127.*" in done.stderr
