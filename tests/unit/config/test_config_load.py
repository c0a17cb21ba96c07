"""Reading a config: numbers, overrides, what is refused and how the refusal reads, and the way back to YAML."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from rayrlhf.config import DATA_ROOT_VARIABLE, Config, dump_config, load_config
from rayrlhf.errors import ConfigError

ROOT = Path(__file__).parents[3]
FORMS = ROOT / "configs" / "planning"  # read by tests/unit/planning
CONFIGS = sorted(str(path) for path in (ROOT / "configs").rglob("*.yaml") if path.parent != FORMS)
BASE = """\
model: {from_scratch: {context: 64, hidden_size: 32, layers: 1, heads: 2}}
data:
  text: [text.jsonl]
  demonstrations: [demonstrations.jsonl]
  rankings: [rankings.jsonl]
  prompts: [prompts.jsonl]
  max_prompt_tokens: 32
sft: {max_response_tokens: 32}
reward: {max_response_tokens: 32}
dpo: {max_response_tokens: 32}
rollout: {max_tokens: 32}
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "base.yaml"
    path.write_text(BASE, encoding="utf-8")
    return path


def load(base: Path, *overrides: str, environ: dict[str, str] | None = None) -> Config:
    return load_config(base, overrides, environ or {})


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "written.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def refusal(base: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(base, *overrides)
    return str(caught.value)


def tree_of(config: Config) -> dict[str, Any]:
    return config.model_dump(mode="json")


# ---- numbers and words, as YAML 1.2 reads them


def test_a_number_with_an_exponent_and_no_point_is_a_float(tmp_path: Path) -> None:
    path = written(tmp_path, BASE + "ppo: {learning_rate: 9e-6, value_learning_rate: 3E-4, clip: 1}\n")
    ppo = load(path).ppo
    assert (ppo.learning_rate, ppo.value_learning_rate, ppo.clip) == (0.000009, 0.0003, 1.0)
    assert type(ppo.clip) is float


def test_the_words_off_and_no_stay_strings(tmp_path: Path) -> None:
    path = written(tmp_path, BASE + "tracking: {wandb: off}\nrun: {name: no}\n")
    config = load(path)
    assert (config.tracking.wandb, config.run.name) == ("off", "no")


def test_every_section_is_optional_but_the_model(base: Path, tmp_path: Path) -> None:
    assert refusal(written(tmp_path, "")) == f"{tmp_path / 'written.yaml'}: model: missing"
    assert load(base).ppo.learning_rate == 9e-6


# ---- overrides


@pytest.mark.parametrize(
    ("override", "section", "field", "value"),
    [
        ("ppo.steps=7", "ppo", "steps", 7),
        ("ppo.learning_rate=1e-5", "ppo", "learning_rate", 0.00001),
        ("run.name=other", "run", "name", "other"),
        ("run.name='8'", "run", "name", "8"),
        ("run.stages=[sft, reward]", "run", "stages", ("sft", "reward")),
        ("data.max_records=null", "data", "max_records", None),
        ("data.prompts=[a.jsonl]", "data", "prompts", ("a.jsonl",)),
        ("model.trust_remote_code=true", "model", "trust_remote_code", True),
        ("tracking.project=org/name", "tracking", "project", "org/name"),
        ("run.output=a=b", "run", "output", Path("a=b")),
    ],
)
def test_an_override_has_the_type_it_would_have_in_the_file(
    base: Path, override: str, section: str, field: str, value: object
) -> None:
    found = getattr(getattr(load(base, override), section), field)
    assert found == value
    assert type(found) is type(value) or isinstance(value, Path)


def test_an_override_creates_the_sections_on_its_way_and_leaves_their_other_keys_alone(base: Path) -> None:
    config = load(base, "ppo.adam.eps=1e-4", "ppo.kl.coef=0.5", "model.from_scratch.layers=3")
    assert (config.ppo.adam.eps, config.ppo.kl.coef, config.ppo.kl.kind) == (0.0001, 0.5, "k1")
    assert config.model.from_scratch is not None
    assert (config.model.from_scratch.layers, config.model.from_scratch.hidden_size) == (3, 32)


def test_an_override_opens_a_section_that_the_file_leaves_empty(tmp_path: Path) -> None:
    assert load(written(tmp_path, BASE + "ppo:\n"), "ppo.steps=3").ppo.steps == 3


