"""Supervised tokens."""

from __future__ import annotations

from torch import Tensor

from temper.core.errors import ShapeError
from temper.policy.losses.out import LossOut, same_shape


def sft_cross_entropy(
    logprobs_B_T: Tensor, weights_B_T: Tensor, mask_B_T: Tensor, *, logz_B_T: Tensor | None = None, z_loss: float = 0.0
) -> LossOut:
    """Weighted cross-entropy, -Σ w·log p, plus `z_loss`·Σ w·logZ² (PaLM, Chowdhery et al. 2022, section 5).

    With weights of one and the count of tokens as denominator this is the token mean; weights of 1/(tokens of the
    row) and the number of rows as denominator give the mean over rows. `Policy.cross_entropy` is the same, cheaper.

    >>> p = tensor([[0.5, 0.25]])
    >>> total(sft_cross_entropy(p.log(), tensor([[1.0, 2.0]]), p > 0))  # ln 2 + 2·ln 4 = 5 ln 2
    3.4657
    """
    same_shape(logprobs_B_T=logprobs_B_T, weights_B_T=weights_B_T, mask_B_T=mask_B_T, logz_B_T=logz_B_T)
    logprobs_B_T, weights_B_T = logprobs_B_T.where(mask_B_T, 0.0), weights_B_T.where(mask_B_T, 0.0)
    loss_B_T = -logprobs_B_T
    if z_loss:
        if logz_B_T is None:
            raise ShapeError("z_loss needs logz_B_T", do="pass TokenScores.logz_B_T, or set z_loss to 0")
        loss_B_T = loss_B_T + z_loss * logz_B_T.where(mask_B_T, 0.0).square()
    return LossOut((loss_B_T * weights_B_T).sum(), mask_B_T.sum(), {"nll": -logprobs_B_T.detach().sum()})
