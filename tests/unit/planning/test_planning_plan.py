"""What does not fit, what would help, what a search finds; and that a plan of every config can be made."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from rayrlhf.actors.placement import required
from rayrlhf.algorithms.advantages import ESTIMATORS
from rayrlhf.config import Config, config_from, load_config
from rayrlhf.errors import ConfigError, ResourceError
from rayrlhf.planning.assumptions import assumptions_for
from rayrlhf.planning.catalogue import shape_named
from rayrlhf.planning.command import asked_of, numbers, plan_asked, read_asked
from rayrlhf.planning.form import read_form
from rayrlhf.planning.hardware import hardware_named, known_hardware
from rayrlhf.planning.plan import Plan, make_plan
from rayrlhf.planning.reading import WITHOUT_VALUES
from rayrlhf.planning.remedies import check_fits
from rayrlhf.planning.search import overrides_of, search, smallest
from rayrlhf.planning.workload import Role, Workload

ROOT = Path(__file__).parents[3]
GIB, NAME = 2**30, "facebook/opt-350m"
H100, GPU = hardware_named("h100-80g"), assumptions_for("gpu")
Make = Callable[..., Workload]

SEVEN = """
model: {path: meta-llama/Llama-2-7b-hf, dtype: bfloat16}
data: {prompts: [p], max_prompt_tokens: 512}
run: {stages: [ppo]}
cluster: {device: cuda, policy: {ranks: 8}, value: {ranks: 8}}
ppo: {zero_stage: 3}
deepspeed: {activation_checkpointing: true}
rollout: {max_tokens: 512, gpu_memory_utilization: 0.9}
"""


# Micro-batches of 16 sequences of 1,024 tokens a rank, with all their activations.
HEAVY = ("deepspeed.activation_checkpointing=false", "ppo.micro_batch_tokens=16384", "ppo.minibatch_size=128")


@pytest.fixture
def seven(tmp_path: Path) -> Callable[..., Config]:
    """A 7B model in bfloat16, ZeRO-3 on 8 GPUs: it fits."""
    (tmp_path / "seven.yaml").write_text(SEVEN, encoding="utf-8")
    return lambda *overrides: load_config(tmp_path / "seven.yaml", overrides, {})


def planned(config: Config) -> Plan:
    (plan,) = plan_asked(asked_of(config), look=False)
    return plan


def test_a_config_that_fits_has_no_shortfall(seven: Callable[..., Config]) -> None:
    plan = planned(seven())
    assert (plan.fits, plan.devices, plan.nodes) == (True, 8 + 8 + 1 + 1 + 1, 3)
    assert plan.gpu_hours == pytest.approx(19 * plan.time.seconds * 100 / 3600)


def test_gradients_add_up_in_float32_unless_deepspeed_is_told_otherwise(seven: Callable[..., Config]) -> None:
    told = "deepspeed.extra={data_types: {grad_accum_dtype: bf16}}"
    found = [planned(seven(*keys)).memory["policy"].rest["gradients"] for keys in ((), (told,))]
    assert found == [4 * 6_738_415_616 / 8, 2 * 6_738_415_616 / 8]


def test_what_does_not_fit_is_named_with_what_is_missing(seven: Callable[..., Config]) -> None:
    """Whole weights and gradients, 2 bytes each, and 12 of Adam's on one GPU: 16 x 6.7 GiB and what work takes."""
    plan = planned(seven("cluster.policy.ranks=1", "ppo.zero_stage=2"))
    (policy,) = plan.shortfalls
    assert policy.roles == ("policy",)
    usable = 79.1 * 0.95 * GIB
    assert policy.over == pytest.approx(plan.memory["policy"].peak - usable)
    assert 16 * 6_738_415_616 + 4 * 6_738_415_616 < policy.over + usable < 25 * 6_738_415_616
    assert "more than the 75.1 usable of NVIDIA H100" in policy.message


def test_too_few_nodes_are_a_shortfall(seven: Callable[..., Config]) -> None:
    (short,) = make_plan(asked_of(seven()).work, H100, GPU, nodes=2).shortfalls
    assert short.message == "the roles take 19 GPUs, 2 nodes of 8 have 16"
    assert short.over == 3


