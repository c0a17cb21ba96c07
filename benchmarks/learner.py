"""The PPO learner against a loop of plain PyTorch, and packed rows against padded ones: tokens per second.

    python benchmarks/learner.py [--shapes 256x5,512x9] [--json]

Product and plain loop: one policy step, `update_policy` on a `Learner` (DeepSpeed, one rank in this process, every
setting a default of `ppo`), beside a loop as one writes it by hand: the same model, AdamW, loss, clipping, batch and
threads, float32. The plain loop gets its micro-batches ready-made; the product cuts them in its time. Before anything
is timed both take one step from the same weights, and must find the same loss and come to the same weights.

Packed and padded: the same learner on the same sequences, cut three ways into micro-batches of at most
`ppo.micro_batch_tokens`:
  packed            several sequences a row, the product's default
  padded            what trainers without packing do: a fixed number of sequences in order of arrival, padded to the
                    longest of them; as many as fit when all are of the longest length there may be
  padded by length  the product with model.packed=false: sorted by length first, so that little is padding
Lengths (prompt and response) are log-normal with a mean of a quarter of the longest there may be and a standard
deviation of the logarithm of --spread; responses are all but the first 16 tokens, or the first half. Measured on the
first of the shapes alone, since it takes three times as long.

A token counts when it belongs to a sequence: padding does not. Times are medians of --rounds rounds, ratios medians of
the ratios of each round, beside their range. The last line is JSON.
"""

from __future__ import annotations

import copy
import logging
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import exp, log
from statistics import NormalDist, median
from tempfile import gettempdir
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import typer
from common import machine, paired_ratio, print_result, print_table, timed_in_turns
from torch import Tensor, nn

from rayrlhf.algorithms import ppo_policy_loss
from rayrlhf.config.model import FromScratch
from rayrlhf.config.ppo import PPOConfig
from rayrlhf.data.batching import Cutting
from rayrlhf.engines.batches import ExperienceBatch, cut_experiences, dummy_experience
from rayrlhf.engines.deepspeed import Learner, LearnerSettings
from rayrlhf.engines.distributed import Rendezvous, join_process_group
from rayrlhf.engines.learning import UpdateSettings, update_policy
from rayrlhf.models.build import PolicyModel, from_scratch
from rayrlhf.types import Experience, Rollout, RolloutInfo

PPO = PPOConfig()
VOCABULARY, PROMPT = 768, 16
# How far the two sides may be apart after one step from the same weights: of the loss, and in learning rates.
LOSS_GAP, WEIGHT_GAP = 1e-5, 0.05


@dataclass(frozen=True, slots=True)
class Shape:
    """Of a model, and of the minibatch it learns from."""

    hidden: int
    layers: int
    sequences: int
    longest: int
    """tokens of the longest sequence there may be"""
    spread: float


