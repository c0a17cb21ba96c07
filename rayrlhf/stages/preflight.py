"""Everything that can be found wrong before an actor starts: files, models, tokenizers, lengths, devices."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from rayrlhf.actors.placement import SAMPLING
from rayrlhf.algorithms.advantages import ESTIMATORS
from rayrlhf.config import Config, check_context
from rayrlhf.config.data import SOURCE_FIELDS
from rayrlhf.config.run import StageName
from rayrlhf.data.chat import load_tokenizer
from rayrlhf.data.readers import check_sources
from rayrlhf.errors import ConfigError, DataError, ModelError
from rayrlhf.models.build import context_length, has_residual_dropout, read_config
from rayrlhf.models.folder import check_weights
from rayrlhf.stages.datasets import Datasets, Split
from rayrlhf.stages.lineage import absolute
from rayrlhf.stages.sources import check_source
from rayrlhf.weights.transports import TRANSPORTS
from rayrlhf.worlds.base import create_world

# vLLM 0.32's CPU attention; a CUDA build has its own, wider list.
# Config keys of models (gemma2, granite, cohere) that cap or scale what their head gives.
LOGIT_TRANSFORMS = ("final_logit_softcapping", "logits_scaling", "logit_scale")
CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)

__all__ = [
    "check_compared",
    "check_data",
    "check_ensemble",
    "check_evaluation",
    "check_files",
    "check_models",
    "check_output",
    "check_selection",
    "check_verify_step",
    "check_world",
]

# What the engines are built for: the first policy that is evaluated; the weights of the others go in its place.
SHAPE = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")

# The prompts that a stage samples for, by their keys in `data`; the first one's counts are shown.
SAMPLED: dict[StageName, tuple[str, ...]] = {
    "collect": ("ranking_prompts", "heldout_prompts"),
    "ppo": ("prompts",),
    "eval": ("heldout_prompts",),
}


def check_files(config: Config) -> None:
    """Every data file is there. DataError names the key, the file and the nearest one."""
    check_sources({f"data.{name}": getattr(config.data, name) for name in SOURCE_FIELDS}, config.data.root)


def check_output(config: Config) -> None:
    """The folder that runs go to can be written to, or made."""
    output = config.run.output.absolute()
    there = next(folder for folder in (output, *output.parents) if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(f"run.output: {there} is not a folder that can be written to", "name another")


def check_models(config: Config) -> None:
    """Every named model is there, and fits what is asked of it; so does the weight transport."""
    if config.weights.transport not in TRANSPORTS:
        known = ", ".join(sorted(TRANSPORTS))
        raise ConfigError(f"weights.transport: no transport {config.weights.transport!r}", f"one of {known}")
    if "ppo" in config.stages():
        check_source(config)
        for arm in config.arms().values():
            _check_advantage(arm)
        for number, member in enumerate(config.ppo.reward.models):
            key, longest = f"ppo.reward.models[{number}]", config.rollout.max_tokens
            _check_judge(config, key, absolute(member), "rollout.max_tokens", longest)
    named = {"model.path": config.model.path, "sft.path": config.sft.path, "reward.path": config.reward.path}
    for key, path in named.items():
        if path is not None:
            _check_model(config, key, absolute(path))
    if "sft" in config.stages() and config.sft.dropout:
        _check_dropout(config)
    if config.cluster.device == "cpu" and any(stage in SAMPLING for stage in config.stages()):
        _check_head_size(config)
    if config.reward.path is not None and "ppo" in config.stages() and config.ppo.reward.kind == "model":
        _check_reward_model(config, absolute(config.reward.path))
    if "sft" in config.stages() and config.sft.select.reward_model is not None:
        judge, longest = absolute(config.sft.select.reward_model), config.sft.max_response_tokens
        _check_judge(config, "sft.select.reward_model", judge, "sft.max_response_tokens", longest)
    if "eval" in config.stages() and config.eval.reward_model is not None:
        judge = absolute(config.eval.reward_model)
        _check_judge(config, "eval.reward_model", judge, "rollout.max_tokens", config.rollout.max_tokens)


def check_verify_step(config: Config, step: int) -> None:
    """The reference trainer covers all that PPO step `step` (counted from 1) is asked to do.

    Raises:
        ConfigError: naming the key that it does not cover.
    """
    ppo = config.ppo
    if ppo.arms:
        raise ConfigError(f"--verify-step {step}: ppo.arms has several runs", "set ppo.arms={} to verify one of them")
    if "ppo" not in config.stages():
        raise ConfigError(f"--verify-step {step}: run.stages has no ppo", "add ppo to run.stages")
    if step > ppo.steps:
        raise ConfigError(f"--verify-step {step}: ppo.steps is {ppo.steps}", "take one of those steps")
    if step <= ppo.value_warmup_steps:
        raise ConfigError(
            f"--verify-step {step}: the policy learns nothing in the first {ppo.value_warmup_steps} steps "
            "(ppo.value_warmup_steps)",
            f"take step {ppo.value_warmup_steps + 1} or later",
        )
    covered: dict[str, tuple[Any, Any]] = {
        "ppo.reward.kind": (ppo.reward.kind, "model"),
        "ppo.advantage": (ppo.advantage, "gae"),
        "ppo.score.normalize": (ppo.score.normalize, "none"),
        "ppo.score.clip": (ppo.score.clip, None),
        "ppo.truncated.treatment": (ppo.truncated.treatment, "keep"),
        "ppo.old_logprobs": (ppo.old_logprobs, "recompute"),
        "ppo.importance_cap": (ppo.importance_cap, None),
        "ppo.dual_clip": (ppo.dual_clip, None),
        "ppo.kl.stop": (ppo.kl.stop, None),
    }
    for key, (found, known) in covered.items():
        if found != known:
            asked = "null" if known is None else known
            raise ConfigError(
                f"--verify-step: {key} is {found}, which the reference trainer does not know",
                f"set {key}={asked}, or leave --verify-step out",
            )


def _check_advantage(config: Config) -> None:
    ppo = config.ppo
    if ppo.advantage not in ESTIMATORS:
        raise ConfigError(f"ppo.advantage: no estimator {ppo.advantage!r}", f"one of {', '.join(sorted(ESTIMATORS))}")
    if ESTIMATORS[ppo.advantage].needs_values:
        return
    if ppo.samples_per_prompt < 2:
        raise ConfigError(
            f"ppo.advantage {ppo.advantage} compares the responses to a prompt, and ppo.samples_per_prompt is 1",
            "set ppo.samples_per_prompt to 4 or more",
        )
    if ppo.value_warmup_steps:
        raise ConfigError(
            f"ppo.value_warmup_steps is {ppo.value_warmup_steps}, but ppo.advantage {ppo.advantage} has no value model",
            "set it to 0",
        )
    if ppo.gamma != 1.0:
        raise ConfigError(
            f"ppo.gamma is {ppo.gamma:g}, but ppo.advantage {ppo.advantage} compares whole responses and discounts "
            "nothing",
            "set it to 1.0",
        )


def _check_model(config: Config, key: str, path: str) -> None:
    limit = context_length(_check_shape(config, key, path))
    if limit is not None:
        try:
            check_context(config, limit, f"the context of {key}")
        except ValueError as error:
            raise ConfigError(str(error), "shorten them, or take a model with a longer context") from None


def _check_shape(config: Config, key: str, path: str) -> PretrainedConfig:
    """The model's config, once it and the tokenizer beside it are found to be usable."""
    trust = config.model.trust_remote_code
    try:
        shape = read_config(path, trust)
        tokenizer = load_tokenizer(path, config.model.chat_template, trust)
    except ModelError as error:
        raise ModelError(f"{key}: {error.message}", error.hint) from None
    if shape.vocab_size < len(tokenizer):
        raise ModelError(
            f"{key} {path}: {shape.vocab_size} embeddings for {len(tokenizer)} tokens",
            "resize the model's embeddings, or take the tokenizer that it was trained with",
        )
    for name in LOGIT_TRANSFORMS:
        if getattr(shape, name, None) not in (None, 1.0):
            raise ModelError(
                f"{key} {path}: the model transforms its logits ({name}), which the trainer would leave out",
                "take a model whose head is linear",
            )
    try:
        check_weights(path)
    except ModelError as error:
        raise ModelError(f"{key}: {error.message}", error.hint) from None
    return shape