def test_roles_that_share_a_gpu_are_judged_together(workload: Make) -> None:
    shape = shape_named("meta-llama/Llama-2-7b-hf", "")
    roles = {"policy": Role("policy", shape, 4, learns=True, zero_stage=3), "rollout": Role("rollout", shape, 4)}
    apart = make_plan(workload(roles), H100, GPU)
    together = make_plan(workload(roles, shared=(("policy", "rollout"),)), H100, GPU)
    less = make_plan(workload(roles, shared=(("policy", "rollout"),), gpu_memory_utilization=0.7), H100, GPU)
    assert (apart.fits, together.fits, less.fits) == (True, False, True)
    assert (apart.devices, together.devices) == (11, 7)


def test_an_engine_must_hold_one_whole_sequence(workload: Make) -> None:
    shape = replace(shape_named("meta-llama/Llama-2-7b-hf", ""), context=None)
    work = workload({"rollout": Role("rollout", shape, 1)}, longest_response=200_000, gpu_memory_utilization=0.9)
    (short,) = [s for s in make_plan(work, H100, GPU).shortfalls if "cache" in s.message]
    assert short.roles == ("rollout",)
    assert "for one sequence of 200004 tokens" in short.message


def test_what_is_offloaded_must_fit_the_nodes_own_memory(workload: Make) -> None:
    shape = shape_named("gpt3-175b", "")
    roles = {"policy": Role("policy", shape, 8, learns=True, zero_stage=3)}
    plan = make_plan(workload(roles, offload_optimizer=True), H100, GPU)
    messages = [short.message for short in plan.shortfalls if "own memory" in short.message]
    assert messages, plan.shortfalls  # 16 bytes of 175B parameters are 2.6 TiB, a node has 2
    assert messages[0].startswith("policy:")


def test_a_machine_without_gpus_shares_its_memory_among_all_roles(tmp_path: Path) -> None:
    config = load_config(ROOT / "configs/tiny.yaml", (), {})
    assert planned(config).fits
    large = ["model.from_scratch.hidden_size=8192", "model.from_scratch.layers=48", "model.from_scratch.heads=64"]
    (short, *_) = planned(load_config(ROOT / "configs/tiny.yaml", large, {})).shortfalls
    assert "more than this machine's" in short.message
    assert set(short.roles) == {"policy", "value", "reference", "reward", "rollout"}


def test_a_config_that_cannot_fit_is_refused_with_three_ways_out(seven: Callable[..., Config]) -> None:
    config = seven(*HEAVY)
    plan = planned(config)
    with pytest.raises(ResourceError, match=r"this does not fit: policy: \d+\.\d GiB a GPU, \d+\.\d more") as error:
        check_fits(config, plan, planned)
    ways = error.value.hint.splitlines()[1:]
    assert len(ways) == 3
    for way in ways:
        assert planned(seven(*HEAVY, *way.split(" (")[0].split())).fits, way


def test_ways_out_come_in_the_order_of_what_they_cost(seven: Callable[..., Config]) -> None:
    config = seven(*HEAVY)
    with pytest.raises(ResourceError) as error:
        check_fits(config, planned(config), planned)
    costs = [float(way.split(" (")[1].split("%")[0]) for way in error.value.hint.splitlines()[1:]]
    assert costs == sorted(costs)


def test_a_search_finds_only_what_fits_and_says_it_in_keys(seven: Callable[..., Config]) -> None:
    config = seven()
    asked = asked_of(config)
    plans = search(asked.work, H100, GPU, nodes=1)
    assert all(plan.fits and plan.devices <= 8 for plan in plans)
    assert [plan.time.seconds for plan in plans] == sorted(plan.time.seconds for plan in plans)
    for plan in plans:
        again = planned(seven(*overrides_of(plan), "plan.nodes=1"))
        assert again.fits
        assert again.time.seconds == pytest.approx(plan.time.seconds)


@pytest.mark.parametrize(
    "keys",
    [
        ("ppo.pacing.kind=overlap", "ppo.importance_cap=2.0"),
        ("weights.transport=nccl",),
        ("weights.transport=ipc", "cluster.shared=[[policy, rollout]]", "rollout.engines=8"),
    ],
)
def test_what_a_search_finds_the_config_takes(keys: tuple[str, ...], seven: Callable[..., Config]) -> None:
    plans = search(asked_of(seven(*keys)).work, H100, GPU, nodes=1)
    assert plans
    for plan in plans:
        config = seven(*keys, *overrides_of(plan))
        together = any({"policy", "rollout"} <= set(roles) for roles in config.cluster.shared)
        assert config.weights.transport == ("ipc" if together else "nccl")


