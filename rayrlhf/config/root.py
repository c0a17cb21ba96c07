"""The whole config, and the checks that need two sections at once."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError, model_validator

from rayrlhf.config.base import Section
from rayrlhf.config.cluster import ClusterConfig
from rayrlhf.config.data import DataConfig
from rayrlhf.config.deepspeed import DeepSpeedConfig, LearnerShape, check_deepspeed
from rayrlhf.config.evaluation import CollectConfig, EvalConfig
from rayrlhf.config.model import ModelConfig
from rayrlhf.config.plan import PlanConfig
from rayrlhf.config.ppo import PPOConfig, RolloutConfig, WeightsConfig
from rayrlhf.config.run import STAGES, CheckpointConfig, RunConfig, StageName, TrackingConfig
from rayrlhf.config.training import DPOConfig, PretrainConfig, RewardConfig, SFTConfig
from rayrlhf.config.world import WorldConfig

__all__ = ["Config"]

# Keys of `ppo` that say how its actors are built.
ARM_FIXED = ("arms", "advantage", "reward", "zero_stage", "frozen_zero_stage")
# What models beside the arms' are called, in a run's folder (`model_<name>`) and in its evaluation.
NOT_ARMS = ("sft", "dpo", "ema")


class Config(Section):
    run: RunConfig = RunConfig()
    model: ModelConfig
    data: DataConfig = DataConfig()
    world: WorldConfig = WorldConfig()
    cluster: ClusterConfig = ClusterConfig()
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
    pretrain: PretrainConfig = PretrainConfig()
    sft: SFTConfig = SFTConfig()
    collect: CollectConfig | None = None
    """Set, the rankings are made by a world's labelers from the SFT model's responses, whatever `data.rankings` is."""
    reward: RewardConfig = RewardConfig()
    dpo: DPOConfig = DPOConfig()
    ppo: PPOConfig = PPOConfig()
    eval: EvalConfig = EvalConfig()
    rollout: RolloutConfig = RolloutConfig()
    weights: WeightsConfig = WeightsConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()
    plan: PlanConfig = PlanConfig()

    def stages(self) -> tuple[StageName, ...]:
        """The stages that `rayrlhf run` goes through: those asked for, less those a given model stands in for, and the
        reward model where PPO takes its rewards from elsewhere."""
        without = "ppo" in self.run.stages and self.ppo.reward.kind != "model"
        given = {
            "pretrain": self.model.path,
            "sft": self.sft.path,
            "collect": self.collect is None or (without and "dpo" not in self.run.stages),
            "reward": self.reward.path or without,
        }
        return tuple(stage for stage in STAGES if stage in self.run.stages and not given.get(stage))

    def arms(self) -> dict[str, Config]:
        """The configs of the PPO runs of `ppo.arms` by name, each without arms; this one where there are none."""
        if not self.ppo.arms:
            return {"ppo_ptx" if self.ppo.ptx.coef else "ppo": self}
        return {name: self._arm(name, changes) for name, changes in self.ppo.arms.items()}

    def _arm(self, name: str, changes: Mapping[str, Any]) -> Config:
        tree = self.model_dump(mode="json")
        tree["ppo"]["arms"] = {}
        for dotted, value in changes.items():
            if dotted.partition(".")[0] in ARM_FIXED:
                raise ValueError(f"ppo.arms.{name}.{dotted}: belongs to the actors, which all arms share")
            _set(tree["ppo"], dotted, value, f"ppo.arms.{name}")
        try:
            return Config.model_validate(tree)
        except ValidationError as error:
            raise ValueError(_first_of(error, f"ppo.arms.{name}")) from None

    def learners(self) -> list[LearnerShape]:
        """Every model that learns in this run, or is held as one that could."""
        stages, cluster, found = self.stages(), self.cluster, list[LearnerShape]()
        for stage in ("pretrain", "sft", "reward", "dpo"):
            if stage in stages:
                key, zero_stage = f"{stage}.zero_stage", getattr(self, stage).zero_stage
                found.append(LearnerShape(key, zero_stage, "cluster.train.ranks", cluster.train.ranks))
        sampling = any(stage in stages for stage in ("collect", "ppo", "eval"))
        for role in ("policy", "value") if "ppo" in stages else ("policy",) * sampling:
            ranks = getattr(cluster, role).ranks
            found.append(LearnerShape("ppo.zero_stage", self.ppo.zero_stage, f"cluster.{role}.ranks", ranks))
        return found

    @model_validator(mode="after")
    def _something_is_to_be_run(self) -> Config:
        if not self.stages():
            raise ValueError("run.stages leaves nothing to run: it is empty, or given models stand in for all of it")
        return self

    @model_validator(mode="after")
    def _a_world_has_a_name(self) -> Config:
        if self.world.module and not self.world.name:
            raise ValueError("world.module is set but world.name is not: name the world that it registers")
        if self.collect is not None and not self.world.name:
            raise ValueError("collect needs world.name: only a world's simulated labelers rank what is sampled")
        return self

    @model_validator(mode="after")
    def _stages_have_data(self) -> Config:
        if self.world.name:
            return self  # the world's files fill data.* before anything reads it
        rankings = "rankings" if self.collect is None else "ranking_prompts"
        needs = {
            "pretrain": "text",
            "sft": "demonstrations",
            "collect": "ranking_prompts",
            "reward": rankings,
            "dpo": rankings,
            "ppo": "prompts",
            "eval": "heldout_prompts",
        }
        for stage in self.stages():
            if stage == "eval" and self.data.multiple_choice:
                continue  # questions alone are an evaluation too: nothing is sampled for them
            if not getattr(self.data, needs[stage]):
                raise ValueError(f"run.stages has {stage} but data.{needs[stage]} is empty")
        if "sft" in self.stages() and self.sft.pretrain_mix.coef and not self.data.text:
            raise ValueError(
                f"sft.pretrain_mix.coef is {self.sft.pretrain_mix.coef:g} but data.text is empty: "
                "give text, or set it to 0"
            )
        return self

    @model_validator(mode="after")
    def _epochs_are_judged_on_something(self) -> Config:
        if "sft" in self.stages() and self.sft.select.by != "last" and self.data.heldout_fraction == 0:
            raise ValueError(
                f"sft.select.by is {self.sft.select.by} but data.heldout_fraction is 0, so nothing is held out to "
                "judge the epochs on: raise it, or set sft.select.by to last"
            )
        return self

    @model_validator(mode="after")
    def _ptx_has_text(self) -> Config:
        if self.ppo.ptx.coef and "ppo" in self.stages() and not (self.data.text or self.world.name):
            raise ValueError("ppo.ptx.coef is set but data.text is empty: PPO-ptx learns from pretraining text")
        return self

    @model_validator(mode="after")
    def _unit_variance_has_demonstrations(self) -> Config:
        asked = self.reward.unit_variance and "reward" in self.stages()
        if asked and not (self.data.demonstrations or self.world.name):
            raise ValueError(
                "reward.unit_variance is measured on demonstrations but data.demonstrations is empty: "
                "name some, or set reward.unit_variance=false"
            )
        return self

    @model_validator(mode="after")
    def _sequences_fit_the_context(self) -> Config:
        if self.model.from_scratch is None:
            return self  # a named model's context is checked when its config is read
        check_context(self, self.model.from_scratch.context, "model.from_scratch.context")
        return self

    @model_validator(mode="after")
    def _given_models_share_a_tokenizer(self) -> Config:
        given: dict[str, Any] = {"sft.path": self.sft.path, "reward.path": self.reward.path}
        if "ppo" in self.stages():
            given["ppo.reward.models"] = self.ppo.reward.models
        if self.model.from_scratch and any(given.values()):
            key = next(key for key, path in given.items() if path)
            raise ValueError(
                f"{key} and model.from_scratch contradict each other: a new tokenizer fits no existing model; "
                "name the base model in model.path"
            )
        return self

    @model_validator(mode="after")
    def _ranks_get_work(self) -> Config:
        for role in ("policy", "value"):
            ranks = getattr(self.cluster, role).ranks
            if ranks > self.ppo.minibatch_size:
                raise ValueError(
                    f"cluster.{role}.ranks {ranks} and ppo.minibatch_size {self.ppo.minibatch_size} "
                    "contradict each other: some ranks would never see a response"
                )
        return self

    @model_validator(mode="after")
    def _roles_on_shared_devices_sit_side_by_side(self) -> Config:
        for roles in self.cluster.shared:
            ranks = {r: self.rollout.engines if r == "rollout" else getattr(self.cluster, r).ranks for r in roles}
            if len(set(ranks.values())) > 1:
                counts = ", ".join(f"{role} {count}" for role, count in ranks.items())
                raise ValueError(f"cluster.shared: roles on the same devices need equally many ranks ({counts})")
            if "rollout" in roles and self.rollout.tensor_parallel > 1:
                raise ValueError(
                    f"cluster.shared has rollout and rollout.tensor_parallel is {self.rollout.tensor_parallel}: an "
                    "engine that shares its device has one; take rollout out of cluster.shared, or more engines"
                )
            if {"policy", "rollout"} <= set(roles) and self.weights.transport == "nccl":
                raise ValueError(
                    "weights.transport is nccl but cluster.shared puts policy and rollout on the same devices, which "
                    "NCCL does not connect: take ipc"
                )
            if {"policy", "rollout"} <= set(roles) and self.ppo.pacing.kind == "overlap":
                raise ValueError(
                    "ppo.pacing.kind is overlap but cluster.shared puts policy and rollout on the same devices, where "
                    "they work in turns: take sync, or devices of their own"
                )
        return self

    @model_validator(mode="after")
    def _rewards_of_text_share_no_device(self) -> Config:
        if "ppo" in self.stages() and self.ppo.reward.sees_text and self.cluster.sharing("reward"):
            raise ValueError(
                f"cluster.shared has reward and ppo.reward.kind is {self.ppo.reward.kind}, which has no model on any "
                "device: take reward out of cluster.shared"
            )
        return self

    @model_validator(mode="after")
    def _gpu_transports_have_gpus(self) -> Config:
        if self.weights.transport in ("nccl", "ipc") and self.cluster.device == "cpu":
            raise ValueError(
                f"weights.transport is {self.weights.transport} but cluster.device is cpu: take shared_memory"
            )
        alone = [role for role in ("policy", "rollout") if self.cluster.gpus(getattr(self.cluster, role)) >= 1]
        if self.weights.transport == "ipc" and alone and "rollout" not in self.cluster.sharing("policy"):
            raise ValueError(
                f"weights.transport is ipc but {' and '.join(alone)} have GPUs of their own: take nccl, or put policy "
                "and rollout on the same devices in cluster.shared"
            )
        return self

    @model_validator(mode="after")
    def _shards_have_whole_gpus(self) -> Config:
        gpus, shards = self.cluster.rollout.gpus, self.rollout.tensor_parallel
        if shards > 1 and gpus is not None and gpus % 1:
            raise ValueError(
                f"cluster.rollout.gpus is {gpus:g} and rollout.tensor_parallel is {shards}: the shards of an engine "
                "need a GPU each; take 1"
            )
        return self

    @model_validator(mode="after")
    def _timing_decides_nothing_that_is_to_be_repeated(self) -> Config:
        pacing = self.ppo.pacing
        if self.run.deterministic and pacing.kind == "overlap" and pacing.max_staleness > 1:
            raise ValueError(
                f"run.deterministic and ppo.pacing.max_staleness {pacing.max_staleness} contradict each other: which "
                "version samples a response would depend on timing; take 0 or 1"
            )
        return self

    @model_validator(mode="after")
    def _learners_can_be_built(self) -> Config:
        check_deepspeed(self.deepspeed, self.cluster.device, self.model.dtype, self.learners())
        return self

    @model_validator(mode="after")
    def _arms_can_be_run(self) -> Config:
        for name in self.ppo.arms:
            if name in NOT_ARMS or name.startswith("best_of_"):
                raise ValueError(f"ppo.arms.{name}: {name} is what another model is called: name the arm otherwise")
        if self.ppo.arms:
            self.arms()
        return self


def check_context(config: Config, context: int, name: str) -> None:
    """Raise ValueError if any stage's longest sequence is over `context` tokens; `name` says whose limit it is."""
    stages, responses = config.stages(), {}
    ptx = any(arm.ppo.ptx.coef for arm in config.arms().values())
    mixes_text = ("sft" in stages and config.sft.pretrain_mix.coef > 0) or ("ppo" in stages and ptx)
    # The blocks of text for a named model are as long as its longest sequences, be sft or ppo run or not.
    has_blocks = mixes_text and config.model.path is not None
    if has_blocks or any(stage in stages for stage in ("collect", "ppo", "eval")):
        responses["rollout.max_tokens"] = config.rollout.max_tokens
    if "sft" in stages or ("reward" in stages and config.data.demonstrations) or has_blocks:
        responses["sft.max_response_tokens"] = config.sft.max_response_tokens
    if "reward" in config.stages():
        responses["reward.max_response_tokens"] = config.reward.max_response_tokens
    if "dpo" in config.stages():
        responses["dpo.max_response_tokens"] = config.dpo.max_response_tokens
    for key, tokens in responses.items():
        if config.data.max_prompt_tokens + tokens > context:
            raise ValueError(
                f"data.max_prompt_tokens {config.data.max_prompt_tokens} + {key} {tokens} is over {name} {context}"
            )


def _set(section: Any, dotted: str, value: Any, arm: str) -> None:
    """Put `value` in the place of a dotted key that is there."""
    *path, key = dotted.split(".")
    for number, part in enumerate([*path, key]):
        if not isinstance(section, dict) or part not in section:
            keys = list(section) if isinstance(section, dict) else []
            near = difflib.get_close_matches(part, keys, n=1, cutoff=0.5)
            nearest = f"; did you mean {'.'.join([arm, *path[:number], near[0]])}?" if near else ""
            raise ValueError(f"{arm}.{dotted}: ppo has no such key{nearest}")
        if number < len(path):
            section = section[part]
    section[key] = value


def _first_of(error: ValidationError, arm: str) -> str:
    """The first error of an arm's config, by the key that the user wrote where it is one of `ppo`."""
    first = error.errors()[0]
    place = ".".join([arm, *(str(part) for part in first["loc"][1:])])
    if first["type"] == "value_error":
        return f"{place}: {first['ctx']['error']}"
    return f"{place}: found {first['input']!r}; {first['msg'][:1].lower()}{first['msg'][1:]}"
