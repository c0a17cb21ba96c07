"""What a metric of ours is called outside: Prometheus knows no slash."""

from __future__ import annotations

import re

__all__ = ["gauge_name", "prometheus_name"]


def gauge_name(metric: str) -> str:
    """`reward/mean` -> `rayrlhf_reward_mean`: the name that Ray is given."""
    return "rayrlhf_" + re.sub(r"[^A-Za-z0-9_]", "_", metric)


def prometheus_name(metric: str) -> str:
    """`reward/mean` -> `ray_rayrlhf_reward_mean`: the name under which Ray offers it, and dashboards ask for it."""
    return "ray_" + gauge_name(metric)
