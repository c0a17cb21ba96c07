"""Who gets what of the cluster, in numbers."""

import pytest
from pydantic import ValidationError

from rayrlhf.actors.placement import RolePlacement, check_resources, largest_first, plan_ppo, plan_training, required
from rayrlhf.config import Config
from rayrlhf.errors import ResourceError


def config(**cluster) -> Config:
    rollout = cluster.pop("engines", {})
    return Config.model_validate(
        {"model": {"path": "org/name"}, "world": {"name": "instructions"}, "cluster": cluster, "rollout": rollout}
    )


GPUS = {"device": "cuda", "policy": {"ranks": 4, "cpus": 2.0}, "engines": {"engines": 3, "tensor_parallel": 2}}


def test_the_default_run_takes_two_cpus():
    plans = plan_ppo(config())
    assert [(p.role, p.ranks, p.cpus, p.gpus, p.threads) for p in plans] == [
        ("policy", 1, 0.4, 0.0, 1),
        ("reference", 1, 0.4, 0.0, 1),
        ("reward", 1, 0.4, 0.0, 1),
        ("value", 1, 0.4, 0.0, 1),
        ("rollout", 1, 0.4, 0.0, 2),
    ]
    train = plan_training(config())
    assert (train.role, train.ranks, train.cpus, train.gpus, train.threads) == ("train", 1, 1, 0.0, 2)
    assert required(config()) == pytest.approx({"CPU": 2.0, "GPU": 0.0})


def test_on_gpus_every_rank_gets_one_and_an_engine_one_per_shard():
    plans = {p.role: p for p in plan_ppo(config(**GPUS))}
    assert (plans["policy"].ranks, plans["policy"].gpus) == (4, 1.0)
    assert (plans["value"].ranks, plans["value"].gpus) == (1, 1.0)
    assert (plans["rollout"].ranks, plans["rollout"].gpus, plans["rollout"].cpus) == (3, 2.0, 0.8)
    # 4 policy + reference, reward, value + 3 engines of 2; CPUs: 4 x 2 + 3 x 0.4 + 3 x 0.8
    assert required(config(**GPUS)) == pytest.approx({"CPU": 11.6, "GPU": 13.0})


def test_roles_may_share_a_gpu():
    shared = {role: {"gpus": 0.25} for role in ("reference", "reward", "value")}
    assert required(config(device="cuda", **shared))["GPU"] == pytest.approx(1 + 3 * 0.25 + 1)


def test_the_larger_of_training_and_ppo_is_required_since_they_take_turns():
    # 8 workers of 1 CPU and 1 GPU; PPO needs 2 CPUs and 5 GPUs
    assert required(config(device="cuda", train={"ranks": 8, "cpus": 1})) == pytest.approx({"CPU": 8.0, "GPU": 8.0})
    # 2 workers; PPO needs more of both
    assert required(config(device="cuda", train={"ranks": 2, "cpus": 0.5})) == pytest.approx({"CPU": 2.0, "GPU": 5.0})


def test_a_bundle_per_rank_names_only_what_it_takes():
    assert RolePlacement("policy", 2, 0.4, 1.0, 1).bundles() == [{"CPU": 0.4, "GPU": 1.0}] * 2
    assert RolePlacement("policy", 1, 0.4, 0.0, 1).bundles() == [{"CPU": 0.4}]
    assert RolePlacement("policy", 1, 0.0, 0.5, 1).bundles() == [{"GPU": 0.5}]


def test_a_bundle_of_nothing_is_a_crumb_since_ray_refuses_empty_ones():
    assert RolePlacement("policy", 2, 0.0, 0.0, 1).bundles() == [{"CPU": 0.01}] * 2


def test_the_environment_sets_the_threads():
    environment = RolePlacement("policy", 1, 1, 0, 3).environment()
    assert environment["OMP_NUM_THREADS"] == "3"
    assert all(isinstance(v, str) for v in environment.values())


@pytest.mark.parametrize("available", [{"CPU": 2.0}, {"CPU": 2.0 - 1e-9}, {"CPU": 64.0, "GPU": 8.0}])
def test_a_cluster_with_room_passes(available):
    check_resources(config(), [available])


def test_a_cluster_without_room_is_refused_with_the_shares():
    with pytest.raises(ResourceError, match=r"asks for 2 CPUs, the cluster has 1 ") as error:
        check_resources(config(), [{"CPU": 1.0}])
    assert error.value.message.endswith(
        "(policy 1 x 0.4, reference 1 x 0.4, reward 1 x 0.4, value 1 x 0.4, rollout 1 x 0.4)"
    )
    assert error.value.hint == "lower cluster.<role>.cpus"


def test_a_cluster_without_gpus_is_refused_with_the_way_out():
    with pytest.raises(ResourceError, match=r"asks for 13 GPUs, the cluster has 0 ") as error:
        check_resources(config(**GPUS), [{"CPU": 64.0}])
    assert "policy 4 x 1" in error.value.message
    assert "rollout 3 x 2" in error.value.message
    assert error.value.hint == "set cluster.device=cpu"


