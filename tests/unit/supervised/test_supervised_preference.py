"""Direct preference optimisation: the loss and what is reported beside it, against a float64 loop over pairs."""

import math

import numpy as np
import pytest
import torch

from rayrlhf.data.batching import Cutting
from rayrlhf.data.prompts import RankingExample
from rayrlhf.errors import TrainingError
from rayrlhf.supervised.loop import TrainSettings, train
from rayrlhf.supervised.preference import PreferenceTask, checking_first_loss, response_logprobs
from tests.engine_fakes import CPU, VOCAB, PlainEngine, Ranks, tiny_policy

BETA = 0.3
CUTTINGS = [Cutting(tokens, packed) for tokens in (1, 60, 10_000) for packed in (False, True)]


def ranking(prompt: int, responses: list[int], ranks: tuple[int, ...], seed: int) -> RankingExample:
    """A prompt of so many tokens under responses of so many."""
    rng = np.random.default_rng(seed)
    shared = rng.integers(0, VOCAB, prompt)
    tokens = tuple(np.concatenate([shared, rng.integers(0, VOCAB, n)]).astype(np.int32) for n in responses)
    return RankingExample(tokens, ranks, prompt, "", tuple(responses))


# (better, worse) by hand: 3 pairs, 1, 5 (the two ranked 2 are a tie), 2
RANKINGS = [
    ranking(3, [4, 7, 3], (1, 2, 3), 1),
    ranking(2, [5, 5], (2, 1), 2),
    ranking(4, [9, 2, 6, 6], (1, 2, 2, 3), 3),
    ranking(1, [8, 8, 8], (3, 1, 1), 5),
]
PAIRS = [
    [(0, 1), (0, 2), (1, 2)],
    [(1, 0)],
    [(0, 1), (0, 2), (0, 3), (1, 3), (2, 3)],
    [(1, 0), (2, 0)],
]


def silent(record: dict) -> None:
    """A log that nobody reads."""


@torch.no_grad()
def alone(module: torch.nn.Module, example: RankingExample) -> list[float]:
    """Each response's log-prob: unbatched, in float64, token by token."""
    sums = []
    for tokens in example.responses:
        logits = module.lm(torch.from_numpy(tokens).long()[None]).logits[0].double().numpy()
        total = 0.0
        for t in range(example.prompt_tokens, len(tokens)):
            row = logits[t - 1]
            total += row[tokens[t]] - row.max() - np.log(np.exp(row - row.max()).sum())
        sums.append(float(total))
    return sums


def pair_margins(policy: torch.nn.Module, reference: torch.nn.Module) -> list[tuple[float, float]]:
    """(log-ratio of the chosen, of the rejected) for every pair of RANKINGS."""
    pairs = []
    for example, listed in zip(RANKINGS, PAIRS, strict=True):
        ratios = [p - r for p, r in zip(alone(policy, example), alone(reference, example), strict=True)]
        pairs += [(ratios[better], ratios[worse]) for better, worse in listed]
    return pairs


def task_of(reference: torch.nn.Module) -> PreferenceTask:
    return PreferenceTask(RANKINGS, [alone(reference, e) for e in RANKINGS], BETA)


def step(module: torch.nn.Module, task: PreferenceTask, cutting: Cutting) -> tuple[PlainEngine, float]:
    engine, rows = PlainEngine(module), list(range(len(RANKINGS)))
    loss = engine.train_step(
        lambda m, b: task.loss(m, b, task.denominator(rows)), task.cut(rows, cutting, CPU), task.dummy(CPU), 0.0
    )["loss"]
    return engine, loss


def settings_of(**changes) -> TrainSettings:
    given = {
        "learning_rate": 0.02,
        "batch_size": 4,
        "epochs": 6.0,
        "warmup_ratio": 0.0,
        "final_lr_ratio": 1.0,
        "cutting": Cutting(60),
        "log_every": 1,
        "seed": 3,
    }
    return TrainSettings(**(given | changes))


# ------------------------------------------------------------------------------------------------- data and loss


def test_pairs_are_better_first_and_ties_are_none():
    assert [list(e.pairs()) for e in RANKINGS] == PAIRS
    assert list(ranking(1, [2, 2], (1, 1), 4).pairs()) == []


def test_the_denominator_counts_pairs():
    task = task_of(tiny_policy())
    assert task.denominator(range(4)) == 11.0
    assert [task.denominator([i]) for i in range(4)] == [3.0, 1.0, 5.0, 2.0]
    assert task.sizes == [23, 14, 39, 27]


