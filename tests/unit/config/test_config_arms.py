"""Several PPO runs in one config, and what `collect` and `eval` need."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rayrlhf.config import Config, dump_config, load_config
from rayrlhf.errors import ConfigError

BASE = """\
model: {from_scratch: {context: 64, hidden_size: 32, layers: 1, heads: 1}}
world: {name: instructions}
data: {max_prompt_tokens: 32}
sft: {max_response_tokens: 32}
reward: {max_response_tokens: 32}
dpo: {max_response_tokens: 32}
rollout: {max_tokens: 32}
ppo: {steps: 20, batch_size: 128, minibatch_size: 32, kl: {coef: 0.2}, ptx: {coef: 1.0}}
"""


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.yaml"
    path.write_text(BASE, encoding="utf-8")
    return path


def load(base: Path, *overrides: str) -> Config:
    return load_config(base, overrides, {})


def refusal(base: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(base, *overrides)
    return str(caught.value)


def different(config: Config, other: Config) -> dict[str, Any]:
    """The keys of `ppo` that differ, by dotted name, with the second config's value."""

    def flat(tree: dict[str, Any], start: str = "") -> dict[str, Any]:
        rows: dict[str, Any] = {}
        for key, value in tree.items():
            rows |= flat(value, f"{start}{key}.") if isinstance(value, dict) else {f"{start}{key}": value}
        return rows

    a, b = (flat(c.ppo.model_dump(mode="json") | {"arms": None}) for c in (config, other))
    return {key: b[key] for key in b if a[key] != b[key]}


# ---- arms


def test_a_config_without_arms_is_one_arm_named_after_what_it_does(base: Path) -> None:
    config = load(base)
    assert config.arms() == {"ppo_ptx": config}
    plain = load(base, "ppo.ptx.coef=0")
    assert plain.arms() == {"ppo": plain}


def test_each_arm_is_the_config_with_its_own_keys_changed_in_the_order_given(base: Path) -> None:
    config = load(base, "ppo.arms={no_ptx: {ptx.coef: 0}, same: {}, quick: {steps: 3, kl.coef: 0.5, adam.eps: 1e-4}}")
    arms = config.arms()
    assert list(arms) == ["no_ptx", "same", "quick"]
    assert different(config, arms["no_ptx"]) == {"ptx.coef": 0.0}
    assert different(config, arms["same"]) == {}
    assert different(config, arms["quick"]) == {"steps": 3, "kl.coef": 0.5, "adam.eps": 1e-4}
    assert all(arm.ppo.arms == {} for arm in arms.values())
    assert all(arm.rollout == config.rollout for arm in arms.values())


def test_arms_come_back_from_a_dump(base: Path, tmp_path: Path) -> None:
    config = load(base, "ppo.arms={a: {ptx.coef: 0}, b: {}}")
    (tmp_path / "dumped.yaml").write_text(dump_config(config), encoding="utf-8")
    again = load(tmp_path / "dumped.yaml")
    assert again == config
    assert list(again.arms()) == ["a", "b"]


@pytest.mark.parametrize(
    ("arm", "message"),
    [
        ("{kl.coeff: 1}", "ppo.arms.a.kl.coeff: ppo has no such key; did you mean ppo.arms.a.kl.coef?"),
        ("{stps: 1}", "ppo.arms.a.stps: ppo has no such key; did you mean ppo.arms.a.steps?"),
        ("{lk.coef: 1}", "ppo.arms.a.lk.coef: ppo has no such key; did you mean ppo.arms.a.kl?"),
        ("{xyzzy: 1}", "ppo.arms.a.xyzzy: ppo has no such key"),
        ("{steps.more: 1}", "ppo.arms.a.steps.more: ppo has no such key"),
        ("{rollout.temperature: 1}", "ppo.arms.a.rollout.temperature: ppo has no such key"),
        ("{zero_stage: 2}", "ppo.arms.a.zero_stage: belongs to the actors, which all arms share"),
        ("{frozen_zero_stage: 3}", "ppo.arms.a.frozen_zero_stage: belongs to the actors, which all arms share"),
        ("{advantage: leave_one_out}", "ppo.arms.a.advantage: belongs to the actors, which all arms share"),
        ("{arms: {}}", "ppo.arms.a.arms: belongs to the actors, which all arms share"),
        ("{kl.coef: -1}", "ppo.arms.a.kl.coef: found -1; input should be greater than or equal to 0"),
        ("{steps: ten}", "ppo.arms.a.steps: found 'ten'; input should be a valid integer"),
        ("{learning_rate: true}", "ppo.arms.a.learning_rate: found True; input should be a valid number"),
        ("{minibatch_size: 100}", "ppo.arms.a: batch_size 128 is not a multiple of minibatch_size 100"),
        ("{value_warmup_steps: 20}", "ppo.arms.a: value_warmup_steps 20 leaves the policy none of 20"),
        ("3", "ppo.arms.a: found 3; input should be a valid dictionary"),
    ],
)
def test_what_is_wrong_in_an_arm_is_named_by_its_arm_and_key(base: Path, arm: str, message: str) -> None:
    assert refusal(base, f"ppo.arms={{fine: {{}}, a: {arm}}}") == f"{base}: {message}"


