"""`reward`: the reward model, from rankings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rayrlhf.data.batching import Cutting
from rayrlhf.data.prompts import RankingExample
from rayrlhf.errors import TrainingError
from rayrlhf.evaluation.calibration import pair_accuracy
from rayrlhf.stages.context import StageContext
from rayrlhf.stages.training import TrainingJob, fetch, run_training, worker_log

if TYPE_CHECKING:
    from rayrlhf.engines.deepspeed import Learner
    from rayrlhf.models.build import ScalarModel

__all__ = ["normalisation", "run_reward"]


def run_reward(context: StageContext, parents: dict[str, str], workspace: Path) -> dict[str, Any]:
    """The SFT model with a scalar head on rankings, then normalised by the scores of demonstrations."""
    split = context.data.reward
    demonstrations = context.data.sft.train if context.config.data.demonstrations else []
    result = run_training(
        context,
        "reward",
        context.config.reward,
        _train_reward_model,
        (split.train, split.heldout, [d.tokens for d in demonstrations]),
        workspace,
        model=parents["sft"],
        unit_variance=context.config.reward.unit_variance,
    )
    context.data.tokenizer.save_pretrained(workspace / "model")
    for source, row in result.get("accuracy", {}).items():
        row["pairs_before_dropping"] = split.counts["heldout_pairs"][source]
    return result | {"data": split.counts}


def normalisation(scores: Sequence[float], unit_variance: bool) -> tuple[float, float]:
    """(bias, scale) by which (score - bias) / scale averages 0 over the demonstrations (Ouyang et al. 2022, sec. 3.5).

    Args:
        scores: raw scores of the demonstrations.
        unit_variance: whether they are to have (population) variance 1 too, as in Ziegler et al. 2019, arXiv
            1909.08593, sec. 2; the scale is 1 otherwise.

    Raises:
        TrainingError: a score is not finite, or a scale is asked for and there is none.
    """
    values = np.asarray(scores, dtype=np.float64)
    if not np.isfinite(values).all():
        raise TrainingError("reward: scores of demonstrations are not finite", "lower reward.learning_rate")
    bias, std = float(values.mean()), float(values.std())
    if not unit_variance:
        return bias, 1.0
    # Equal scores can differ by float32's rounding; to divide by that would make rewards of it.
    if std <= 1e-6 * float(np.abs(values).max()):
        raise TrainingError(
            f"reward.unit_variance: the scores of {len(values)} demonstrations do not vary (standard deviation "
            f"{std:.3g}), and cannot be scaled to variance 1",
            "give data.demonstrations that differ, or set reward.unit_variance=false",
        )
    return bias, std


def _train_reward_model(job: TrainingJob) -> dict[str, Any]:
    """Worker: train, measure on held-out rankings, normalise, save."""
    from rayrlhf.engines.deepspeed import Learner
    from rayrlhf.engines.scoring import check_packing
    from rayrlhf.models.build import new_scalar
    from rayrlhf.supervised.checkpoints import TrainingCheckpoints
    from rayrlhf.supervised.loop import train
    from rayrlhf.supervised.ranking import RankingTask

    assert job.model is not None
    model = new_scalar(job.model, job.trust_remote_code, job.seed, zero_stage=job.learner.zero_stage)
    learner = Learner(model, job.learner)
    if job.train.cutting.packed:
        check_packing(learner, job.learner.dtype)
    log = worker_log(job, learner.rank)
    examples, heldout, demonstrations = fetch(job)
    cutting = job.train.cutting
    log({"phase": "training"})
    checkpoints = TrainingCheckpoints(learner, job.checkpoints, log)
    trained = train(learner, RankingTask(examples), job.train, log, checkpoints=checkpoints)
    result: dict[str, Any] = {"examples": len(examples)} | {f"train_{k}": v for k, v in trained.items()}
    result |= checkpoints.figures
    log({"phase": "evaluating"})
    result |= _evaluate(model, learner, heldout, demonstrations, cutting, job.extra["unit_variance"])
    log({"phase": "saving"})
    learner.save_pretrained(model.classifier, Path(job.workspace) / "model")
    return result


def _evaluate(
    model: ScalarModel,
    learner: Learner,
    heldout: Sequence[RankingExample],
    demonstrations: Sequence[np.ndarray],
    cutting: Cutting,
    unit_variance: bool,
) -> dict[str, Any]:
    """What the trained scores are worth, then what they are counted in from now on."""
    from rayrlhf.supervised.ranking import RankingTask, score_sequences

    result: dict[str, Any] = {}
    if heldout:
        # Before the scale is set: differences are log-odds, and can be calibrated, only as they were trained.
        result["accuracy"] = pair_accuracy(heldout, RankingTask(heldout).scores(learner, cutting))
    if demonstrations:
        model.normalise(*normalisation(score_sequences(learner, demonstrations, cutting), unit_variance))
        result["normalisation"] = {"bias": model.bias, "scale": model.scale, "demonstrations": len(demonstrations)}
    return result
