"""`rayrlhf manifests`: the files that make a cluster and run a config there, from one set of values.

values.yaml ─┐                       ┌─► kuberay     storage.yaml, config.yaml, raycluster.yaml, rayjob.yaml
             ├─► sizes of the groups ┼─► launcher    ray-launcher.yaml
run's config ┘                       ├─► slurm       slurm.sh
                                     ├─► docker      Dockerfile.gpu, Dockerfile.cpu
                                     └─► monitoring  prometheus.yaml, podmonitor.yaml, grafana-dashboard.json
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from rayrlhf.config import DATA_ROOT_VARIABLE, Config, load_config, load_section
from rayrlhf.config.load import read_yaml
from rayrlhf.config.secrets import refuse_secrets
from rayrlhf.errors import ConfigError
from rayrlhf.launch.dashboard import dashboard
from rayrlhf.launch.supported import supported_versions
from rayrlhf.launch.values import Values, WorkerGroup

__all__ = ["KINDS", "Sized", "load_values", "render", "write_manifests"]

KINDS: Mapping[str, tuple[str, ...]] = {
    "kuberay": ("storage.yaml", "config.yaml", "raycluster.yaml", "rayjob.yaml"),
    "launcher": ("ray-launcher.yaml",),
    "slurm": ("slurm.sh",),
    "docker": ("Dockerfile.gpu", "Dockerfile.cpu"),
    "monitoring": ("prometheus.yaml", "podmonitor.yaml", "grafana-dashboard.json"),
}
EXECUTABLE = ("slurm.sh",)
NAME_SECRETS = (
    *("kubernetes.auth_secret", "kubernetes.env_secrets", "images.pull_secrets"),
    "launcher.ssh_private_key",
)
KUBERAY_CONFIG = "/etc/rayrlhf/run.yaml"


@dataclass(frozen=True, slots=True)
class Sized:
    """A group of workers, and how many of them there are."""

    name: str
    group: WorkerGroup
    nodes: int
    most: int
    image: str

    @property
    def shared_memory_gib(self) -> int:
        return self.group.shared_memory_gib or max(1, self.group.memory_gib // 3)

    def resources(self) -> dict[str, int]:
        """What Ray is told that a node has."""
        gpus = {"GPU": self.group.gpus} if self.group.gpus else {}
        return {"CPU": self.group.cpus, **gpus, **self.group.resources}


def load_values(path: Path) -> tuple[Values, Config | None]:
    """The values, and the config they name.

    Raises:
        ConfigError: in either, by file and key.
    """
    refuse_secrets(_without_names(read_yaml(path)), source=str(path))
    values = load_section(path, Values).beside(path)
    if values.config is not None and not values.config.is_file():
        raise ConfigError(
            f"{path}: config: {values.config} is not there", "a relative path starts from the folder of this file"
        )
    # Nothing of this machine belongs in the files: neither its data folder nor what its environment keeps secret.
    environ = {name: value for name, value in os.environ.items() if name != DATA_ROOT_VARIABLE}
    return values, load_config(values.config, environ=environ) if values.config else None


def _without_names(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Less the keys that say where a secret is, and sound like one."""
    return {
        name: {k: v for k, v in section.items() if f"{name}.{k}" not in NAME_SECRETS}
        if isinstance(section, dict)
        else section
        for name, section in tree.items()
    }


def render(values: Values, config: Config | None, kinds: Sequence[str] = ()) -> dict[str, str]:
    """File name -> text, of these kinds, of all where none is named.

    Raises:
        ConfigError: an unknown kind, or values that cannot be met.
    """
    for kind in kinds:
        if kind not in KINDS:
            raise ConfigError(f"manifests: there is no kind {kind}", f"one of {', '.join(KINDS)}")
    groups = _sized(values, config)
    files = [name for kind in KINDS if not kinds or kind in kinds for name in KINDS[kind]]
    return {name: _render_one(name, values, groups) for name in files if name != "config.yaml" or values.config}


def write_manifests(values_file: Path, folder: Path, kinds: Sequence[str] = ()) -> list[Path]:
    """Render into `folder`; what an earlier call left there is replaced."""
    rendered = render(*load_values(values_file), kinds)
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in rendered.items():
        (folder / name).write_text(text, encoding="utf-8")
        (folder / name).chmod(0o755 if name in EXECUTABLE else 0o644)
    return [folder / name for name in rendered]


