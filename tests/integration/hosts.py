"""Two hosts on one machine: a network namespace each, joined by a veth pair, a Ray node in each."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PORT = 6411
ADDRESSES = {"a": "10.91.0.1", "b": "10.91.0.2"}
RAY = str(Path(sys.executable).with_name("ray"))


class Hosts:
    """Host a has the Ray head, host b a worker node; each has a custom resource of its name, `host_a` and `host_b`."""

    def __init__(self, mark: str, folder: Path) -> None:
        self.namespaces = {host: f"rl{mark}{host}" for host in ADDRESSES}
        self.links = {host: f"rl{mark}{host}0" for host in ADDRESSES}
        self.folder = folder
        self.address = f"{ADDRESSES['a']}:{PORT}"
        self.environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "HF_HUB_OFFLINE": "1"}
        self.nodes: dict[str, subprocess.Popen[bytes]] = {}
        # Ray's sockets lie in it, whose paths may not be long; and Ray's usual folder names the machine's own cluster.
        self.scratch = Path(tempfile.mkdtemp(prefix="rl", dir="/tmp"))

    def inside(self, host: str, *command: str) -> list[str]:
        return ["ip", "netns", "exec", self.namespaces[host], *command]

    def connect(self) -> None:
        a, b = self.links.values()
        for namespace in self.namespaces.values():
            _ip("netns", "add", namespace)
        _ip("link", "add", a, "type", "veth", "peer", "name", b)
        for host, link in self.links.items():
            _ip("link", "set", link, "netns", self.namespaces[host])
            _ip("-n", self.namespaces[host], "addr", "add", f"{ADDRESSES[host]}/24", "dev", link)
            for device in (link, "lo"):
                _ip("-n", self.namespaces[host], "link", "set", device, "up")

    def start_ray(self) -> None:
        self._start_node("a", "--head", f"--port={PORT}", "--include-dashboard=false", f"--temp-dir={self.scratch}")
        self._wait_for(1)
        self._start_node("b", f"--address={self.address}")
        self._wait_for(2)

    def start_spare(self, resources: dict[str, float]) -> None:
        """One more node on host a, with these resources."""
        self._start_node("a", f"--address={self.address}", resources=resources, name="spare")

    def cut(self) -> None:
        """Take the link between the hosts down."""
        _ip("-n", self.namespaces["b"], "link", "set", self.links["b"], "down")

    def _start_node(
        self, host: str, *arguments: str, resources: dict[str, float] | None = None, name: str = ""
    ) -> None:
        resources = resources or {f"host_{host}": 1}
        command = [RAY, "start", "--block", *arguments, f"--node-ip-address={ADDRESSES[host]}", "--num-cpus=4"]
        command += [f"--resources={json.dumps(resources)}", "--object-store-memory=300000000", "--disable-usage-stats"]
        with (self.folder / f"ray-{name or host}.log").open("wb") as log:
            self.nodes[name or host] = subprocess.Popen(
                self.inside(host, *command), env=self.environment, stdout=log, stderr=log
            )

    def _wait_for(self, nodes: int) -> None:
        deadline = time.monotonic() + 60
        command = self.inside("a", RAY, "status", f"--address={self.address}")
        while time.monotonic() < deadline:
            said = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False).stdout
            if said.count("node_") >= nodes:
                return
            time.sleep(0.5)
        raise AssertionError(f"Ray has not {nodes} nodes after a minute; see {self.folder}")

    def disconnect(self) -> None:
        for node in reversed(self.nodes.values()):
            node.terminate()
        for node in self.nodes.values():
            try:
                node.wait(30)
            except subprocess.TimeoutExpired:
                node.kill()
        for namespace in self.namespaces.values():
            subprocess.run(["ip", "netns", "del", namespace], capture_output=True, check=False)
        shutil.rmtree(self.scratch, ignore_errors=True)


def why_not() -> str | None:
    """Why this machine cannot make namespaces; None if it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "no `ip` command (Debian: iproute2)"
    name = f"rltry{os.getpid()}"
    tried = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if tried.returncode:
        return f"this machine makes no network namespaces: {tried.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
    return None


@contextmanager
def linked_hosts(folder: Path) -> Iterator[Hosts]:
    """The two without Ray: for what starts it there itself."""
    hosts = Hosts(f"{os.getpid() % 100_000}", folder)
    try:
        hosts.connect()
        yield hosts
    finally:
        hosts.disconnect()


@contextmanager
def two_hosts(folder: Path) -> Iterator[Hosts]:
    with linked_hosts(folder) as hosts:
        hosts.start_ray()
        yield hosts


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
