"""PPO whose rewards come from a user's function, on real actors: what it cannot score is not trained on."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from rayrlhf.config import load_config
from rayrlhf.stages.datasets import Datasets
from rayrlhf.stages.world import with_world
from tests.integration.conftest import FinishedRun, rayrlhf

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
REASONS = {
    0: "function: the reward is missing",
    1: "function: the reward is NaN",
    2: "function: ValueError: the oracle sleeps after 2 tries",
}


def test_responses_that_a_function_cannot_score_are_quarantined_and_replaced(
    finished: FinishedRun, tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text(FUNCTION, encoding="utf-8")
    sft, place = finished.artifact("sft") / "model", f"{tmp_path / 'mine.py'}:reward"
    arguments = [
        f"run.output={tmp_path / 'runs'}",
        f"model={{path: {sft}}}",
        f"sft.path={sft}",
        "ppo.steps=3",
        "ppo.batch_size=16",
        "ppo.minibatch_size=8",
        "ppo.max_failed_share=1.0",
        "rollout.max_tokens=12",
        f"ppo.reward={{kind: function, function: '{place}', batch: 1, retries: 1, backoff_s: 0.001}}",
    ]
    done = rayrlhf("ppo", "configs/tiny.yaml", *arguments, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "runs" / "tiny"
    ledger = [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]
    trained = [entry for line in ledger for entry in line.get("trained", [])]
    out = [entry for line in ledger for entry in line.get("quarantined", [])]
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert sum(record["rollout/quarantined"] for record in records) == len(out) > 0
    assert len(trained) == 3 * 16  # every step learned from a whole batch
    prompts = Datasets(with_world(load_config("configs/tiny.yaml", arguments, {})), str(sft)).prompts.texts
    function: dict[str, Any] = {}
    exec(FUNCTION, function)
    kinds = {prompt: function["kind"](text) for prompt, text in prompts.items()}
    assert {kinds[prompt] for _, _, prompt, _ in trained}.isdisjoint(REASONS)
    assert [reason for *_, reason in out] == [REASONS[kinds[prompt]] for _, _, prompt, *_ in out]
    audit = rayrlhf("audit", str(run))
    assert audit.returncode == 0, audit.stdout + audit.stderr
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert [sample["reward"] for sample in samples] == pytest.approx([worth(sample) for sample in samples], abs=1e-6)


def worth(sample: dict[str, Any]) -> float:
    text = re.sub(r"<\|[a-z]+\|>", "", sample["response"])
    return (not sample["truncated"]) - 0.02 * len(text)
