"""A run's numbers for Prometheus, by way of Ray: each node's metrics agent offers what its processes report."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from typing import Any

import ray
from ray.util.metrics import Gauge

from rayrlhf.metrics.names import gauge_name

__all__ = ["RayMetrics"]


class RayMetrics:
    """The newest number of every metric as a gauge, tagged with run, stage and arm (empty where there is one only).

    `reward/mean` of the record is `ray_rayrlhf_reward_mean` at the endpoint of the driver's node. Ray sends a value
    once, within ten seconds, and the agent forgets it twenty seconds later. A step takes longer: the present stage's
    numbers are said again and again, and those of a stage that is over fade.
    """

    TAGS = ("run", "stage", "arm")

    def __init__(self, run: str, repeat_s: float = 5.0) -> None:
        self._run = run
        self._repeat_s = repeat_s
        self._gauges: dict[str, Gauge] = {}
        self._tags: dict[str, str] = {}
        self._newest: dict[str, float] = {}
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._repeating: threading.Thread | None = None

    def write(self, record: Mapping[str, Any]) -> None:
        if not ray.is_initialized():
            return  # of a stage that was done before: there is no agent yet, and a gauge shows the present only
        tags = {"run": self._run, "stage": str(record.get("stage", "")), "arm": str(record.get("arm", ""))}
        with self._lock:
            if tags != self._tags:
                self._tags, self._newest = tags, {}
            for metric, value in record.items():
                if isinstance(value, int | float) and not isinstance(value, bool):
                    self._newest[metric] = value
        self._say()
        if self._repeating is None:
            self._repeating = threading.Thread(target=self._repeat, name="ray-metrics", daemon=True)
            self._repeating.start()

    def close(self) -> None:
        self._closed.set()
        if self._repeating is not None:
            self._repeating.join()

    def _repeat(self) -> None:
        while not self._closed.wait(self._repeat_s):
            self._say()

    def _say(self) -> None:
        if not ray.is_initialized():
            return
        with self._lock:
            for metric, value in self._newest.items():
                if math.isfinite(value):  # one that could not be computed fades too, until it can be again
                    self._gauge(metric).set(value, self._tags)

    def _gauge(self, metric: str) -> Gauge:
        if metric not in self._gauges:
            self._gauges[metric] = Gauge(gauge_name(metric), f"{metric} (docs/metrics.md)", self.TAGS)
        return self._gauges[metric]
