"""The actors of reward sources, called as plain objects: what becomes of text, of numbers and of reasons."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from rayrlhf.actors.models import ModelSettings
from rayrlhf.actors.placement import plan_ppo
from rayrlhf.actors.sources import EnsembleActor, SourceActor, combined, requests_of
from rayrlhf.config import Config
from rayrlhf.config.rewards import RewardSourceConfig
from rayrlhf.data.batching import Cutting
from rayrlhf.data.tokenizer import train_tokenizer
from rayrlhf.engines.distributed import Rendezvous
from rayrlhf.engines.scoring import score_rewards
from rayrlhf.errors import ConfigError
from rayrlhf.rewards.base import SourceSettings
from rayrlhf.types import Prompt, Rollout, RolloutInfo, Scores
from tests.engine_fakes import SHAPES, PlainEngine, rollouts, tiny_scalar

RENDEZVOUS = Rendezvous(0, 1, "127.0.0.1", 1, "cpu", 1, False)
PROMPTS = {5: Prompt((("system", "be brief"), ("user", "hello you")), "forum")}


def source(**keys: object) -> RewardSourceConfig:
    return RewardSourceConfig.model_validate(keys)


def settings(path: str, found: SourceSettings) -> ModelSettings:
    return ModelSettings(path, "float32", "cpu", False, Cutting(1000), 0, 1.0, source=found)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["hello you, I am well and you are not"] * 3, 300).save_pretrained(folder)
    return str(folder)


def said(tokenizer: str, sample: int, text: str, finished: bool = True) -> Rollout:
    """A rollout whose response is this text."""
    reader = AutoTokenizer.from_pretrained(tokenizer)
    prompt = reader.encode("hello you", add_special_tokens=False)
    response = reader.encode(text, add_special_tokens=False) + ([reader.eos_token_id] if finished else [])
    return Rollout(
        RolloutInfo(sample, 5, len(prompt) + len(response), len(response), not finished),
        np.array([*prompt, *response], dtype=np.int32),
        np.zeros(len(response), dtype=np.float32),
        np.zeros(len(response), dtype=np.int32),
    )


# ---- text


def test_a_source_reads_the_prompts_record_and_the_response_without_special_tokens(tokenizer: str) -> None:
    found = SourceSettings(source(kind="function", function="m:f"), 0, PROMPTS)
    reader = AutoTokenizer.from_pretrained(tokenizer)
    (first, second) = requests_of([said(tokenizer, 1, "I am well"), said(tokenizer, 2, "I am", False)], found, reader)
    assert (first.sample_id, first.prompt, first.response, first.finished) == (1, PROMPTS[5].prompt, "I am well", True)
    assert (second.response, second.finished, second.source) == ("I am", False, "forum")


def test_the_actor_of_a_function_fills_rewards_and_reasons(tokenizer: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("def reward(prompts, responses):\n    return [None if 'not' in r else len(r) for r in responses]\n")
    actor = SourceActor.__new__(SourceActor)  # a constructor would send this process's output to a file
    config = source(kind="function", function=f"{file}:reward")
    actor.settings = settings(tokenizer, SourceSettings(config, 0, PROMPTS))
    actor.start(RENDEZVOUS)
    spoken = [said(tokenizer, 1, "I am well"), said(tokenizer, 7, "you are not"), said(tokenizer, 4, "I")]
    scores = actor._score(spoken, spoken[0])
    assert scores.rewards == {1: 9.0, 4: 1.0}
    assert scores.failed == {7: "function: the reward is missing"}
    assert actor._score([], spoken[0]) == Scores()
    actor.occupy("none")
    file.write_text("def reward(prompts, responses):\n    return [0.5 for _ in responses]\n")
    actor.reload(actor.settings)
    assert actor._score(spoken, spoken[0]).rewards == {1: 0.5, 7: 0.5, 4: 0.5}
    actor.close()


def test_a_function_that_is_not_there_on_the_actors_host_is_named(tokenizer: str, tmp_path: Path) -> None:
    actor = SourceActor.__new__(SourceActor)
    config = source(kind="function", function=f"{tmp_path / 'gone.py'}:reward")
    actor.settings = settings(tokenizer, SourceSettings(config, 0, PROMPTS))
    with pytest.raises(ConfigError, match="there is no file"):
        actor.start(RENDEZVOUS)


# ---- ensembles


def test_members_are_combined_sample_by_sample() -> None:
    each = [Scores(rewards={1: 1.0, 2: 4.0}), Scores(rewards={2: 0.0, 1: 3.0}), Scores(rewards={1: 2.0, 2: 2.0})]
    models = {"kind": "ensemble", "models": ("a", "b", "c")}
    assert combined(each, source(**models)).rewards == {1: 2.0, 2: 2.0}
    assert combined(each, source(**models, how="min")).rewards == {1: 1.0, 2: 0.0}
    # Variances over the members are 2/3 and 8/3.
    uwo = combined(each, source(**models, how="uwo", weight=0.3)).rewards
    assert uwo == pytest.approx({1: 2.0 - 0.2, 2: 2.0 - 0.8})


def test_a_sample_that_one_member_cannot_score_has_no_reward() -> None:
    each = [Scores(rewards={1: 1.0, 2: 4.0}), Scores(rewards={1: 3.0}, failed={2: "model: the score is NaN"})]
    scores = combined(each, source(kind="ensemble", models=("a", "b")))
    assert scores.rewards == {1: 2.0}
    assert scores.failed == {2: "ensemble: models[1]: the score is NaN"}
    lost = combined([Scores(failed={1: "model: the score is NaN"})], source(kind="ensemble", models=("a",)))
    assert (lost.rewards, lost.failed) == ({}, {1: "ensemble: models[0]: the score is NaN"})


def test_a_penalty_for_variance_that_is_too_large_to_train_on_is_a_failure() -> None:
    each = [Scores(rewards={1: 9e8}), Scores(rewards={1: -9e8})]
    scores = combined(each, source(kind="ensemble", models=("a", "b"), how="uwo", weight=1.0))
    assert scores.failed == {1: "ensemble: the score is larger than 1e+09"}


def test_the_actor_of_an_ensemble_scores_with_every_member(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rayrlhf.actors.sources.FrozenModel", lambda module, *_: PlainEngine(module))
    batch, members = rollouts(SHAPES), []
    for seed in (0, 1):
        members.append(str(tmp_path / str(seed)))
        tiny_scalar(seed).classifier.save_pretrained(members[-1])
    actor = EnsembleActor.__new__(EnsembleActor)
    config = source(kind="ensemble", models=tuple(members))
    actor.settings = settings(members[0], SourceSettings(config, 0, members=tuple(members)))
    actor.engine = actor._load()
    scores = actor._score(batch, batch[0])
    alone = [score_rewards(PlainEngine(tiny_scalar(seed)), batch, batch[0], Cutting(1000)) for seed in (0, 1)]
    means = {sample: (reward + alone[1].rewards[sample]) / 2 for sample, reward in alone[0].rewards.items()}
    assert scores.rewards == pytest.approx(means, abs=1e-5)
    assert scores.rewards != pytest.approx(alone[0].rewards, abs=1e-3)


# ---- placement


def placed(source: dict[str, object], **cluster: object) -> dict[str, float]:
    given = {
        "model": {"path": "org/name"},
        "world": {"name": "instructions"},
        "cluster": {"device": "cuda", **cluster},
        "ppo": {"reward": source},
    }
    return {p.role: p.gpus for p in plan_ppo(Config.model_validate(given))}


def test_a_source_that_reads_text_asks_for_no_gpu_unless_told_to() -> None:
    function = {"kind": "function", "function": "m:f"}
    everything = dict.fromkeys(("policy", "reference", "reward", "value", "rollout"), 1.0)
    assert placed(function) == everything | {"reward": 0.0}
    assert placed(function, reward={"gpus": 1.0}) == everything
    assert placed({"kind": "ensemble", "models": ["a"]}) == everything


def test_the_reward_model_of_another_stage_keeps_its_gpu() -> None:
    given = {
        "model": {"path": "org/name"},
        "world": {"name": "instructions"},
        "cluster": {"device": "cuda"},
        "ppo": {"reward": {"kind": "function", "function": "m:f"}},
    }
    roles = plan_ppo(Config.model_validate(given), ("policy", "reward"), scoring_text=False)
    assert {p.role: p.gpus for p in roles} == {"policy": 1.0, "reward": 1.0}