def test_each_response_is_run_once_and_a_prompts_responses_stay_together():
    task = task_of(tiny_policy())
    for cutting in CUTTINGS:
        batches = task.cut([2, 0, 3, 1], cutting, CPU)
        assert sum(len(b.lengths) for b in batches) == 12
        assert sum(len(b.chosen) for b in batches) == 11
        assert sorted(n for b in batches for n in b.lengths) == [2, 3, 4, 5, 5, 6, 6, 7, 8, 8, 8, 9]


def test_the_loss_is_the_mean_over_all_pairs_of_the_minibatch_in_float64():
    policy, reference = tiny_policy(0), tiny_policy(1)
    expected = np.mean([math.log1p(math.exp(-BETA * (c - r))) for c, r in pair_margins(policy, reference)])
    assert abs(expected - math.log(2)) > 0.05, "or the test could not tell policies apart"
    for cutting in CUTTINGS:
        assert step(policy, task_of(reference), cutting)[1] == pytest.approx(expected, rel=1e-5)


def test_gradients_are_those_of_the_loop_over_pairs():
    policy, reference = tiny_policy(0), tiny_policy(1)
    frozen = [alone(reference, e) for e in RANKINGS]
    losses = []
    for example, listed, ref in zip(RANKINGS, PAIRS, frozen, strict=True):
        sums = []
        for tokens in example.responses:
            ids = torch.from_numpy(tokens).long()
            table = policy.lm(ids[None]).logits[0].log_softmax(-1)
            positions = torch.arange(example.prompt_tokens, len(tokens))
            sums.append(table[positions - 1, ids[positions]].sum())
        losses += [-torch.log(torch.sigmoid(BETA * (sums[a] - ref[a] - sums[b] + ref[b]))) for a, b in listed]
    torch.stack(losses).mean().backward()
    expected = [p.grad.clone() for p in policy.parameters()]
    for cutting in CUTTINGS:
        step(policy, task_of(reference), cutting)
        for p, want in zip(policy.parameters(), expected, strict=True):
            assert float((p.grad - want).abs().max()) <= 1e-4 * float(want.abs().max())


def test_metrics_are_means_over_pairs_whatever_the_cut_and_are_forgotten_once_read():
    policy, reference = tiny_policy(0), tiny_policy(1)
    pairs = pair_margins(policy, reference)
    expected = {
        "accuracy": np.mean([c > r for c, r in pairs]),
        "margin": np.mean([BETA * (c - r) for c, r in pairs]),
        "chosen_log_ratio": np.mean([c for c, _ in pairs]),
        "rejected_log_ratio": np.mean([r for _, r in pairs]),
    }
    assert 0 < expected["accuracy"] < 1
    task = task_of(reference)
    for cutting in CUTTINGS:
        step(policy, task, cutting)
        assert task.take_metrics() == pytest.approx(expected, rel=1e-4)


def test_a_dummy_adds_nothing_to_loss_gradients_or_metrics():
    policy, task = tiny_policy(0), task_of(tiny_policy(1))
    loss = task.loss(policy, task.dummy(CPU), 11.0)
    loss.backward()
    assert loss.item() == 0.0
    assert all(float(p.grad.abs().max()) == 0.0 for p in policy.parameters() if p.grad is not None)
    assert set(task.take_metrics().values()) == {0.0}


def test_equal_implicit_rewards_count_half():
    twins = RankingExample((np.array([1, 2, 3], np.int32),) * 2, (1, 2), 1, "", (2, 2))
    task = PreferenceTask([twins], [[-4.0, -4.0]], BETA)
    task.loss(tiny_policy(), task.cut([0], Cutting(100, packed=False), CPU)[0], 1.0)
    metrics = task.take_metrics()
    assert (metrics["accuracy"], metrics["margin"]) == (0.5, 0.0)


# ------------------------------------------------------------------------------------------------------ log-probs


@pytest.mark.parametrize("cutting", CUTTINGS, ids=str)
def test_log_probs_of_responses_are_those_of_each_alone(cutting):
    module = tiny_policy()
    found = response_logprobs(PlainEngine(module), RANKINGS, cutting, silent, "reference")
    for got, example in zip(found, RANKINGS, strict=True):
        assert got == pytest.approx(alone(module, example), rel=1e-5)


def test_a_long_pass_over_the_rankings_says_every_so_often_that_it_lives(monkeypatch):
    monkeypatch.setattr("rayrlhf.supervised.preference.RANKINGS_A_REPORT", 3)
    module, heard = tiny_policy(), []
    found = response_logprobs(PlainEngine(module), RANKINGS, Cutting(60), heard.append, "reference")
    assert heard == [{"phase": "reference"}] * 2
    whole = [alone(module, e) for e in RANKINGS]
    assert [x for row in found for x in row] == pytest.approx([x for row in whole for x in row], rel=1e-5)