def test_a_cluster_with_too_few_gpus_says_what_to_lower():
    with pytest.raises(ResourceError, match=r"asks for 13 GPUs, the cluster has 8 ") as error:
        check_resources(config(**GPUS), [{"CPU": 64.0, "GPU": 8.0}])
    assert error.value.hint == "lower cluster.<role>.gpus"


def test_the_refusal_names_the_stage_that_is_too_large():
    with pytest.raises(ResourceError, match="asks for 16 CPUs, the cluster has 8") as error:
        check_resources(config(train={"ranks": 16, "cpus": 1}), [{"CPU": 8.0}])
    assert error.value.message.endswith("(train 16 x 1)")


def test_a_run_of_ppo_alone_needs_no_room_for_training():
    given = config(train={"ranks": 16, "cpus": 1}).model_dump()
    given["run"]["stages"] = ("ppo",)
    check_resources(Config.model_validate(given), [{"CPU": 2.0}])


def test_a_run_without_any_stage_left_is_refused():
    given = config().model_dump()
    given["run"]["stages"] = ("pretrain",)  # model.path is given
    with pytest.raises(ValidationError, match="leaves nothing to run"):
        Config.model_validate(given)


def test_an_engines_shards_are_one_bundle_since_they_share_a_node():
    rollout = plan_ppo(config(**GPUS))[-1]
    assert rollout.bundles() == [{"CPU": 0.8, "GPU": 2.0}] * 3


def test_a_bundle_on_gpus_asks_for_the_share_that_the_role_was_given():
    reward = next(p for p in plan_ppo(config(device="cuda", reward={"gpus": 0.25, "ranks": 2})) if p.role == "reward")
    assert reward.bundles() == [{"CPU": 0.4, "GPU": 0.25}] * 2


def test_roles_are_reserved_from_the_largest_bundle_down_and_else_in_their_own_order():
    planned = plan_ppo(config(**GPUS, reference={"gpus": 0.5}))
    assert [p.role for p in largest_first(planned)] == ["rollout", "policy", "reward", "value", "reference"]


def test_supervised_workers_have_a_gpu_each():
    assert plan_training(config(device="cuda", train={"ranks": 2})).bundles() == [{"CPU": 0.4, "GPU": 1.0}] * 2


def test_a_role_that_is_alone_of_its_set_in_a_stage_has_the_whole_device() -> None:
    config = Config.model_validate(
        {
            "model": {"path": "org/name"},
            "world": {"name": "instructions"},
            "cluster": {"device": "cuda", "shared": [["policy", "reference"], ["reward", "value", "rollout"]]},
        }
    )
    assert {p.role: round(p.gpus, 3) for p in plan_ppo(config)} == {
        **dict.fromkeys(("policy", "reference"), 0.5),
        **dict.fromkeys(("reward", "value", "rollout"), 0.333),
    }
    assert {p.role: p.gpus for p in plan_ppo(config, ("policy", "rollout"))} == {"policy": 1.0, "rollout": 1.0}


def on_nodes(gpus: int, nodes: int) -> list[dict[str, float]]:
    return [{"CPU": 16.0, "GPU": float(gpus)}] * nodes


EIGHT_SHARDS = {"device": "cuda", "engines": {"engines": 1, "tensor_parallel": 8}}
FOUR_RANKS = {"device": "cuda", "policy": {"ranks": 4, "strategy": "strict_pack"}}


@pytest.mark.parametrize(
    ("asked", "nodes", "message", "hint"),
    [
        (
            EIGHT_SHARDS,
            on_nodes(2, 8),
            r"no node has room for one rank of rollout \(3.2 CPU, 8 GPU\)",
            "tensor_parallel",
        ),
        (FOUR_RANKS, on_nodes(2, 8), r"no node has room for the 4 ranks of policy .*, the roomiest for 2", "=pack"),
        (
            {"device": "cuda", "policy": {"ranks": 4, "strategy": "strict_spread"}},
            on_nodes(8, 2),
            "policy wants 4 nodes with room for a rank .*, the cluster has 2",
            "=spread",
        ),
        (
            {"device": "cuda", "engines": {"engines": 4, "tensor_parallel": 4}},
            on_nodes(7, 3),
            "the nodes have room for 3 of the 4 ranks of rollout",
            "so that nodes are filled",
        ),
    ],
)
def test_what_no_node_can_hold_is_refused_however_much_the_cluster_has(asked, nodes, message, hint):
    with pytest.raises(ResourceError, match=message) as error:
        check_resources(config(**asked), nodes)
    assert hint in error.value.hint


@pytest.mark.parametrize("asked", [EIGHT_SHARDS, FOUR_RANKS])
def test_what_some_node_can_hold_passes(asked):
    check_resources(config(**asked), on_nodes(8, 2))