def _sized(values: Values, config: Config | None) -> list[Sized]:
    """The groups that have, or may get, nodes."""
    open_groups = {name: group for name, group in values.workers.items() if group.nodes is None}
    needed: Mapping[str, int] = {}
    if config and open_groups:
        from rayrlhf.launch.sizes import nodes_needed  # and torch, behind what it imports

        needed = nodes_needed(config, values.workers)
    sized = []
    for name, group in values.workers.items():
        nodes = needed[name] if group.nodes is None else group.nodes
        most = max(nodes, group.most or 0) if values.autoscaling else nodes
        if group.most is not None and nodes > group.most:
            raise ConfigError(
                f"workers.{name}.most is {group.most}, and {values.config} needs {nodes} such nodes at once",
                f"raise workers.{name}.most, or leave it out",
            )
        if most:
            sized.append(Sized(name, group, nodes, most, values.images.gpu if group.gpus else values.images.cpu))
    if not sized:
        raise ConfigError("workers: no group has nodes", "set workers.<group>.nodes")
    return sized


def _slurm_group(values: Values, groups: Sequence[Sized]) -> Sized:
    """The one whose nodes the job asks for: all nodes of a Slurm job are alike."""
    found = [g for g in groups if g.nodes and values.slurm.group in (None, g.name)]
    if len(found) != 1:
        names = ", ".join(g.name for g in found) or "none"
        raise ConfigError(f"slurm: one group of workers must have nodes ({names} have)", "name it in slurm.group")
    return found[0]


def _check_machines(values: Values, groups: Sequence[Sized]) -> None:
    """Where machines are named (provider `local`) the launcher has one kind of worker: the first group's."""
    if values.launcher.provider["type"] != "local":
        return
    needed, there = sum(group.nodes for group in groups), len(values.launcher.provider["worker_ips"])
    if needed > there:
        raise ConfigError(
            f"launcher.provider.worker_ips names {there} machine{'' if there == 1 else 's'}, and the groups of workers "
            f"need {needed}",
            "name more, or lower workers.<group>.nodes",
        )
    for other in groups[1:]:
        if other.group.resources != groups[0].group.resources:
            raise ConfigError(
                f"launcher.provider is local, whose workers are alike: workers.{groups[0].name}.resources and "
                f"workers.{other.name}.resources differ",
                "make them the same, or start Ray on those machines by hand",
            )


def _render_one(name: str, values: Values, groups: Sequence[Sized]) -> str:
    if name == "grafana-dashboard.json":
        return json.dumps(dashboard(values.name), indent=2) + "\n"
    context: dict[str, Any] = {"values": values, "groups": groups, "ray": supported_versions()["ray"].lstrip("=")}
    if name == "config.yaml" and values.config:
        context["config_text"] = values.config.read_text(encoding="utf-8")
    if name == "slurm.sh":
        context |= {"group": _slurm_group(values, groups), "command": _command(values, str(_absolute(values)))}
    if name == "rayjob.yaml":
        context["command"] = _command(values, KUBERAY_CONFIG)
    if name == "ray-launcher.yaml":
        _check_machines(values, groups)
        user = "ray" if values.launcher.docker else values.launcher.ssh_user
        home = "/root" if user == "root" else f"/home/{user}"
        context |= {"home": home, "config_file": _absolute(values), "command": _command(values, f"{home}/run.yaml")}
    return _templates().get_template(f"{name}.j2").render(context)


def _absolute(values: Values) -> Path | None:
    return values.config.resolve() if values.config else None


def _command(values: Values, config: str) -> str:
    """As a shell's line. `auto` is the cluster of RAY_ADDRESS, or of the machine where it is run."""
    if values.command is not None:
        return shlex.join(values.command)
    keys = ["cluster.address=auto", f"run.output={values.storage.path}/runs", "tracking.ray_metrics=true"]
    return shlex.join(["rayrlhf", "run", config, *keys, "--resume"])


def _templates() -> Environment:
    environment = Environment(
        loader=PackageLoader("rayrlhf.launch", "templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        comment_start_string="{##",  # in bash `{#` counts an array
        comment_end_string="##}",
    )
    environment.filters["q"] = _quoted
    environment.filters["sh"] = shlex.quote
    return environment


def _quoted(value: Any) -> str:
    """A JSON value is a YAML value: nothing that it holds can be taken for YAML's own signs."""
    return json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)
