"""The `deepspeed` section: what reaches DeepSpeed, and what is refused, with the cure."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from rayrlhf.config import Config
from rayrlhf.config.deepspeed import OWNED, DeepSpeedConfig, zero_stage_in_use
from rayrlhf.config.load import config_from
from rayrlhf.errors import ConfigError

STAGES = ("sft", "reward", "ppo")
SHARDED = {"sft": {"zero_stage": 3}, "reward": {"zero_stage": 3}, "ppo": {"zero_stage": 3}}


def tree(deepspeed: dict[str, Any], **sections: Any) -> dict[str, Any]:
    return {
        "run": {"stages": STAGES},
        "model": {"path": "org/name"},
        "world": {"name": "instructions"},
        "cluster": {"device": "cuda"},
        "deepspeed": deepspeed,
        **sections,
    }


def refusal(deepspeed: dict[str, Any], **sections: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        config_from(tree(deepspeed, **sections), environ={})
    return str(caught.value).removeprefix("the config: ")


def test_nothing_is_passed_on_unless_it_is_asked_for() -> None:
    assert DeepSpeedConfig().keys() == {}


def test_offloading_is_passed_on_by_deepspeeds_own_names() -> None:
    given = DeepSpeedConfig(offload_optimizer="cpu", offload_param="cpu", pin_memory=False, zero_hpz_partition_size=8)
    assert given.keys() == {
        "zero_optimization": {
            "offload_optimizer": {"device": "cpu", "pin_memory": False},
            "offload_param": {"device": "cpu", "pin_memory": False},
            "zero_hpz_partition_size": 8,
        }
    }


def test_what_has_no_key_of_its_own_is_passed_on_as_it_is_beside_what_has() -> None:
    extra = {"wall_clock_breakdown": True, "zero_optimization": {"reduce_bucket_size": 5}}
    given = DeepSpeedConfig(offload_optimizer="cpu", extra=extra)
    assert given.keys() == {
        "wall_clock_breakdown": True,
        "zero_optimization": {"reduce_bucket_size": 5, "offload_optimizer": {"device": "cpu", "pin_memory": True}},
    }
    assert extra == {"wall_clock_breakdown": True, "zero_optimization": {"reduce_bucket_size": 5}}


@pytest.mark.parametrize("owned", OWNED)
def test_a_key_that_another_section_says_is_refused_by_its_dotted_path(owned: str) -> None:
    extra: Any = 1
    for key in reversed(owned.split(".")):
        extra = {key: extra}
    assert refusal({"extra": extra}) == f"deepspeed.extra.{owned} is not passed on: set {OWNED[owned]} instead"


def test_a_section_below_an_owned_key_is_refused_too() -> None:
    message = refusal({"extra": {"optimizer": {"params": {"lr": 1.0}}}})
    assert message == "deepspeed.extra.optimizer is not passed on: set ppo.adam or <stage>.adam instead"


def test_a_dotted_key_which_deepspeed_would_not_read_is_refused() -> None:
    assert "written as sections" in refusal({"extra": {"zero_optimization.reduce_bucket_size": 5}})


def test_zero_optimization_has_to_be_a_section() -> None:
    assert "found 2; it is a section of keys" in refusal({"extra": {"zero_optimization": 2}})


@pytest.mark.parametrize("name", ["offload_optimizer", "offload_param"])
def test_offloading_from_a_cpu_to_a_cpu_is_refused(name: str) -> None:
    message = refusal({name: "cpu"}, cluster={"device": "cpu"}, **SHARDED)
    assert message == f"deepspeed.{name} is cpu but cluster.device is cpu too: nothing lies on a GPU; set it to none"


def test_an_offloaded_optimizer_needs_zero_in_every_stage_that_is_run() -> None:
    message = refusal({"offload_optimizer": "cpu"}, sft={"zero_stage": 1})
    assert message == (
        "deepspeed.offload_optimizer cpu needs ZeRO stage 1 or more in every learner of the run, and "
        "reward.zero_stage is 0: set reward.zero_stage=1"
    )
    stages = {"run": {"stages": ("ppo",)}}  # ppo.zero_stage is 1 by default
    Config.model_validate(tree({"offload_optimizer": "cpu"}, **stages))


def test_one_rank_in_float32_shards_nothing_unless_zero_is_asked_for_by_its_own_keys() -> None:
    assert [zero_stage_in_use(stage, "float32", 1, False) for stage in range(4)] == [0, 0, 0, 0]
    assert [zero_stage_in_use(stage, "float32", 2, False) for stage in range(4)] == [0, 1, 2, 3]
    assert [zero_stage_in_use(stage, "float32", 1, True) for stage in range(4)] == [0, 1, 2, 3]


def test_in_bfloat16_zero_is_on_at_stage_2_whatever_is_asked_for() -> None:
    for ranks in (1, 2):
        assert [zero_stage_in_use(stage, "bfloat16", ranks, False) for stage in range(4)] == [2, 2, 2, 3]
    Config.model_validate(tree({"offload_optimizer": "cpu"}, model={"path": "org/name", "dtype": "bfloat16"}))


@pytest.mark.parametrize("setting", [{"offload_param": "cpu"}, {"zero_hpz_partition_size": 2}])
def test_offloaded_and_hierarchical_weights_need_stage_3(setting: dict[str, Any]) -> None:
    message = refusal(setting, **(SHARDED | {"ppo": {"zero_stage": 2}}))
    assert message.endswith("ppo.zero_stage is 2: set ppo.zero_stage=3")


def test_hierarchical_partitions_divide_the_ranks_of_every_learner() -> None:
    ranks = {"policy": {"ranks": 8}, "value": {"ranks": 6}, "train": {"ranks": 8}}
    message = refusal({"zero_hpz_partition_size": 4}, cluster={"device": "cuda", **ranks}, **SHARDED)
    assert message == (
        "deepspeed.zero_hpz_partition_size 4 does not divide cluster.value.ranks 6: take the number of ranks that "
        "share a node"
    )


def test_the_policy_that_collect_and_eval_sample_from_is_a_learner_too() -> None:
    given = Config.model_validate(tree({}, run={"stages": ("eval",)}))
    assert [learner.ranks_key for learner in given.learners()] == ["cluster.policy.ranks"]
    given = Config.model_validate(tree({}))
    assert [(learner.stage_key, learner.ranks_key) for learner in given.learners()] == [
        ("sft.zero_stage", "cluster.train.ranks"),
        ("reward.zero_stage", "cluster.train.ranks"),
        ("ppo.zero_stage", "cluster.policy.ranks"),
        ("ppo.zero_stage", "cluster.value.ranks"),
    ]


@pytest.mark.parametrize("bad", [{"offload_optimizer": "nvme"}, {"offload_optimiser": "cpu"}, {"pin_memory": "maybe"}])
def test_misspelt_keys_and_values_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        DeepSpeedConfig(**bad)
