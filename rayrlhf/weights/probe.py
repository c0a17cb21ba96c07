"""The log-prob probe: do trainer and engine, after a publish, give the same log-probs?

Fingerprints prove that bytes arrived. They cannot see an engine that packs its weights into another layout and
kept the old copy; a handful of log-probs over the whole vocabulary can.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["ProbeRow", "gap_error", "probe_rows"]

# Many targets after one short context: every weight takes part in each, and a publish does not wait for a long pass.
# With so few tokens a pass takes as long as reading the weights does; with twice as many, its products count.
TARGETS, CONTEXT = 64, 4


@dataclass(frozen=True, slots=True)
class ProbeRow:
    """Token ids: the log-prob of each target is asked for, each of them directly after the context."""

    context: list[int]
    targets: list[int]


def probe_rows(vocab_size: int, tokens: int, context: int) -> list[ProbeRow]:
    """At least `tokens` targets, evenly spread over the vocabulary, as are the contexts; no row fills `context`."""
    count = -(-tokens // TARGETS)
    ids = np.linspace(0, vocab_size - 1, count * TARGETS).astype(int)
    # Dealt like cards, so that each row spans the vocabulary instead of a corner of it.
    hands = [[int(t) for t in ids[i::count]] for i in range(count)]
    length = max(1, min(CONTEXT, context - 1))  # the engine generates one token after it
    return [ProbeRow(hands[i - 1][:: TARGETS // CONTEXT][:length], hand) for i, hand in enumerate(hands)]


def gap_error(trainer: Sequence[float], engine: Sequence[float], dtype: str, tolerance: float | None) -> str | None:
    """None if the log-probs agree, else a sentence that says by how much they do not.

    float32 is held to its largest difference (default 1e-4), bfloat16 to its mean (default 0.03): a single
    bfloat16 log-prob may be off by more through rounding alone.
    """
    if len(trainer) != len(engine):
        return f"the trainer probed {len(trainer)} tokens, the engine {len(engine)}"
    gap = np.abs(np.asarray(trainer, dtype=np.float64) - np.asarray(engine, dtype=np.float64))
    exact = dtype == "float32"
    measured = float(gap.max() if exact else gap.mean())
    allowed = tolerance if tolerance is not None else (1e-4 if exact else 0.03)
    if measured <= allowed:  # written so that a NaN does not pass
        return None
    word = "largest" if exact else "mean"
    return f"{word} log-prob difference {measured:.3g} is over {allowed:.3g} on {len(gap)} probed tokens"
