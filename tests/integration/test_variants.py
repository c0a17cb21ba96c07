"""The same PPO in other shapes: models given by path, sharded over ranks, tensor-parallel engines, bfloat16."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.integration.conftest import ROOT, FinishedRun, rayrlhf, shared_memory

pytestmark = [pytest.mark.integration, pytest.mark.timeout(400)]


def last_steps(folder: Path) -> list[dict[str, float]]:
    import json

    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [r for r in records if r["stage"] == "ppo"]


def test_models_given_by_relative_path_run_sharded_and_tensor_parallel_and_agree_with_one_rank(
    finished: FinishedRun, tmp_path: Path
) -> None:
    """Two ranks under ZeRO-3 in every role and an engine of two shards give the numbers of the first, single run."""
    for stage in ("sft", "reward"):
        shutil.copytree(finished.artifact(stage) / "model", tmp_path / stage)
    relative = {stage: os.path.relpath(tmp_path / stage, ROOT) for stage in ("sft", "reward")}
    arguments = [
        "configs/tiny.yaml",
        f"run.output={tmp_path / 'runs'}",
        f"model={{path: {relative['sft']}}}",
        f"sft.path={relative['sft']}",
        f"reward.path={relative['reward']}",
        "ppo.steps=2",
        *[a for a in finished.arguments if a.startswith(("ppo.batch", "ppo.mini", "ppo.learn", "rollout.max"))],
        "ppo.zero_stage=3",
        "ppo.frozen_zero_stage=3",
        *(f"cluster.{role}.ranks=2" for role in ("policy", "reference", "reward", "value")),
        "rollout.tensor_parallel=2",
        "cluster.rollout.threads=1",
    ]
    before = shared_memory()
    done = rayrlhf("ppo", *arguments, timeout=380)
    assert done.returncode == 0, done.stdout + done.stderr
    assert shared_memory() <= before  # vLLM leaves what its shards talk through
    got, want = last_steps(tmp_path / "runs" / "tiny"), finished.metrics("ppo")[:2]
    assert len(got) == 2
    for a, b in zip(got, want, strict=True):
        for name in ("reward/mean", "kl/mean", "policy/loss", "policy/grad_norm", "value/loss", "response/length_mean"):
            assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-4), name
        assert a["rollout/logprob_gap_max"] < 1e-4


def test_roles_that_share_devices_take_turns_and_learn_the_same(finished: FinishedRun, tmp_path: Path) -> None:
    models = [f"{stage}.path={finished.artifact(stage) / 'model'}" for stage in ("sft", "reward")]
    arguments = [
        "configs/tiny.yaml",
        f"run.output={tmp_path}",
        f"model={{path: {finished.artifact('sft') / 'model'}}}",
        *models,
        "ppo.steps=2",
        *[a for a in finished.arguments if a.startswith(("ppo.batch", "ppo.mini", "ppo.learn", "rollout.max"))],
        "cluster.shared=[[policy, value, rollout], [reference, reward]]",
    ]
    done = rayrlhf("ppo", *arguments, timeout=380)
    assert done.returncode == 0, done.stdout + done.stderr
    got, want = last_steps(tmp_path / "tiny"), finished.metrics("ppo")[:2]
    assert len(got) == 2
    for a, b in zip(got, want, strict=True):
        for name in ("reward/mean", "kl/mean", "policy/loss", "policy/grad_norm", "value/loss", "response/length_mean"):
            assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-4), name
        assert a["weights/quarantined"] == 0


def test_bfloat16_runs_within_its_own_guards(finished: FinishedRun) -> None:
    arguments = [*finished.arguments[:1], "run.name=half", *finished.arguments[2:], "model.dtype=bfloat16"]
    models = [f"{stage}.path={finished.artifact(stage) / 'model'}" for stage in ("sft", "reward")]
    base = [a for a in arguments if not a.startswith(("model.from_scratch", "tracking"))]
    path = f"model={{path: {finished.artifact('sft') / 'model'}, dtype: bfloat16}}"
    done = rayrlhf("ppo", base[0], path, *[a for a in base[1:] if a != "model.dtype=bfloat16"], *models, "ppo.steps=3")
    assert done.returncode == 0, done.stdout + done.stderr
    steps = last_steps(finished.output / "half")
    assert len(steps) == 3
    assert abs(steps[0]["kl/per_token"]) < 0.02
    assert all(s["rollout/logprob_gap"] < 0.03 for s in steps)