def test_more_nodes_are_never_slower_and_the_smallest_is_as_small_as_it_gets(seven: Callable[..., Config]) -> None:
    work = asked_of(seven()).work
    seconds = [search(work, H100, GPU, nodes)[0].time.seconds for nodes in (1, 2, 4)]
    assert seconds == sorted(seconds, reverse=True)
    assert smallest(work, H100, GPU)[0].devices == 1, "by turns, with the optimizer on the host"
    assert not search(work, H100.model_copy(update={"device": tiny_device()}), GPU, nodes=4)


def tiny_device() -> object:
    return H100.device.model_copy(update={"memory_gib": 2.0})


def test_a_search_that_finds_nothing_says_so(seven: Callable[..., Config]) -> None:
    asked = replace(asked_of(seven()), hardware=H100.model_copy(update={"device": tiny_device()}), nodes=1)
    with pytest.raises(ResourceError, match="no placement fits on 1 nodes of 8"):
        plan_asked(asked, look=True)


@pytest.mark.parametrize("name", ["1b", "6b", "175b"])
def test_the_plan_counts_the_gpus_that_the_run_asks_for(name: str) -> None:
    config = load_config(ROOT / f"configs/instructgpt/{name}.yaml", (), {})
    assert planned(config).devices == pytest.approx(required(config)["GPU"])


@pytest.mark.parametrize("name", ["1b", "6b", "175b"])
def test_instructgpts_sizes_fit_where_their_configs_put_them(name: str) -> None:
    plan = planned(load_config(ROOT / f"configs/instructgpt/{name}.yaml", (), {}))
    assert plan.fits, plan.shortfalls
    assert plan.work.steps * plan.work.batch_size == 256_000, "episodes (Ouyang et al. 2022, appendix C.4)"


def test_the_form_is_read_and_a_placement_is_found_for_it() -> None:
    form = read_form(ROOT / "configs/planning/workload.yaml")
    assert form.steps() == 59
    asked = read_asked(ROOT / "configs/planning/workload.yaml", (), None, None, {})
    assert not asked.is_placed
    plans = plan_asked(asked, look=False)
    assert plans[0].fits
    assert plans[0].work.roles["policy"].shape.parameters == 8_030_261_248


def test_a_placement_of_a_form_is_planned_as_it_is(tmp_path: Path) -> None:
    text = (ROOT / "configs/planning/workload.yaml").read_text(encoding="utf-8")
    filled = text.replace("# placement:", "placement:").replace("\n#   ", "\n  ").replace("\n  rayrlhf", "\n# rayrlhf")
    (tmp_path / "form.yaml").write_text(filled, encoding="utf-8")
    asked = read_asked(tmp_path / "form.yaml", (), None, None, {"mfu_train": 0.5})
    assert asked.is_placed
    assert asked.work.shared == (("policy", "value", "reference", "reward", "rollout"),)
    assert asked.assume["mfu_train"] == 0.5


def test_a_misspelt_key_of_a_form_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "form.yaml").write_text("workload: {promts: 3}", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"workload\.promts: unknown key; did you mean workload\.prompts"):
        read_form(tmp_path / "form.yaml")


def test_hardware_of_ones_own_comes_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        """
links: {slow: {gb_s: 1.5, latency_us: 40, source: ours}}
devices:
  ours: {kind: gpu, title: Ours, memory_gib: 24, host_gib: 128, tflops: {bfloat16: 100, float32: 20},
         memory_gb_s: 900, per_node: 4, within: pcie4, between: slow, host: pcie4, source: ours}
assumptions: {mfu_train: 0.3}
""",
        encoding="utf-8",
    )
    mine = hardware_named(str(tmp_path / "mine.yaml"))
    assert (mine.per_node, mine.link(4).gb_s, mine.link(5).gb_s) == (4, 32, 1.5)
    config = load_config(ROOT / "configs/tiny.yaml", ["cluster.device=cuda"], {})
    assert asked_of(config, str(tmp_path / "mine.yaml")).assume["mfu_train"] == 0.3


def test_unknown_names_are_errors_with_the_nearest_one(seven: Callable[..., Config]) -> None:
    with pytest.raises(ConfigError, match=r"h100: no such hardware \(--hardware(.|\n)*did you mean h100-80g"):
        hardware_named("h100")
    with pytest.raises(ConfigError, match=r"no assumption 'mfu'(.|\n)*mfu_"):
        asked_of(seven("plan.assume={mfu: 0.3}"))
    with pytest.raises(ConfigError, match="expected name=number"):
        numbers(["mfu_train"])
    with pytest.raises(ConfigError, match=r"hardware cpu is a cpu and cluster\.device is cuda"):
        asked_of(seven(), "cpu")