def test_the_later_of_two_overrides_of_a_key_wins(base: Path) -> None:
    assert load(base, "ppo.steps=3", "ppo.steps=4").ppo.steps == 4


@pytest.mark.parametrize("override", ["ppo.steps", "=3", "ppo..steps=3", ".steps=3", "ppo.=3", ""])
def test_an_override_without_key_or_equals_sign_is_refused_with_an_example(base: Path, override: str) -> None:
    assert refusal(base, override) == (
        f"{override!r} is not an override\n  hint: write section.key=value, for example ppo.steps=10"
    )


def test_an_override_whose_value_is_no_yaml_names_the_key(base: Path) -> None:
    assert refusal(base, "run.stages=[sft").startswith("run.stages: cannot read '[sft' as YAML")


def test_an_override_below_a_plain_value_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, BASE + "ppo: {steps: 3}\n")
    assert refusal(path, "ppo.steps.more=1") == "ppo.steps.more: steps is a value, not a section"


# ---- unknown keys


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("pppo.steps=1", "pppo: unknown key; did you mean ppo?"),
        ("ppo.stps=1", "ppo.stps: unknown key; did you mean ppo.steps?"),
        ("ppo.kl.coeff=1", "ppo.kl.coeff: unknown key; did you mean ppo.kl.coef?"),
        ("ppo.adam.bets=1", "ppo.adam.bets: unknown key; did you mean ppo.adam.betas?"),
        ("cluster.policy.cpu=1", "cluster.policy.cpu: unknown key; did you mean cluster.policy.cpus?"),
        (
            "model.from_scratch.hiden_size=1",
            "model.from_scratch.hiden_size: unknown key; did you mean model.from_scratch.hidden_size?",
        ),
        ("world.xyzzy=1", "world.xyzzy: unknown key; did you mean one of module, name, seed, size?"),
    ],
)
def test_an_unknown_key_is_named_by_its_dotted_path_with_the_nearest_valid_one(
    base: Path, override: str, message: str
) -> None:
    assert refusal(base, override) == f"{base}: {message}"


def test_every_wrong_key_is_reported_not_only_the_first(base: Path) -> None:
    lines = refusal(base, "ppo.stps=1", "sft.epoch=1").splitlines()
    assert [line.split(": ")[1] for line in lines] == ["sft.epoch", "ppo.stps"]


