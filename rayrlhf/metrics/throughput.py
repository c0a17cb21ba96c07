"""How fast a step was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from rayrlhf.types import RolloutInfo

__all__ = ["later", "throughput"]


def later(infos: Sequence[RolloutInfo], seconds: float) -> tuple[RolloutInfo, ...]:
    """The same responses, of a call that began so long after the first one of their batch: finished since that one."""
    return tuple(replace(info, seconds=info.seconds + seconds) for info in infos)


def throughput(infos: Sequence[RolloutInfo], seconds: float, times: Mapping[str, float]) -> dict[str, float]:
    """Tokens per second of sampling and of learning, and the share of a step that waited for its longest 2 %.

    Args:
        infos: the step's responses; at least one is of the longest.
        seconds: that sampling them took.
        times: of the step's phases, as `StepClock.end_step` gives them.
    """
    finished, longest = [0.0, *sorted(info.seconds for info in infos)], max(1, len(infos) // 50)
    # Responses that are drawn while another step learns keep nobody waiting, however long they take.
    waited = min(finished[-1] - finished[-1 - longest], times["time/generate_s"])
    sampled, update = sum(info.response_tokens for info in infos), times["time/update_s"]
    return {
        "throughput/rollout_tokens_per_s": sampled / seconds if seconds else 0.0,
        "throughput/train_tokens_per_s": sum(info.tokens for info in infos) / update if update else 0.0,
        "rollout/seconds": seconds,
        "rollout/tail_share": waited / times["time/step_s"],
    }