def test_every_device_names_its_source_and_links_that_there_are() -> None:
    for name in known_hardware():
        hardware = hardware_named(name)
        assert hardware.device.source
        assert hardware.within.gb_s >= hardware.between.gb_s


def test_every_assumption_has_a_unit_and_a_source() -> None:
    for kind in ("gpu", "cpu"):
        known = assumptions_for(kind).known
        assert all(found.unit and found.source for found in known.values())
        assert known.keys() == assumptions_for("gpu").known.keys()


def test_the_plan_and_the_algorithms_agree_on_who_needs_a_value_model() -> None:
    assert {name for name, estimator in ESTIMATORS.items() if not estimator.needs_values} == set(WITHOUT_VALUES)
    tree = load_config(ROOT / "configs/tiny.yaml", (), {}).model_dump(mode="json")
    config = config_from(tree, ["ppo.advantage=leave_one_out", "ppo.samples_per_prompt=4"], {})
    assert "value" not in asked_of(config).work.roles


def test_rewards_from_elsewhere_need_no_reward_model_and_those_of_an_ensemble_several(
    seven: Callable[..., Config],
) -> None:
    text = planned(seven("ppo.reward.kind=function", "ppo.reward.function=rewards.py:score"))
    assert "reward" not in text.work.roles
    assert text.work.roles["value"].shape.scalar
    one, three = (planned(seven("ppo.reward.kind=ensemble", f"ppo.reward.models={[NAME] * count}")) for count in (1, 3))
    assert three.memory["reward"].weights["weights"] == 3 * one.memory["reward"].weights["weights"]
    assert three.time.by_role["score"]["reward"] == pytest.approx(3 * one.time.by_role["score"]["reward"])


def ways(config: Config) -> list[str]:
    """The overrides that a refusal names."""
    with pytest.raises(ResourceError) as error:
        check_fits(config, planned(config), planned)
    return [line.split(" (")[0].strip() for line in error.value.hint.splitlines()[1:]]


def tiny(*overrides: str) -> Config:
    return load_config(ROOT / "configs/tiny.yaml", overrides, {})


def test_a_number_is_lowered_no_further_than_it_must_be() -> None:
    here = hardware_named("cpu").host_bytes
    too_much = f"rollout.kv_cache_gib={int(2 * here / GIB)}"
    (way, *_) = [way for way in ways(tiny(too_much)) if "kv_cache_gib" in way]
    name, _, value = way.partition("=")
    assert planned(tiny(way)).fits
    assert not planned(tiny(f"{name}={int(value) + 1}")).fits


def test_micro_batches_alone_are_enough_where_they_are_what_is_too_much() -> None:
    keys = ("ppo.micro_batch_tokens=2000000", "ppo.batch_size=8192", "ppo.minibatch_size=8192")
    found = ways(tiny(*keys))
    assert len(found) == 3
    assert any(way.startswith("ppo.micro_batch_tokens=") and " " not in way for way in found), found
    assert all(planned(tiny(*keys, *way.split())).fits for way in found)


def test_on_a_cpu_fewer_engines_are_a_way_out() -> None:
    here = int(hardware_named("cpu").host_bytes / GIB)
    config = tiny(f"rollout.kv_cache_gib={here // 4}", "rollout.engines=8", "cluster.rollout.threads=1")
    assert any(way.startswith("rollout.engines=") for way in ways(config))


def test_on_gpus_roles_that_fit_make_room_for_others_and_take_turns(seven: Callable[..., Config]) -> None:
    config = seven("plan.nodes=1", "cluster.policy.ranks=4", "cluster.value.ranks=4")
    found = ways(config)
    assert len(found) == 3, found
    assert any("cluster.shared=" in way for way in found)
    for way in found:
        assert planned(seven("plan.nodes=1", "cluster.policy.ranks=4", "cluster.value.ranks=4", *split(way))).fits


def split(way: str) -> list[str]:
    """At the spaces before a key."""
    return re.split(r" (?=[a-z_]+\.[a-z_.]+=)", way)


@pytest.mark.parametrize("value", ["auto", "'5e8'", "0", "true", ".inf"])
def test_a_bucket_of_deepspeeds_that_is_no_number_is_named(value: str) -> None:
    config = tiny(f"deepspeed.extra={{zero_optimization: {{reduce_bucket_size: {value}}}}}")
    with pytest.raises(ConfigError, match=r"deepspeed\.extra\.zero_optimization\.reduce_bucket_size is ") as error:
        planned(config)
    assert "a whole number of elements, as 500000000" in error.value.hint
