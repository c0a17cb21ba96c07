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
    assert "#SBATCH" not in mixed["slurm.sh"].split("set -eo pipefail")[1]
    assert "--resources='{\"fast_disk\": 1}'" in mixed["slurm.sh"]


def test_slurm_needs_one_group_with_nodes() -> None:
    made = values(workers={"a": {"nodes": 1}, "b": {"nodes": 1}})
    with pytest.raises(ConfigError, match=r"slurm: one group of workers must have nodes \(a, b have\)"):
        rendered("slurm.sh", made)


def run_script(text: str, folder: Path, job: str = "7", **stubs: str) -> subprocess.CompletedProcess[str]:
    """With shell lines in place of the commands of Slurm and Ray, and of the Python that looks for nodes."""
    there = {"scontrol": "echo first; echo second", "hostname": "echo 10.0.0.1", "srun": "", "ray": "", "python": "cat"}
    for name, body in (there | stubs).items():
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)
    environment = {"PATH": f"{folder}:/usr/bin:/bin", "SLURM_JOB_ID": job, "SLURM_JOB_NODELIST": "first"}
    return subprocess.run(["bash"], input=text, env=environment, capture_output=True, text=True, check=False)


def test_a_node_without_an_address_of_its_own_is_named(tmp_path: Path) -> None:
    done = run_script(rendered("slurm.sh"), tmp_path, hostname="echo 127.0.1.1 ::1")
    assert done.returncode == 1
    assert "slurm.sh: first knows no IPv4 address of its own but 127.*" in done.stderr


def ports_of(job: str, folder: Path) -> dict[str, list[int]]:
    """What `ray start` is told of ports, on the head and on the other nodes."""
    said = folder / "said"
    said.unlink(missing_ok=True)
    wait = f"until [ $(wc -l <{said}) = 2 ]; do sleep 0.1; done"
    made = values(storage={"path": str(folder)}, command=["timeout", "20", "sh", "-c", wait])
    done = run_script(rendered("slurm.sh", made), folder, job, srun=f'echo "$@" >>{said}')
    assert done.returncode == 0, done.stderr
    head, others = sorted(said.read_text().splitlines(), key=lambda line: "--head" not in line)
    return {
        who: [int(port) for port in re.findall(r"-port=(\d+)", line)]
        for who, line in (("head", head), ("other", others))
    }


def test_jobs_that_share_a_node_have_no_port_of_rays_in_common(tmp_path: Path) -> None:
    """The head's, its dashboard's, the client server's and the agent's of every node: each has a default."""
    first, second, far = (ports_of(job, tmp_path) for job in ("7", "8", "123456789"))
    assert [len(job["head"]) for job in (first, second, far)] == [4, 4, 4]
    assert [len(job["other"]) for job in (first, second, far)] == [1, 1, 1]
    assert set(first["other"]) < set(first["head"])
    assert not set(first["head"]) & set(second["head"])
    defaults = {6379, 8265, 10001, 52365}
    for port in {port for job in (first, second, far) for port in job["head"]}:
        assert port not in defaults
        # Ray's workers begin below, and above the system takes ports for connections as it likes.
        assert 20_000 <= port < 32_768


def test_setup_lines_may_use_variables_that_nobody_has_set(tmp_path: Path) -> None:
    """Modules and `activate` scripts do."""
    made = values(
        storage={"path": str(tmp_path)}, slurm={"setup": ['test -z "$NOBODY_SETS_THIS"']}, command=["echo", "ran"]
    )
    done = run_script(rendered("slurm.sh", made), tmp_path)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "ran"), done.stderr


def test_a_setup_line_that_fails_ends_the_job(tmp_path: Path) -> None:
    made = values(storage={"path": str(tmp_path)}, slurm={"setup": ["false"]}, command=["echo", "ran"])
    assert (done := run_script(rendered("slurm.sh", made), tmp_path)).returncode == 1
    assert "ran" not in done.stdout