def test_no_rankings_have_no_log_probs():
    assert response_logprobs(PlainEngine(tiny_policy()), [], Cutting(60), silent, "reference") == []


# ------------------------------------------------------------------------------------------------------- training


def trained(rank: int = 0, world_size: int = 1, module: torch.nn.Module | None = None, **changes) -> list[dict]:
    """The records of a training whose reference is the model as it starts, as in the stage."""
    engine = PlainEngine(module or tiny_policy(), sgd=True, rank=rank, world_size=world_size)
    reference = response_logprobs(engine, RANKINGS, Cutting(25, packed=False), silent, "reference")
    records: list[dict] = []
    train(engine, PreferenceTask(RANKINGS, reference, BETA), settings_of(**changes), records.append)
    return records


def test_the_first_loss_is_log_2_and_training_raises_margin_and_accuracy():
    records = trained()
    assert [r["step"] for r in records] == [1, 2, 3, 4, 5, 6]
    assert records[0]["loss"] == pytest.approx(0.69314718, abs=1e-5)
    assert abs(records[0]["margin"]) < 1e-4
    assert records[-1]["loss"] < records[0]["loss"] - 0.02
    assert records[-1]["margin"] > 0.02
    assert records[-1]["chosen_log_ratio"] > records[-1]["rejected_log_ratio"]
    assert records[-1]["accuracy"] > 0.5


def test_the_first_step_is_logged_whatever_the_interval():
    assert [r["step"] for r in trained(log_every=4)] == [1, 4, 6]


@pytest.mark.parametrize("world_size", [3, 5])  # four prompts: of five ranks one has nothing but dummies
def test_log_probs_and_records_do_not_depend_on_the_ranks(monkeypatch, world_size):
    names = ("loss", "accuracy", "margin", "chosen_log_ratio", "rejected_log_ratio")

    def on_rank(rank: int, size: int, policy: torch.nn.Module, other: torch.nn.Module) -> dict:
        engine = PlainEngine(other, rank=rank, world_size=size)
        reference = response_logprobs(engine, RANKINGS, Cutting(20), silent, "reference")
        records: list[dict] = []
        engine = PlainEngine(policy, rank=rank, world_size=size)
        train(engine, PreferenceTask(RANKINGS, reference, BETA), settings_of(epochs=1.0), records.append)
        return {name: records[0][name] for name in names}

    expected = on_rank(0, 1, tiny_policy(0), tiny_policy(1))
    models = [(tiny_policy(0), tiny_policy(1)) for _ in range(world_size)]  # here: threads share torch's random state
    for got in Ranks(world_size, monkeypatch).run(lambda rank: on_rank(rank, world_size, *models[rank])):
        assert got == pytest.approx(expected, rel=1e-4)


def record_of(step: int, loss: float) -> dict:
    return {"step": step, "steps": 9, "loss": loss}


@pytest.mark.parametrize(
    ("dtype", "loss"), [("float32", 0.6925), ("float32", 0.6939), ("bfloat16", 0.66), ("bfloat16", 0.73)]
)
def test_a_first_loss_of_log_2_up_to_rounding_passes(dtype, loss):
    records: list[dict] = []
    checking_first_loss(records.append, dtype)(record_of(1, loss))
    assert records == [record_of(1, loss)]


@pytest.mark.parametrize(
    ("dtype", "loss"), [("float32", 0.6920), ("float32", 0.6943), ("float32", math.nan), ("bfloat16", 0.75)]
)
def test_another_first_loss_is_written_and_then_stops_the_run(dtype, loss):
    records: list[dict] = []
    with pytest.raises(TrainingError, match=r"dpo's first loss is .* log 2, 0\.693147") as caught:
        checking_first_loss(records.append, dtype)(record_of(1, loss))
    assert len(records) == 1
    assert "dropout" in caught.value.hint
    assert "model.packed=false" in caught.value.hint


def test_only_the_first_step_is_held_to_log_2():
    records: list[dict] = []
    log = checking_first_loss(records.append, "float32")
    for record in ({"phase": "training"}, record_of(1, 0.693147), record_of(2, 0.3)):
        log(record)
    assert len(records) == 3


def test_a_reference_of_other_weights_is_found_at_the_first_step():
    engine = PlainEngine(tiny_policy(0))
    with pytest.raises(TrainingError, match="dpo's first loss"):
        train(engine, task_of(tiny_policy(1)), settings_of(), checking_first_loss(silent, "float32"))
