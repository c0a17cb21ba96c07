"""`reward`: the reward model, from rankings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rayrlhf.evaluation.calibration import pair_accuracy
from rayrlhf.stages.context import StageContext
from rayrlhf.stages.training import TrainingJob, fetch, run_training, worker_log

__all__ = ["run_reward"]


def run_reward(context: StageContext, parents: dict[str, str], workspace: Path) -> dict[str, Any]:
    """The SFT model with a scalar head on rankings, then shifted so that demonstrations average 0."""
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
    )
    context.data.tokenizer.save_pretrained(workspace / "model")
    for source, row in result.get("accuracy", {}).items():
        row["pairs_before_dropping"] = split.counts["heldout_pairs"][source]
    return result | {"data": split.counts}


def _train_reward_model(job: TrainingJob) -> dict[str, Any]:
    """Worker: train, normalise, measure held-out accuracy, save."""
    from rayrlhf.engines.deepspeed import Learner
    from rayrlhf.engines.scoring import check_packing
    from rayrlhf.engines.supervised import RankingTask, score_sequences, train
    from rayrlhf.models.build import new_scalar

    assert job.model is not None
    model = new_scalar(job.model, job.trust_remote_code, job.seed)
    learner = Learner(model, job.learner)
    if job.train.cutting.packed:
        check_packing(learner, job.learner.dtype)
    log = worker_log(job, learner.rank)
    examples, heldout, demonstrations = fetch(job)
    cutting = job.train.cutting
    log({"phase": "training"})
    trained = train(learner, RankingTask(examples), job.train, log)
    result: dict[str, Any] = {"examples": len(examples)} | {f"train_{k}": v for k, v in trained.items()}
    log({"phase": "evaluating"})
    if demonstrations:
        scores = score_sequences(learner, demonstrations, cutting)
        model.normalise(sum(scores) / len(scores), 1.0)
        result["normalisation"] = {"bias": model.bias, "scale": model.scale, "demonstrations": len(scores)}
    if heldout:
        task = RankingTask(heldout)
        result["accuracy"] = pair_accuracy(heldout, task.scores(learner, cutting))
    log({"phase": "saving"})
    learner.save_pretrained(model.classifier, Path(job.workspace) / "model")
    return result
