"""Supervised tasks: what is learned, what it is divided by, and a loss that no cut can change."""

import math
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rayrlhf.data.batching import Cutting
from rayrlhf.data.prompts import LMExample, RankingExample
from rayrlhf.engines.tasks import LanguageTask
from rayrlhf.supervised.loop import TrainSettings, _batches, train
from rayrlhf.supervised.ranking import RankingTask, score_sequences
from tests.engine_fakes import CPU, VOCAB, PlainEngine, Ranks, tiny_policy, tiny_scalar


def text(tokens: list[int], prompt_tokens: int) -> LMExample:
    return LMExample(np.array(tokens, dtype=np.int32), prompt_tokens, "")


def ranking(lengths: list[int], ranks: tuple[int, ...], seed: int = 0) -> RankingExample:
    rng = np.random.default_rng(seed)
    responses = tuple(rng.integers(0, VOCAB, n).astype(np.int32) for n in lengths)
    return RankingExample(responses, ranks, 1, "", tuple(lengths))


def texts(count: int = 9) -> list[LMExample]:
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 14, count)
    return [text(rng.integers(0, VOCAB, n).tolist(), int(rng.integers(0, n))) for n in lengths]


RANKINGS = [
    ranking([4, 7, 3], (1, 2, 3), 1),
    ranking([5, 5], (2, 1), 2),
    ranking([9, 2, 6, 6], (1, 2, 2, 3), 3),
    ranking([3, 3], (1, 1), 4),
    ranking([8, 8, 8], (3, 1, 1), 5),
]


# ------------------------------------------------------------------------------------------------ language


def test_prompt_tokens_are_not_learned():
    task = LanguageTask([text([9, 8, 7, 6, 5], 2), text([4, 3, 2], 1)])
    (batch,) = task.cut([0, 1], Cutting(100, packed=False), CPU)
    assert batch.layout.tokens.tolist() == [[9, 8, 7, 6, 5], [4, 3, 2, 0, 0]]
    assert batch.positions.tolist() == [2, 3, 4, 6, 7]
    assert batch.layout.tokens.reshape(-1)[batch.positions].tolist() == [7, 6, 5, 3, 2]


def test_without_a_prompt_everything_but_the_first_token_is_learned():
    (batch,) = LanguageTask([text([9, 8, 7], 0)]).cut([0], Cutting(100), CPU)
    assert batch.positions.tolist() == [1, 2]


def test_the_denominator_counts_learned_tokens():
    task = LanguageTask([text([9, 8, 7, 6, 5], 2), text([4, 3, 2], 1), text([1, 1, 1, 1], 0)])
    assert task.sizes == [5, 3, 4]
    assert [task.denominator(rows) for rows in ([0], [1], [2], [0, 1, 2], [])] == [3.0, 2.0, 3.0, 8.0, 0.0]


def test_the_language_loss_is_the_mean_over_learned_tokens_in_float64():
    module, examples = tiny_policy(), texts()
    task = LanguageTask(examples)
    losses = []
    for e in examples:
        with torch.no_grad():
            table = module.lm(torch.from_numpy(e.tokens).long()[None]).logits[0].double().log_softmax(-1)
        losses += [-float(table[t - 1, e.tokens[t]]) for t in range(max(1, e.prompt_tokens), len(e.tokens))]
    rows = list(range(len(examples)))
    (batch,) = task.cut(rows, Cutting(10_000, packed=False), CPU)
    assert task.loss(module, batch, task.denominator(rows)).item() == pytest.approx(np.mean(losses), rel=1e-5)
    for cutting in (Cutting(1), Cutting(40, packed=False), Cutting(40, packed=True)):
        assert task.evaluate(PlainEngine(module), cutting) == pytest.approx(np.mean(losses), rel=1e-5)


# ------------------------------------------------------------------------------------------------- ranking


def test_ranking_batches_hold_last_positions_ranks_and_prompts():
    task = RankingTask(RANKINGS)
    (batch,) = task.cut([0, 1], Cutting(100, packed=False), CPU)
    # widest prompt first: example 0 (4, 7, 3) -> width 7, then example 1 (5, 5)
    assert batch.layout.tokens.shape == (5, 7)
    assert batch.last_positions.tolist() == [3, 7 + 6, 14 + 2, 21 + 4, 28 + 4]
    assert batch.ranks.tolist() == [1, 2, 3, 2, 1]
    assert batch.prompts.tolist() == [0, 0, 0, 1, 1]


