"""What of a config reaches the learners: the `deepspeed` section, and where importance weights are made."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rayrlhf.config import Config
from rayrlhf.data.batching import Cutting
from rayrlhf.engines.deepspeed import LearnerSettings
from rayrlhf.stages.roles import _estimate, _learner, _update
from rayrlhf.stages.training import learner_settings


def config(**deepspeed: Any) -> Config:
    return Config.model_validate(
        {
            "run": {"stages": ["ppo"]},
            "model": {"path": "org/name"},
            "world": {"name": "instructions"},
            "cluster": {"device": "cuda"},
            "deepspeed": deepspeed,
        }
    )


def every_learner(given: Config) -> list[LearnerSettings]:
    context: Any = SimpleNamespace(config=given, folder=Path("run"))
    sft = learner_settings(context, "sft", given.sft.adam, given.sft.zero_stage, given.sft.learning_rate)
    return [sft, *(_learner(context, given, role) for role in ("policy", "value"))]


@pytest.mark.parametrize("number", range(3), ids=["sft", "policy", "value"])
def test_what_is_set_is_handed_to_each_learner(number: int) -> None:
    plain = every_learner(config())[number]
    assert (plain.deepspeed, plain.activation_checkpointing) == ({}, False)
    given = every_learner(config(offload_optimizer="cpu", activation_checkpointing=True, extra={"a": 1}))[number]
    zero = {"offload_optimizer": {"device": "cpu", "pin_memory": True}}
    assert (given.deepspeed, given.activation_checkpointing) == ({"a": 1, "zero_optimization": zero}, True)


@pytest.mark.parametrize(("old_logprobs", "ratio_cap"), [("recompute", None), ("rollout", 1.5)])
def test_weights_are_made_once_before_the_update_or_by_each_minibatch_never_both(
    old_logprobs: str, ratio_cap: float | None
) -> None:
    given = config()
    given = given.model_copy(
        update={"ppo": given.ppo.model_copy(update={"old_logprobs": old_logprobs, "importance_cap": 1.5})}
    )
    assert _update(given, 0.2, Cutting(9)).ratio_cap == ratio_cap
    assert _estimate(given).old_from_rollout == (ratio_cap is not None)