# ---- wrong types and ranges


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("ppo.steps=true", "ppo.steps: found True; input should be a valid integer"),
        ("ppo.steps='8'", "ppo.steps: found '8'; input should be a valid integer"),
        ("ppo.steps=8.0", "ppo.steps: found 8.0; input should be a valid integer"),
        ("ppo.steps=null", "ppo.steps: found null; input should be a valid integer"),
        ("ppo.steps=0", "ppo.steps: found 0; input should be greater than or equal to 1"),
        ("ppo.steps=many", "ppo.steps: found 'many'; input should be a valid integer"),
        ("ppo.clip=true", "ppo.clip: found True; input should be a valid number"),
        ("ppo.clip='0.2'", "ppo.clip: found '0.2'; input should be a valid number"),
        ("ppo.clip=0", "ppo.clip: found 0; input should be greater than 0"),
        ("ppo.clip=.nan", "ppo.clip: found nan; input should be a finite number"),
        ("ppo.clip=.inf", "ppo.clip: found inf; input should be a finite number"),
        ("ppo.learning_rate=1e400", "ppo.learning_rate: found inf; input should be a finite number"),
        ("ppo.adam.weight_decay=-.inf", "ppo.adam.weight_decay: found -inf; input should be "),
        ("ppo.gamma=.nan", "ppo.gamma: found nan; input should be "),
        ("ppo.lam=1.01", "ppo.lam: found 1.01; input should be less than or equal to 1"),
        ("ppo.zero_stage=4", "ppo.zero_stage: found 4; input should be less than or equal to 3"),
        ("ppo.zero_stage='1'", "ppo.zero_stage: found '1'; input should be a valid integer"),
        ("ppo.frozen_zero_stage=1", "ppo: frozen_zero_stage is 0 or 3, found 1: stages 1 and 2 shard optimizers"),
        ("ppo.adam.betas=[0.9]", "ppo.adam.betas.1: missing"),
        ("ppo.adam.betas=[0.9, 2]", "ppo.adam.betas.1: found 2; input should be less than or equal to 1"),
        ("sft.dropout=1", "sft.dropout: found 1; input should be less than 1"),
        ("sft.dropout=.nan", "sft.dropout: found nan; input should be "),
        ("sft.pretrain_mix=0.1", "sft.pretrain_mix: found 0.1; it is a section: set one of coef, "),
        ("sft.pretrain_mix.coef=-1", "sft.pretrain_mix.coef: found -1; input should be greater than or equal to 0"),
        (
            "sft.pretrain_mix.examples_per_demonstration=0",
            "sft.pretrain_mix.examples_per_demonstration: found 0; input should be greater than 0",
        ),
        ("sft.select.by=best", "sft.select.by: found 'best'; input should be 'last', 'heldout_loss' or 'reward'"),
        ("data.heldout_fraction=0.6", "data.heldout_fraction: found 0.6; input should be less than or equal to 0.5"),
        ("data.overlong_prompts=cut", "data.overlong_prompts: found 'cut'; input should be 'drop' or 'refuse'"),
        ("weights.probe_tokens=63", "weights.probe_tokens: found 63; input should be greater than or equal to 64"),
        ("model.from_scratch.vocab_size=299", "model.from_scratch.vocab_size: found 299; input should be "),
        ("run.seed=-1", "run.seed: found -1; input should be greater than or equal to 0"),
        ("run.seed=2147483648", "run.seed: found 2147483648; input should be less than 2147483648"),
        ("run.name=../up", "run.name: found '../up'; string should match pattern "),
        (
            "run.stages=[pretrain, rm]",
            "run.stages.1: found 'rm'; input should be 'pretrain', 'sft', 'collect', 'reward', 'dpo'",
        ),
        ("dpo.beta=0", "dpo.beta: found 0; input should be greater than 0"),
        ("dpo.betas=0.1", "dpo.betas: unknown key; did you mean dpo.beta?"),
        ("dpo.path=a/b", "dpo.path: unknown key; did you mean "),
        ("tracking.samples_per_step=65", "tracking.samples_per_step: found 65; input should be less than or equal to"),
        ("tracking.wandb=false", "tracking.wandb: found False; input should be 'off', 'offline' or 'online'"),
        ("ppo.kl=3", "ppo.kl: found 3; it is a section: set one of coef, horizon, "),
        ("ppo=[1]", "ppo: found [1]; it is a section: set one of adam, "),
    ],
)
def test_a_wrong_type_or_range_names_the_key_what_was_found_and_what_was_expected(
    base: Path, override: str, message: str
) -> None:
    assert refusal(base, override).startswith(f"{base}: {message}")


@pytest.mark.parametrize("value", ["true", "1.0"])
def test_a_zero_stage_that_is_no_integer_is_refused(base: Path, value: str) -> None:
    assert "ppo.zero_stage" in refusal(base, f"ppo.zero_stage={value}")


def test_the_pattern_that_a_name_must_match_is_quoted_as_it_is(base: Path) -> None:
    assert "[A-Za-z0-9][A-Za-z0-9._-]*" in refusal(base, "run.name=../up")


# ---- sections that contradict each other

