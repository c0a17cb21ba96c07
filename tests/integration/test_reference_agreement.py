"""The DeepSpeed learners against `rayrlhf.reference`: scores, experience, losses, gradients, weights after a step.

One single process and one pair of processes run every case in turn, no Ray: ZeRO stages 0 to 3, three micro-batch
budgets, padded and packed, Llama and GPT-2, tied and untied heads. The reference runs in float64 on the same weights
and the learners in float32, so a gap is the product's rounding and no more.

Gradients come from DeepSpeed's public `safe_get_full_grad`, read between the last backward pass and the optimizer's
step, in every stage. Weights are compared after an AdamW step, which makes much of a tiny gap, and after an SGD step,
strictly: a learner has AdamW only, but with eps = rate = 1e6 its first step is -g / (1 + |g| / 1e6).
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from rayrlhf import reference
from rayrlhf.config.model import FromScratch
from rayrlhf.data.batching import Cutting
from rayrlhf.data.prompts import LMExample, RankingExample
from rayrlhf.models.build import PolicyModel, ScalarModel, from_scratch
from rayrlhf.types import Experience, Rollout, RolloutInfo, Scores
from tests.ranks import run_ranks

pytestmark = pytest.mark.integration

VOCAB, CLIP, TEMPERATURE = 64, 0.2, 0.8
# Past this norm gradients are scaled down. Below the norm of some cases and above that of others.
MAX_NORM = 1.0
# GPT-2's last bias moves all scores alike, so the ranking loss has no gradient there: float32 leaves some 1e-10 of it,
# to which "relative to the largest entry" does not apply.
NO_GRADIENT = {("reward", "gpt2"): "transformer.ln_f.bias"}
NORMALISATION = (0.3, 1.7)
PTX_COEF = 2.5
BLOCKS = np.random.default_rng(17).integers(2, VOCAB, (6, 12)).astype(np.int32)
TEXT_ROWS = [5, 0, 3]
PATIENCE_S = 280.0
KL_COEF, GAMMA, LAM = 0.1, 0.99, 0.95
MIX_COEF = 0.5
STAGES = [0, 1, 2, 3]
# A key of ZeRO's own (DeepSpeed's default): else one rank, which has nothing to shard, would go back to stage 0.
AS_ASKED = {"zero_optimization": {"allgather_partitions": True}}
# One row at a time, a few, all at once; and the optimizer that steps. Padded rows, then packed ones.
BUDGETS = {
    (16, False): "adamw",
    (64, False): "sgd",
    (4096, False): "adamw",
    (16, True): "sgd",
    (64, True): "adamw",
    (4096, True): "sgd",
}
ARCHITECTURES = ["llama", "gpt2"]
HEADS = {"tied": True, "untied": False}


@dataclass(frozen=True)
class Adam:
    learning_rate: float
    eps: float
    weight_decay: float
    betas: tuple[float, float] = (0.9, 0.95)


LEARNERS = {"adamw": Adam(1e-3, 1e-5, 0.1), "sgd": Adam(1e6, 1e6, 0.0)}


# ---- the same models and data in every process ----------------------------------------------------------------------


def policy(architecture: str, tied: bool, seed: int = 3) -> PolicyModel:
    spec = FromScratch(
        architecture=architecture,
        vocab_size=300,
        hidden_size=32,
        layers=2,
        heads=2,
        kv_heads=1 if architecture == "llama" else None,
        context=64,
        tie_embeddings=tied,
    )
    model = from_scratch(spec, VOCAB, 0, 1, seed=seed)
    # Fresh weights give near uniform attention; larger ones give every parameter a gradient worth comparing.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3.0)
    return model


def scalar(architecture: str, seed: int = 5) -> ScalarModel:
    config = copy.deepcopy(policy(architecture, True).lm.config)
    config.num_labels = 1
    torch.manual_seed(seed)
    return ScalarModel(AutoModelForSequenceClassification.from_config(config, dtype=torch.float32))


def value_model(architecture: str) -> ScalarModel:
    model = scalar(architecture)
    model.normalise(*NORMALISATION)
    return model


def rollouts() -> list[Rollout]:
    """Made-up responses of very different lengths."""
    rng = np.random.default_rng(7)
    made = []
    for i in range(7):
        prompt, response = int(rng.integers(1, 6)), int(rng.integers(1, 14))
        row = rng.integers(2, VOCAB, prompt + response).astype(np.int32)
        info = RolloutInfo(i, i, prompt + response, response, truncated=False)
        made.append(Rollout(info, row, np.zeros(response, np.float32), np.zeros(response, np.int32)))
    return made


@cache
def experiences(architecture: str, tied: bool) -> list[Experience]:
    """Old log-probs and values near the models' own, so that some tokens are clipped and some are not."""
    rng = np.random.default_rng(11)
    lm, classifier = policy(architecture, tied).lm, value_model(architecture).classifier
    made = []
    for rollout in rollouts():
        sample = reference.Sample.of(rollout)
        scored = reference.score(sample, lm, lm, classifier, classifier, TEMPERATURE, NORMALISATION, NORMALISATION)

        def noisy(base: Any, scale: float, n: int = rollout.info.response_tokens) -> np.ndarray:
            return (np.asarray(base) + rng.normal(size=n) * scale).astype(np.float32)

        old_logprobs, old_values = noisy(scored.logprobs, 0.2), noisy(scored.values, 0.2)
        # Whitened advantages make the loss a sum that cancels to nothing, of which 1e-6 would be less than rounding.
        advantages, returns = noisy(0.7, 1.0), noisy(scored.values, 0.5)
        made.append(Experience(rollout, old_logprobs, advantages, returns, old_values))
    return made


