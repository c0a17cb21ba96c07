"""The rendered Slurm script, on two hosts with networks of their own, with stand-ins for Slurm's three commands."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rayrlhf.launch.manifests import render
from rayrlhf.launch.values import Values
from tests.integration.hosts import ADDRESSES, Hosts, linked_hosts, why_not

pytestmark = [pytest.mark.integration, pytest.mark.timeout(180)]

# srun runs the command on each node of --nodelist, in that host's network, and hands on SIGTERM, as Slurm's does.
SRUN = """\
#!/usr/bin/env bash
while [[ $1 == --* ]]; do
    case $1 in
        --nodelist=*) IFS=, read -r -a nodes <<<"${1#*=}" ;;
        --overlap | --nodes=* | --ntasks=* | --ntasks-per-node=1 | --cpus-per-task=*) ;;
        *) echo "srun: $1?" >&2; exit 2 ;;
    esac
    shift
done
tasks=()
for node in "${nodes[@]}"; do
    ip netns exec "$HOSTS_PREFIX$node" "$@" &
    tasks+=($!)
done
trap 'kill "${tasks[@]}"' TERM
wait
wait
"""
SCONTROL = """\
#!/usr/bin/env bash
[[ $* == "show hostnames node[a-b]" ]] || { echo "scontrol: $*?" >&2; exit 2; }
printf 'a\\nb\\n'
"""
# On a host of several addresses, IPv6 first.
HOSTNAME = f"""\
#!/usr/bin/env bash
[[ $* == --ip-address ]] || exit 2
echo fe80::1 127.0.1.1 {ADDRESSES["a"]}
"""
# What is run: a task on each node; then it waits for the signal that Slurm sends before the time is over.
RUN = """\
import json, os, signal, subprocess, sys
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

ray.init(address="auto", log_to_driver=False)

@ray.remote(num_cpus=1)
def where():
    return ray.util.get_node_ip_address()

nodes = [node["NodeID"] for node in ray.nodes()]
refs = [where.options(scheduling_strategy=NodeAffinitySchedulingStrategy(n, soft=False)).remote() for n in nodes]
found = {"nodes": ray.get(refs), "resources": ray.cluster_resources(), "address": os.environ["RAY_ADDRESS"]}
stranger = {**os.environ, "RAY_AUTH_TOKEN": "f" * 64}
knock = [sys.executable, "-c", "import ray; ray.init(address='auto'); print('in')"]
knocked = subprocess.run(knock, env=stranger, capture_output=True, text=True, timeout=60)
found["stranger"] = [knocked.stdout.strip(), "AuthenticationError" in knocked.stderr]
found["token_mode"] = oct(os.stat(os.environ["RAY_AUTH_TOKEN_PATH"]).st_mode & 0o777)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
with open(sys.argv[1] + ".new", "w") as file:
    json.dump(found, file)
os.rename(sys.argv[1] + ".new", sys.argv[1])
signal.pause()
"""


# Those of another job's Ray on the same nodes, which was started with Ray's own defaults.
OTHERS = """\
import socket, time
taken = [socket.create_server(("0.0.0.0", port)) for port in (6379, 8265, 10001, 52365)]
print("taken", flush=True)
time.sleep(600)
"""


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    if reason := why_not():
        pytest.skip(reason)
    with linked_hosts(tmp_path) as made:
        yield made


def commands(folder: Path) -> Path:
    folder.mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "hostname": HOSTNAME}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return folder


@pytest.fixture
def occupied(hosts: Hosts) -> Iterator[None]:
    """On both hosts somebody listens where Ray would by default."""
    there = [
        subprocess.Popen(hosts.inside(host, sys.executable, "-c", OTHERS), stdout=subprocess.PIPE, text=True)
        for host in ADDRESSES
    ]
    try:
        assert [process.stdout.readline() for process in there if process.stdout] == ["taken\n", "taken\n"]
        yield
    finally:
        for process in there:
            process.kill()
            process.communicate()


def inside(hosts: Hosts) -> list[str]:
    """The processes that are left on either host."""
    listed = [subprocess.check_output(["ip", "netns", "pids", name], text=True) for name in hosts.namespaces.values()]
    return "".join(listed).split()


def test_the_script_makes_one_ray_of_all_nodes_hands_on_the_signal_and_leaves_nothing(
    hosts: Hosts, occupied: None, tmp_path: Path
) -> None:
    strangers = set(inside(hosts))
    shared, result, job = tmp_path / "shared", tmp_path / "result.json", str(os.getpid() % 3000)
    shared.mkdir()
    (tmp_path / "run.py").write_text(RUN)
    values = Values.model_validate(
        {
            "command": ["python", str(tmp_path / "run.py"), str(result)],
            "workers": {"cpu": {"cpus": 2, "nodes": 2, "resources": {"disk": 3}}},
            "storage": {"path": str(shared)},
            "slurm": {"setup": [f"export PATH={commands(tmp_path / 'bin')}:{Path(sys.executable).parent}:$PATH"]},
        }
    )
    script = tmp_path / "slurm.sh"
    script.write_text(render(values, None, ["slurm"])["slurm.sh"])
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"SLURM_JOB_ID": job, "SLURM_JOB_NODELIST": "node[a-b]", "HOME": str(tmp_path)}
    environment["HOSTS_PREFIX"] = hosts.namespaces["a"].removesuffix("a")
    log = tmp_path / "slurm.log"
    with log.open("wb") as file:
        running = subprocess.Popen(hosts.inside("a", "bash", str(script)), env=environment, stdout=file, stderr=file)
    try:
        deadline = time.monotonic() + 120
        while not result.exists() and running.poll() is None and time.monotonic() < deadline:
            time.sleep(0.2)
        assert result.exists(), log.read_text()
        running.send_signal(signal.SIGTERM)
        assert running.wait(60) == 143, log.read_text()
    finally:
        running.kill()
        shutil.rmtree(f"/tmp/ray-{job}", ignore_errors=True)
    found = json.loads(result.read_text())
    assert sorted(found["nodes"]) == sorted(ADDRESSES.values())
    assert (found["resources"]["CPU"], found["resources"]["disk"]) == (4, 6)
    assert found["address"] == f"{ADDRESSES['a']}:{20_000 + int(job)}"
    assert (found["stranger"], found["token_mode"]) == (["", True], "0o600")
    assert "slurm.sh: 2 Ray nodes" in log.read_text()
    assert list(shared.iterdir()) == []  # the token went with the job
    deadline = time.monotonic() + 20
    while set(inside(hosts)) - strangers and time.monotonic() < deadline:
        time.sleep(0.2)
    assert set(inside(hosts)) == strangers
