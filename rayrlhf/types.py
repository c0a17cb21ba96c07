"""All records, in the order data flows.

    text        Demonstration, Ranking, Prompt           what a person wrote (data/ reads them)
    rollout     SampleRequest -> Rollout + RolloutInfo   what an engine is asked for, and sampled
    scoring     Scores                                   what the four models say of a rollout
    learning    Experience -> StepReport                 what a learner trains on, and what came of it

Shape legend: T tokens of one sequence (prompt + response), R tokens of its response. Arrays are NumPy so that
Ray moves them without copies and no reader needs torch. An `...Info` record holds scalars only: it is what the
driver sees; the record it describes stays in the object store.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

__all__ = [
    "ChoiceQuestion",
    "Demonstration",
    "Experience",
    "PretrainText",
    "Prompt",
    "PromptTokens",
    "Ranking",
    "Rollout",
    "RolloutInfo",
    "SampleRequest",
    "Scores",
    "StepReport",
    "Turns",
]

Turns = tuple[tuple[str, str], ...]
"""A conversation that ends with the user's turn: ((role, text), ...); a plain prompt is one user turn."""


@dataclass(frozen=True, slots=True)
class PretrainText:
    """One document of plain text."""

    text: str


@dataclass(frozen=True, slots=True)
class Demonstration:
    """A prompt and the response a person wrote for it."""

    prompt: Turns
    response: str
    source: str = ""


@dataclass(frozen=True, slots=True)
class Ranking:
    """K responses to one prompt, ranked by a person: rank 1 is best, equal ranks are ties.

    A comparison (chosen, rejected) is a ranking with K = 2 and ranks (1, 2).
    """

    prompt: Turns
    responses: tuple[str, ...]
    ranks: tuple[int, ...]
    source: str = ""
    unfinished: frozenset[int] = frozenset()
    """numbers of the responses that were cut before their end: no EOS follows them"""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt to sample responses for."""

    prompt: Turns
    source: str = ""


@dataclass(frozen=True, slots=True)
class ChoiceQuestion:
    """A multiple-choice or cloze question; `answer` is the number of the right choice, from 0."""

    prompt: str
    choices: tuple[str, ...]
    answer: int
    source: str = ""


@dataclass(frozen=True, slots=True)
class PromptTokens:
    """A prompt after the chat template and the tokenizer."""

    prompt_id: int
    tokens: np.ndarray
    """int32 [P]"""


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """One response to draw."""

    sample_id: int
    """unique in a run"""
    prompt_id: int
    seed: int
    """of the engine's random stream for this response alone"""


@dataclass(frozen=True, slots=True)
class RolloutInfo:
    """What the driver knows of a rollout: ids and scalars, never tokens."""

    sample_id: int
    prompt_id: int
    tokens: int
    """prompt + response tokens (T)"""
    response_tokens: int
    """R, the final EOS included"""
    truncated: bool
    """True when the response was cut by `rollout.max_tokens` before an EOS."""
    version: int = 0
    """of the policy that sampled its oldest token"""
    seconds: float = 0.0
    """from the start of the engine's call until it was finished; in a batch, from the first call for it"""


@dataclass(frozen=True, slots=True)
class Rollout:
    """A sampled response with the log-probs its engine gave it."""

    info: RolloutInfo
    tokens: np.ndarray
    """int32 [T]: prompt then response"""
    logprobs: np.ndarray
    """float32 [R]: the engine's log-probs of the response tokens at the sampling temperature"""
    versions: np.ndarray
    """int32 [R]: the version of the policy that sampled each token"""

    @property
    def prompt_tokens(self) -> int:
        return self.info.tokens - self.info.response_tokens


@dataclass(slots=True)
class Scores:
    """What one model says of some rollouts, keyed by sample id; each role fills its own field."""

    logprobs: dict[int, np.ndarray] = field(default_factory=dict)
    """float32 [R] per sample: the policy's, before this step's first update (policy); empty if the engine's are used"""
    reference_logprobs: dict[int, np.ndarray] = field(default_factory=dict)
    """float32 [R] per sample: the SFT model's (reference)"""
    values: dict[int, np.ndarray] = field(default_factory=dict)
    """float32 [R] per sample: value of the state before each response token (value model)"""
    rewards: dict[int, float] = field(default_factory=dict)
    """one scalar per sample, in the reward model's normalised units (reward model)"""
    failed: dict[int, str] = field(default_factory=dict)
    """samples without a score, and why: they must not train"""

    def merge(self, other: Scores) -> None:
        """Take in what another role, or another rank, says."""
        self.logprobs.update(other.logprobs)
        self.reference_logprobs.update(other.reference_logprobs)
        self.values.update(other.values)
        self.rewards.update(other.rewards)
        self.failed.update(other.failed)


@dataclass(frozen=True, slots=True)
class Experience:
    """One rollout, ready to train on."""

    rollout: Rollout
    old_logprobs: np.ndarray
    """float32 [R]: the policy's log-probs before this step's first update"""
    advantages: np.ndarray
    """float32 [R]; those of GAE whitened over all tokens of the step that are trained on"""
    returns: np.ndarray | None = None
    """float32 [R]; None where the advantages need no value model"""
    old_values: np.ndarray | None = None
    """float32 [R]; likewise"""
    weights: np.ndarray | None = None
    """float32 [R]: truncated importance weights of the loss; None for 1"""
    trained: bool = True
    """False for a response whose tokens are masked out of every loss"""


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one PPO step measured: metric name -> value, plus what the KL controller needs."""

    metrics: dict[str, float]
    kl: float
    """nats per response: the sum over a response, averaged over responses"""
    num_samples: int
    """responses that the KL is over; 0 while the critic alone learns"""