def demonstrations() -> list[LMExample]:
    """The same rows with their prompts masked, and two plain texts."""
    made = [LMExample(r.tokens, r.prompt_tokens, "") for r in rollouts()]
    made[2:4] = [LMExample(e.tokens, 0, "") for e in made[2:4]]
    return made


def plain_texts() -> list[LMExample]:
    rng = np.random.default_rng(17)
    return [LMExample(rng.integers(2, VOCAB, n).astype(np.int32), 0, "") for n in (15, 15, 9)]


def rankings() -> list[RankingExample]:
    """K from 2 to 4; ties within a prompt, and a prompt of ties alone."""
    rng = np.random.default_rng(13)
    made = []
    for ranks in [(2, 1, 3), (1, 1, 2, 3), (2, 2), (1, 2)]:
        prompt = rng.integers(2, VOCAB, 3)
        rows = tuple(np.r_[prompt, rng.integers(2, VOCAB, rng.integers(1, 9))].astype(np.int32) for _ in ranks)
        made.append(RankingExample(rows, ranks, 3, "", tuple(0 for _ in ranks)))
    return made


# ---- what the reference says -----------------------------------------------------------------------------------------


def yardstick(module: nn.Module) -> Any:
    return module.double()


def optimizer(model: nn.Module, kind: str) -> torch.optim.Optimizer:
    if kind == "sgd":
        return torch.optim.SGD(model.parameters(), 1.0)
    adam = LEARNERS[kind]
    return torch.optim.AdamW(model.parameters(), adam.learning_rate, adam.betas, adam.eps, adam.weight_decay)


def expected_policy(architecture: str, tied: bool, kind: str) -> reference.Step:
    lm = yardstick(policy(architecture, tied).lm)
    batch = [reference.PPOExample.of(e) for e in experiences(architecture, tied)]
    return reference.policy_step(lm, optimizer(lm, kind), batch, CLIP, TEMPERATURE, max_norm=MAX_NORM)


