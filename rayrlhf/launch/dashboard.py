"""The Grafana dashboard of a run: what docs/metrics.md explains, as panels over what Ray's exporter offers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rayrlhf.metrics.names import prometheus_name

__all__ = ["NODE_METRICS", "PANELS", "Panel", "dashboard", "node_label"]


@dataclass(frozen=True, slots=True)
class Panel:
    title: str
    unit: str
    """Grafana's name of it"""
    metrics: tuple[str, ...]
    """of ours, as in docs/metrics.md; a panel of `nodes` has Ray's own"""
    nodes: bool = False


PHASES = ("generate", "score", "estimate", "update", "publish", "save", "other")
ROLES = ("policy", "reference", "reward", "value", "rollout", "driver")
PANELS: dict[str, tuple[Panel, ...]] = {
    "Is it learning?": (
        Panel("Reward", "none", ("reward/mean", "reward/shaped_mean", "reward/gold")),
        Panel("KL to the reference, nats a response", "none", ("kl/mean",)),
        Panel("KL coefficient", "none", ("kl/coef",)),
        Panel("Response length", "none", ("response/length_mean",)),
        Panel("Truncated responses", "percentunit", ("response/truncated_fraction",)),
        Panel("Value: explained variance", "none", ("value/explained_variance",)),
    ),
    "Is it healthy?": (
        Panel("Losses", "none", ("policy/loss", "value/loss", "ptx/loss", "loss", "pretrain_loss")),
        Panel("Gradient norms", "none", ("policy/grad_norm", "value/grad_norm", "ptx/grad_norm", "grad_norm")),
        Panel("Entropy, nats a token", "none", ("policy/entropy",)),
        Panel("Clipped tokens", "percentunit", ("policy/clip_fraction", "value/clip_fraction")),
        Panel(
            "Log-prob gap, trainer to engine",
            "none",
            ("rollout/logprob_gap", "rollout/logprob_gap_max", "rollout/stale_logprob_gap"),
        ),
        Panel("Engines left out; versions behind", "none", ("weights/quarantined", "rollout/staleness_max")),
    ),
    "Is it fast?": (
        Panel("Seconds of a step, by phase", "s", tuple(f"time/{phase}_s" for phase in PHASES)),
        Panel(
            "Tokens a second",
            "none",
            ("throughput/rollout_tokens_per_s", "throughput/train_tokens_per_s", "tokens_per_s"),
        ),
        Panel("Publish", "s", ("weights/publish_s", "weights/transfer_s", "weights/load_s", "weights/probe_s")),
        Panel("Waiting for the longest responses", "percentunit", ("rollout/tail_share",)),
        Panel("Memory of a role's largest rank, GiB", "none", tuple(f"memory/{role}_gib" for role in ROLES)),
        Panel("Step", "none", ("step",)),
    ),
    "Its nodes": (
        Panel("CPU", "percent", ("ray_node_cpu_utilization",), nodes=True),
        Panel("GPU", "percent", ("ray_node_gpus_utilization",), nodes=True),
        Panel("Memory in use", "bytes", ("ray_node_mem_used",), nodes=True),
        Panel("GPU memory in use, MiB", "none", ("ray_node_gram_used",), nodes=True),
        Panel("Object store in use", "bytes", ("ray_object_store_memory",), nodes=True),
        Panel("Disk free", "bytes", ("ray_node_disk_free",), nodes=True),
    ),
}
NODE_METRICS = tuple(metric for panels in PANELS.values() for p in panels if p.nodes for metric in p.metrics)
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
WIDTH, HEIGHT = 8, 7


def dashboard(name: str) -> dict[str, Any]:
    """As Grafana imports it (schema version 39, Grafana 10 and later)."""
    return {
        "title": f"RLHF: {name}",
        "uid": f"rayrlhf-{name}"[:40],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-6h", "to": "now"},
        "tags": ["rayrlhf"],
        "templating": {"list": [_source(), *(_variable(tag) for tag in ("run", "stage", "arm"))]},
        "panels": _panels(),
    }


def _panels() -> list[dict[str, Any]]:
    panels: list[dict[str, Any]] = []
    top = 0
    for title, row in PANELS.items():
        place = {"h": 1, "w": 24, "x": 0, "y": top}
        panels.append(
            {"type": "row", "id": len(panels) + 1, "title": title, "collapsed": False, "gridPos": place, "panels": []}
        )
        top += 1
        for number, panel in enumerate(row):
            place = {"h": HEIGHT, "w": WIDTH, "x": number % 3 * WIDTH, "y": top + number // 3 * HEIGHT}
            panels.append(_panel(panel, len(panels) + 1, place))
        top += -(-len(row) // 3) * HEIGHT
    return panels


def _panel(panel: Panel, number: int, place: dict[str, int]) -> dict[str, Any]:
    several = len(panel.metrics) > 1
    return {
        "type": "timeseries",
        "id": number,
        "title": panel.title,
        "datasource": SOURCE,
        "gridPos": place,
        "fieldConfig": {"defaults": {"unit": panel.unit, "custom": {"spanNulls": True}}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": [
            {
                "refId": chr(ord("A") + index),
                "datasource": SOURCE,
                "expr": _query(metric, panel.nodes),
                "legendFormat": _legend(metric, panel.nodes, several),
            }
            for index, metric in enumerate(panel.metrics)
        ],
    }


def node_label(metric: str) -> str:
    """The label with a node's address: Ray's agent of a node and its other processes do not call it the same."""
    return "ip" if metric.startswith("ray_node_") else "NodeAddress"


def _query(metric: str, nodes: bool) -> str:
    if nodes:
        how = "avg" if "utilization" in metric else "sum"
        return f"{how} by ({node_label(metric)}) ({metric})"
    # `max` drops the tags of the process: a run that was resumed goes on as the same line.
    return f'max by (run, stage, arm) ({prometheus_name(metric)}{{run=~"$run", stage=~"$stage", arm=~"$arm"}})'


def _legend(metric: str, nodes: bool, several: bool) -> str:
    if nodes:
        return f"{{{{{node_label(metric)}}}}}"
    return f"{metric} {{{{run}}}} {{{{arm}}}}" if several else "{{run}} {{arm}}"


def _source() -> dict[str, Any]:
    return {"type": "datasource", "name": "datasource", "label": "Prometheus", "query": "prometheus"}


def _variable(tag: str) -> dict[str, Any]:
    return {
        "type": "query",
        "name": tag,
        "datasource": SOURCE,
        "query": {"query": f"label_values({prometheus_name('step')}, {tag})", "refId": tag},
        "refresh": 2,
        "multi": True,
        "includeAll": True,
        # `.*` and not all values by name: an arm may be empty.
        "allValue": ".*",
        "current": {"text": ["All"], "value": ["$__all"]},
    }
