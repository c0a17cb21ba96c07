"""The DeepSpeed learner against a plain PyTorch loop written here: same loss, same gradient norm, same weights.

One pair of processes (and one single process) runs every ZeRO stage and micro-batch cut in turn; no Ray.
"""

from __future__ import annotations

import socket
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp

from rayrlhf.config.model import FromScratch
from rayrlhf.models.build import PolicyModel, from_scratch
from rayrlhf.types import Experience, Rollout, RolloutInfo

pytestmark = pytest.mark.integration

VOCAB, LR, CLIP, TEMPERATURE = 64, 1e-3, 0.2, 0.8
MINIBATCHES = [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]]
BUDGETS = [16, 64, 4096]  # one row at a time, a few, all at once


def tiny_model() -> PolicyModel:
    spec = FromScratch(vocab_size=300, hidden_size=32, layers=2, heads=2, context=64)
    return from_scratch(spec, VOCAB, 0, 1, seed=3)


def experiences() -> list[Experience]:
    """Twelve made-up responses of very different lengths."""
    rng = np.random.default_rng(7)
    made = []
    for i in range(12):
        prompt, response = int(rng.integers(2, 6)), int(rng.integers(1, 14))
        info = RolloutInfo(i, i, prompt + response, response, False)
        row = rng.integers(2, VOCAB, prompt + response).astype(np.int32)

        def noise(scale: float, n: int = response) -> np.ndarray:
            return rng.normal(size=n).astype(np.float32) * np.float32(scale)

        rollout = Rollout(info, row, noise(1.0), np.zeros(response, dtype=np.int32))
        made.append(Experience(rollout, noise(0.3) - np.float32(4.2), noise(1.0), noise(1.0), noise(1.0)))
    return made


def oracle() -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    """Two AdamW steps, sequence by sequence, nothing shared with the product but the module."""
    model, data = tiny_model(), experiences()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.0)
    losses, norms = [], []
    for rows in MINIBATCHES:
        optimizer.zero_grad()
        total, tokens = torch.zeros(()), sum(data[i].rollout.info.response_tokens for i in rows)
        for i in rows:
            e = data[i]
            ids = torch.from_numpy(e.rollout.tokens).long()[None]
            logits = model.lm(input_ids=ids).logits[0] / TEMPERATURE
            logprobs = torch.log_softmax(logits.double(), -1)
            for r in range(e.rollout.info.response_tokens):
                at = e.rollout.prompt_tokens + r
                ratio = torch.exp(logprobs[at - 1, ids[0, at]] - float(e.old_logprobs[r]))
                a = float(e.advantages[r])
                total = total - torch.minimum(ratio * a, torch.clamp(ratio, 1 - CLIP, 1 + CLIP) * a)
        (total / tokens).backward()
        losses.append(float(total.detach()) / tokens)
        norms.append(float(torch.sqrt(sum((p.grad.double() ** 2).sum() for p in model.parameters()))))
        optimizer.step()
    return losses, norms, {n: p.detach().clone() for n, p in model.named_parameters()}


def work(rank: int, world: int, port: int, folder: str) -> None:
    """One rank: every stage and cut; rank 0 leaves the results in `folder`."""
    import deepspeed

    from rayrlhf.data.batching import balance
    from rayrlhf.engines.deepspeed import Learner, LearnerSettings
    from rayrlhf.engines.distributed import Rendezvous, join_process_group
    from rayrlhf.engines.learning import UpdateSettings, update_policy

    join_process_group(Rendezvous(rank, world, "127.0.0.1", port, "cpu", 1))
    data = experiences()
    results = {}
    for stage in (0, 1, 2, 3):
        for budget in BUDGETS:
            model = tiny_model()
            learner = Learner(
                model, LearnerSettings(stage, "float32", "cpu", LR, (0.9, 0.95), 1e-5, 0.0, grad_clip=0.0)
            )
            losses, norms = [], []
            for rows in MINIBATCHES:
                # An uneven deal on purpose: rank 0 gets one response, the other all the rest.
                shares = [rows[:1], rows[1:]] if world == 2 and budget == 64 else None
                if shares is None:
                    dealt = balance([data[i].rollout.info.tokens for i in rows], world)
                    shares = [[rows[i] for i in share] for share in dealt]
                settings = UpdateSettings(CLIP, budget, TEMPERATURE)
                report = update_policy(learner, data, [shares[rank]], data[0], settings, LR)
                losses.append(report["policy/loss"])
                norms.append(report["policy/grad_norm"])
            weights = {}
            for bucket in learner.named_buckets(model, 4096):
                weights.update((n, t.clone()) for n, t in bucket)
            results[(stage, budget)] = (losses, norms, weights)
    if rank == 0:
        torch.save(results, Path(folder) / "results.pt")
    deepspeed.comm.barrier()


@pytest.fixture(scope="module", params=[1, 2], ids=["one_rank", "two_ranks"])
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = tmp_path_factory.mktemp("learner")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(work, args=(request.param, port, str(folder)), nprocs=request.param)
    return torch.load(folder / "results.pt", weights_only=True)


@pytest.fixture(scope="module")
def expected() -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    return oracle()


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_loss_gradient_and_weights_equal_a_plain_loop(stage: int, budget: int, results: dict, expected) -> None:
    losses, norms, weights = results[(stage, budget)]
    want_losses, want_norms, want_weights = expected
    assert losses == pytest.approx(want_losses, rel=1e-6)
    assert norms == pytest.approx(want_norms, rel=1e-5)
    for name, want in want_weights.items():
        got = weights[name]
        gap = (got - want).abs()
        assert gap.max() <= 2 * LR, f"{name} differs by {gap.max():.3g}"
        assert gap.mean() <= LR * 1e-2, f"{name} differs on average by {gap.mean():.3g}"


def test_every_stage_and_cut_gives_the_same_numbers(results: dict) -> None:
    losses = np.array([r[0] for r in results.values()])
    assert np.ptp(losses, axis=0).max() <= 1e-6 * np.abs(losses).max()
