"""Everything that can be found wrong before an actor starts: files, models, tokenizers, lengths, devices."""

from __future__ import annotations

from collections.abc import Sequence

from rayrlhf.config import Config, check_context
from rayrlhf.config.data import SOURCE_FIELDS
from rayrlhf.config.run import StageName
from rayrlhf.data.chat import load_tokenizer
from rayrlhf.data.readers import check_sources
from rayrlhf.errors import ConfigError, ModelError
from rayrlhf.models.build import context_length, has_residual_dropout, read_config
from rayrlhf.stages.datasets import Datasets

__all__ = ["check_data", "check_files", "check_models"]


def check_files(config: Config) -> None:
    """Every data file is there. DataError names the key, the file and the nearest one."""
    check_sources({f"data.{name}": getattr(config.data, name) for name in SOURCE_FIELDS}, config.data.root)


def check_models(config: Config) -> None:
    """Every named model is there, and fits what is asked of it."""
    trust = config.model.trust_remote_code
    for key, path in (("model.path", config.model.path), ("sft.path", config.sft.path)):
        if path is None:
            continue
        shape = read_config(path, trust)
        load_tokenizer(path, config.model.chat_template, trust)
        limit = context_length(shape)
        if limit is not None:
            try:
                check_context(config, limit, f"the context of {key}")
            except ValueError as error:
                raise ConfigError(str(error), "shorten them, or take a model with a longer context") from None
    if "sft" in config.stages() and config.sft.dropout:
        _check_dropout(config)
    if config.reward.path is not None and "ppo" in config.stages():
        _check_reward_model(config, config.reward.path)


def check_data(config: Config, data: Datasets, todo: Sequence[StageName]) -> None:
    """Read and tokenize what the stages still to run need; a bad record fails here with its file and line."""
    needed = {"pretrain": "pretrain", "sft": "sft", "reward": "reward", "ppo": "prompts"}
    for stage in todo:
        getattr(data, needed[stage])


def _check_dropout(config: Config) -> None:
    scratch = config.model.from_scratch
    if scratch is not None:
        name, has = scratch.architecture, scratch.architecture == "gpt2"
    else:
        assert config.model.path is not None
        shape = read_config(config.model.path, config.model.trust_remote_code)
        name, has = shape.model_type, has_residual_dropout(shape)
    if not has:
        raise ConfigError(
            f"sft.dropout is {config.sft.dropout:g} but a {name} model has no residual dropout",
            "set sft.dropout=0, or take an architecture that has it (gpt2)",
        )


def _check_reward_model(config: Config, path: str) -> None:
    """The reward model must read the policy's token ids as the same tokens."""
    trust = config.model.trust_remote_code
    policy = config.sft.path or config.model.path
    read_config(path, trust)
    theirs = load_tokenizer(path, config.model.chat_template, trust).get_vocab()
    if policy is None:
        raise ConfigError(
            "reward.path and model.from_scratch contradict each other: a new tokenizer fits no existing reward model",
            "drop reward.path, or name the model that the reward model was trained with in model.path",
        )
    ours = load_tokenizer(policy, config.model.chat_template, trust).get_vocab()
    if theirs != ours:
        differing = sum(theirs.get(token) != index for token, index in ours.items())
        raise ModelError(
            f"reward.path {path}: its vocabulary ({len(theirs)} tokens) does not fit the policy's ({len(ours)}): "
            f"{differing} tokens have another id or none",
            "a reward model scores token ids: take one trained with the policy's tokenizer",
        )
