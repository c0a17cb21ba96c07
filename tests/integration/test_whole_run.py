"""The main job, through the command line, with real Ray, vLLM and DeepSpeed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from tests.integration.conftest import COMMAND, ROOT, SECRETS, FinishedRun, rayrlhf

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]


def test_all_stages_run_and_leave_what_the_design_promises(finished: FinishedRun) -> None:
    names = {p.name for p in finished.folder.iterdir()}
    assert {
        "config.yaml",
        "metrics.jsonl",
        "samples.jsonl",
        "trace.json",
        "summary.json",
        "report.html",
        "logs",
        "model",
    } <= names
    assert list(finished.summary["stages"]) == ["pretrain", "sft", "reward", "ppo"]
    assert (
        finished.summary["stages"]["pretrain"]["heldout_loss"]
        < finished.summary["stages"]["pretrain"]["heldout_loss_before"]
    )
    logs = {p.name for p in (finished.folder / "logs").iterdir()}
    assert {"policy-0.log", "reference-0.log", "reward-0.log", "value-0.log", "rollout-0.log", "sft-0.log"} <= logs


def test_no_secret_of_the_environment_is_in_anything_that_a_run_leaves(finished: FinishedRun) -> None:
    files = [path for path in finished.output.rglob("*") if path.is_file()]
    assert {"config.yaml", "report.html", "policy-0.log", "artifact.json", "manifest.json"} <= {p.name for p in files}
    for path in files:
        text = path.read_bytes()
        assert not [name for name, value in SECRETS.items() if value.encode() in text], path
    assert not [name for name, value in SECRETS.items() if value in finished.stdout]


def test_every_artifact_names_its_parents(finished: FinishedRun) -> None:
    stages = finished.summary["stages"]
    for stage, parents in {"sft": ["pretrain"], "reward": ["sft"], "ppo": ["sft", "reward"]}.items():
        record = json.loads(
            (finished.output / "artifacts" / f"{stage}-{stages[stage]['key']}" / "artifact.json").read_text()
        )
        assert record["parents"] == {parent: stages[parent]["key"] for parent in parents}


def test_each_step_reports_the_metrics_of_the_design(finished: FinishedRun) -> None:
    steps = finished.metrics("ppo")
    assert [s["step"] for s in steps] == list(range(1, 51))
    assert [s["weights/version"] for s in steps] == list(range(1, 51))
    promised = {
        *("reward/mean", "kl/mean", "kl/coef", "policy/loss", "policy/clip_fraction", "policy/ratio_mean"),
        *("policy/grad_norm", "value/loss", "value/explained_variance", "response/length_mean", "rollout/logprob_gap"),
        *(f"time/{p}_s" for p in ("generate", "score", "estimate", "update", "publish", "save", "other")),
        *("throughput/rollout_tokens_per_s", "throughput/train_tokens_per_s", "weights/publish_s", "weights/gib_per_s"),
        *(f"memory/{role}_gib" for role in ("policy", "reference", "reward", "value", "rollout", "driver")),
    }
    assert promised <= set(steps[0])
    assert steps[0]["kl/mean"] == 0.0, "policy and reference start as the same model"
    assert max(s["rollout/logprob_gap_max"] for s in steps) < 1e-4, "engine and trainer agree on every sampled token"
    assert all(s["weights/quarantined"] == 0 for s in steps)


def test_time_outside_the_phases_is_below_five_percent(finished: FinishedRun) -> None:
    shares = [s["time/other_s"] / s["time/step_s"] for s in finished.metrics("ppo")]
    assert np.median(shares) < 0.05


def test_no_phase_after_the_first_step_loads_a_model_or_starts_a_process(finished: FinishedRun) -> None:
    """Either takes five seconds or more here; a phase of this run takes a tenth of one."""
    phases = [f"time/{p}_s" for p in ("generate", "score", "estimate", "update", "publish", "save", "other")]
    slowest = max((step[phase], phase, step["step"]) for step in finished.metrics("ppo")[1:] for phase in phases)
    assert slowest[0] < 3.0, slowest


def test_driver_memory_does_not_grow_with_steps(finished: FinishedRun) -> None:
    memory = [s["memory/driver_gib"] * 1024 for s in finished.metrics("ppo")]
    assert memory[-1] - memory[9] < 4.0, "MiB gained between step 10 and step 50"


def test_samples_hold_text_and_scores_of_each_step(finished: FinishedRun) -> None:
    samples = [json.loads(line) for line in (finished.folder / "samples.jsonl").read_text().splitlines()]
    assert [s["version"] for s in samples] == [step for step in range(50) for _ in range(4)]
    assert all(s["prompt"].startswith("<|user|>\n") and s["response"] for s in samples)
    assert all(np.isfinite(s["reward"]) for s in samples)


def test_the_policy_loads_with_transformers_and_has_learned(finished: FinishedRun) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    policy = AutoModelForCausalLM.from_pretrained(finished.folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(finished.folder / "model")
    assert len(tokenizer) == policy.config.vocab_size
    sft = AutoModelForCausalLM.from_pretrained(finished.artifact("sft") / "model")
    moved = sum(float((a - b).abs().sum()) for a, b in zip(policy.parameters(), sft.parameters(), strict=True))
    assert moved > 0


def test_demonstrations_average_zero_under_the_reward_model(finished: FinishedRun) -> None:
    from rayrlhf.data.chat import load_tokenizer
    from rayrlhf.data.prompts import tokenize_demonstrations
    from rayrlhf.data.readers import read_demonstrations
    from rayrlhf.data.split import split_by_prompt
    from rayrlhf.models.build import load_scalar

    folder = finished.artifact("reward") / "model"
    model = load_scalar(str(folder), False)
    train, _ = split_by_prompt(
        read_demonstrations(["demonstrations.jsonl"], finished.output / "worlds/instructions-0-0.2"), 0.05, 0
    )
    examples, _ = tokenize_demonstrations(load_tokenizer(folder), train, 48, 96, "drop")
    with torch.no_grad():
        scores = [
            float(model(torch.from_numpy(e.tokens).long()[None], torch.tensor([len(e.tokens) - 1]))) for e in examples
        ]
    assert abs(np.mean(scores)) < 1e-4
    assert np.std(scores) > 1e-3


def test_checkpoints_are_whole_and_only_the_newest_are_kept(finished: FinishedRun) -> None:
    kept = sorted(p.name for p in (finished.folder / "checkpoints").iterdir())
    assert kept == ["step-000025", "step-000050"]
    assert (finished.folder / "checkpoints/step-000050/model/model.safetensors").exists()


def test_a_second_run_finds_everything_done_and_starts_no_actor(finished: FinishedRun) -> None:
    again = rayrlhf("run", *finished.arguments[:1], "run.name=again", *finished.arguments[2:])
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("done before with the same inputs") == 4
    assert not (finished.output / "again" / "logs").exists()
    first, second = (
        (finished.folder / "metrics.jsonl").read_text(),
        (finished.output / "again" / "metrics.jsonl").read_text(),
    )
    assert second == first


def test_wandb_without_a_login_writes_offline_and_says_so(finished: FinishedRun) -> None:
    assert "wandb: no login found, writing offline" in finished.stdout
    assert list((finished.folder / "wandb").glob("offline-run-*/*.wandb"))


def test_nothing_is_left_behind(finished: FinishedRun) -> None:
    assert finished.shared_memory_left == set()
    names = [" ".join(p.info["cmdline"] or []) for p in psutil.process_iter(["cmdline"])]
    assert not [n for n in names if "ray::" in n and "rayrlhf-tiny" in n]


def output_within_ten_seconds(process: subprocess.Popen[str]) -> str:
    """What a run printed that was told to end; one that does not is killed, or it would slow down every later test."""
    try:
        return process.communicate(timeout=10)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise


def started(command: str, arguments: list[str], folder: Path, seconds: float) -> subprocess.Popen[str]:
    """A run in a process group of its own, after its first record."""
    start = time.monotonic()
    process = subprocess.Popen(
        [*COMMAND, command, *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "WANDB_API_KEY": ""},
        start_new_session=True,
        # Whoever runs the tests in the background of a script has Ctrl-C ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    metrics = folder / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n")):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() - start < seconds, f"no record within {seconds:g} s"
        time.sleep(0.2)
    return process


def test_ctrl_c_in_a_supervised_stage_ends_everything_within_ten_seconds(finished: FinishedRun) -> None:
    arguments = [*finished.arguments[:1], "run.name=cut", *finished.arguments[2:]]
    process = started("sft", [*arguments, "sft.epochs=500"], finished.output / "cut", seconds=90)
    family = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGINT)
    output = output_within_ten_seconds(process)
    assert process.returncode == 130, output
    assert "Traceback" not in output
    assert not psutil.wait_procs(family, timeout=1)[1], "no actor outlives the run"
    assert not list((finished.output / "artifacts").glob(".sft-*")), "the broken attempt is cleared away"


def test_the_first_ppo_step_comes_within_ninety_seconds_and_ctrl_c_ends_everything_within_ten(
    finished: FinishedRun,
) -> None:
    """Warm caches: sft and reward are done, two policy ranks under ZeRO-3 and two engines start."""
    arguments = [*finished.arguments[:1], "run.name=stopped", *finished.arguments[2:]]
    arguments += ["ppo.steps=500", "ppo.zero_stage=3", "cluster.policy.ranks=2", "rollout.engines=2"]
    process = started("ppo", arguments, finished.output / "stopped", seconds=90)
    family = psutil.Process(process.pid).children(recursive=True)
    assert len([p for p in family if "ray::" in " ".join(p.cmdline())]) >= 7
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to every process of the foreground group
    stopped = time.monotonic()
    output = output_within_ten_seconds(process)
    assert time.monotonic() - stopped < 10
    assert process.returncode == 130, output
    assert "interrupted" in output
    assert "Traceback" not in output
    assert not psutil.wait_procs(family, timeout=1)[1], "no actor outlives the run"
    assert not list(Path("/dev/shm").glob("rayrlhf-stopped-*"))
