"""What goes into each stage, as JSON; its hash names the stage's artifact, so unchanged inputs are not run again."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from rayrlhf.actors.placement import TRAINING
from rayrlhf.checkpoint.artifacts import Artifact, ArtifactStore, content_key, hash_model_folder
from rayrlhf.config import Config
from rayrlhf.config.base import Section
from rayrlhf.config.ppo import PPOConfig
from rayrlhf.config.rewards import RewardSourceConfig
from rayrlhf.config.run import STAGES, StageName
from rayrlhf.data.readers import fingerprint_sources
from rayrlhf.errors import ConfigError
from rayrlhf.rewards.function import source_file
from rayrlhf.stages.datasets import block_tokens

__all__ = ["PARENTS", "Lineage", "absolute", "ppo_section"]

# Raise when a stage comes to compute something else from the same inputs.
RECIPE_VERSION = 1

PARENTS: dict[StageName, tuple[StageName, ...]] = {
    "pretrain": (),
    "sft": ("pretrain",),
    "collect": ("sft",),
    "reward": ("sft",),
    "dpo": ("sft",),
    "ppo": ("sft", "reward"),
    "eval": ("sft", "reward"),
}
SOURCES: dict[StageName, tuple[str, ...]] = {
    "pretrain": ("text", "demonstrations"),  # the tokenizer learns from both
    "sft": ("demonstrations",),
    "reward": ("rankings", "heldout_rankings", "demonstrations"),
    "dpo": ("rankings", "heldout_rankings"),
    "collect": ("ranking_prompts", "heldout_prompts"),
    "ppo": ("prompts",),
    "eval": ("heldout_prompts", "multiple_choice", "text"),
}
SECTIONS: dict[StageName, tuple[str, ...]] = {
    "pretrain": ("pretrain", "deepspeed"),
    "sft": ("sft", "deepspeed"),
    "reward": ("reward", "sft", "deepspeed"),  # sft's limit cuts the demonstrations that normalise the rewards
    "dpo": ("dpo", "deepspeed"),
    "collect": ("collect", "rollout", "world"),
    "ppo": ("ppo", "rollout", "weights", "world", "deepspeed"),  # a world judges the responses, for `reward/gold`
    "eval": ("eval", "rollout", "world"),
}


class Lineage:
    """The keys of all stages of a config, and where their models are."""

    def __init__(self, config: Config, store: ArtifactStore, again: Collection[StageName] = ()) -> None:
        """Stages in `again` count as not finished, whatever there is of them."""
        self._again = again
        self._config = config
        self._store = store
        self._inputs: dict[StageName, dict[str, Any]] = {}
        self._keys: dict[StageName, str] = {}
        given = {"pretrain": config.model.path, "sft": config.sft.path, "reward": config.reward.path}
        self._given: dict[StageName, str] = {s: absolute(path) for s in STAGES if (path := given.get(s))}
        for stage in STAGES:  # in order: a stage's key holds its parents'
            if stage in self._given:
                self._keys[stage] = hash_model_folder(self._given[stage])
            else:
                self._inputs[stage] = self._collect(stage)
                self._keys[stage] = content_key(self._inputs[stage])

    def key(self, stage: StageName) -> str:
        return self._keys[stage]

    def inputs(self, stage: StageName) -> dict[str, Any]:
        return self._inputs[stage]

    def parent_keys(self, stage: StageName) -> dict[str, str]:
        return {parent: self._keys[parent] for parent in self.parents(stage)}

    def parents(self, stage: StageName) -> tuple[StageName, ...]:
        """What `stage` starts from: models, the rankings collected, and for eval every policy that the run makes.

        No reward model where PPO's rewards come from elsewhere, unless `reward.path` names one for eval.
        """
        parents, elsewhere = PARENTS[stage], self._config.ppo.reward.kind != "model"
        if elsewhere and (stage == "ppo" or (stage == "eval" and self._config.reward.path is None)):
            parents = tuple(parent for parent in parents if parent != "reward")
        if stage in ("reward", "dpo") and self._config.collect is not None:
            parents = (*parents, "collect")
        if stage == "eval":
            parents = (*parents, *(policy for policy in ("dpo", "ppo") if policy in self._config.run.stages))
        return parents

    def finished(self, stage: StageName) -> Artifact | None:
        return None if stage in self._given or stage in self._again else self._store.find(stage, self._keys[stage])

    def model(self, stage: StageName) -> str | None:
        """Path or name of the stage's model, if there is one yet."""
        if stage in self._given:
            return self._given[stage]
        artifact = self.finished(stage)
        return artifact.model if artifact else None

    def parent_models(self, stage: StageName, to_come: Sequence[StageName] = ()) -> dict[str, str]:
        """Where the models are that `stage` starts from, those of stages `to_come` aside.

        Raises:
            ConfigError: naming the parent stage that has not been run.
        """
        models: dict[str, str] = {}
        for parent in self.parents(stage):
            if parent == "collect" and (parent in to_come or self.finished(parent)):
                continue  # rankings, not a model
            path = self.model(parent)
            if path is None and parent in to_come:
                continue
            if path is None and parent == "collect":
                raise ConfigError(
                    f"{stage} learns from the rankings of collect, and there are none for this config",
                    "name collect in run.stages first, or set collect=null to use data.rankings",
                )
            if path is None:
                setting = "model.path" if parent == "pretrain" else f"{parent}.path"
                raise ConfigError(
                    f"{stage} starts from the {parent} model, and there is none for this config",
                    f"run `rayrlhf run` or `rayrlhf {parent}` first, or name one with {setting}",
                )
            models[parent] = path
        return models

    def _collect(self, stage: StageName) -> dict[str, Any]:
        config = self._config
        ptx = any(arm.ppo.ptx.coef for arm in config.arms().values())
        mixed = (stage == "sft" and config.sft.pretrain_mix.coef > 0) or (stage == "ppo" and ptx)
        names = (*SOURCES[stage], "text") if mixed else SOURCES[stage]
        if "collect" in self.parents(stage):
            names = tuple(name for name in names if name not in ("rankings", "heldout_rankings"))
        sources = {name: fingerprint_sources(getattr(config.data, name), config.data.root) for name in names}
        judge = {"sft": config.sft.select.reward_model, "eval": config.eval.reward_model}.get(stage)
        roles = ("train",) if stage in TRAINING else ("policy", "reference", "reward", "value", "rollout")
        limits = ("heldout_fraction", "max_prompt_tokens", "overlong_prompts", "max_records")
        return {
            "recipe": RECIPE_VERSION,
            "stage": stage,
            "seed": config.run.seed,
            "model": config.model.model_dump(mode="json"),
            "chat_template": _file_hash(config.model.chat_template),
            "sections": {name: _section(config, name) for name in SECTIONS[stage]},
            "sources": sources,
            "limits": {name: getattr(config.data, name) for name in limits},
            "device": config.cluster.device,
            "ranks": {role: getattr(getattr(config.cluster, role), "ranks", None) for role in roles},
            "parents": self.parent_keys(stage),
            **({"block_tokens": block_tokens(config)} if mixed else {}),
            **({"judge": hash_model_folder(absolute(judge))} if judge else {}),
            **({"world_module": _file_hash(config.world.module)} if "world" in SECTIONS[stage] else {}),
            **({"reward_source": _reward_source(config.ppo.reward)} if stage == "ppo" else {}),
        }