def expected_ptx(architecture: str, tied: bool, kind: str) -> reference.Step:
    """PPO-ptx: the policy's step with pretraining text in it."""
    lm = yardstick(policy(architecture, tied).lm)
    batch = [reference.PPOExample.of(e) for e in experiences(architecture, tied)]
    text = [reference.Sample(torch.tensor(BLOCKS[i]).long(), 0) for i in TEXT_ROWS]
    return reference.policy_step(lm, optimizer(lm, kind), batch, CLIP, TEMPERATURE, text, PTX_COEF, max_norm=MAX_NORM)


def expected_sft(architecture: str, tied: bool, kind: str) -> reference.Step:
    lm = yardstick(policy(architecture, tied).lm)
    batch = [reference.Sample(torch.tensor(e.tokens).long(), e.prompt_tokens) for e in demonstrations()]
    return reference.sft_step(lm, optimizer(lm, kind), batch, max_norm=MAX_NORM)


def expected_mixed(architecture: str, tied: bool, kind: str) -> reference.Step:
    lm = yardstick(policy(architecture, tied).lm)

    def terms(examples: list[LMExample], coef: float) -> Iterator[Tensor]:
        tokens = sum(len(e.tokens) - max(1, e.prompt_tokens) for e in examples)
        for e in examples:
            sample = reference.Sample(torch.tensor(e.tokens).long(), e.prompt_tokens)
            yield coef * reference.language_loss(lm, sample) / tokens

    objectives = {"sft": terms(demonstrations(), 1.0), "text": terms(plain_texts(), MIX_COEF)}
    return reference.take_step(lm, optimizer(lm, kind), objectives, MAX_NORM)


def expected_value(architecture: str, tied: bool, kind: str) -> reference.Step:
    classifier = yardstick(value_model(architecture).classifier)
    batch = [reference.PPOExample.of(e) for e in experiences(architecture, tied)]
    return reference.value_step(classifier, optimizer(classifier, kind), batch, CLIP, NORMALISATION, MAX_NORM)


def expected_reward(architecture: str, tied: bool, kind: str) -> reference.Step:
    classifier = yardstick(scalar(architecture).classifier)
    batch = [
        reference.Comparison(tuple(reference.Sample(torch.tensor(r).long(), 3) for r in e.responses), e.ranks)
        for e in rankings()
    ]
    return reference.reward_step(classifier, optimizer(classifier, kind), batch, MAX_NORM)


def expected_scores(architecture: str) -> list[reference.Scored]:
    models = policy(architecture, True).lm, policy(architecture, True, seed=4).lm
    scalars = value_model(architecture).classifier, scalar(architecture, seed=6).classifier
    ready = [yardstick(m) for m in (*models, *scalars)]
    return [
        reference.score(reference.Sample.of(r), *ready, TEMPERATURE, NORMALISATION, NORMALISATION) for r in rollouts()
    ]


# ---- what the learners say: in the spawned processes -----------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    module: Callable[[str, bool], nn.Module]
    heads: list[str]
    expected: Callable[[str, bool, str], reference.Step]


TASKS = {
    "policy": Task(policy, list(HEADS), expected_policy),
    "ptx": Task(policy, list(HEADS), expected_ptx),
    "sft": Task(policy, list(HEADS), expected_sft),
    "sft_mixed": Task(policy, ["tied"], expected_mixed),
    "value": Task(lambda architecture, tied: value_model(architecture), ["untied"], expected_value),
    "reward": Task(lambda architecture, tied: scalar(architecture), ["untied"], expected_reward),
}
CASES = [(task, a, head) for task in TASKS for a in ARCHITECTURES for head in TASKS[task].heads]


@contextmanager
def captured_gradients(learner: Any) -> Iterator[dict[str, Tensor]]:
    """The whole gradients, as the optimizer is about to get them; unclipped."""
    from deepspeed.utils import safe_get_full_grad

    gradients, step = dict[str, Tensor](), learner.engine.step

    def read_and_step() -> None:
        for name, parameter in learner.module.named_parameters():
            gradients[name] = safe_get_full_grad(parameter).clone()
        step()

    learner.engine.step = read_and_step
    yield gradients
    learner.engine.step = step