def check_data(data: Datasets, todo: Sequence[StageName]) -> dict[StageName, dict[str, int]]:
    """Read and tokenize what the stages still to run need; a bad record fails here with its file and line.

    Returns:
        For each stage what became of its records: kept, dropped (prompt too long), truncated (response too long).
    """
    counts: dict[StageName, dict[str, int]] = {}
    for stage in todo:
        if stage in SAMPLED:
            counts[stage] = dict(getattr(data, SAMPLED[stage][0]).counts)
            if stage == "ppo" and data.uses_text:
                counts[stage]["text_blocks"] = len(data.pretrain.train)
            if stage == "eval":
                kept = len(data.multiple_choice[1])
                counts[stage] |= {"questions_kept": kept, "questions_dropped": len(data.questions) - kept}
            if stage == "collect":
                counts[stage]["heldout_kept"] = len(data.heldout_prompts.tokens)
        elif stage in ("reward", "dpo") and data.waits_for_rankings:
            continue  # they are sampled and ranked first
        else:
            split: Split = getattr(data, stage)
            counts[stage] = split.counts
        if stage == "sft" and data.sft_text:
            counts[stage] = counts[stage] | {"text_blocks": len(data.sft_text)}
    return counts


def check_selection(config: Config, data: Datasets) -> None:
    """There is something to judge the epochs on once long prompts are dropped, and who judges reads the same tokens."""
    select = config.sft.select
    if select.by != "last" and not data.sft.heldout:
        raise DataError(
            f"sft.select.by is {select.by}, but no held-out demonstration is left to judge the epochs on",
            "raise data.heldout_fraction or data.max_prompt_tokens, or set sft.select.by to last",
        )
    if select.reward_model is not None:
        _check_vocabulary(config, "sft.select.reward_model", absolute(select.reward_model), data.tokenizer)


