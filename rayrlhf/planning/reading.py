"""A config as a workload."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from rayrlhf.config import Config
from rayrlhf.config.cluster import RankResources
from rayrlhf.config.deepspeed import zero_stage_in_use
from rayrlhf.errors import ConfigError
from rayrlhf.planning.assumptions import Assumptions
from rayrlhf.planning.catalogue import shape_named
from rayrlhf.planning.shapes import ModelShape, from_scratch_config, shape_of
from rayrlhf.planning.workload import LIVE_PARAMETERS, REDUCE_BUCKET, Role, Workload

__all__ = ["TRAINING", "WITHOUT_VALUES", "longest_in_training", "workload_of"]

# Advantage estimators that need no value model; algorithms.advantages, which says so too, imports torch.
WITHOUT_VALUES = ("group_relative", "leave_one_out")
TRAINING = ("pretrain", "sft", "reward", "dpo")


def workload_of(config: Config, assume: Assumptions) -> Workload:
    """PPO as the config has it (its arms are configs of their own), and the workers of the supervised stages.

    Raises:
        ModelError: a model whose shape cannot be read.
        ConfigError: a key of DeepSpeed's that is no number.
    """
    ppo, rollout, deepspeed = config.ppo, config.rollout, config.deepspeed
    policy = _policy_shape(config)
    longest_prompt, longest_response = config.data.max_prompt_tokens, rollout.max_tokens
    ptx = ppo.ptx.coef > 0
    return Workload(
        roles=_roles(config, policy, _reward_shape(config, policy)),
        dtype=config.model.dtype,
        gpu=config.cluster.device == "cuda",
        steps=ppo.steps,
        batch_size=ppo.batch_size,
        minibatch_size=ppo.minibatch_size,
        epochs=ppo.epochs,
        prompt_tokens=assume["prompt_share"] * longest_prompt,
        longest_prompt=longest_prompt,
        response_tokens=assume["response_share"] * longest_response,
        longest_response=longest_response,
        response_spread=assume["response_spread"],
        micro_batch_tokens=ppo.micro_batch_tokens,
        transport=config.weights.transport,
        bucket_bytes=config.weights.bucket_mib * 2**20,
        shared=tuple(tuple(roles) for roles in config.cluster.shared),
        text_blocks=ppo.ptx.examples_per_episode if ptx else 0.0,
        text_tokens=_block_tokens(config) if ptx else 0,
        checkpointing=deepspeed.activation_checkpointing,
        offload_optimizer=deepspeed.offload_optimizer == "cpu",
        offload_param=deepspeed.offload_param == "cpu",
        hpz=deepspeed.zero_hpz_partition_size,
        gradient_dtype=_gradient_dtype(config),
        reduce_bucket=_elements(config, "reduce_bucket_size", REDUCE_BUCKET),
        live_parameters=_elements(config, "stage3_max_live_parameters", LIVE_PARAMETERS),
        max_sequences=rollout.max_sequences,
        kv_cache_gib=rollout.kv_cache_gib,
        gpu_memory_utilization=rollout.gpu_memory_utilization,
        recomputes_old=ppo.old_logprobs == "recompute",
        overlap=ppo.pacing.kind == "overlap",
        train=_train(config, policy),
        train_micro_batch_tokens=max(
            (getattr(config, stage).micro_batch_tokens for stage in config.stages() if stage in TRAINING), default=0
        ),
        train_longest=max(
            (longest_in_training(config, stage, assume) for stage in config.stages() if stage in TRAINING), default=0
        ),
    )


def longest_in_training(config: Config, stage: str, assume: Assumptions) -> int:
    """Tokens of a supervised stage that are never cut: a sequence, or every response that was ranked for a prompt."""
    if stage == "pretrain":
        return _block_tokens(config)
    sequence = config.data.max_prompt_tokens + int(getattr(config, stage).max_response_tokens)
    return round(sequence * {"sft": 1.0, "dpo": 2.0, "reward": assume["ranked_responses"]}[stage])


def _gradient_dtype(config: Config) -> Literal["float32", "bfloat16"]:
    """float32, unless DeepSpeed is told otherwise in the keys that it gets as they are."""
    types = config.deepspeed.extra.get("data_types", {})
    told = types.get("grad_accum_dtype") if isinstance(types, dict) else None
    return "bfloat16" if told in ("bf16", "bfloat16") else "float32"


def _elements(config: Config, key: str, default: int) -> int:
    """A count in the keys that DeepSpeed gets as they are."""
    value = config.deepspeed.extra.get("zero_optimization", {}).get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 1 or not float(value).is_integer():
        raise ConfigError(
            f"deepspeed.extra.zero_optimization.{key} is {value!r}",
            f"a whole number of elements, as {default}",
        )
    return int(value)


def _policy_shape(config: Config) -> ModelShape:
    if given := config.plan.shapes.get("policy"):
        return shape_named(given, "plan.shapes.policy")
    for key, path in (("sft.path", config.sft.path), ("model.path", config.model.path)):
        if path is not None:
            return shape_named(path, key)
    assert config.model.from_scratch is not None  # the config wants one of the two
    return shape_of(from_scratch_config(config.model.from_scratch), "model.from_scratch")


def _reward_shape(config: Config, policy: ModelShape) -> ModelShape:
    """Of the reward model, which the value model starts from; `reward` makes it from the SFT model."""
    if given := config.plan.shapes.get("reward"):
        return shape_named(given, "plan.shapes.reward").as_scalar()
    source = config.ppo.reward
    if source.kind == "ensemble":
        return shape_named(source.models[0], "ppo.reward.models").as_scalar()
    if config.reward.path and not source.sees_text:
        return shape_named(config.reward.path, "reward.path").as_scalar()
    return policy.as_scalar()


def _roles(config: Config, policy: ModelShape, reward: ModelShape) -> dict[str, Role]:
    ppo, cluster = config.ppo, config.cluster
    asks = bool(config.deepspeed.keys().get("zero_optimization"))

    def learner(name: str, shape: ModelShape, average: bool = False) -> Role:
        ranks = getattr(cluster, name).ranks
        stage = zero_stage_in_use(ppo.zero_stage, config.model.dtype, ranks, asks)
        return Role(name, shape, ranks, _devices(config, name), True, stage, average=average)

    def frozen(name: str, shape: ModelShape) -> Role:
        return Role(name, shape, getattr(cluster, name).ranks, _devices(config, name), zero_stage=ppo.frozen_zero_stage)

    roles = {
        "policy": learner("policy", policy, ppo.ema is not None),
        "reference": frozen("reference", policy),
        "reward": frozen("reward", reward),
        "value": learner("value", reward),
        "rollout": Role(
            "rollout",
            policy,
            config.rollout.engines,
            _devices(config, "rollout") * config.rollout.tensor_parallel,
        ),
    }
    if ppo.advantage in WITHOUT_VALUES:
        del roles["value"]
    if ppo.reward.sees_text:  # a function or a service: no model, and nobody knows how long it takes
        del roles["reward"]
    elif ppo.reward.kind == "ensemble":
        members = [shape_named(model, "ppo.reward.models").as_scalar() for model in ppo.reward.models]
        largest = max(members, key=lambda shape: shape.parameters)
        copies = sum(shape.parameters for shape in members) / largest.parameters
        roles["reward"] = replace(roles["reward"], shape=largest, copies=copies)
    return roles


def _devices(config: Config, role: str) -> float:
    """GPUs of a rank, or its cores."""
    resources: RankResources = getattr(config.cluster, role)
    return config.cluster.gpus(resources) if config.cluster.device == "cuda" else float(resources.threads)


def _train(config: Config, policy: ModelShape) -> Role | None:
    """The supervised stages' workers at the ZeRO stage that takes most memory."""
    stages = [stage for stage in config.stages() if stage in TRAINING]
    if not stages:
        return None
    asks, ranks = bool(config.deepspeed.keys().get("zero_optimization")), config.cluster.train.ranks
    asked = min(getattr(config, stage).zero_stage for stage in stages)
    stage = zero_stage_in_use(asked, config.model.dtype, ranks, asks)
    return Role("train", policy, ranks, _devices(config, "train"), True, stage)


def _block_tokens(config: Config) -> int:
    """As stages/datasets.py cuts text."""
    if config.model.from_scratch:
        return config.model.from_scratch.context
    return config.data.max_prompt_tokens + max(config.rollout.max_tokens, config.sft.max_response_tokens)
