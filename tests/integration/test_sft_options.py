"""What `sft` can be asked for: text mixed in, the best epoch instead of the last; dropout is off while it is judged."""

from __future__ import annotations

import json
import os
import random
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rayrlhf.config.model import FromScratch
from rayrlhf.data.batching import Cutting
from rayrlhf.data.chat import load_tokenizer
from rayrlhf.data.prompts import LMExample, tokenize_demonstrations
from rayrlhf.data.readers import read_demonstrations
from rayrlhf.data.split import split_by_prompt
from tests.faults import recoveries, started, wait_until, writer_of
from tests.integration.conftest import FinishedRun, rayrlhf
from tests.ranks import run_ranks

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

PATIENCE_S = 150.0

RECORDS, HELDOUT, LONGEST = 20, 0.2, 48


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Demonstrations that nobody could give: beyond their form there is nothing to learn but each of them by heart."""
    rng, folder = random.Random(0), tmp_path_factory.mktemp("noise")
    rows = [
        {"prompt": f"say {i}", "response": " ".join(str(rng.randrange(10)) for _ in range(4))} for i in range(RECORDS)
    ]
    (folder / "demonstrations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def run_sft(finished: FinishedRun, noise: Path, name: str, *overrides: str) -> FinishedRun:
    arguments = sft_of_noise(finished, noise, name, *overrides)
    done = rayrlhf("sft", *arguments, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    return FinishedRun(finished.output / name, finished.output, arguments, done.stdout, set())


def sft_of_noise(finished: FinishedRun, noise: Path, name: str, *overrides: str) -> list[str]:
    """Arguments of `rayrlhf sft` on the noise, from the pretrained model of the finished run; text as there."""
    return [
        "configs/tiny.yaml",
        f"run.name={name}",
        f"run.output={finished.output}",
        f"model={{path: {finished.artifact('pretrain') / 'model'}}}",
        "world.name=null",
        f"data.root={noise}",
        "data.demonstrations=[demonstrations.jsonl]",
        f"data.text=[{finished.output / 'worlds/instructions-0-0.2/text.jsonl'}]",
        f"data.heldout_fraction={HELDOUT}",
        f"sft.max_response_tokens={LONGEST}",
        "sft.learning_rate=1e-2",
        "sft.final_lr_ratio=1.0",
        "sft.batch_size=4",
        *overrides,
    ]


def held_out(finished: FinishedRun, noise: Path) -> list[LMExample]:
    _, held = split_by_prompt(read_demonstrations(["demonstrations.jsonl"], noise), HELDOUT, 0)
    tokenizer = load_tokenizer(finished.artifact("pretrain") / "model")
    return tokenize_demonstrations(tokenizer, held, 48, 48 + LONGEST, "drop")[0]


@torch.no_grad()
def plain_loss(lm: Any, examples: list[LMExample]) -> float:
    """Mean over all response tokens in float64, an example at a time."""
    losses: list[float] = []
    for e in examples:
        table = lm.eval().double()(torch.from_numpy(e.tokens).long()[None]).logits[0].log_softmax(-1)
        losses += [-float(table[t - 1, int(e.tokens[t])]) for t in range(max(1, e.prompt_tokens), len(e.tokens))]
    return float(np.mean(losses))


@torch.no_grad()
def plain_reward(lm: Any, classifier: Any, examples: list[LMExample], eos: int) -> float:
    """Mean normalised score of greedy responses, each prompt once and alone, all over again for every token."""
    bias, scale = classifier.config.rayrlhf_reward_normalisation
    scores = []
    for prompt in {tuple(e.tokens[: e.prompt_tokens].tolist()) for e in examples}:
        tokens = list(prompt)
        while len(tokens) < len(prompt) + LONGEST and (tokens[-1] != eos or len(tokens) == len(prompt)):
            tokens.append(int(lm(torch.tensor([tokens])).logits[0, -1].argmax()))
        hidden = classifier.base_model(torch.tensor([tokens])).last_hidden_state[0, -1]
        scores.append((float(classifier.score(hidden)) - bias) / scale)
    return float(np.mean(scores))


OVERFIT = [
    "sft.epochs=14",
    "sft.log_every=1",
    "sft.pretrain_mix={coef: 0.5, examples_per_demonstration: 0.5}",
    "sft.select.by=heldout_loss",
    "sft.zero_stage=3",
    "cluster.train.ranks=2",
    "cluster.train.threads=1",
]


@pytest.fixture(scope="module")
def overfit(finished: FinishedRun, noise: Path) -> FinishedRun:
    """Fourteen epochs of four steps on two sharded ranks, text mixed in, the best epoch kept."""
    return run_sft(finished, noise, "overfit", *OVERFIT)


def test_the_best_epoch_is_what_sharded_ranks_save_when_the_last_ones_overfit(
    overfit: FinishedRun, finished: FinishedRun, noise: Path
) -> None:
    run = overfit
    result, records, folder = run.summary["stages"]["sft"], run.metrics("sft"), run.artifact("sft")
    epochs = [r for r in records if "heldout_loss" in r]
    losses = [r["heldout_loss"] for r in epochs]
    assert len(epochs) == 14
    best = epochs[int(np.argmin(losses))]
    assert best["heldout_loss"] < losses[-1] - 0.1, "it has overfitted, or this says nothing"
    assert result["selected"] == {"step": best["step"], "heldout_loss": best["heldout_loss"]}
    assert result["heldout_loss"] == min(losses)
    saved = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert plain_loss(saved, held_out(finished, noise)) == pytest.approx(min(losses), rel=1e-5)
    assert {p.name for p in folder.iterdir()} == {"artifact.json", "metrics.jsonl", "result.json", "model"}
    for r in epochs:
        assert f"{r['step']}/{r['steps']}  held-out loss {r['heldout_loss']:.4g}" in run.stdout
    assert f"kept from step {best['step']}" in run.stdout
    text = [r["pretrain_loss"] for r in records if "loss" in r]
    assert len(text) == epochs[-1]["step"]
    assert np.mean(text[-5:]) < np.mean(text[:5]) - 0.1, "text is learned too"


def unmeasured(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in record.items() if k not in ("elapsed_s", "tokens_per_s")} for record in records]


def test_a_stage_that_lost_a_worker_and_then_its_driver_ends_as_the_one_that_lost_none(
    overfit: FinishedRun, finished: FinishedRun, noise: Path, tmp_path: Path
) -> None:
    arguments = sft_of_noise(finished, noise, "ended", *OVERFIT, f"run.output={tmp_path}")
    arguments += ["checkpoint.training_every=20"]
    folder, checkpoints = tmp_path / "ended", tmp_path / "ended" / "checkpoints" / "training" / "sft"

    def at_step(step: int) -> bool:
        files = [*(tmp_path / "artifacts").glob(".sft-*.partial/metrics.jsonl")]
        return any(f'"step": {step},' in file.read_text() for file in files)

    with started(["sft", *arguments], tmp_path / "printed") as run:
        wait_until(lambda: at_step(24), run)
        assert [p.name for p in checkpoints.glob("step-*")] == ["step-000020"], "it is between two checkpoints"
        os.kill(writer_of(folder / "logs" / "sft-1.log"), signal.SIGKILL)
        wait_until(lambda: [r["event"] for r in recoveries(folder)] == ["lost", "replaced"], run)
        assert "sft: goes on from step 20" in (tmp_path / "printed").read_text()
        wait_until(lambda: at_step(45), run)
        run.kill()
    assert not [*(tmp_path / "artifacts").glob("sft-*")]
    done = rayrlhf("sft", *arguments, "--resume")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "sft: goes on from step 40" in done.stdout
    ended = FinishedRun(folder, tmp_path, arguments, done.stdout, set())
    assert unmeasured(ended.metrics("sft")) == unmeasured(overfit.metrics("sft"))
    mine, other = (load_file(run.artifact("sft") / "model" / "model.safetensors") for run in (ended, overfit))
    assert mine.keys() == other.keys()
    assert all(torch.equal(mine[name], other[name]) for name in other)
    results = [run.summary["stages"]["sft"] for run in (ended, overfit)]
    assert all(results[0][name] == results[1][name] for name in ("selected", "heldout_loss_before", "train_loss"))
    assert results[0]["saves"] == 2
    assert not checkpoints.exists(), "a stage that is done needs none"


def test_a_worker_that_hangs_shows_its_stack_and_the_stage_goes_on(
    finished: FinishedRun, noise: Path, tmp_path: Path
) -> None:
    arguments = sft_of_noise(finished, noise, "hung", f"run.output={tmp_path}", "sft.epochs=4", "sft.log_every=1")
    arguments += ["checkpoint.training_every=4", "cluster.call_timeout_s=15"]
    folder = tmp_path / "hung"
    with started(["sft", *arguments], tmp_path / "printed") as run:
        wait_until((folder / "checkpoints" / "training" / "sft" / "step-000004").exists, run)
        os.kill(writer_of(folder / "logs" / "sft-0.log"), signal.SIGSTOP)
        wait_until(lambda: [r["event"] for r in recoveries(folder)] == ["lost", "replaced"], run)
        assert run.wait(200) == 0, (tmp_path / "printed").read_text()
    assert "worker 0 is in File" in recoveries(folder)[0]["cause"]
    steps = [r["step"] for r in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if "loss" in r]
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) > 4


def test_the_epoch_whose_responses_the_reward_model_likes_best_is_saved(finished: FinishedRun, noise: Path) -> None:
    judge = finished.artifact("reward") / "model"
    run = run_sft(finished, noise, "liked", "sft.epochs=8", f"sft.select={{by: reward, reward_model: {judge}}}")
    epochs = [r for r in run.metrics("sft") if "reward" in r]
    rewards = [r["reward"] for r in epochs]
    assert len(rewards) == 8
    assert len(set(rewards)) >= 5  # two epochs may answer alike, word for word
    best = epochs[int(np.argmax(rewards))]
    assert run.summary["stages"]["sft"]["selected"] == {k: best[k] for k in ("step", "heldout_loss", "reward")}
    assert f"reward {best['reward']:.4g}" in run.stdout
    saved = AutoModelForCausalLM.from_pretrained(run.artifact("sft") / "model")
    classifier = AutoModelForSequenceClassification.from_pretrained(judge)
    examples = held_out(finished, noise)
    expected = plain_reward(saved, classifier, examples, saved.config.eos_token_id)
    assert max(rewards) == pytest.approx(expected, abs=1e-3)
    assert best["heldout_loss"] == pytest.approx(plain_loss(saved, examples), rel=1e-5)


# ---- dropout


def examples_of(count: int) -> list[LMExample]:
    rng = np.random.default_rng(0)
    return [LMExample(rng.integers(2, 64, 12).astype(np.int32), 4, "") for _ in range(count)]


def dropping_model() -> Any:
    from rayrlhf.models.build import from_scratch

    spec = FromScratch(architecture="gpt2", vocab_size=300, hidden_size=32, layers=2, heads=2, context=64)
    model = from_scratch(spec, 64, 0, 1, seed=3)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    return model


def train_without_moving(rank: int, world: int, port: int, folder: str) -> None:
    """Four epochs at a learning rate of 0: what differs from one to the next is dropout and nothing else."""
    from rayrlhf.engines.deepspeed import Learner, LearnerSettings
    from rayrlhf.engines.distributed import Rendezvous, join_process_group
    from rayrlhf.engines.tasks import LanguageTask
    from rayrlhf.stages.selection import ResponseLimits, greedy_responses
    from rayrlhf.supervised.loop import TrainSettings, train

    join_process_group(Rendezvous(rank, world, "127.0.0.1", port, "cpu", 1, deterministic=True))
    model = dropping_model()
    learner = Learner(
        model, LearnerSettings(0, "float32", "cpu", 1e-3, (0.9, 0.95), 1e-8, 0.0, 1.0, 1e4, "failed", "sft")
    )
    task, found = LanguageTask(examples_of(4)), dict[str, list[Any]](training=[], heldout=[], responses=[])

    def judge(step: int, steps: int) -> None:
        found["heldout"].append(task.evaluate(learner, Cutting(4096)))
        prompts = [e.tokens[:4] for e in task.examples]
        responses = greedy_responses(model.lm, prompts, ResponseLimits(8, 0, 1), 4096, learner.device)
        found["responses"].append([r.tolist() for r in responses])

    settings = TrainSettings(0.0, 4, 4.0, 0.0, 0.1, Cutting(4096), 1, 0)
    train(learner, task, settings, lambda r: found["training"].append(r["loss"]), after_epoch=judge)
    (Path(folder) / "found.json").write_text(json.dumps(found), encoding="utf-8")
    torch.distributed.destroy_process_group()  # else its threads may outlive the interpreter, which then aborts


def test_dropout_is_off_while_an_epoch_is_judged_and_on_again_when_training_resumes(tmp_path: Path) -> None:
    run_ranks(train_without_moving, 1, tmp_path, PATIENCE_S)
    found = json.loads((tmp_path / "found.json").read_text())
    expected = plain_loss(dropping_model().lm, examples_of(4))
    assert found["heldout"] == pytest.approx([expected] * 4, rel=1e-6)
    assert all(responses == found["responses"][0] for responses in found["responses"])
    assert len(set(found["training"])) == 4, "each epoch drops other units"
    assert min(abs(loss - expected) for loss in found["training"]) > 1e-4
