"""Per-token rewards: where the KL penalty enters the reward. Shapes: B sequences, R response positions."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from rayrlhf.algorithms.masking import zero_masked

__all__ = ["token_rewards", "treat_truncated"]


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, coef: float) -> Tensor:
    """Spread a response's score and its KL penalty over its tokens.

    r_t = -coef * kl_t + [t is the last valid token] * score

    The score sits on the last valid token of its row (the EOS when there is one): with k1 the rewards of a row sum
    to R(x, y) = score - coef * log(pi(y|x) / pi_ref(y|x)). A row without valid tokens gives zeros.

    Args:
        scores: [B], of the reward model.
        kl: [B, R], nats per token, from `kl.kl_estimate`.
        mask: [B, R], bool, True at valid response tokens.
        coef: the KL coefficient, beta.

    Returns:
        [B, R], 0 at masked positions.

    Source: Ouyang et al. 2022 (arXiv 2203.02155), eq. 2, placed by token as in Ziegler et al. 2019.
    """
    if scores.shape != mask.shape[:1]:
        raise ValueError(f"expected scores of shape {tuple(mask.shape[:1])}, found {tuple(scores.shape)}")
    penalty = -coef * zero_masked(kl, mask)
    valid_from_here = mask.flip(1).cumsum(1).flip(1)
    is_last = mask & (valid_from_here == 1)
    score = scores.to(penalty.dtype).unsqueeze(1).expand_as(penalty)
    return torch.where(is_last, penalty + score, penalty)


def treat_truncated(
    scores: Tensor, truncated: Tensor, treatment: Literal["keep", "penalty", "replace", "mask"], value: float = 0.0
) -> Tensor:
    """Change the scores of responses that were cut before their EOS.

    keep, mask:  s_b            (mask leaves them out of the losses, which is not the score's business)
    penalty:     s_b - value
    replace:     value

    Args:
        scores: [B].
        truncated: [B], bool.
        treatment: which of the above.
        value: in units of the score.

    Returns:
        [B].

    Source: Huang et al. 2024 (arXiv 2403.17031), the "EOS trick" (a fixed score for a response without EOS); masking:
    Yu et al. 2025 (arXiv 2503.14476), section 3.4.
    """
    if treatment in ("keep", "mask"):
        return scores
    if treatment not in ("penalty", "replace"):
        raise ValueError(f"unknown treatment {treatment!r}; expected 'keep', 'penalty', 'replace' or 'mask'")
    changed = scores - value if treatment == "penalty" else torch.full_like(scores, value)
    return torch.where(truncated, changed, scores)
