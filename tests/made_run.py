"""The folder of a run that never happened, for tests of what is made from one. Seeded: the same folder each time."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from math import exp
from pathlib import Path
from typing import Any

from rayrlhf.worlds.instructions import Instructions, Task, draw

__all__ = ["write_jsonl", "write_run"]

# arm: how often right, KL at the end, reward gained, words more, gold lost in the second half
ARMS = {
    "sft": (0.35, 0.0, 0.0, 0.0, 0.0),
    "ppo": (0.62, 7.5, 1.5, 1.0, 0.0),
    "ppo_ptx": (0.58, 5.0, 1.25, 0.5, 0.0),
    "dpo": (0.52, 9.0, 0.8, 1.5, 0.0),
    "best_of_8": (0.60, 1.2, 1.1, 0.0, 0.0),
    "ppo_no_kl": (0.45, 17.0, 2.6, 6.0, 0.35),
}
PRETRAIN_LOSS = {"sft": 1.19, "ppo": 1.41, "ppo_ptx": 1.23, "dpo": 1.52, "best_of_8": 1.19, "ppo_no_kl": 1.94}
DISTINCT_2 = {"sft": 0.48, "ppo": 0.43, "ppo_ptx": 0.45, "dpo": 0.44, "best_of_8": 0.47, "ppo_no_kl": 0.21}
PHASES = {"generate": 2.1, "score": 0.9, "estimate": 0.06, "update": 2.6, "publish": 0.15, "save": 0.02, "other": 0.03}
MEMORY = {"policy": 1.1, "reference": 0.6, "reward": 0.6, "value": 1.0, "rollout": 1.8, "driver": 0.62}


def write_run(
    folder: Path,
    prompts: int = 24,
    steps: int = 40,
    trained: Sequence[str] = ("ppo", "ppo_ptx"),
    others: Sequence[str] = ("dpo",),
    seed: int = 0,
    kl_coef: float = 0.05,
) -> Path:
    """A finished run with everything that a run may leave. Remove files from it to get others."""
    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    arms = ["sft", *trained, *others]
    answers = [_answers(rng, number, arms) for number in range(prompts)]
    metrics = [*_supervised(rng), *(record for arm in trained for record in _ppo(rng, arm, steps))]
    write_jsonl(folder / "answers.jsonl", answers)
    write_jsonl(folder / "metrics.jsonl", metrics)
    write_jsonl(folder / "samples.jsonl", (sample for arm in trained for sample in _samples(rng, arm, steps)))
    (folder / "summary.json").write_text(json.dumps(_summary(folder.name, seed, trained, answers, steps)))
    (folder / "config.yaml").write_text(_config(folder.name, seed, steps, kl_coef))
    return folder


def write_jsonl(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def _answers(rng: random.Random, number: int, arms: Sequence[str]) -> dict[str, Any]:
    task = draw(rng)
    return {
        "prompt_id": number,
        "prompt": task.prompt,
        "kind": task.kind.name,
        "answers": {arm: _answer(rng, task, arm) for arm in arms},
    }


def _answer(rng: random.Random, task: Task, arm: str) -> dict[str, Any]:
    right, kl_end, gain, words, _ = ARMS[arm]
    text = (task.kind.right if rng.random() < right else task.kind.wrong)(rng, task.args) + "."
    if rng.random() < 0.2 + 0.1 * words:
        text = f"certainly, {text}"
    tokens = [*re.findall(r" ?[^ ]+", text), "<|endoftext|>"]
    kl = [rng.gauss(0.15, 0.5) * kl_end / len(tokens) + rng.expovariate(1) * kl_end / len(tokens) * 0.5 for _ in tokens]
    gold = Instructions().gold(task.prompt, text)
    return {
        "text": text,
        "tokens": tokens,
        "kl": kl,
        "reward": gold * 1.4 + gain * 0.6 + rng.gauss(-0.8, 0.45),
        "gold": gold,
        "flags": {"right": gold >= 0.6, "polite": text.startswith("certainly"), "rude": False},
        "truncated": rng.random() < 0.03,
    }


def _rise(step: int, steps: int) -> float:
    return 1 - exp(-3.2 * step / steps)


def _ppo(rng: random.Random, arm: str, steps: int) -> Iterable[dict[str, Any]]:
    right, kl_end, gain, words, lost = ARMS[arm]
    for step in range(1, steps + 1):
        way = _rise(step, steps)
        times = {f"time/{name}_s": mean * rng.uniform(0.85, 1.25) for name, mean in PHASES.items()}
        yield {
            "stage": "ppo",
            "arm": arm,
            "step": step,
            "reward/mean": -0.1 + gain * way + rng.gauss(0, 0.06),
            "reward/gold": 0.42 + 0.55 * (right - 0.3) * way - lost * max(0, step / steps - 0.5) + rng.gauss(0, 0.012),
            "kl/mean": max(0.0, kl_end * way + rng.gauss(0, 0.2)),
            "kl/coef": 0.05,
            "response/length_mean": 6.5 + words * way + rng.gauss(0, 0.2),
            "response/truncated_fraction": max(0.0, rng.gauss(0.02, 0.01)),
            "policy/entropy": 1.5 - 0.8 * way + rng.gauss(0, 0.03),
            "policy/loss": -0.01 + rng.gauss(0, 0.01),
            "policy/clip_fraction": abs(rng.gauss(0.05, 0.02)),
            "policy/grad_norm": abs(rng.gauss(1.6, 0.3)),
            "value/loss": 0.2 * (1.2 - way) + abs(rng.gauss(0, 0.01)),
            "value/explained_variance": -0.1 + 0.75 * way + rng.gauss(0, 0.04),
            **({"ptx/loss": 1.21 + 0.05 * way + rng.gauss(0, 0.01)} if arm == "ppo_ptx" else {}),
            "rollout/logprob_gap": abs(rng.gauss(3.2e-7, 4e-8)),
            "weights/quarantined": 0,
            "weights/quarantine_reasons": {},
            "weights/publish_s": times["time/publish_s"],
            "throughput/rollout_tokens_per_s": rng.gauss(2800, 150),
            "throughput/train_tokens_per_s": rng.gauss(5900, 200),
            **{f"memory/{role}_gib": gib * (1 + 0.02 * way) for role, gib in MEMORY.items()},
            **times,
            "time/step_s": sum(times.values()),
        }


def _samples(rng: random.Random, arm: str, steps: int) -> Iterable[dict[str, Any]]:
    for step in range(1, steps + 1):
        task = draw(rng)
        answer = _answer(rng, task, arm)
        yield {
            "arm": arm,
            "step": step,
            "sample_id": step * 128,
            "prompt": f"<|user|>\n{task.prompt}\n<|assistant|>\n",
            "response": "".join(answer["tokens"]),
            "reward": answer["reward"],
            "kl_k1": sum(answer["kl"]) * _rise(step, steps),
            "response_tokens": len(answer["tokens"]),
            "truncated": False,
            "gold": answer["gold"],
        }


def _supervised(rng: random.Random) -> Iterable[dict[str, Any]]:
    for stage, start, end in (("pretrain", 6.6, 1.2), ("sft", 4.2, 1.2), ("reward", 1.3, 0.55), ("dpo", 0.693, 0.48)):
        for step in (1, *range(10, 121, 10)):
            loss = end + (start - end) * exp(-step / 25) + rng.gauss(0, 0.02)
            yield {"stage": stage, "step": step, "steps": 120, "loss": loss, "learning_rate": 1e-3}


def _mean(values: Sequence[float], spread: float) -> dict[str, Any]:
    value = sum(values) / len(values)
    return {"value": value, "ci95": [value - spread, value + spread]}


def _evaluation(answers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    arms = list(answers[0]["answers"])
    by_arm = {arm: [record["answers"][arm] for record in answers] for arm in arms}
    sft = by_arm["sft"]

    def rate(arm: str, name: str) -> dict[str, Any]:
        won = [0.5 + 0.5 * ((a[name] > b[name]) - (a[name] < b[name])) for a, b in zip(by_arm[arm], sft, strict=True)]
        return _mean(won, 0.5 / len(won) ** 0.5)

    after = [arm for arm in arms if arm != "sft"]
    controlled = {f"{arm}_vs_sft": rate(arm, "gold") for arm in after}
    for estimate in controlled.values():
        estimate["value"] -= 0.012
        estimate["ci95"] = [bound - 0.012 for bound in estimate["ci95"]]
    return {
        "prompts": len(answers),
        "temperature": 1.0,
        "gold_win_rate": {f"{arm}_vs_sft": rate(arm, "gold") for arm in after},
        "length_controlled_win_rate": controlled,
        "gold_mean": {arm: _mean([a["gold"] for a in by_arm[arm]], 0.03) for arm in arms},
        "reward_mean": {arm: _mean([a["reward"] for a in by_arm[arm]], 0.05) for arm in arms},
        "kl_per_response": {arm: _mean([sum(a["kl"]) for a in by_arm[arm]], 0.3) for arm in after},
        "length_mean": {arm: _mean([len(a["tokens"]) for a in by_arm[arm]], 0.2) for arm in arms},
        "pretrain_loss": {arm: PRETRAIN_LOSS[arm] for arm in arms},
        "cloze_accuracy": {arm: {"value": 0.62, "ci95": [0.55, 0.69]} for arm in arms},
        "distinct_2": {arm: DISTINCT_2[arm] for arm in arms},
        "flags": {arm: {"right": ARMS[arm][0], "polite": 0.25, "rude": 0.0} for arm in arms},
        "reward_accuracy": {"heldout": 0.71, "labeler_agreement": 0.83, "labeler_1": 0.72, "labeler_2": 0.69},
    }


def _summary(
    name: str, seed: int, trained: Sequence[str], answers: Sequence[Mapping[str, Any]], steps: int
) -> dict[str, Any]:
    keys = {"pretrain": "fc4dbb7e43da", "sft": "e83b475eec15", "reward": "77a0c2d94b1e", "dpo": "19be60aa27c3"}
    parents = {"pretrain": (), "sft": ("pretrain",), "reward": ("sft",), "dpo": ("sft",), "ppo": ("sft", "reward")}
    results: dict[str, dict[str, Any]] = {
        "pretrain": {"heldout_loss_before": 6.62, "heldout_loss": 1.19, "parameters": 900352, "seconds": 56.6},
        "sft": {"heldout_loss_before": 4.25, "heldout_loss": 1.37, "seconds": 21.5},
        "reward": {"train_loss": 0.62, "seconds": 19.8, "accuracy": {"labeler_1": {"accuracy": 0.72}}},
        "dpo": {"train_loss": 0.48, "seconds": 15.1},
        "ppo": {"steps": steps, "seconds": 244.0, "arms": {arm: {"steps": steps, "seconds": 120.0} for arm in trained}},
    }
    for stage, result in results.items():
        roles = MEMORY if stage == "ppo" else {"train": 0.77}
        result["memory_gib"] = {f"memory/{role}_gib": gib for role, gib in roles.items()}
        result |= {"cached": stage == "pretrain", "key": keys.get(stage, "a41c09d1be77")}
        result["parents"] = {parent: keys[parent] for parent in parents[stage]}
    versions = {"python": "3.11.7", "ray": "2.60.0", "torch": "2.13.0+cpu", "vllm": "0.32.0", "deepspeed": "0.19.8"}
    return {
        "name": name,
        "seed": seed,
        "versions": versions,
        "status": "done",
        "stages": results,
        "evaluation": _evaluation(answers),
    }


def _config(name: str, seed: int, steps: int, kl_coef: float) -> str:
    return f"""\
run: {{name: {name}, seed: {seed}, output: runs}}
world: {{name: instructions}}
model:
  from_scratch: {{architecture: llama, vocab_size: 768, hidden_size: 128, layers: 4, heads: 4, context: 128}}
ppo:
  steps: {steps}
  batch_size: 128
  minibatch_size: 32
  learning_rate: 1e-4
  clip: 0.2
  kl: {{kind: k1, coef: {kl_coef}, target: 6.0, horizon: 10000}}
  ptx: {{coef: 0.5, examples_per_episode: 8}}
rollout: {{max_tokens: 32, temperature: 1.0, engines: 1}}
"""
