"""`pretrain` and `sft`: language modelling, on plain text and on what people answered, text mixed in if asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from rayrlhf.config.training import PretrainMixConfig, SelectConfig
from rayrlhf.data.prompts import LMExample
from rayrlhf.engines.deepspeed import FrozenModel, Learner
from rayrlhf.engines.scoring import check_packing
from rayrlhf.engines.tasks import LanguageTask
from rayrlhf.models.build import PolicyModel, from_scratch, load_policy, load_scalar
from rayrlhf.stages.context import StageContext
from rayrlhf.stages.lineage import absolute
from rayrlhf.stages.selection import BestEpoch, ResponseLimits, mean_reward, spread_prompts
from rayrlhf.stages.training import TrainingJob, fetch, run_training, worker_log
from rayrlhf.supervised.checkpoints import TrainingCheckpoints
from rayrlhf.supervised.loop import Mix, train

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
        (split.train, split.heldout, []),
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
    split, tokenizer, sft = context.data.sft, context.data.tokenizer, context.config.sft
    result = run_training(
        context,
        "sft",
        sft,
        _train_language_model,
        (split.train, split.heldout, context.data.sft_text),
        workspace,
        model=parents["pretrain"],
        dropout=sft.dropout,
        mix=sft.pretrain_mix,
        select=sft.select,
        judge=None if sft.select.reward_model is None else absolute(sft.select.reward_model),
        limits=ResponseLimits(sft.max_response_tokens, tokenizer.eos_token_id, tokenizer.pad_token_id),
    )
    tokenizer.save_pretrained(workspace / "model")
    return result | {"data": split.counts}


def _train_language_model(job: TrainingJob) -> dict[str, Any]:
    """Worker: train, measure the held-out loss before and after, save the last epoch or the best one."""
    model = _build(job)
    learner = Learner(model, job.learner)
    if job.train.cutting.packed:
        check_packing(learner, job.learner.dtype)
    log = worker_log(job, learner.rank)
    examples, heldout, texts = fetch(job)
    result: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters()), "examples": len(examples)}
    held = LanguageTask(heldout) if heldout else None
    best = _best_epoch(job, learner, model, held, log)
    checkpoints = TrainingCheckpoints(learner, job.checkpoints, log, best)

    def heldout_before() -> dict[str, Any]:
        if held is None:
            return {}
        log({"phase": "evaluating"})
        return {"heldout_loss_before": held.evaluate(learner, job.train.cutting)}

    result |= checkpoints.before(heldout_before)
    torch.manual_seed(job.seed + 1 + learner.rank)  # each rank draws its own dropout
    log({"phase": "training"})
    trained = train(learner, LanguageTask(examples), job.train, log, _mix(job, texts), best, checkpoints)
    result |= {f"train_{k}": v for k, v in trained.items()} | checkpoints.figures
    if best:
        return result | {"selected": best.best, "heldout_loss": best.best["heldout_loss"]}
    if held:
        log({"phase": "evaluating"})
        result["heldout_loss"] = held.evaluate(learner, job.train.cutting)
    log({"phase": "saving"})
    learner.save_pretrained(model.lm, Path(job.workspace) / "model")
    return result


def _build(job: TrainingJob) -> PolicyModel:
    if job.model is not None:
        return load_policy(job.model, job.trust_remote_code, job.extra["dropout"], zero_stage=job.learner.zero_stage)
    x = job.extra
    return from_scratch(x["scratch"], x["vocab_size"], x["eos"], x["pad"], job.seed)


def _mix(job: TrainingJob, texts: Sequence[LMExample]) -> Mix | None:
    """Worker: the text that is learned beside the demonstrations."""
    if not texts:
        return None
    config: PretrainMixConfig = job.extra["mix"]
    size = max(1, round(config.examples_per_demonstration * job.train.batch_size))
    # No run's own seed is that large: the text is shuffled unlike the demonstrations of any run.
    return Mix("pretrain_loss", LanguageTask(texts), config.coef, size, seed=2**31 + job.seed)


def _best_epoch(
    job: TrainingJob,
    learner: Learner,
    model: PolicyModel,
    held: LanguageTask | None,
    log: Callable[[dict[str, Any]], None],
) -> BestEpoch | None:
    """Worker: what judges the epochs, unless the last one is kept whatever it is."""
    select: SelectConfig | None = job.extra.get("select")
    if select is None or select.by == "last":
        return None
    assert held is not None  # preflight.check_selection
    cutting = job.train.cutting
    judges: dict[str, Callable[[], float]] = {"heldout_loss": lambda: held.evaluate(learner, cutting)}
    if job.extra["judge"] is not None:
        scalar = load_scalar(job.extra["judge"], job.trust_remote_code)
        reward = FrozenModel(scalar, 0, job.learner.dtype, job.learner.device)
        if cutting.packed:
            check_packing(reward, job.learner.dtype)
        prompts, limits = spread_prompts(held.examples, select.prompts), job.extra["limits"]
        judges["reward"] = lambda: mean_reward(learner, model.lm, reward, prompts, limits, cutting)
    return BestEpoch(learner, model.lm, judges, select.by, Path(job.workspace) / "model", log)