ROLES = ("policy", "reference", "reward", "value", "rollout", "train")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        *((["cluster." + r + ".gpus=1"], f"{r}.gpus is 1 but cluster.device is cpu") for r in ROLES),
        *((["cluster.device=cuda", f"cluster.{r}.gpus=0"], f"{r}.gpus is 0 but cluster.device is cuda") for r in ROLES),
        (["model.path=org/name"], "path and from_scratch contradict each other: keep one, and set the other to null"),
        (
            ["ppo.truncated.treatment=penalty"],
            "ppo.truncated: value is missing with treatment penalty: penalty and replace need it",
        ),
        (["ppo.truncated.value=1.0"], "ppo.truncated: value is not used with treatment keep"),
        (
            ["ppo.batch_size=12", "ppo.minibatch_size=4", "ppo.samples_per_prompt=8"],
            "ppo: batch_size 12 is not a multiple of samples_per_prompt 8",
        ),
        (["ppo.old_logprobs=rollout"], "ppo: old_logprobs rollout needs importance_cap (2.0 is usual)"),
        (["ppo.pacing.kind=overlap"], "ppo: pacing.kind overlap needs importance_cap (2.0 is usual)"),
        (
            ["ppo.pacing.kind=overlap", "ppo.importance_cap=2.0", "ppo.old_logprobs=rollout"],
            "ppo: pacing.kind overlap and old_logprobs rollout contradict each other",
        ),
        (
            [
                "run.deterministic=true",
                "ppo.pacing.kind=overlap",
                "ppo.importance_cap=2.0",
                "ppo.pacing.max_staleness=2",
            ],
            "run.deterministic and ppo.pacing.max_staleness 2 contradict each other",
        ),
        (["weights.transport=nccl"], "weights.transport is nccl but cluster.device is cpu: take shared_memory"),
        (["cluster.shared=[[policy]]"], "shared: policy: a set names two roles or more, and a role is in one set"),
        (
            ["cluster.shared=[[policy, rollout], [rollout, value]]"],
            "shared: rollout, value: a set names two roles or more, and a role is in one set",
        ),
        (["cluster.shared=[[policy, train]]"], "cluster.shared"),
        (
            ["cluster.shared=[[policy, value]]", "cluster.device=cuda", "cluster.value.gpus=0.5"],
            "value.gpus and shared contradict each other: value shares a whole GPU",
        ),
        (
            ["cluster.shared=[[policy, value]]", "cluster.value.strategy=spread"],
            "value and policy share devices: give both the same resources and strategy",
        ),
        (
            ["cluster.shared=[[policy, rollout]]", "rollout.engines=2"],
            "cluster.shared: roles on the same devices need equally many ranks (policy 1, rollout 2)",
        ),
        (
            ["cluster.device=cuda", "cluster.rollout.gpus=0.5", "rollout.tensor_parallel=2"],
            "cluster.rollout.gpus is 0.5 and rollout.tensor_parallel is 2: the shards of an engine need a GPU each",
        ),
        (
            ["cluster.shared=[[reward, rollout]]", "rollout.tensor_parallel=2"],
            "cluster.shared has rollout and rollout.tensor_parallel is 2: an engine that shares its device has one",
        ),
        (
            ["cluster.shared=[[policy, rollout]]", "ppo.pacing.kind=overlap", "ppo.importance_cap=2.0"],
            "ppo.pacing.kind is overlap but cluster.shared puts policy and rollout on the same devices",
        ),
        (
            ["cluster.shared=[[policy, rollout]]", "cluster.device=cuda", "weights.transport=nccl"],
            "weights.transport is nccl but cluster.shared puts policy and rollout on the same devices",
        ),
        (["ppo.steps=3", "ppo.value_warmup_steps=3"], "ppo: value_warmup_steps 3 leaves the policy none of 3"),
        (["ppo.ptx.coef=1.0", "data.text=[]", "run.stages=[ppo]"], "ppo.ptx.coef is set but data.text is empty"),
        (["model.from_scratch=null"], "model: name a model with path, or describe one with from_scratch"),
        (["model.from_scratch.heads=5"], "hidden_size 32 is not a multiple of heads 5"),
        (["model.from_scratch.heads=32"], "hidden_size / heads must be even"),
        (["model.from_scratch.kv_heads=3"], "heads 2 is not a multiple of kv_heads 3"),
        (
            ["model.from_scratch.architecture=gpt2", "model.from_scratch.kv_heads=1"],
            "kv_heads is for llama; gpt2 has as many as heads",
        ),
        (["ppo.minibatch_size=100"], "ppo: batch_size 512 is not a multiple of minibatch_size 100"),
        (["data.text=[]"], "run.stages has pretrain but data.text is empty"),
        (["data.demonstrations=[]"], "run.stages has sft but data.demonstrations is empty"),
        (["data.rankings=[]"], "run.stages has reward but data.rankings is empty"),
        (
            ["reward.unit_variance=true", "run.stages=[reward]", "data.demonstrations=[]"],
            "reward.unit_variance is measured on demonstrations but data.demonstrations is empty: "
            "name some, or set reward.unit_variance=false",
        ),
        (["run.stages=[dpo]", "data.rankings=[]"], "run.stages has dpo but data.rankings is empty"),
        (["data.prompts=[]"], "run.stages has ppo but data.prompts is empty"),
        (
            ["rollout.max_tokens=33"],
            "data.max_prompt_tokens 32 + rollout.max_tokens 33 is over model.from_scratch.context 64",
        ),
        (
            ["sft.max_response_tokens=33"],
            "data.max_prompt_tokens 32 + sft.max_response_tokens 33 is over model.from_scratch.context 64",
        ),
        (
            ["reward.max_response_tokens=33"],
            "data.max_prompt_tokens 32 + reward.max_response_tokens 33 is over model.from_scratch.context 64",
        ),
        (
            ["run.stages=[dpo]", "dpo.max_response_tokens=33"],
            "data.max_prompt_tokens 32 + dpo.max_response_tokens 33 is over model.from_scratch.context 64",
        ),
        (
            ["model={path: a/b}", "data.text=[]", "sft.pretrain_mix.coef=0.5"],
            "sft.pretrain_mix.coef is 0.5 but data.text is empty: give text, or set it to 0",
        ),
        (["sft.select.by=reward"], "sft.select: by reward needs reward_model: name an existing reward model"),
        (
            ["sft.select={by: heldout_loss, reward_model: a/b}"],
            "sft.select: by heldout_loss and reward_model contradict each other: set by to reward, or leave it out",
        ),
        (
            ["sft.select={by: reward, reward_model: a/b}", "sft.zero_stage=3"],
            "sft: select.by reward and zero_stage 3 contradict each other",
        ),
        (
            ["sft.select.by=heldout_loss", "data.heldout_fraction=0"],
            "sft.select.by is heldout_loss but data.heldout_fraction is 0",
        ),
        (
            ["cluster.policy.ranks=3", "ppo.minibatch_size=2"],
            "cluster.policy.ranks 3 and ppo.minibatch_size 2 contradict each other",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_settings_that_contradict_each_other_are_both_named(base: Path, overrides: list[str], message: str) -> None:
    assert message in refusal(base, *overrides)


def test_a_world_stands_in_for_the_files_that_are_not_named(base: Path) -> None:
    config = load(base, "world.name=instructions", "data.prompts=[]", "run.stages=[ppo, eval]")
    assert config.stages() == ("ppo", "eval")
    assert config.data.text == ("text.jsonl",)


def test_settings_exactly_at_their_limits_are_accepted(base: Path) -> None:
    config = load(base, "cluster.policy.ranks=64", "ppo.minibatch_size=64", "sft.dropout=0.99", "run.seed=2147483647")
    assert (config.cluster.policy.ranks, config.sft.dropout, config.run.seed) == (64, 0.99, 2147483647)


def test_a_stage_that_is_not_asked_for_needs_no_data_and_no_room(base: Path) -> None:
    config = load(base, "run.stages=[pretrain]", "data.rankings=[]", "sft.max_response_tokens=500")
    assert config.stages() == ("pretrain",)


def test_a_given_model_stands_in_for_its_stage_and_for_the_data_of_that_stage(base: Path) -> None:
    config = load(base, "model={path: a/b}", "sft.path=a/c", "reward.path=a/d", "data={prompts: [p.jsonl]}")
    assert config.stages() == ("ppo",)


def test_more_value_ranks_than_responses_in_a_minibatch_contradict_each_other(base: Path) -> None:
    assert "cluster.value.ranks" in refusal(base, "cluster.value.ranks=3", "ppo.minibatch_size=2")


def test_the_length_of_rollouts_does_not_matter_to_a_run_without_ppo(base: Path) -> None:
    assert load(base, "run.stages=[sft]", "rollout.max_tokens=500").stages() == ("sft",)


def test_sharded_weights_are_judged_by_their_loss_and_whole_ones_by_reward(base: Path) -> None:
    assert load(base, "sft.select.by=heldout_loss", "sft.zero_stage=3").sft.zero_stage == 3
    assert load(base, "sft.select={by: reward, reward_model: a/b}", "sft.zero_stage=2").sft.select.prompts == 64


def test_a_run_that_is_given_its_sft_model_needs_no_text_to_mix_in_and_nothing_held_out(base: Path) -> None:
    given = ("model={path: a/b}", "sft.path=a/c", "data.text=[]", "data.heldout_fraction=0")
    config = load(base, *given, "sft.pretrain_mix.coef=0.1", "sft.select.by=heldout_loss")
    assert config.stages() == ("reward", "ppo")


def test_the_stages_come_in_the_order_of_the_recipe_and_once_each(base: Path) -> None:
    assert load(base, "run.stages=[ppo, sft, sft, pretrain, reward]").stages() == ("pretrain", "sft", "reward", "ppo")
    everything = load(base, "run.stages=[ppo, dpo, sft, pretrain, reward]")
    assert everything.stages() == ("pretrain", "sft", "reward", "dpo", "ppo")


def test_dpo_runs_only_where_it_is_named(base: Path) -> None:
    assert load(base).stages() == ("pretrain", "sft", "reward", "ppo")
    assert load(base, "run.stages=[dpo]").stages() == ("dpo",)
    assert load(base, "run.stages=[dpo]", "data.prompts=[]", "data.text=[]", "reward.max_response_tokens=500")


def test_dpo_without_being_named_needs_no_room(base: Path) -> None:
    assert load(base, "dpo.max_response_tokens=500").stages() == ("pretrain", "sft", "reward", "ppo")


def test_the_defaults_of_dpo_are_those_of_its_sources(base: Path) -> None:
    dpo = load(base).dpo
    assert (dpo.learning_rate, dpo.beta, dpo.batch_size, dpo.epochs, dpo.warmup_ratio) == (5e-7, 0.1, 64, 1.0, 0.1)


# ---- the folder of human data


@pytest.mark.parametrize(
    ("overrides", "environ", "root"),
    [
        ([], {}, None),
        ([], {DATA_ROOT_VARIABLE: ""}, None),
        ([], {DATA_ROOT_VARIABLE: "/from/environment"}, Path("/from/environment")),
        (["data.root=/from/config"], {DATA_ROOT_VARIABLE: "/from/environment"}, Path("/from/config")),
    ],
)
def test_the_environment_names_the_data_root_only_where_the_config_does_not(
    base: Path, overrides: Sequence[str], environ: dict[str, str], root: Path | None
) -> None:
    assert DATA_ROOT_VARIABLE == "RAYRLHF_HUMAN_DATA"
    assert load(base, *overrides, environ=environ).data.root == root


def test_unit_variance_takes_the_demonstrations_of_a_world_and_asks_for_none_where_reward_is_not_run(
    base: Path, tmp_path: Path
) -> None:
    world = "model: {from_scratch: {context: 256}}\nworld: {name: instructions}\nreward: {unit_variance: true}\n"
    assert load(written(tmp_path, world)).reward.unit_variance is True
    ppo_only = load(base, "reward.unit_variance=true", "data.demonstrations=[]", "run.stages=[ppo]")
    assert ppo_only.stages() == ("ppo",)


def test_a_built_in_world_runs_although_the_environment_names_a_folder_of_human_data() -> None:
    config = load_config(ROOT / "configs" / "demo.yaml", (), {DATA_ROOT_VARIABLE: "/from/environment"})
    assert (config.world.name, config.data.root) == ("instructions", None)


# ---- files that cannot be read


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("run: {name: demo\nmodel: 1\n", 2),
        ("run:\n  name: a\n   seed: 1\n", 3),
        ("run: {seed: 1}\n\tmodel: x\n", 2),
        ("a: 1\n\nb: 'open\n", 4),
        ("ppo: {steps: 1}\nsft: {epochs: 1.0}\nppo: {steps: 2}\n", 3),
        ("a: 1\n---\nb: 2\n", 2),
        ("a: *nowhere\n", 1),
    ],
)
def test_broken_yaml_is_named_by_file_and_line(tmp_path: Path, text: str, line: int) -> None:
    path = written(tmp_path, text)
    assert refusal(path).startswith(f"{path}:{line}: broken YAML: ")


