"""Worker: which epoch's weights `sft` keeps. Each is judged as it ends; the best one so far is on disk."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from rayrlhf.data.batching import Cutting, pad_rows
from rayrlhf.data.prompts import LMExample
from rayrlhf.engines.deepspeed import FrozenModel, Learner
from rayrlhf.errors import TrainingError
from rayrlhf.supervised.ranking import score_sequences

if TYPE_CHECKING:  # see models/build.py
    from transformers import PreTrainedModel

__all__ = ["BestEpoch", "ResponseLimits", "greedy_responses", "mean_reward", "spread_prompts"]

# What `sft.select.by` looks at, and whether more of it is better.
SIGN = {"heldout_loss": -1.0, "reward": 1.0}


@dataclass(frozen=True, slots=True)
class ResponseLimits:
    """Where a response ends, and what fills the rows of those that end earlier."""

    tokens: int
    eos: int
    pad: int


class BestEpoch:
    """`train`'s `after_epoch`: judges the model and, when it is better than all before, writes it to `folder`.

    The weights travel to disk alone, so a run needs no more memory for it; sharded ones are gathered as they are for
    any save, in which all ranks take part.
    """

    def __init__(
        self,
        learner: Learner,
        lm: PreTrainedModel,
        judges: Mapping[str, Callable[[], float]],
        by: str,
        folder: Path,
        log: Callable[[dict[str, Any]], None],
    ) -> None:
        """`judges` give the same number on every rank; `by` names the one that decides."""
        self._learner, self._lm = learner, lm
        self._judges, self._by = judges, by
        self._folder, self._log = folder, log
        self.best: dict[str, float] = {}
        """the step whose weights are in the folder, and what each judge said of them"""

    def __call__(self, step: int, steps: int) -> None:
        self._log({"phase": "evaluating"})
        scores = {name: judge() for name, judge in self._judges.items()}
        for name, score in scores.items():
            if not math.isfinite(score):
                raise TrainingError(f"sft: {name} after step {step} is {score}", "lower sft.learning_rate")
        self._log({"step": step, "steps": steps, **scores})
        sign = SIGN[self._by]
        if not self.best or sign * scores[self._by] > sign * self.best[self._by]:
            self.best = {"step": step, **scores}
            self._learner.save_pretrained(self._lm, self._folder)
        self._log({"phase": "training"})


def spread_prompts(examples: Sequence[LMExample], limit: int) -> list[np.ndarray]:
    """At most `limit` distinct prompts, int32 [P] each, evenly from all over the examples: files are often sorted."""
    distinct = list({e.tokens[: e.prompt_tokens].tobytes(): e.tokens[: e.prompt_tokens] for e in examples}.values())
    count = min(limit, len(distinct))
    return [distinct[i * len(distinct) // count] for i in range(count)]


def mean_reward(
    learner: Learner,
    lm: PreTrainedModel,
    reward: Learner | FrozenModel,
    prompts: Sequence[np.ndarray],
    limits: ResponseLimits,
    cutting: Cutting,
) -> float:
    """The reward model's mean score of the model's own greedy responses; shared out over the ranks, the same on all.

    Greedy, since a best epoch is to differ from the others by its weights and not by the luck of its draws.
    """
    # Each rank completes the rows that it is to score; the others' stay prompts here and are not looked at.
    mine, sequences = slice(learner.rank, None, learner.world_size), list(prompts)
    sequences[mine] = greedy_responses(lm, sequences[mine], limits, cutting.tokens, learner.device)
    scores = score_sequences(reward, sequences, cutting)
    return sum(scores) / len(scores)


def greedy_responses(
    lm: PreTrainedModel, prompts: Sequence[np.ndarray], limits: ResponseLimits, batch_tokens: int, device: torch.device
) -> list[np.ndarray]:
    """Prompt and response of each, int32 [T]: the likeliest token at every place, to the EOS or the limit."""
    from transformers import GenerationConfig

    if not prompts:
        return []
    size = max(1, batch_tokens // (max(map(len, prompts)) + limits.tokens))
    lm.eval()
    theirs = lm.generation_config
    # `generate` fills in whatever the model's own file says (penalties, other ends), which the policy knows nothing of.
    lm.generation_config = GenerationConfig()
    try:
        chunks = [prompts[i : i + size] for i in range(0, len(prompts), size)]
        return [row for chunk in chunks for row in _complete(lm, chunk, limits, device)]
    finally:
        lm.generation_config = theirs


def _complete(
    lm: PreTrainedModel, prompts: Sequence[np.ndarray], limits: ResponseLimits, device: torch.device
) -> list[np.ndarray]:
    """Rows are padded on the left, so that all responses start at one place; the mask keeps the padding unseen."""
    tokens = pad_rows([p[::-1] for p in prompts], limits.pad, np.int64)[:, ::-1]
    mask = pad_rows([np.ones(len(p)) for p in prompts], 0, np.int64)[:, ::-1]
    output: Tensor = lm.generate(
        input_ids=torch.from_numpy(tokens.copy()).to(device),
        attention_mask=torch.from_numpy(mask.copy()).to(device),
        do_sample=False,
        max_new_tokens=limits.tokens,
        eos_token_id=limits.eos,
        pad_token_id=limits.pad,
    )
    rows = []
    for prompt, response in zip(prompts, output[:, tokens.shape[1] :].cpu().numpy(), strict=True):
        ends = np.flatnonzero(response == limits.eos)
        rows.append(np.concatenate([prompt, response[: ends[0] + 1] if len(ends) else response]).astype(np.int32))
    return rows