@given(
    st.lists(st.lists(st.integers(1, 20), min_size=2, max_size=5), min_size=1, max_size=10),
    st.integers(1, 150),
    st.randoms(use_true_random=False),
)
@settings(max_examples=80, deadline=None)
def test_the_responses_of_a_prompt_stay_together_under_any_budget(lengths, budget, random):
    # the first token of each response is its example's number
    examples = [ranking(row, tuple(range(1, len(row) + 1))) for row in lengths]
    for number, e in enumerate(examples):
        for response in e.responses:
            response[0] = number
    rows = list(range(len(examples)))
    random.shuffle(rows)
    task = RankingTask(examples)
    seen = []
    for batch in task.cut(rows, Cutting(budget, packed=False), CPU):
        numbers = batch.layout.tokens[:, 0].tolist()
        groups = batch.prompts.tolist()
        assert len(set(zip(numbers, groups, strict=True))) == len(set(numbers)) == len(set(groups))
        for number in set(numbers):
            assert numbers.count(number) == len(lengths[number])
        assert batch.layout.tokens.numel() <= budget or len(set(numbers)) == 1
        seen += sorted(set(numbers))
    assert sorted(seen) == list(range(len(examples)))


def test_the_denominator_counts_prompts_with_a_pair_that_is_no_tie():
    task = RankingTask(RANKINGS)
    assert task.denominator(range(5)) == 4.0
    assert task.denominator([3]) == 0.0
    assert task.sizes == [14, 10, 23, 6, 24]


def test_the_ranking_loss_is_the_mean_over_prompts_of_their_mean_over_pairs():
    module, task = tiny_scalar(), RankingTask(RANKINGS)
    scores = task.scores(PlainEngine(module), Cutting(40))
    prompts = []
    for e, row in zip(RANKINGS, scores, strict=True):
        pairs = [
            math.log1p(math.exp(row[loser] - row[winner]))
            for winner, better in enumerate(e.ranks)
            for loser, worse in enumerate(e.ranks)
            if better < worse
        ]
        prompts += [np.mean(pairs)] if pairs else []
    rows = list(range(len(RANKINGS)))
    (batch,) = task.cut(rows, Cutting(10_000, packed=False), CPU)
    assert task.loss(module, batch, task.denominator(rows)).item() == pytest.approx(np.mean(prompts), rel=1e-5)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("tokens", [1, 30, 10_000])
def test_sequences_are_scored_at_their_last_token_in_the_order_given(tokens, packed):
    module = tiny_scalar()
    sequences = [response for e in RANKINGS for response in e.responses]
    expected = []
    for sequence in sequences:
        with torch.no_grad():
            hidden = module.classifier.base_model(torch.from_numpy(sequence).long()[None]).last_hidden_state[0, -1]
        expected.append((hidden @ module.classifier.score.weight[0]).item())
    assert score_sequences(PlainEngine(module), sequences, Cutting(tokens, packed)) == pytest.approx(expected, abs=1e-5)


# ---------------------------------------------------------------------------------------------- both, train


@pytest.mark.parametrize(
    ("task", "build"), [(LanguageTask(texts()), tiny_policy), (RankingTask(RANKINGS), tiny_scalar)], ids=["lm", "rank"]
)
def test_micro_batch_losses_and_gradients_add_up_to_those_of_the_whole(task, build):
    module = build()
    rows = list(range(len(task.sizes)))
    results = {}
    for cutting in (Cutting(10_000, False), Cutting(60, False), Cutting(1, False), Cutting(10_000), Cutting(60)):
        engine = PlainEngine(module)
        loss = engine.train_step(
            lambda m, b: task.loss(m, b, task.denominator(rows)), task.cut(rows, cutting, CPU), None, 0.0
        )["loss"]
        results[cutting] = engine.cuts[0], loss, [p.grad.clone() for p in module.parameters() if p.grad is not None]
    assert len({cuts for cuts, _, _ in results.values()}) >= 3
    _, whole, gradients = results[Cutting(10_000, False)]
    for _, loss, got in results.values():
        assert loss == pytest.approx(whole, rel=1e-6)
        for a, b in zip(got, gradients, strict=True):
            assert float((a - b).abs().max()) <= 1e-5 * float(b.abs().max())


def settings_of(**changes) -> TrainSettings:
    given = {
        "learning_rate": 0.1,
        "batch_size": 4,
        "epochs": 1.0,
        "warmup_ratio": 0.0,
        "final_lr_ratio": 0.1,
        "cutting": Cutting(50, packed=False),
        "log_every": 2,
        "seed": 3,
    }
    return TrainSettings(**(given | changes))


@pytest.mark.parametrize(
    ("examples", "changes", "steps"),
    [
        (12, {}, 3),
        (15, {}, 3),  # the last, short batch is dropped
        (3, {}, 1),  # unless there is no other
        (12, {"epochs": 2.0}, 6),
        (12, {"epochs": 0.5}, 2),
        (12, {"epochs": 0.01}, 1),
        (12, {"epochs": 5.0, "max_steps": 7}, 7),
        (12, {"max_steps": 100}, 3),
    ],
)
def test_the_number_of_steps(examples, changes, steps):
    assert settings_of(**changes).steps(examples) == steps


