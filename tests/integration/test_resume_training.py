"""Supervised stages that were ended and go on: each ends as the one that was not, bit by bit."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

from rayrlhf.checkpoint.store import Checkpoint, CheckpointStore
from rayrlhf.config.training import PretrainMixConfig, SelectConfig
from rayrlhf.data.batching import Cutting
from rayrlhf.data.prompts import LMExample
from tests.faults import started, wait_until
from tests.integration.conftest import DPO, FinishedRun, rayrlhf
from tests.ranks import run_ranks

pytestmark = [pytest.mark.integration, pytest.mark.timeout(400)]

TIMES = ("elapsed_s", "tokens_per_s")


def same_weights(mine: Path, other: Path) -> bool:
    a, b = load_file(mine / "model.safetensors"), load_file(other / "model.safetensors")
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in b)


def unmeasured(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in record.items() if k not in TIMES} for record in records]


# ---- every step of sft, on two ranks under ZeRO 1, with dropout, text and the best epoch -----------------------------

STEPS = 8


def examples(count: int, prompt: int, seed: int) -> list[LMExample]:
    rng = np.random.default_rng(seed)
    return [LMExample(rng.integers(2, 64, n).astype(np.int32), prompt, "") for n in rng.integers(6, 24, count)]


def job_of(folder: Path, name: str, found: Checkpoint | None) -> Any:
    from rayrlhf.engines.deepspeed import LearnerSettings
    from rayrlhf.stages.training import TrainingJob
    from rayrlhf.supervised.checkpoints import CheckpointPlan
    from rayrlhf.supervised.loop import TrainSettings

    adam: dict[str, Any] = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "grad_clip": 1.0}
    guards: dict[str, Any] = {"max_loss": 1e4, "failed_folder": "failed", "role": "sft"}
    workspace = folder / name
    return TrainingJob(
        stage="sft",
        body=lambda job: {},
        workspace=str(workspace),
        logs=(),
        device="cpu",
        threads=1,
        model=str(folder / "start"),
        trust_remote_code=False,
        seed=3,
        deterministic=True,
        learner=LearnerSettings(1, "float32", "cpu", 1e-2, **adam, **guards),
        train=TrainSettings(1e-2, 4, 4.0, 0.1, 0.1, Cutting(60), 3, 3),
        checkpoints=CheckpointPlan(
            CheckpointStore(folder / "checkpoints", keep=99) if found is None else CheckpointStore(folder / "others"),
            every=1,
            inputs={},
            workspace=workspace,
            stop=folder / "stop",
            found=found,
        ),
        data=None,
        extra={
            "dropout": 0.3,
            "mix": PretrainMixConfig(coef=0.5, examples_per_demonstration=0.5),
            "select": SelectConfig(by="heldout_loss"),
            "judge": None,
        },
    )


def train_from_every_step(rank: int, world: int, port: int, given: str) -> None:
    from rayrlhf.engines.distributed import Rendezvous, join_process_group
    from rayrlhf.stages import language
    from rayrlhf.supervised.checkpoints import put_back

    join_process_group(Rendezvous(rank, world, "127.0.0.1", port, "cpu", 1, deterministic=True))
    folder = Path(given)
    language.fetch = lambda job: (examples(8, 3, 1), examples(5, 3, 2), examples(5, 0, 3))  # Ray's store otherwise

    def run(name: str, found: Checkpoint | None) -> None:
        if rank == 0:
            (folder / name).mkdir()
            put_back(found, folder / name)
        torch.distributed.barrier()
        result = language._train_language_model(job_of(folder, name, found))
        if rank == 0:
            (folder / name / "result.json").write_text(json.dumps(result), encoding="utf-8")

    run("whole", None)
    for step in range(1, STEPS + 1):
        there = folder / "checkpoints" / f"step-{step:06d}"
        manifest = json.loads((there / "manifest.json").read_text())
        run(f"from-{step}", Checkpoint(there, step, manifest["state"], manifest["inputs"]))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_positions=64, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(folder / "start")
    run_ranks(train_from_every_step, 2, folder, 200.0)
    return folder


@pytest.mark.parametrize("step", range(1, STEPS + 1))
def test_sft_that_goes_on_from_any_step_ends_as_the_one_that_did_not_stop(trained: Path, step: int) -> None:
    whole, resumed = trained / "whole", trained / f"from-{step}"
    records = [
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (whole, resumed)
    ]
    mine, other = (unmeasured([r for r in rows if "step" in r]) for rows in records)
    assert mine == other
    assert [r["step"] for r in mine if "loss" in r] == [1, 3, 6, 8]
    assert [r["step"] for r in mine if "heldout_loss" in r] == [2, 4, 6, 8]
    assert same_weights(resumed / "model", whole / "model")
    results = [json.loads((folder / "result.json").read_text()) for folder in (whole, resumed)]
    for result in results:
        assert result.pop("save_seconds") > 0
        assert result.pop("train_tokens_per_s") > 0
    assert results[0] == results[1]
    assert results[0]["saves"] == STEPS


# ---- whole runs ------------------------------------------------------------------------------------------------------


def test_reward_and_dpo_that_were_ended_are_those_that_were_not(
    finished: FinishedRun, baseline: Path, tmp_path: Path
) -> None:
    sft = finished.artifact("sft") / "model"
    run = [
        *(finished.arguments[0], "run.name=ended", f"run.output={tmp_path}", *finished.arguments[3:], *DPO),
        *(f"model={{path: {sft}}}", f"sft.path={sft}", "run.stages=[reward,dpo]", "checkpoint.training_every=7"),
    ]
    folder = tmp_path / "ended"

    def dpo_at_step_2() -> bool:
        files = [*(tmp_path / "artifacts").glob(".dpo-*.partial/metrics.jsonl")]
        return any('"step": 2,' in file.read_text() for file in files)

    with started(["run", *run], tmp_path / "first") as process:
        wait_until((folder / "checkpoints" / "training" / "reward" / "step-000021").exists, process)
        process.kill()
    assert not [*(tmp_path / "artifacts").glob("reward-*")]
    with started(["run", *run, "--resume"], tmp_path / "printed") as process:
        wait_until(dpo_at_step_2, process)
        process.terminate()
        assert process.wait(30) == 143
    printed = " ".join((tmp_path / "printed").read_text().split())
    assert "reward: goes on from step" in printed
    assert "Stopped: dpo: stopped after step" in printed
    refused = rayrlhf("run", *run, "dpo.beta=0.3", "--resume")
    assert refused.returncode == 2
    assert "dpo.beta was 0.1, is 0.3" in " ".join(refused.stderr.split())
    done = rayrlhf("run", *run, "--resume")
    assert done.returncode == 0, done.stdout + done.stderr
    ended = FinishedRun(folder, tmp_path, run, done.stdout, set())
    assert unmeasured(ended.metrics("reward")) == unmeasured(finished.metrics("reward"))
    steps = [json.loads(line) for line in (baseline / "metrics.jsonl").read_text().splitlines()]
    assert unmeasured(ended.metrics("dpo")) == unmeasured(steps)
    assert same_weights(ended.artifact("reward") / "model", finished.artifact("reward") / "model")
    assert same_weights(folder / "model_dpo", baseline / "model_dpo")
    mine, others = ended.summary["stages"], json.loads((baseline / "summary.json").read_text())["stages"]
    for name in ("accuracy", "normalisation"):
        assert mine["reward"][name] == finished.summary["stages"]["reward"][name]
    assert mine["dpo"]["accuracy"] == others["dpo"]["accuracy"]
