"""`pretrain` and `sft`: language modelling, on plain text and on what people answered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rayrlhf.stages.context import StageContext
from rayrlhf.stages.training import TrainingJob, fetch, run_training, worker_log

__all__ = ["run_pretrain", "run_sft"]


def run_pretrain(context: StageContext, parents: dict[str, str], workspace: Path) -> dict[str, Any]:
    """A causal LM from scratch on plain text, and its tokenizer."""
    tokenizer, split = context.data.tokenizer, context.data.pretrain
    scratch = context.config.model.from_scratch
    result = run_training(
        context,
        "pretrain",
        context.config.pretrain,
        _train_language_model,
        (split.train, split.heldout),
        workspace,
        model=None,
        scratch=scratch,
        vocab_size=len(tokenizer),
        eos=tokenizer.eos_token_id,
        pad=tokenizer.pad_token_id,
    )
    tokenizer.save_pretrained(workspace / "model")
    return result | {"data": split.counts}


def run_sft(context: StageContext, parents: dict[str, str], workspace: Path) -> dict[str, Any]:
    """The pretrained model on demonstrations, prompt tokens not learned (Ouyang et al. 2022, section 3.5)."""
    split = context.data.sft
    result = run_training(
        context,
        "sft",
        context.config.sft,
        _train_language_model,
        (split.train, split.heldout),
        workspace,
        model=parents["pretrain"],
        dropout=context.config.sft.dropout,
    )
    context.data.tokenizer.save_pretrained(workspace / "model")
    return result | {"data": split.counts}


def _train_language_model(job: TrainingJob) -> dict[str, Any]:
    """Worker: train, measure the held-out loss before and after, save."""
    import torch

    from rayrlhf.engines.deepspeed import Learner
    from rayrlhf.engines.scoring import check_packing
    from rayrlhf.engines.supervised import LanguageTask, train
    from rayrlhf.models.build import from_scratch, load_policy

    if job.model is None:
        x = job.extra
        model = from_scratch(x["scratch"], x["vocab_size"], x["eos"], x["pad"], job.seed)
    else:
        model = load_policy(job.model, job.trust_remote_code, job.extra["dropout"])
    learner = Learner(model, job.learner)
    if job.train.cutting.packed:
        check_packing(learner, job.learner.dtype)
    torch.manual_seed(job.seed + 1 + learner.rank)  # each rank draws its own dropout
    log = worker_log(job, learner.rank)
    examples, heldout = fetch(job)
    result: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters()), "examples": len(examples)}
    held = LanguageTask(heldout) if heldout else None
    if held:
        log({"phase": "evaluating"})
        result["heldout_loss_before"] = held.evaluate(learner, job.train.cutting)
    log({"phase": "training"})
    result |= {f"train_{k}": v for k, v in train(learner, LanguageTask(examples), job.train, log).items()}
    if held:
        log({"phase": "evaluating"})
        result["heldout_loss"] = held.evaluate(learner, job.train.cutting)
    log({"phase": "saving"})
    learner.save_pretrained(model.lm, Path(job.workspace) / "model")
    return result
