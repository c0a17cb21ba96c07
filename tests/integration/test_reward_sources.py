"""PPO whose rewards come from a user's function or service, on real actors: what cannot be scored is not trained on."""

from __future__ import annotations

import json
import re
import threading
from pathlib import Path
from typing import Any

import pytest

from rayrlhf.config import load_config
from rayrlhf.stages.datasets import Datasets
from rayrlhf.stages.world import with_world
from tests.integration.conftest import FinishedRun, rayrlhf
from tests.unit.rewards.rewards_fakes import Handler, Service, says

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

# For about a fourth of the prompts, always the same, there is no reward; each of three ways comes about.
FUNCTION = """
import zlib

def kind(prompt):
    return zlib.crc32(prompt.encode()) % 12

def reward(prompts, responses, finished):
    if any(kind(prompt) == 2 for prompt in prompts):
        raise ValueError("the oracle sleeps")
    known = {0: None, 1: float("nan")}
    return [known.get(kind(prompt), end - 0.02 * len(text)) for prompt, text, end in zip(prompts, responses, finished)]
"""
TOKEN = "hunter2-rewards"
REASONS = {
    0: "function: the reward is missing",
    1: "function: the reward is NaN",
    2: "function: ValueError: the oracle sleeps after 2 tries",
}


def test_responses_that_a_function_cannot_score_are_quarantined_and_replaced(
    finished: FinishedRun, tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text(FUNCTION, encoding="utf-8")
    source = f"{{kind: function, function: '{tmp_path / 'mine.py'}:reward', batch: 1, retries: 1, backoff_s: 0.001}}"
    check(*ppo(finished, tmp_path, source), REASONS)


def test_a_service_that_fails_at_first_and_cannot_score_all_is_asked_again_and_what_it_cannot_score_replaced(
    finished: FinishedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other two ways are a function's; the token goes from this environment to the actor, and into no file."""
    service = Service()
    service.script = [says("no", 503), says("<html>"), scores]
    threading.Thread(target=service.serve_forever, daemon=True).start()
    monkeypatch.setenv("MY_TOKEN", TOKEN)
    source = f"{{kind: http, url: '{service.url}', token_variable: MY_TOKEN, batch: 1, retries: 2, backoff_s: 0.001}}"
    try:
        run, prompts = ppo(finished, tmp_path, source)
    finally:
        service.shutdown()
        service.server_close()
    check(run, prompts, {0: "http: the reward is missing", 1: "http: the reward is NaN"})
    assert set(service.authorization) == {f"Bearer {TOKEN}"}
    assert len(service.bodies) == 2 + sum(len(step) for step in accounted(run))
    assert not [file for file in run.rglob("*") if file.is_file() and TOKEN.encode() in file.read_bytes()]


def scores(handler: Handler) -> None:
    function: dict[str, Any] = {}
    exec(FUNCTION, function)
    rewards = []
    for sample in json.loads(handler.asked)["samples"]:
        worth = sample["finished"] - 0.02 * len(sample["response"])
        rewards.append({0: None, 1: float("nan")}.get(function["kind"](sample["prompt"]), worth))
    handler.answer(json.dumps({"rewards": rewards}).encode())


def ppo(finished: FinishedRun, folder: Path, source: str) -> tuple[Path, dict[int, str]]:
    """Three steps with these rewards: the run, and its prompts by id."""
    sft = finished.artifact("sft") / "model"
    arguments = [
        f"run.output={folder / 'runs'}",
        f"model={{path: {sft}}}",
        f"sft.path={sft}",
        "ppo.steps=3",
        "ppo.batch_size=16",
        "ppo.minibatch_size=8",
        "ppo.max_failed_share=1.0",
        "rollout.max_tokens=12",
        f"ppo.reward={source}",
    ]
    done = rayrlhf("ppo", "configs/tiny.yaml", *arguments, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    config = with_world(load_config("configs/tiny.yaml", arguments, {}))
    return folder / "runs" / "tiny", Datasets(config, str(sft)).prompts.texts


def accounted(run: Path) -> tuple[list[Any], list[Any]]:
    """Trained and quarantined, as the ledger has it."""
    ledger = [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]
    trained, out = ([entry for line in ledger for entry in line.get(name, [])] for name in ("trained", "quarantined"))
    return trained, out


def check(run: Path, prompts: dict[int, str], reasons: dict[int, str]) -> None:
    """What has no reward is quarantined with its reason, and the rest is trained with the right one."""
    trained, out = accounted(run)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert sum(record["rollout/quarantined"] for record in records) == len(out) > 0
    assert len(trained) == 3 * 16  # every step learned from a whole batch
    function: dict[str, Any] = {}
    exec(FUNCTION, function)
    kinds = {prompt: function["kind"](text) for prompt, text in prompts.items()}
    assert {kinds[prompt] for _, _, prompt, _ in trained}.isdisjoint(reasons)
    assert [reason for *_, reason in out] == [reasons[kinds[prompt]] for _, _, prompt, *_ in out]
    audit = rayrlhf("audit", str(run))
    assert audit.returncode == 0, audit.stdout + audit.stderr
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert [sample["reward"] for sample in samples] == pytest.approx([worth(sample) for sample in samples], abs=1e-6)


def worth(sample: dict[str, Any]) -> float:
    text = re.sub(r"<\|[a-z]+\|>", "", sample["response"])
    return (not sample["truncated"]) - 0.02 * len(text)