def deal(rows: list[int], sizes: list[int], world: int, uneven: bool) -> list[list[int]]:
    from rayrlhf.data.batching import balance

    if world == 2 and uneven:  # one rank gets a single row and runs dummies while the other works
        return [rows[:1], rows[1:]]
    return [[rows[i] for i in share] for share in balance([sizes[i] for i in rows], world)]


def run_step(
    task: str, architecture: str, tied: bool, learner: Any, budget: tuple[int, bool]
) -> tuple[Any, float, Any]:
    """One optimizer step of the product; (losses, gradient norm, gradient norms of its parts where measured)."""
    from rayrlhf.engines.learning import TextShare, UpdateSettings, update_policy, update_value
    from rayrlhf.engines.tasks import LanguageTask
    from rayrlhf.supervised.loop import Mix, TrainSettings, train
    from rayrlhf.supervised.ranking import RankingTask

    rate = LEARNERS[BUDGETS[budget]].learning_rate
    if task in ("policy", "ptx", "value"):
        data = experiences(architecture, tied)
        sizes = [e.rollout.info.tokens for e in data]
        mine = deal(list(range(len(data))), sizes, learner.world_size, budget[0] == 64)[learner.rank]
        settings = UpdateSettings(CLIP, Cutting(*budget), TEMPERATURE, ptx_coef=PTX_COEF)
        if task == "value":
            report = update_value(learner, data, [mine], data[0], settings, rate)
            return {"value": report["value/loss"]}, report["value/grad_norm"], {}
        text = None
        if task == "ptx":  # norms of the parts with some cuts and not with others: they must not change the step
            text = TextShare(BLOCKS, [TEXT_ROWS[learner.rank :: learner.world_size]], measure=budget[1])
        report = update_policy(learner, data, [mine], data[0], settings, rate, text)
        losses = {"policy": report["policy/loss"]}
        if text:
            losses["ptx"] = PTX_COEF * report["ptx/loss"]
        parts = {"policy": "policy/ppo_grad_norm", "ptx": "ptx/grad_norm"}
        return losses, report["policy/grad_norm"], {n: report[k] for n, k in parts.items() if k in report}
    supervised: Any = RankingTask(rankings()) if task == "reward" else LanguageTask(demonstrations())
    mix = Mix("text", LanguageTask(plain_texts()), MIX_COEF, 3, 0) if task == "sft_mixed" else None
    train_settings = TrainSettings(
        learning_rate=rate,
        batch_size=len(supervised.sizes),
        epochs=1,
        warmup_ratio=0.0,
        final_lr_ratio=0.1,
        cutting=Cutting(*budget),
        log_every=1,
        seed=0,
    )
    record = train(learner, supervised, train_settings, lambda record: None, mix)
    names = {"loss": (task.removesuffix("_mixed"), 1.0), "text": ("text", MIX_COEF)}
    return {n: record[k] * coef for k, (n, coef) in names.items() if k in record}, record["grad_norm"], {}


def new_learner(module: nn.Module, stage: int, kind: str = "adamw") -> Any:
    from rayrlhf.engines.deepspeed import Learner, LearnerSettings

    gc.freeze()  # ZeRO-3 collects garbage when it starts: without this, two thirds of the time goes there
    a = LEARNERS[kind]
    settings = LearnerSettings(
        zero_stage=stage,
        dtype="float32",
        device="cpu",
        learning_rate=a.learning_rate,
        betas=a.betas,
        eps=a.eps,
        weight_decay=a.weight_decay,
        grad_clip=MAX_NORM,
        max_loss=1e4,
        failed_folder="failed",
        role="test",
        deepspeed=AS_ASKED,
    )
    learner = Learner(module, settings)
    assert learner.zero_stage == stage
    return learner


