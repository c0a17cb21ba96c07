"""A run's numbers for Prometheus, by way of Ray: each node's metrics agent offers what its processes report."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import ray
from ray.util.metrics import Gauge

from rayrlhf.metrics.names import gauge_name

__all__ = ["RayMetrics"]


class RayMetrics:
    """The newest number of every metric as a gauge, tagged with run, stage and arm (empty where there is one only).

    `reward/mean` of the record is `ray_rayrlhf_reward_mean` at the endpoint of the driver's node.
    """

    TAGS = ("run", "stage", "arm")

    def __init__(self, run: str) -> None:
        self._run = run
        self._gauges: dict[str, Gauge] = {}

    def write(self, record: Mapping[str, Any]) -> None:
        if not ray.is_initialized():
            return  # of a stage that was done before: there is no agent yet, and a gauge shows the present only
        tags = {"run": self._run, "stage": str(record.get("stage", "")), "arm": str(record.get("arm", ""))}
        for metric, value in record.items():
            # Ray drops NaN: a number that could not be computed leaves its gauge as it was, and only the step moves on.
            if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
                self._gauge(metric).set(value, tags)

    def close(self) -> None:
        """Nothing: Ray forgets the gauges with the driver's process."""

    def _gauge(self, metric: str) -> Gauge:
        if metric not in self._gauges:
            self._gauges[metric] = Gauge(gauge_name(metric), f"{metric} (docs/metrics.md)", self.TAGS)
        return self._gauges[metric]
