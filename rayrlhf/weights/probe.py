"""The log-prob probe: do trainer and engine, after a publish, give the same log-probs?

Fingerprints prove that bytes arrived. They cannot see an engine that packs its weights into another layout and
kept the old copy; a handful of log-probs over the whole vocabulary can.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

__all__ = ["gap_error", "probe_sequences"]

ROW = 17  # one context token, then 16 probed ones


def probe_sequences(vocab_size: int, tokens: int, context: int) -> list[list[int]]:
    """Rows of token ids whose 2nd and later entries are the probed tokens, spread evenly over the vocabulary.

    At least `tokens` tokens are probed; no row fills `context`.
    """
    probed = max(1, min(ROW, context - 1) - 1)  # the engine generates one token after the row
    rows = -(-tokens // probed)
    ids = np.linspace(0, vocab_size - 1, rows * probed).astype(int)
    # Deal them like cards, so that each row spans the vocabulary instead of a corner of it; the row before lends
    # its last token as context.
    hands = [[int(t) for t in ids[i::rows]] for i in range(rows)]
    return [[hands[i - 1][-1], *hand] for i, hand in enumerate(hands)]


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