def updates() -> dict[str, Any]:
    results = {}
    for task, architecture, head in CASES:
        for stage in STAGES:
            for budget, kind in BUDGETS.items():
                module = TASKS[task].module(architecture, HEADS[head])
                learner = new_learner(module, stage, kind)
                with captured_gradients(learner) as gradients:
                    losses, norm, parts = run_step(task, architecture, HEADS[head], learner, budget)
                weights = {n: t.clone() for bucket in learner.named_buckets(module, 4096) for n, t in bucket}
                results[task, architecture, head, stage, budget] = losses, norm, parts, gradients, weights
    return results


def estimates(architecture: str, stage: int, rank: int, world: int) -> list[tuple[int, dict[str, Tensor]]]:
    """Four models score the rollouts, then `estimate`; this rank's (sample id, numbers)."""
    from rayrlhf.engines.deepspeed import FrozenModel
    from rayrlhf.engines.estimation import EstimateSettings, estimate
    from rayrlhf.engines.scoring import score_logprobs, score_rewards, score_values

    def frozen(module: nn.Module) -> FrozenModel:
        return FrozenModel(module, 3 if stage == 3 else 0, "float32", "cpu")

    reward = scalar(architecture, seed=6)
    reward.normalise(*NORMALISATION)
    data = rollouts()
    shares = deal(list(range(len(data))), [r.info.tokens for r in data], world, stage == 1)
    mine, spare = [data[i] for i in shares[rank]], data[0]
    scores = Scores()
    scores.merge(score_logprobs(new_learner(policy(architecture, True), stage), mine, spare, Cutting(64), TEMPERATURE))
    sft = score_logprobs(frozen(policy(architecture, True, seed=4)), mine, spare, Cutting(64), TEMPERATURE)
    scores.merge(Scores(reference_logprobs=sft.logprobs))
    scores.merge(score_values(new_learner(value_model(architecture), stage), mine, spare, Cutting(64)))
    scores.merge(score_rewards(frozen(reward), mine, spare, Cutting(64)))
    settings = EstimateSettings("k1", GAMMA, LAM)
    made, _ = estimate(mine, scores, settings, KL_COEF, torch.device("cpu"))
    return [
        (
            e.rollout.info.sample_id,
            {
                "logprobs": torch.tensor(e.old_logprobs),
                "reference_logprobs": torch.tensor(scores.reference_logprobs[e.rollout.info.sample_id]),
                "values": torch.tensor(e.old_values),
                "reward": torch.tensor(scores.rewards[e.rollout.info.sample_id]),
                "returns": torch.tensor(e.returns),
                "advantages": torch.tensor(e.advantages),
            },
        )
        for e in made
    ]


def work(rank: int, world: int, port: int, folder: str) -> None:
    import deepspeed

    from rayrlhf.engines.distributed import Rendezvous, join_process_group

    join_process_group(Rendezvous(rank, world, "127.0.0.1", port, "cpu", 1, deterministic=True))
    found = {(a, s): estimates(a, s, rank, world) for a in ARCHITECTURES for s in (1, 3)}
    done = updates()
    torch.save((found, done if rank == 0 else {}), Path(folder) / f"{rank}.pt")
    deepspeed.comm.barrier()
    gc.unfreeze()
    deepspeed.comm.destroy_process_group()  # else its threads may outlive the interpreter, which then aborts


# ---- the comparison --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[1, 2], ids=["one_rank", "two_ranks"])
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, dict]:
    """(experience by architecture, stage and sample; updates by case, stage and budget)"""
    folder = tmp_path_factory.mktemp("agreement")
    run_ranks(work, request.param, folder, PATIENCE_S)
    ranks = [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(request.param)]
    found = {key: dict(pair for made, _ in ranks for pair in made[key]) for key in ranks[0][0]}
    return found, ranks[0][1]


