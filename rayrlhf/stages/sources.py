"""`ppo.reward` from config to actors: what is checked before any starts, what its rewards depend on, who gives them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rayrlhf.actors.sources import EnsembleActor, FreshValueActor, SourceActor
from rayrlhf.config import Config
from rayrlhf.config.rewards import RewardSourceConfig
from rayrlhf.errors import ConfigError
from rayrlhf.rewards.base import SourceSettings
from rayrlhf.rewards.function import load_function
from rayrlhf.stages.lineage import absolute
from rayrlhf.types import Prompt

__all__ = ["PPOModels", "check_source", "plan_models"]


def check_source(config: Config) -> None:
    """A function can be imported and called, a token is there. Nothing is sent to a service.

    Raises:
        ConfigError
    """
    reward = config.ppo.reward
    if reward.function is not None:
        load_function(reward.function)
    _token(reward)


@dataclass(frozen=True, slots=True)
class PPOModels:
    """What PPO's roles start from."""

    models: Mapping[str, str]
    """by role; for a source that reads text, whose tokenizer it reads with"""
    actors: Mapping[str, type]
    """by role, where it is another than usual"""
    source: SourceSettings | None
    """None for a reward model"""


def plan_models(config: Config, parents: Mapping[str, str], prompts: Mapping[int, Prompt]) -> PPOModels:
    """With a reward model the value model starts from it, its head included (Ouyang et al. 2022, appendix C.4); with an
    ensemble from its first; else from the SFT model with a head of zeros.

    Args:
        parents: folders of the models that the stage starts from, `sft` and, where rewards come from one, `reward`.
        prompts: by prompt_id.
    """
    reward, sft = config.ppo.reward, parents["sft"]
    if reward.kind == "model":
        start = parents["reward"]
        return PPOModels(_models(sft, start), {}, None)
    members = tuple(absolute(path) for path in reward.models)
    if reward.kind == "ensemble":
        source = SourceSettings(reward, config.run.seed, members=members)
        return PPOModels(_models(sft, members[0]), {"reward": EnsembleActor}, source)
    token, here = _token(reward), _with_full_path(reward)
    source = SourceSettings(here, config.run.seed, dict(prompts), token=token)
    return PPOModels(_models(sft, sft), {"reward": SourceActor, "value": FreshValueActor}, source)


def _models(sft: str, scalar: str) -> dict[str, str]:
    return {"policy": sft, "reference": sft, "reward": scalar, "value": scalar}


def _with_full_path(reward: RewardSourceConfig) -> RewardSourceConfig:
    """Actors live elsewhere than the driver."""
    place, _, name = (reward.function or "").rpartition(":")
    if not place.endswith(".py"):
        return reward
    return reward.model_copy(update={"function": f"{Path(place).resolve()}:{name}"})


def _token(reward: RewardSourceConfig) -> str | None:
    """What the environment has in `token_variable`; no message quotes it."""
    if reward.token_variable is None:
        return None
    token, key = os.environ.get(reward.token_variable, "").strip(), "ppo.reward.token_variable"
    if not token:
        raise ConfigError(f"{key}: the environment has no {reward.token_variable}", "export it, or leave the key out")
    if not (token.isascii() and token.isprintable()) or " " in token:
        raise ConfigError(
            f"{key}: what {reward.token_variable} holds cannot stand in a header", "it is one word of ASCII"
        )
    return token