def check_ensemble(config: Config, data: Datasets) -> None:
    """The reward models of PPO's ensemble read the same tokens."""
    for number, path in enumerate(config.ppo.reward.models):
        _check_vocabulary(config, f"ppo.reward.models[{number}]", absolute(path), data.tokenizer)


def check_evaluation(config: Config, data: Datasets) -> None:
    """The reward model that judges all answers reads the same tokens."""
    if config.eval.reward_model is not None:
        _check_vocabulary(config, "eval.reward_model", absolute(config.eval.reward_model), data.tokenizer)


def check_compared(config: Config, data: Datasets, models: Mapping[str, str], reward: str | None) -> None:
    """The models of `rayrlhf eval` are there and read the same tokens; those that are sampled from, of one shape.

    Args:
        models: folder or Hugging Face name of each policy by the name of its arm.
    """
    shapes = {name: _check_shape(config, f"eval: {name}", path) for name, path in models.items()}
    (base, first), *others = shapes.items()
    for name, shape in others:
        _check_vocabulary(config, f"eval: {name}", models[name], data.tokenizer)
        for key in SHAPE if config.data.heldout_prompts else ():
            ours, theirs = getattr(first, key, None), getattr(shape, key, None)
            if ours != theirs:
                raise ModelError(
                    f"eval: {name} {models[name]}: {key} is {theirs}, and {ours} in {base}: the engines hold one shape",
                    "evaluate it in a command of its own",
                )
    if reward is not None:
        _check_judge(config, "eval: reward model", reward, "rollout.max_tokens", config.rollout.max_tokens)
        _check_vocabulary(config, "eval: reward model", reward, data.tokenizer)