@pytest.mark.parametrize("name", ["sft", "dpo", "ema", "best_of_8"])
def test_an_arm_may_not_be_called_what_another_model_is(base: Path, name: str) -> None:
    assert f"ppo.arms.{name}: {name} is what another model is called" in refusal(base, f"ppo.arms={{{name}: {{}}}}")


@pytest.mark.parametrize("name", ["a b", "../up", "A", "", "x" * 33])
def test_the_name_of_an_arm_names_folders(base: Path, name: str) -> None:
    assert "string should match pattern" in refusal(base, f"ppo.arms={{'{name}': {{}}}}")


def test_an_arm_that_contradicts_another_section_is_named(base: Path) -> None:
    message = refusal(base, "cluster.policy.ranks=2", "ppo.arms={a: {minibatch_size: 1}}")
    assert "ppo.arms.a: cluster.policy.ranks 2 and ppo.minibatch_size 1 contradict each other" in message


def test_an_arm_that_learns_from_text_needs_text(base: Path) -> None:
    given = ("world.name=null", "model={path: a/b}", "run.stages=[ppo]", "data.prompts=[p.jsonl]", "ppo.ptx.coef=0")
    assert load(base, *given, "ppo.arms={a: {}}").stages() == ("ppo",)
    message = refusal(base, *given, "ppo.arms={plain: {}, a: {ptx.coef: 1.0}}")
    assert "ppo.arms.a: ppo.ptx.coef is set but data.text is empty" in message


def test_what_is_wrong_in_the_config_itself_is_not_blamed_on_an_arm(base: Path) -> None:
    message = refusal(base, "ppo.arms={a: {}}", "world.name=null")
    assert message == f"{base}: run.stages has pretrain but data.text is empty"


# ---- collect and eval


def test_collect_runs_only_where_there_is_a_section_for_it(base: Path) -> None:
    assert load(base).stages() == ("pretrain", "sft", "reward", "ppo")
    assert load(base, "collect={}").stages() == ("pretrain", "sft", "collect", "reward", "ppo")
    assert load(base, "collect={}", "run.stages=[sft, ppo]").stages() == ("sft", "ppo")


def test_collect_needs_a_world(base: Path) -> None:
    files = "data={text: [t.txt], demonstrations: [d.jsonl], rankings: [r.jsonl], prompts: [p.jsonl]}"
    message = refusal(base, "collect={}", "world.name=null", files)
    assert message == f"{base}: collect needs world.name: only a world's simulated labelers rank what is sampled"


def test_the_numbers_of_responses_to_rank_are_in_order(base: Path) -> None:
    assert load(base, "collect={fewest: 5, most: 5}").collect is not None
    assert "collect: fewest 6 is over most 5" in refusal(base, "collect={fewest: 6, most: 5}")
    assert "collect.fewest: found 1; input should be greater than or equal to 2" in refusal(base, "collect.fewest=1")


def test_a_world_is_named_where_its_module_is(base: Path) -> None:
    message = refusal(base, "world={module: own.py}")
    assert "world.module is set but world.name is not: name the world that it registers" in message


def test_eval_runs_only_where_it_is_named_and_needs_held_out_prompts(base: Path) -> None:
    assert load(base, "run.stages=[ppo, eval]").stages() == ("ppo", "eval")
    given = ("world.name=null", "run.stages=[eval]")
    assert refusal(base, *given) == f"{base}: run.stages has eval but data.heldout_prompts is empty"
    assert load(base, *given, "data.heldout_prompts=[h.jsonl]").stages() == ("eval",)


def test_questions_alone_are_enough_to_evaluate(base: Path) -> None:
    given = ("world.name=null", "run.stages=[eval]", "data.multiple_choice=[arc.jsonl]")
    assert load(base, *given).stages() == ("eval",)


@pytest.mark.parametrize("stage", ["collect", "eval"])
def test_the_length_of_rollouts_matters_to_every_stage_that_samples(base: Path, stage: str) -> None:
    message = refusal(base, "collect={}", f"run.stages=[{stage}]", "rollout.max_tokens=33")
    assert "data.max_prompt_tokens 32 + rollout.max_tokens 33 is over model.from_scratch.context 64" in message


def test_the_defaults_of_collect_are_the_papers(base: Path) -> None:
    """Ouyang et al. 2022, section 3.5: labelers rank between K = 4 and K = 9 responses."""
    collect = load(base, "collect={}").collect
    assert collect is not None
    assert (collect.fewest, collect.most) == (4, 9)