def main(
    shapes: str = "256x5,512x9",
    sequences: int = 32,
    longest: int = 256,
    spread: float = 0.8,
    rounds: int = 7,
    threads: int = 2,
    device: str = "cpu",
    json: bool = False,
) -> None:
    """`shapes` are hidden sizes and layers; `json` leaves out the table."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    join_process_group(Rendezvous(0, 1, "127.0.0.1", port, device, threads, deterministic=False))
    chosen = [Shape(*map(int, shape.split("x")), sequences, longest, spread) for shape in shapes.split(",")]
    rows = [measure(shape, rounds, device, padding=number == 0) for number, shape in enumerate(chosen)]
    facts = machine(device)
    dist.destroy_process_group()
    if not json:
        print_table(f"{sequences} sequences a step, {threads} threads, torch {facts['torch']}", table_rows(rows))
    print_result({**facts, "rounds": rounds, "longest": longest, "spread": spread, "rows": rows})


def measure(shape: Shape, rounds: int, device: str, padding: bool) -> dict[str, Any]:
    """Against the plain loop, and with `padding` against padded rows."""
    spec = FromScratch(
        hidden_size=shape.hidden, layers=shape.layers, heads=max(1, shape.hidden // 64), context=shape.longest
    )
    model = from_scratch(spec, VOCABULARY, 0, 1, seed=0)
    experiences = make_experiences(model, shape)
    plain, learner = PlainLoop(copy.deepcopy(model).to(device)), new_learner(model, device)
    tokens = sum(e.rollout.info.tokens for e in experiences)
    row = {"parameters": sum(p.numel() for p in plain.model.parameters()), "tokens": tokens}
    row |= against_plain(learner, plain, experiences, rounds)
    return row | packed_against_padded(learner, experiences, shape.longest, rounds) if padding else row


def make_experiences(model: PolicyModel, shape: Shape) -> list[Experience]:
    """Sequences of random tokens, in random order of length, with log-probs near the model's own."""
    rng, made = np.random.default_rng(0), []
    # The middles of as many slices of the distribution as there are sequences: a draw of few may be far from it.
    slices = rng.permutation((np.arange(shape.sequences) + 0.5) / shape.sequences)
    normal = NormalDist(log(shape.longest / 4) - shape.spread**2 / 2, shape.spread)
    for i, share in enumerate(slices.tolist()):
        length = min(max(4, round(exp(normal.inv_cdf(share)))), shape.longest)
        prompt = min(PROMPT, length // 2)
        tokens = rng.integers(2, VOCABULARY, length).astype(np.int32)
        with torch.no_grad():
            own = model(torch.from_numpy(tokens).long()[None], torch.arange(prompt, length)).numpy()
        response = length - prompt
        info = RolloutInfo(i, i, length, response, truncated=False)
        rollout = Rollout(info, tokens, own, np.zeros(response, np.int32))
        # As in a later minibatch of a step: the policy has moved, and some tokens are clipped.
        old = own + rng.normal(0, 0.2, response).astype(np.float32)
        made.append(Experience(rollout, old, rng.normal(size=response).astype(np.float32), None, None))
    return made


# ---- the product and the plain loop ----------------------------------------------------------------------------------


def new_learner(model: PolicyModel, device: str) -> Learner:
    settings = LearnerSettings(
        zero_stage=PPO.zero_stage,
        dtype="float32",
        device=device,
        learning_rate=PPO.learning_rate,
        betas=PPO.adam.betas,
        eps=PPO.adam.eps,
        weight_decay=PPO.adam.weight_decay,
        grad_clip=PPO.adam.grad_clip,
        max_loss=1e4,
        failed_folder=gettempdir(),
        role="benchmark",
    )
    return Learner(model, settings)


class PlainLoop:
    """What one writes without a framework: no guard, no metric but the loss."""

    def __init__(self, model: PolicyModel) -> None:
        self.model = model
        self.optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=PPO.learning_rate,
            betas=PPO.adam.betas,
            eps=PPO.adam.eps,
            weight_decay=PPO.adam.weight_decay,
            fused=True,
        )

    def step(self, batches: Sequence[ExperienceBatch], tokens: int) -> float:
        """One optimizer step on the mean loss over all `tokens` response tokens of the batches; that loss."""
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for batch in batches:
            layout = batch.batch.layout
            logprobs = self.model(layout.tokens, batch.batch.positions, position_ids=layout.position_ids)
            ratio = (logprobs - batch.old_logprobs).exp()
            clipped = ratio.clamp(1 - PPO.clip, 1 + PPO.clip)
            loss = -torch.minimum(ratio * batch.advantages, clipped * batch.advantages).sum() / tokens
            loss.backward()
            total += loss.item()
        nn.utils.clip_grad_norm_(self.model.parameters(), PPO.adam.grad_clip)
        self.optimizer.step()
        return total