@pytest.mark.parametrize("value", ["2024-13-45", "!!int x", "!!float x", "1" * 5000])
def test_a_scalar_that_yaml_cannot_construct_is_a_config_error(base: Path, value: str) -> None:
    assert "run.name" in refusal(base, f"run.name={value}")


def test_a_file_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "latin.yaml"
    path.write_bytes(b"run: {name: caf\xe9}\n")
    assert refusal(path).startswith(f"{path}: broken YAML: ")


@pytest.mark.parametrize(("text", "kind"), [("[1, 2]", "list"), ("hello", "str"), ("3", "int")])
def test_a_file_without_sections_says_what_it_holds(tmp_path: Path, text: str, kind: str) -> None:
    path = written(tmp_path, text)
    assert refusal(path) == f"{path}: expected sections (`run:`, `model:`, ...), found a {kind}"


def test_a_missing_config_file_suggests_the_nearest_one(tmp_path: Path) -> None:
    (tmp_path / "demo.yaml").touch()
    (tmp_path / "human.yaml").touch()
    missing = tmp_path / "dmo.yaml"
    assert refusal(missing) == f"{missing}: no such config file\n  hint: did you mean {tmp_path / 'demo.yaml'}?"
    assert refusal(tmp_path) == f"{tmp_path}: a folder, not a config file\n  hint: name a YAML file in it"
    elsewhere = tmp_path / "nowhere" / "demo.yaml"
    assert refusal(elsewhere) == f"{elsewhere}: no such config file"


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.text(max_size=30))
def test_no_override_whatever_it_says_ends_in_anything_but_a_config_or_a_config_error(base: Path, text: str) -> None:
    for override in (text, f"run.name={text}", f"ppo={text}"):
        with suppress(ConfigError):
            assert isinstance(load(base, override), Config)