def check_world(config: Config, data: Datasets, todo: Sequence[StageName]) -> None:
    """The world's judge, if there is one, knows every prompt that will be sampled for."""
    if config.world.name is None:
        return
    world = create_world(config.world.name, config.world.module)
    for name in sorted({name for stage in todo for name in SAMPLED.get(stage, ())}):
        for prompt in getattr(data, name).texts.values():
            try:
                world.flags(prompt, "", True)
            except DataError as error:
                raise DataError(
                    f"data.{name}: {error.message}",
                    f"leave data.{name} empty for the prompts of world {config.world.name}, or set world.name=null",
                ) from None


def _check_dropout(config: Config) -> None:
    scratch = config.model.from_scratch
    if scratch is not None:
        name, has = scratch.architecture, scratch.architecture == "gpt2"
    else:
        assert config.model.path is not None
        shape = read_config(absolute(config.model.path), config.model.trust_remote_code)
        name, has = shape.model_type, has_residual_dropout(shape)
    if not has:
        raise ConfigError(
            f"sft.dropout is {config.sft.dropout:g} but a {name} model has no residual dropout",
            "set sft.dropout=0, or take an architecture that has it (gpt2)",
        )


def _check_head_size(config: Config) -> None:
    """vLLM's attention on a CPU knows certain head sizes only, and says so at the first token."""
    scratch = config.model.from_scratch
    if scratch is not None:
        name, size = "model.from_scratch", scratch.hidden_size // scratch.heads
    else:
        path = absolute(config.sft.path or config.model.path or "")
        shape = read_config(path, config.model.trust_remote_code)
        name = path
        size = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
    if size not in CPU_HEAD_SIZES:
        raise ConfigError(
            f"{name}: heads of size {size} cannot be sampled with cluster.device cpu",
            f"hidden_size / heads must be one of {', '.join(map(str, CPU_HEAD_SIZES))}",
        )


def _check_reward_model(config: Config, path: str) -> None:
    _check_reward_head("reward.path", path, read_config(path, config.model.trust_remote_code))
    policy = config.sft.path or config.model.path
    assert policy is not None  # the config refuses reward.path beside a model from scratch
    tokenizer = load_tokenizer(absolute(policy), config.model.chat_template, config.model.trust_remote_code)
    _check_vocabulary(config, "reward.path", path, tokenizer)


def _check_judge(config: Config, key: str, path: str, longest: str, tokens: int) -> None:
    """A reward model that `key` names, all but its vocabulary: a policy from scratch has no tokenizer yet.

    Args:
        longest: the key of the longest response, and what it is.
    """
    shape = _check_shape(config, key, path)
    _check_reward_head(key, path, shape)
    limit = context_length(shape)
    if limit is not None and config.data.max_prompt_tokens + tokens > limit:
        raise ConfigError(
            f"data.max_prompt_tokens {config.data.max_prompt_tokens} + {longest} {tokens} is over the context of "
            f"{key} {limit}",
            "shorten them, or take a model with a longer context",
        )


def _check_reward_head(key: str, path: str, shape: PretrainedConfig) -> None:
    named = shape.architectures
    architecture = str(named[0]) if named and isinstance(named, list) else "model of unknown architecture"
    if not architecture.endswith("ForSequenceClassification") or shape.num_labels != 1:
        raise ModelError(
            f"{key} {path}: a {architecture} with {shape.num_labels} labels has no reward head",
            "take a sequence-classification model with one label, such as the `reward` stage writes",
        )


def _check_vocabulary(config: Config, key: str, path: str, policy: PreTrainedTokenizerBase) -> None:
    """The reward model must read the policy's token ids as the same tokens."""
    theirs = load_tokenizer(path, config.model.chat_template, config.model.trust_remote_code).get_vocab()
    ours = policy.get_vocab()
    if theirs != ours:
        differing = sum(theirs.get(token) != index for token, index in ours.items())
        raise ModelError(
            f"{key} {path}: its vocabulary ({len(theirs)} tokens) does not fit the policy's ({len(ours)}): "
            f"{differing} tokens have another id or none",
            "models pass token ids to each other: take one trained with the policy's tokenizer",
        )
