"""Seconds of one PPO step of the product, beside one process with batched `generate` and PyTorch.

    python benchmarks/ppo_step.py [--sizes 4M,30M] [--json]

Product: the stage `ppo` as `rayrlhf run` runs it, on real actors, engines and learners; its seconds are those of its
own records. Plain: `plain_ppo.py`, the way TRL's PPOTrainer works. Both have the same models, prompts, lengths,
minibatches, float32, and all of the machine's cores; log-normal lengths are given in advance, with a quarter of the
longest as mean. The sides take turns, a step each: the plain loop runs when the product has written a step's record,
and before it begins the next. The first step of each warms up.

Micro-batches of the plain loop have --rows sequences in order of arrival.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import typer
from common import machine, paired_ratio, print_result, print_table
from lengths import actor_with_lengths, given_lengths
from plain_ppo import Work, hush, serve
from rich.console import Console

from rayrlhf.config import Config, load_config
from rayrlhf.config.model import FromScratch
from rayrlhf.data.chat import encode_prompt
from rayrlhf.data.tokenizer import train_tokenizer
from rayrlhf.metrics.clock import PHASES
from rayrlhf.models.build import from_scratch, new_scalar
from rayrlhf.stages import roles
from rayrlhf.stages.context import StageContext
from rayrlhf.stages.datasets import Datasets
from rayrlhf.stages.ppo import run_ppo_stage

PAIRS, BATCH, LONGEST, PROMPT, VOCABULARY = 7, 64, 256, 32, 2048
# Of 4, 8 and 16 the fastest of the plain loop.
ROWS = 8
SHAPES = {
    "tiny": FromScratch(hidden_size=32, layers=1, heads=1, context=LONGEST + 2 * PROMPT),
    "4M": FromScratch(hidden_size=256, layers=4, heads=4, context=LONGEST + 2 * PROMPT),
    "30M": FromScratch(hidden_size=512, layers=9, heads=8, context=LONGEST + 2 * PROMPT),
}


def main(
    overrides: Annotated[list[str] | None, typer.Argument(help="Further keys of the product's config.")] = None,
    sizes: str = "4M,30M",
    pairs: int = PAIRS,
    batch: int = BATCH,
    longest: int = LONGEST,
    rows: Annotated[int, typer.Option(help="Sequences in a micro-batch of the plain loop.")] = ROWS,
    as_json: Annotated[bool, typer.Option("--json", help="The last line alone.")] = False,
) -> None:
    hush()
    results = []
    for size in sizes.split(","):
        results.append(_measure(size, pairs, batch, longest, rows, overrides or []))
        if not as_json:
            print_table(_title(results[-1]), _table(results[-1]))
    print_result({**machine("cpu"), "pairs": pairs, "rows": results})


def _measure(size: str, pairs: int, batch: int, longest: int, rows: int, overrides: Sequence[str]) -> dict[str, Any]:
    lengths = given_lengths("log-normal", batch, longest)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parameters = _make_inputs(folder, SHAPES[size], batch)
        config = _config(folder, pairs + 1, batch, longest, overrides)
        data = Datasets(config, config.sft.path)
        prompts = [prompt.tokens for prompt in data.prompts.tokens]
        threads = os.cpu_count() or 1
        turns = _Turns(Work(config.sft.path, config.reward.path, prompts, lengths, config.ppo, rows, threads))
        try:
            _run_stage(config, data, turns, folder)
        finally:
            turns.stop()
    return {
        "size": size,
        "parameters": parameters,
        "responses": batch,
        "prompt_tokens": sum(map(len, prompts)),
        "response_tokens": sum(lengths),
        **turns.result(),
    }


def _make_inputs(folder: Path, shape: FromScratch, prompts: int) -> int:
    """An SFT model with its tokenizer, a reward model, and prompts.jsonl; the parameters of the first."""
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz"), rng.integers(2, 8))) for _ in range(4000)]
    tokenizer = train_tokenizer([" ".join(words)], VOCABULARY)
    policy = from_scratch(shape, len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id, seed=0).lm
    policy.save_pretrained(folder / "sft")
    tokenizer.save_pretrained(folder / "sft")
    new_scalar(str(folder / "sft"), trust_remote_code=False, seed=1).classifier.save_pretrained(folder / "reward")
    with open(folder / "prompts.jsonl", "w", encoding="utf-8") as file:
        for tokens in rng.integers(PROMPT * 3 // 4, PROMPT * 5 // 4 + 1, prompts).tolist():
            text = str(rng.choice(words))
            while len(encode_prompt(tokenizer, (("user", text),))) < tokens:
                text += f" {rng.choice(words)}"
            file.write(json.dumps({"prompt": text}) + "\n")
    return sum(p.numel() for p in policy.parameters())


def _config(folder: Path, steps: int, batch: int, longest: int, overrides: Sequence[str]) -> Config:
    """The paper's step, a quarter of the batch to each optimizer step; every key that is not here has its default."""
    keys = {
        "run": {"name": "bench", "output": str(folder), "stages": ["ppo"]},
        "model": {"path": str(folder / "sft")},
        "sft": {"path": str(folder / "sft")},
        "reward": {"path": str(folder / "reward")},
        "data": {"prompts": [str(folder / "prompts.jsonl")], "max_prompt_tokens": 2 * PROMPT},
        "rollout": {"max_tokens": longest},
        "ppo": {"steps": steps, "batch_size": batch, "minibatch_size": batch // 4},
    }
    (folder / "config.yaml").write_text(json.dumps(keys), encoding="utf-8")  # which YAML takes
    return load_config(folder / "config.yaml", overrides)


def _run_stage(config: Config, data: Datasets, turns: _Turns, folder: Path) -> None:
    (workspace := folder / "ppo").mkdir()
    context = StageContext(config, data, folder / "run", turns, Console(quiet=True))  # type: ignore[arg-type]
    roles.RolloutActor = actor_with_lengths(turns.work.lengths)
    try:
        run_ppo_stage(context, {"sft": config.sft.path, "reward": config.reward.path}, workspace)
    finally:
        context.close()


class _Turns:
    """The product's sink: whatever the stage writes at the end of a step, the plain loop takes a step of its own."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.product: list[Mapping[str, Any]] = []
        self.plain: list[Mapping[str, Any]] = []
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, work))
        self._process.start()
        theirs.close()  # or nobody would hear that the process has died

    def write(self, record: Mapping[str, Any]) -> None:
        if not self.product:
            self._pipe.recv()  # it is ready
        self._pipe.send("step")
        done = self._pipe.recv()
        tokens = sum(self.work.lengths)
        assert done["sampled"] == done["trained"] == tokens
        assert record["response/length_mean"] * len(self.work.lengths) == tokens
        assert record["policy/minibatches"] == done["minibatches"]
        self.product.append({"step": record["time/step_s"], **{p: record[f"time/{p}_s"] for p in (*PHASES, "other")}})
        self.plain.append({"step": done["step"], **done["seconds"]})

    def write_sample(self, record: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...

    def stop(self) -> None:
        with suppress(OSError):  # it is gone already
            self._pipe.send(None)
        self._process.join(30)
        self._process.kill()

    def result(self) -> dict[str, Any]:
        """Medians of each side's phases, the first step left out, and the ratio of whole steps."""
        product, plain = self.product[1:], self.plain[1:]
        found: dict[str, Any] = {}
        for side, steps in (("product", product), ("plain", plain)):
            found[f"{side}_s"] = {phase: median(step[phase] for step in steps) for phase in steps[0]}
        seconds = [[step["step"] for step in steps] for steps in (plain, product)]
        return found | paired_ratio("product_over_plain", *seconds)


def _title(result: Mapping[str, Any]) -> str:
    least, most = result["product_over_plain_range"]
    return (
        f"{result['parameters'] / 1e6:.1f}M parameters, {result['responses']} responses of "
        f"{result['response_tokens'] / result['responses']:.0f} tokens in the mean: "
        f"{result['product_over_plain_ratio']:.2f} times as fast ({least:.2f} to {most:.2f})"
    )


def _table(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A line for each phase that takes either side a thousandth of a step."""
    product, plain = result["product_s"], result["plain_s"]
    lines = []
    for phase in (*PHASES, "other", "step"):
        shares = [side.get(phase, 0.0) / side["step"] for side in (product, plain)]
        if max(shares) > 0.001:
            row: dict[str, Any] = {"phase": phase}
            for name, side, share in zip(("product", "plain"), (product, plain), shares, strict=True):
                row |= {f"{name} (s)": side.get(phase, 0.0), f"{name} (%)": round(100 * share)}
            lines.append(row)
    return lines


if __name__ == "__main__":
    typer.run(main)
