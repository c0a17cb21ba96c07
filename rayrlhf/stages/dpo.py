"""`dpo`: the baseline without a reward model or sampling (Rafailov et al. 2023), from the rankings of `reward`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rayrlhf.evaluation.calibration import pair_accuracy
from rayrlhf.stages.context import StageContext
from rayrlhf.stages.training import TrainingJob, fetch, run_training, worker_log

__all__ = ["run_dpo"]


def run_dpo(context: StageContext, parents: dict[str, str], workspace: Path) -> dict[str, Any]:
    """The SFT model, made to prefer what people preferred, with itself as the reference."""
    split = context.data.dpo
    result = run_training(
        context,
        "dpo",
        context.config.dpo,
        _train_on_preferences,
        (split.train, split.heldout),
        workspace,
        model=parents["sft"],
        beta=context.config.dpo.beta,
    )
    context.data.tokenizer.save_pretrained(workspace / "model")
    for source, row in result.get("accuracy", {}).items():
        row["pairs_before_dropping"] = split.counts["heldout_pairs"][source]
    return result | {"data": split.counts}


def _train_on_preferences(job: TrainingJob) -> dict[str, Any]:
    """Worker: take the reference's log-probs, train, measure held-out accuracy of the implicit reward, save."""
    from rayrlhf.engines.deepspeed import Learner
    from rayrlhf.engines.scoring import check_packing
    from rayrlhf.models.build import load_policy
    from rayrlhf.supervised.checkpoints import TrainingCheckpoints
    from rayrlhf.supervised.loop import train
    from rayrlhf.supervised.preference import PreferenceTask, checking_first_loss, response_logprobs

    assert job.model is not None
    model = load_policy(job.model, job.trust_remote_code, zero_stage=job.learner.zero_stage)
    learner = Learner(model, job.learner)
    cutting, beta = job.train.cutting, job.extra["beta"]
    if cutting.packed:
        check_packing(learner, job.learner.dtype)
    log = worker_log(job, learner.rank)
    examples, heldout = fetch(job)
    checkpoints = TrainingCheckpoints(learner, job.checkpoints, log)
    reference = checkpoints.before(
        lambda: {
            name: response_logprobs(learner, rankings, cutting, log, "reference")
            for name, rankings in (("train", examples), ("heldout", heldout))
        }
    )
    log({"phase": "training"})
    task = PreferenceTask(examples, reference["train"], beta)
    trained = train(learner, task, job.train, checking_first_loss(log, job.learner.dtype), checkpoints=checkpoints)
    result: dict[str, Any] = {"examples": len(examples), "pairs": int(task.denominator(range(len(examples))))}
    result |= {f"train_{name}": value for name, value in trained.items()} | checkpoints.figures
    if heldout:
        policy = response_logprobs(learner, heldout, cutting, log, "evaluating")
        rewards = [
            [beta * (p - r) for p, r in zip(*both, strict=True)]
            for both in zip(policy, reference["heldout"], strict=True)
        ]
        result["accuracy"] = pair_accuracy(heldout, rewards)
    log({"phase": "saving"})
    learner.save_pretrained(model.lm, Path(job.workspace) / "model")
    return result