@pytest.fixture(scope="module")
def expected() -> dict[tuple[str, str, str, str], reference.Step]:
    torch.set_num_threads(1)
    return {(*c, kind): TASKS[c[0]].expected(c[1], HEADS[c[2]], kind) for c in CASES for kind in LEARNERS}


def bare(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names of the Hugging Face model inside the product's wrapper: `lm.x` and `classifier.x` become `x`."""
    return {name.split(".", 1)[1]: tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_an_optimizer_step_is_the_references(case: tuple[str, str, str], stage: int, results, expected) -> None:
    for budget, kind in BUDGETS.items():
        want = expected[*case, kind]
        losses, norm, parts, gradients, weights = results[1][*case, stage, budget]
        gradients, weights = bare(gradients), bare(weights)
        where = f"budget {budget}, {kind}: "
        assert losses == pytest.approx(want.losses, rel=1e-6), where + "loss"
        assert parts == pytest.approx({n: want.gradient_norms[n] for n in parts}, rel=1e-5), where + "norm of a part"
        assert bool(parts) == (case[0] == "ptx" and budget[1])
        assert norm == pytest.approx(want.gradient_norm, rel=1e-5), where + "gradient norm"
        assert gradients.keys() == want.gradients.keys()
        wanted, wanted_weights = dict(want.gradients), dict(want.weights)
        if silent := NO_GRADIENT.get(case[:2]):
            assert max(wanted.pop(silent).abs().max(), gradients[silent].abs().max()) < 1e-8
            wanted_weights.pop(silent)
        difference = reference.first_difference(gradients, wanted, 1e-5)
        assert difference is None, where + f"the gradient of {difference}"
        difference = weight_difference(weights, wanted_weights, kind)
        assert difference is None, where + f"the weight {difference}"


def weight_difference(got: dict[str, Tensor], want: dict[str, Tensor], kind: str) -> str | None:
    if kind == "sgd":
        return reference.first_difference(got, want, 1e-5)
    rate = LEARNERS[kind].learning_rate
    for name, expected_weight in want.items():
        gap = (got[name] - expected_weight).abs()
        if not (gap.max() <= 2 * rate and gap.mean() <= 1e-2 * rate):
            return f"{name} differs by {gap.max():.3g}, on average by {gap.mean():.3g}"
    return None


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_scores_and_experience_are_the_references(architecture: str, stage: int, results) -> None:
    scored = expected_scores(architecture)
    estimated = reference.estimate(scored, KL_COEF, "k1", GAMMA, LAM)
    found = results[0][architecture, stage]
    assert sorted(found) == list(range(len(scored)))
    for sample, (s, e) in enumerate(zip(scored, estimated, strict=True)):
        want = {
            "logprobs": s.logprobs,
            "reference_logprobs": s.reference_logprobs,
            "values": s.values,
            "reward": s.reward,
            "returns": e.returns,
            "advantages": e.advantages,
        }
        difference = reference.first_difference(found[sample], want, 5e-6)
        assert difference is None, f"sample {sample}: {difference}"


def test_the_cases_exercise_both_sides_of_every_clip(expected) -> None:
    """Or agreement would say nothing about them."""
    for architecture in ARCHITECTURES:
        lm, classifier = policy(architecture, True).lm, value_model(architecture).classifier
        ratios, moves = [], []
        for e in map(reference.PPOExample.of, experiences(architecture, True)):
            with torch.no_grad():
                ratios.append((reference.response_logprobs(lm, e.sample, TEMPERATURE) - e.old_logprobs).exp())
                moves.append((reference.response_values(classifier, e.sample, *NORMALISATION) - e.old_values).abs())
        assert 0.1 < ((torch.cat(ratios) - 1).abs() > CLIP).double().mean() < 0.9
        assert 0.1 < (torch.cat(moves) > CLIP).double().mean() < 0.9
    norms = [step.gradient_norm for step in expected.values()]
    assert min(norms) < MAX_NORM < max(norms)
