"""What the learners of tests are told, where it is not what a test is about."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rayrlhf.engines.deepspeed import LearnerSettings

__all__ = ["learner_settings"]


def learner_settings(zero_stage: int, **changes: Any) -> LearnerSettings:
    """Adam in float32 on the CPU."""
    from rayrlhf.engines.deepspeed import LearnerSettings  # slow to import, and for the processes of ranks alone

    told = {"dtype": "float32", "device": "cpu", "learning_rate": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8}
    told |= {"weight_decay": 0.0, "grad_clip": 1.0, "max_loss": 1e4, "failed_folder": "failed", "role": "test"}
    return LearnerSettings(zero_stage=zero_stage, **(told | changes))