# ---- and back


@pytest.mark.parametrize("path", CONFIGS, ids=[Path(p).name for p in CONFIGS])
def test_every_config_of_the_project_is_read_and_comes_back_equal_from_its_dump(path: str, tmp_path: Path) -> None:
    config = load_config(path, (), {})
    assert load(written(tmp_path, dump_config(config))) == config


def test_the_project_has_the_demo_config() -> None:
    assert "demo.yaml" in [Path(p).name for p in CONFIGS]


def test_a_dump_writes_out_every_default_and_keeps_numbers_exact(base: Path, tmp_path: Path) -> None:
    config = load(base, "ppo.learning_rate=9e-6", "run.name='1e5'", "model.chat_template='a: {{b}} #c'")
    again = load(written(tmp_path, dump_config(config)))
    assert again == config
    assert again.ppo.learning_rate == 0.000009
    assert again.run.name == "1e5"
    assert tree_of(again).keys() == Config.model_fields.keys()


POSITIVE = st.floats(min_value=0, max_value=1e30, exclude_min=True, allow_nan=False, allow_infinity=False)
SCALARS = st.one_of(
    st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,12}\Z"),
    st.sampled_from(
        ["1e5", "1.0", "null", "true", "off", "no", "0x1F", "0o7", "2024-01-01", "1_000", "nan", "~", "-1"]
    ),
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    name=SCALARS.filter(lambda text: text[0].isalnum()),
    rate=POSITIVE,
    eps=POSITIVE,
    betas=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    seed=st.integers(0, 2**31 - 1),
    template=st.none() | SCALARS | st.text(max_size=40),
    files=st.lists(SCALARS, min_size=1, max_size=3),
)
def test_any_config_comes_back_equal_from_its_dump(
    base: Path,
    name: str,
    rate: float,
    eps: float,
    betas: tuple[float, float],
    seed: int,
    template: str | None,
    files: list[str],
) -> None:
    tree = tree_of(load(base))
    tree["run"] |= {"name": name, "seed": seed, "output": name}
    tree["ppo"] |= {"learning_rate": rate, "adam": {"eps": eps, "betas": betas}}
    tree["model"] |= {"chat_template": template}
    tree["data"] |= {"prompts": files}
    config = Config.model_validate(tree)
    path = base.with_name("dumped.yaml")
    path.write_text(dump_config(config), encoding="utf-8")
    again = load(path)
    assert again == config
    assert math.copysign(1, again.ppo.learning_rate) == 1


# ---- what a config is


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [("run", "name", "x"), ("ppo", "steps", 1), ("data", "root", None), ("cluster", "device", "cuda")],
)
def test_a_config_cannot_be_altered_once_it_is_read(base: Path, section: str, field: str, value: object) -> None:
    config = load(base)
    with pytest.raises(ValidationError, match="frozen"):
        setattr(getattr(config, section), field, value)
    with pytest.raises(ValidationError, match="frozen"):
        setattr(config, section, None)


def test_reading_a_config_does_not_import_torch_ray_or_transformers() -> None:
    code = (
        "import sys; from rayrlhf.config import load_config; load_config('configs/demo.yaml', (), {});"
        "print(sorted({'torch', 'ray', 'vllm', 'deepspeed', 'transformers', 'datasets'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")