def against_plain(learner: Learner, plain: PlainLoop, experiences: Sequence[Experience], rounds: int) -> dict[str, Any]:
    cutting = Cutting(PPO.micro_batch_tokens)
    batches = cut_experiences(experiences, cutting, learner.device)
    tokens, everything = sum(len(e.old_logprobs) for e in experiences), [range(len(experiences))]
    settings = UpdateSettings(PPO.clip, cutting)

    def product() -> float:
        done = update_policy(learner, experiences, everything, experiences[0], settings, PPO.learning_rate)
        return done["policy/loss"]

    gaps = check_agreement(learner.module, plain.model, product(), plain.step(batches, tokens))
    seconds = timed_in_turns({"product": product, "plain": lambda: plain.step(batches, tokens)}, rounds)
    return {
        **gaps,
        "product_s": median(seconds["product"]),
        "plain_s": median(seconds["plain"]),
        **paired_ratio("product_over_plain", seconds["plain"], seconds["product"]),
    }


def check_agreement(product: nn.Module, plain: nn.Module, product_loss: float, plain_loss: float) -> dict[str, float]:
    """How far the sides are apart after one step each; the end of the benchmark if that is too far."""
    loss_gap = abs(product_loss - plain_loss) / abs(plain_loss)
    pairs = zip(product.parameters(), plain.parameters(), strict=True)
    weight_gap = max(float((a.detach() - b.detach()).abs().max()) for a, b in pairs) / PPO.learning_rate
    if not (loss_gap <= LOSS_GAP and weight_gap <= WEIGHT_GAP):
        raise SystemExit(
            f"the sides do not do the same: losses {product_loss} and {plain_loss}, weights up to {weight_gap:.3g} "
            "learning rates apart after one step"
        )
    return {"loss_gap": loss_gap, "weight_gap_in_rates": weight_gap}


# ---- packed and padded -----------------------------------------------------------------------------------------------


def packed_against_padded(
    learner: Learner, experiences: Sequence[Experience], longest: int, rounds: int
) -> dict[str, Any]:
    budget, device = PPO.micro_batch_tokens, learner.device
    tokens = sum(len(e.old_logprobs) for e in experiences)
    dummy = dummy_experience(experiences[0], device)
    fits = max(1, budget // longest)
    groups = [experiences[i : i + fits] for i in range(0, len(experiences), fits)]
    ways = {
        "packed": cut_experiences(experiences, Cutting(budget), device),
        "padded": [b for g in groups for b in cut_experiences(g, Cutting(fits * longest, packed=False), device)],
        "padded_by_length": cut_experiences(experiences, Cutting(budget, packed=False), device),
    }

    def loss(module: Callable[..., Tensor], batch: ExperienceBatch) -> Tensor:
        logprobs = module(**batch.batch.layout.inputs, positions=batch.batch.positions)
        return ppo_policy_loss(
            logprobs, batch.old_logprobs, batch.advantages, batch.mask, PPO.clip, denominator=tokens
        )[0]

    sides = {
        name: partial(learner.train_step, loss, batches, dummy, PPO.learning_rate) for name, batches in ways.items()
    }
    seconds = timed_in_turns(sides, rounds)
    result: dict[str, Any] = {f"{name}_s": median(times) for name, times in seconds.items()}
    result |= {f"{name}_cells": sum(b.batch.layout.tokens.numel() for b in bs) for name, bs in ways.items()}
    for other in ("padded", "padded_by_length"):
        result |= paired_ratio(f"packed_over_{other}", seconds[other], seconds["packed"])
    return result


def table_rows(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A line for each comparison, in tokens per second."""
    pairs = [("product", "plain"), ("packed", "padded"), ("packed", "padded_by_length")]
    return [
        {
            "parameters": f"{row['parameters'] / 1e6:.1f}M",
            "side": side,
            "tokens/s": round(row["tokens"] / row[f"{side}_s"]),
            "against": other.replace("_", " "),
            "its tokens/s": round(row["tokens"] / row[f"{other}_s"]),
            "ratio": row[f"{side}_over_{other}_ratio"],
            "from": row[f"{side}_over_{other}_range"],
        }
        for row in rows
        for side, other in pairs
        if f"{other}_s" in row
    ]


if __name__ == "__main__":
    typer.run(main)