def ppo_section(ppo: PPOConfig) -> dict[str, Any]:
    """As JSON, less the keys of `ppo.reward` that decide no reward, such as time limits."""
    return ppo.model_dump(mode="json") | {"reward": ppo.reward.deciding()}


def _section(config: Config, name: str) -> dict[str, Any] | None:
    section: Section | None = getattr(config, name)  # `collect` may be left out
    if isinstance(section, PPOConfig):
        return ppo_section(section)
    return None if section is None else section.model_dump(mode="json")


def _reward_source(reward: RewardSourceConfig) -> dict[str, Any]:
    """What its rewards depend on beside its keys: the function's file (not what that imports), the ensemble's models.
    Of a service only the address is known."""
    file = None if reward.function is None else source_file(reward.function)
    return {
        "function": None if file is None else _file_hash(str(file)),
        "models": [hash_model_folder(absolute(path)) for path in reward.models],
    }


def absolute(path: str) -> str:
    """A model folder by its full path, since Ray Train's workers live elsewhere; a hub name as it is."""
    folder = Path(path).expanduser()
    return str(folder.resolve()) if folder.is_dir() else path


def _file_hash(path_or_text: str | None) -> str | None:
    """Of what the file of a chat template or a world holds; Jinja text in the config is already part of it."""
    if path_or_text is None or "{" in path_or_text or not (path := Path(path_or_text).expanduser()).is_file():
        return None
    return hashlib.sha256(path.read_bytes()).hexdigest()
