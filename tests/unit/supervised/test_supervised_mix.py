"""Two losses in one optimizer step: their gradient, what they are means over, how each is drawn; and ends of epochs."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from rayrlhf.data.batching import Cutting
from rayrlhf.data.prompts import LMExample
from rayrlhf.engines.tasks import LanguageTask
from rayrlhf.models.build import PolicyModel
from rayrlhf.supervised.loop import Mix, TrainSettings, train
from tests.engine_fakes import VOCAB, PlainEngine, Ranks, tiny_policy


def example(length: int, prompt: int, seed: int) -> LMExample:
    tokens = np.random.default_rng([seed, length]).integers(0, VOCAB, length)
    return LMExample(tokens.astype(np.int32), prompt, "")


DEMONSTRATIONS = [example(n, p, i) for i, (n, p) in enumerate([(7, 3), (4, 1), (12, 9), (9, 2), (3, 1)])]
# Of several lengths, though real blocks have one: nothing may lean on that.
TEXTS = [example(n, 0, 100 + i) for i, n in enumerate([10, 14, 6])]


def settings_of(**changes: Any) -> TrainSettings:
    given = {
        "learning_rate": 0.0,
        "batch_size": len(DEMONSTRATIONS),
        "epochs": 1.0,
        "warmup_ratio": 0.0,
        "final_lr_ratio": 0.1,
        "cutting": Cutting(50),
        "log_every": 1,
        "seed": 3,
    }
    return TrainSettings(**(given | changes))


def mix_of(texts: list[LMExample] = TEXTS, coef: float = 0.5, batch_size: int = 3, seed: int = 99) -> Mix:
    return Mix("pretrain_loss", LanguageTask(texts), coef, batch_size, seed)


def one_step(module: PolicyModel, cutting: Cutting, mix: Mix, rank: int = 0, ranks: int = 1) -> tuple[dict, dict]:
    """(the record, the gradients)"""
    engine = PlainEngine(module, rank=rank, world_size=ranks)
    record = train(engine, LanguageTask(DEMONSTRATIONS), settings_of(cutting=cutting), lambda record: None, mix)
    return record, {n: p.grad for n, p in module.named_parameters() if p.grad is not None}


def plain_loss(module: PolicyModel, examples: list[LMExample]) -> torch.Tensor:
    """Mean over all learned tokens, an example and a token at a time."""
    losses = []
    for e in examples:
        table = module.lm(torch.from_numpy(e.tokens).long()[None]).logits[0].log_softmax(-1)
        losses += [-table[t - 1, int(e.tokens[t])] for t in range(max(1, e.prompt_tokens), len(e.tokens))]
    return torch.stack(losses).mean()


def plain_step(coef: float) -> tuple[float, float, dict[str, torch.Tensor]]:
    module = tiny_policy().double()
    response, text = plain_loss(module, DEMONSTRATIONS), plain_loss(module, TEXTS)
    (response + coef * text).backward()
    return response.item(), text.item(), {n: p.grad for n, p in module.named_parameters() if p.grad is not None}


def assert_close(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, gradient in want.items():
        assert float((got[name].double() - gradient).abs().max()) <= 1e-5 * float(gradient.abs().max()), name


CUTTINGS = [Cutting(10_000, False), Cutting(30, False), Cutting(1, False), Cutting(10_000), Cutting(30), Cutting(1)]


@pytest.mark.parametrize("coef", [0.5, 1 / 9])
def test_the_gradient_of_a_mixed_step_is_that_of_the_weighted_sum_of_two_token_means_for_every_cut(coef):
    response, text, gradients = plain_step(coef)
    for cutting in CUTTINGS:
        record, got = one_step(tiny_policy(), cutting, mix_of(coef=coef))
        assert record["loss"] == pytest.approx(response, rel=1e-6)
        assert record["pretrain_loss"] == pytest.approx(text, rel=1e-6)
        assert_close(got, gradients)


@pytest.mark.parametrize("ranks", [2, 3, 7])
def test_the_gradients_of_all_ranks_add_up_to_that_of_the_weighted_sum(monkeypatch, ranks):
    """Seven ranks: some have text alone, some demonstrations alone, and runs of dummies."""
    response, text, gradients = plain_step(0.5)
    modules = [tiny_policy() for _ in range(ranks)]
    results = Ranks(ranks, monkeypatch).run(lambda r: one_step(modules[r], Cutting(14), mix_of(), r, ranks))
    for record, _ in results:
        assert record["loss"] == pytest.approx(response, rel=1e-6)
        assert record["pretrain_loss"] == pytest.approx(text, rel=1e-6)
    total = {n: sum(g[n] for _, g in results if n in g) for n in gradients}
    assert_close(total, gradients)


def test_ten_per_cent_of_text_is_a_coefficient_of_a_ninth():
    """0.9 SFT + 0.1 text, as the paper mixes, is 0.9 times the step's loss."""
    module = tiny_policy().double()
    (0.9 * plain_loss(module, DEMONSTRATIONS) + 0.1 * plain_loss(module, TEXTS)).backward()
    _, got = one_step(tiny_policy(), Cutting(50), mix_of(coef=1 / 9))
    assert_close({n: 0.9 * g.double() for n, g in got.items()}, {n: p.grad for n, p in module.named_parameters()})


