"""The options of a PPO step on the real engines, and two runs that give the same numbers bit by bit."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from rayrlhf.weights.publish import PUBLISH_PARTS
from tests.integration.conftest import ROOT, FinishedRun, rayrlhf

pytestmark = [pytest.mark.integration, pytest.mark.timeout(500)]

# What is measured of the machine, not of the model.
MEASURED = (
    "time/",
    "throughput/",
    "memory/",
    *(f"weights/{part}_s" for part in ("publish", *PUBLISH_PARTS)),
    "weights/gib",
    "rollout/seconds",
    "rollout/tail_share",
)


def ppo(finished: FinishedRun, name: str, *overrides: str) -> Path:
    """A short PPO run from the finished run's SFT and reward models; its folder."""
    arguments = [*finished.arguments[:1], f"run.name={name}", *finished.arguments[2:], "tracking.wandb=off"]
    done = rayrlhf("ppo", *arguments, "ppo.steps=3", "checkpoint.every=0", *overrides)
    assert done.returncode == 0, done.stdout + done.stderr
    return finished.output / name


def steps(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def explained() -> set[str]:
    """The metrics that docs/metrics.md knows."""
    return set(re.findall(r"`([^`\s]+)`", (ROOT / "docs" / "metrics.md").read_text()))


@pytest.fixture(scope="module")
def everything(finished: FinishedRun) -> list[Path]:
    """PPO-ptx, twice: two ZeRO-3 ranks, two engines, text, an average of the weights, the critic warmed up.

    The second time steps may overlap, by nothing: that too must give the same numbers.
    """
    overrides = [
        "run.deterministic=true",
        "cluster.policy.ranks=2",
        "ppo.zero_stage=3",
        "rollout.engines=2",
        "ppo.value_warmup_steps=1",
        "ppo.ema=0.9",
        "ppo.importance_cap=2.0",
        "ppo.ptx.coef=0.5",
        "ppo.ptx.examples_per_episode=0.5",
        "ppo.ptx.norms_every=2",
    ]
    overlap = ["ppo.pacing.kind=overlap", "ppo.pacing.max_staleness=0"]
    return [ppo(finished, "first", *overrides), ppo(finished, "second", *overrides, *overlap)]


def test_two_deterministic_runs_give_the_same_numbers_bit_by_bit(everything: list[Path]) -> None:
    first, second = ([{k: v for k, v in s.items() if not k.startswith(MEASURED)} for s in steps(f)] for f in everything)
    assert len(first) == 3
    assert "ptx/loss" in first[1]
    assert first == second
    samples = [(folder / "samples.jsonl").read_text() for folder in everything]
    assert samples[0] == samples[1]
    for model in ("model", "model_ema"):
        weights = [(folder / model / "model.safetensors").read_bytes() for folder in everything]
        assert weights[0] == weights[1]


def test_every_metric_is_explained_in_the_docs(everything: list[Path], finished: FinishedRun) -> None:
    names = {name for step in steps(everything[0]) + steps(finished.folder) for name in step} - {"stage"}
    assert names <= explained()


def test_ptx_reports_its_loss_each_step_and_both_norms_when_due(everything: list[Path]) -> None:
    warm, first, second = steps(everything[0])
    assert not [name for name in warm if name.startswith(("ptx", "policy/loss"))], "the critic alone learned"
    assert warm["policy/learning_rate"] == 0.0
    assert "value/loss" in warm
    assert first["ptx/loss"] > 0
    assert second["ptx/loss"] > 0
    assert not {"ptx/grad_norm", "policy/ppo_grad_norm"} & set(first)
    assert {"ptx/grad_norm", "policy/ppo_grad_norm"} <= set(second)  # steps 0, 2, ... counted from 0


def test_a_warm_up_of_the_critic_leaves_the_policy_and_so_its_kl_at_0(everything: list[Path]) -> None:
    warm, first, second = steps(everything[0])
    assert abs(warm["kl/per_token"]) < 1e-6
    assert abs(first["kl/per_token"]) < 1e-6
    assert abs(second["kl/per_token"]) > 1e-6
    assert warm["rollout/importance_weight"] == pytest.approx(1.0, abs=1e-4)


def test_the_average_lies_between_the_start_and_the_end(everything: list[Path], finished: FinishedRun) -> None:
    """After 4 updates at decay 0.9 the start has weight 0.9^4; the rest are policies on the way."""
    start = load_file(finished.artifact("sft") / "model" / "model.safetensors")
    end = load_file(everything[0] / "model" / "model.safetensors")
    average = load_file(everything[0] / "model_ema" / "model.safetensors")
    assert average.keys() == end.keys()
    for name in end:
        moved, way = (average[name] - start[name]).norm(), (end[name] - start[name]).norm()
        assert 0 < moved < way, name


def test_group_estimators_start_no_value_model_and_the_engines_logprobs_save_a_pass(finished: FinishedRun) -> None:
    folder = ppo(
        finished,
        "group",
        "ppo.advantage=leave_one_out",
        "ppo.samples_per_prompt=4",
        "ppo.old_logprobs=rollout",
        "ppo.importance_cap=2.0",
        "ppo.dual_clip=3.0",
        "ppo.truncated.treatment=penalty",
        "ppo.truncated.value=1.0",
        "ppo.score.clip=3.0",
        "ppo.kl.stop=50.0",
    )
    for step in steps(folder):
        assert not [name for name in step if name.startswith("value/")]
        assert "memory/value_gib" not in step
        assert step["rollout/logprob_gap_max"] < 1e-4, "measured on the first minibatch"
        assert step["rollout/importance_weight"] == pytest.approx(1.0, abs=0.1)
        assert 0 <= step["rollout/importance_capped_fraction"] < 0.1
        assert step["reward/shaped_mean"] <= step["reward/mean"] + 1e-6
    assert not (folder / "logs" / "value-0.log").exists()
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert [s["prompt_id"] for s in samples[:4]] == [samples[0]["prompt_id"]] * 4, "four responses to one prompt"


def test_overlapping_steps_learn_from_samples_one_version_old_with_importance_weights(finished: FinishedRun) -> None:
    folder = ppo(finished, "overlap", "ppo.pacing.kind=overlap", "ppo.importance_cap=2.0", "rollout.engines=2")
    first, second, third = steps(folder)
    assert [step["rollout/staleness_max"] for step in (first, second, third)] == [0, 1, 1]
    assert [step["rollout/staleness_mean"] for step in (first, second, third)] == [0, 1, 1]
    assert first["rollout/logprob_gap_max"] < 1e-4
    assert first["rollout/importance_weight"] == pytest.approx(1.0, abs=1e-4)
    assert "rollout/stale_logprob_gap" not in first
    # What the engine sampled with the version before is not the trainer's: no gap to limit, something to weigh.
    for step in (second, third):
        assert step["rollout/logprob_gap"] is None
        assert 0 < step["rollout/stale_logprob_gap"] <= step["rollout/stale_logprob_gap_max"] < 1
        assert 0.9 < step["rollout/importance_weight"] < 1.1
        assert step["rollout/importance_weight"] != pytest.approx(1.0, abs=1e-6)
    assert [step["weights/version"] for step in (first, second, third)] == [1, 2, 3]