def test_each_epoch_is_a_fresh_shuffle_without_repeats():
    batches = list(islice(_batches(10, settings_of()), 8))  # two batches of four an epoch, two examples left out
    assert [len(b) for b in batches] == [4] * 8
    epochs = [batches[i] + batches[i + 1] for i in range(0, 8, 2)]
    assert all(max(Counter(e).values()) == 1 for e in epochs)
    assert len({tuple(e) for e in epochs}) == 4
    assert {i for e in epochs for i in e} == set(range(10))


def test_batches_are_the_same_for_the_same_seed_and_others_for_another():
    first = list(islice(_batches(10, settings_of()), 6))
    assert first == list(islice(_batches(10, settings_of()), 6))
    assert first != list(islice(_batches(10, settings_of(seed=4)), 6))


def test_fewer_examples_than_a_batch_are_one_batch_an_epoch():
    batches = list(islice(_batches(3, settings_of()), 5))
    assert [sorted(b) for b in batches] == [[0, 1, 2]] * 5


def test_training_takes_its_steps_logs_on_time_and_lowers_the_loss():
    engine, records = PlainEngine(tiny_policy(), sgd=True), []
    task = LanguageTask([text([1, 2, 3, 4, 5, 6], 0)] * 8)
    final = train(engine, task, settings_of(epochs=2.5, learning_rate=0.2), records.append)
    assert [(r["step"], r["steps"]) for r in records] == [(1, 5), (2, 5), (4, 5), (5, 5)]
    # 5 steps, cosine from 0.2 to 0.02: half-way at the middle step
    assert engine.rates[0] == 0.2
    assert engine.rates[2] == pytest.approx(0.11)
    assert engine.rates[4] == pytest.approx(0.02)
    assert [r["loss"] for r in records] == pytest.approx([engine.losses[i] for i in (0, 1, 3, 4)])
    assert engine.losses[4] < engine.losses[0] / 2
    assert final.keys() == {"loss", "grad_norm", "learning_rate", "tokens_per_s"}
    assert final["loss"] == records[-1]["loss"]


@pytest.mark.parametrize(
    ("task", "build"),
    [(LanguageTask(texts(12)), tiny_policy), (RankingTask(RANKINGS), tiny_scalar)],
    ids=["lm", "rank"],
)
def test_the_logged_loss_does_not_depend_on_the_ranks(monkeypatch, task, build):
    plan = settings_of(batch_size=5, log_every=1)

    def losses(module: torch.nn.Module, rank: int, world_size: int) -> list[float]:
        records: list[dict] = []
        train(PlainEngine(module, rank=rank, world_size=world_size), task, plan, records.append)
        return [r["loss"] for r in records]

    alone = losses(build(), 0, 1)
    modules = [build() for _ in range(3)]  # here: threads share torch's random state
    for got in Ranks(3, monkeypatch).run(lambda rank: losses(modules[rank], rank, 3)):
        assert got == pytest.approx(alone, rel=1e-5)


def test_scores_and_evaluation_do_not_depend_on_the_ranks(monkeypatch):
    policy, scalar = tiny_policy(), tiny_scalar()
    language, rank_task = LanguageTask(texts(5)), RankingTask(RANKINGS[:2])
    loss, scores = (
        language.evaluate(PlainEngine(policy), Cutting(30)),
        rank_task.scores(PlainEngine(scalar), Cutting(12)),
    )

    def on_rank(rank: int) -> tuple[float, list[list[float]]]:
        return (
            language.evaluate(PlainEngine(policy, rank=rank, world_size=4), Cutting(30)),
            rank_task.scores(PlainEngine(scalar, rank=rank, world_size=4), Cutting(12)),
        )

    for loss_of_rank, scores_of_rank in Ranks(4, monkeypatch).run(on_rank):
        assert loss_of_rank == pytest.approx(loss, rel=1e-6)
        for got, expected in zip(scores_of_rank, scores, strict=True):
            assert got == pytest.approx(expected, abs=1e-5)


def test_more_ranks_than_examples_still_score_every_sequence(monkeypatch):
    scalar, sequences = tiny_scalar(), [np.array([1, 2, 3], np.int32)]
    alone = score_sequences(PlainEngine(scalar), sequences, Cutting(10))
    got = Ranks(3, monkeypatch).run(
        lambda rank: score_sequences(PlainEngine(scalar, rank=rank, world_size=3), sequences, Cutting(10))
    )
    assert got == [pytest.approx(alone)] * 3