class Recorded(LanguageTask):
    """Remembers the global minibatches."""

    def __init__(self, examples: list[LMExample]) -> None:
        super().__init__(examples)
        self.minibatches: list[list[int]] = []

    def denominator(self, rows):
        if len(rows):
            self.minibatches.append(list(rows))
        return super().denominator(rows)


def drawn(mixed: bool, texts: int = 5, batch_size: int = 2, rank: int = 0, ranks: int = 1, seed: int = 99) -> Any:
    """(demonstrations, text) of each of 8 steps"""
    task, text = Recorded(DEMONSTRATIONS), Recorded([example(6, 0, i) for i in range(texts)])
    mix = Mix("pretrain_loss", text, 0.5, batch_size, seed) if mixed else None
    engine = PlainEngine(tiny_policy(), rank=rank, world_size=ranks)
    train(engine, task, settings_of(batch_size=2, epochs=4.0), lambda record: None, mix)
    return task.minibatches, text.minibatches


def test_text_is_drawn_in_shuffles_of_its_own_and_leaves_those_of_the_demonstrations_alone(monkeypatch):
    demonstrations, text = drawn(mixed=True)
    assert demonstrations == drawn(mixed=False)[0]
    assert [len(batch) for batch in text] == [2] * 8
    epochs = [text[i] + text[i + 1] for i in range(0, 8, 2)]  # five blocks, two a step: the fifth is left out
    assert all(max(Counter(epoch).values()) == 1 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert text != demonstrations
    assert drawn(mixed=True) == (demonstrations, text)
    assert drawn(mixed=True, seed=98)[1] != text
    assert drawn(mixed=True, seed=98)[0] == demonstrations


def test_every_rank_draws_the_same_text(monkeypatch):
    alone = drawn(mixed=True)
    assert Ranks(3, monkeypatch).run(lambda rank: drawn(True, rank=rank, ranks=3)) == [alone] * 3


def test_with_fewer_blocks_than_a_step_asks_for_it_takes_them_all():
    _, text = drawn(mixed=True, texts=2, batch_size=5)
    assert [sorted(batch) for batch in text] == [[0, 1]] * 8


@pytest.mark.parametrize(
    ("changes", "ends"),
    [
        ({"epochs": 3.0}, [2, 4, 6]),
        ({"epochs": 2.5}, [2, 4, 5]),  # and after the last step in any case
        ({"epochs": 0.5}, [1]),
        ({"epochs": 3.0, "max_steps": 3}, [2, 3]),
        ({"epochs": 3.0, "batch_size": 50}, [1, 2, 3]),
    ],
)
def test_the_end_of_each_epoch_is_announced_once(changes, ends):
    called: list[tuple[int, int]] = []
    settings = settings_of(**({"batch_size": 2} | changes))  # five demonstrations: two steps an epoch
    train(
        PlainEngine(tiny_policy()),
        LanguageTask(DEMONSTRATIONS),
        settings,
        lambda record: None,
        after_epoch=lambda step, steps: called.append((step, steps)),
    )
    assert called == [(end, ends[-1]) for end in ends]


def test_the_speed_that_is_logged_leaves_out_what_happens_between_epochs(monkeypatch):
    clock = iter(float(n) for n in range(100))
    monkeypatch.setattr("rayrlhf.supervised.loop.perf_counter", lambda: next(clock))
    records: list[dict[str, Any]] = []

    def after_epoch(step: int, steps: int) -> None:
        for _ in range(20):
            next(clock)

    plan = settings_of(batch_size=2, epochs=2.0)
    train(PlainEngine(tiny_policy()), LanguageTask(DEMONSTRATIONS), plan, records.append, after_epoch=after_epoch)
    # Read at 0, 1, 2; a pause from 3 to 24, which are 21; then 25 - 21 and 26 - 21.
    assert [r["elapsed_s"] for r in records] == [1.0, 2.0, 4.0, 5.0]
