"""Every objective as a pure function: tensors in, sums and counts out. The step divides.

Masks come in as bool tensors and are applied with `where`, so that NaN in a masked place stays harmless.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from temper.core.errors import ShapeError


@dataclass
class LossOut:
    """A loss as a sum: `total` carries the gradient, `count` is what it was summed over, `sums` are metrics' sums."""

    total: Tensor
    count: Tensor
    sums: dict[str, Tensor] = field(default_factory=dict)


def same_shape(**tensors: Tensor) -> None:
    """Raise ShapeError naming the first tensor whose shape differs from that of the first."""
    (first, expected), *others = tensors.items()
    for name, tensor in others:
        if tensor.shape != expected.shape:
            raise ShapeError(f"{name} is {tuple(tensor.shape)}, {first} is {tuple(expected.shape)}", do="pass tensors with the same axes")


def sft_cross_entropy(
    logprobs_B_T: Tensor, weights_B_T: Tensor, mask_B_T: Tensor, *, logz_B_T: Tensor | None = None, z_loss: float = 0.0
) -> LossOut:
    """Weighted cross-entropy, -Σ w·log p, plus `z_loss`·Σ w·logZ² (PaLM, Chowdhery et al. 2022, section 5).

    With weights of one and the count of tokens as denominator this is the token mean; weights of 1/(tokens of the
    row) and the number of rows as denominator give the mean over rows.
    """
    same_shape(logprobs_B_T=logprobs_B_T, weights_B_T=weights_B_T, mask_B_T=mask_B_T)
    loss_B_T = -logprobs_B_T
    if z_loss:
        if logz_B_T is None:
            raise ShapeError("z_loss needs logz_B_T", do="pass TokenScores.logz_B_T, or set z_loss to 0")
        loss_B_T = loss_B_T + z_loss * logz_B_T.square()
    total = (loss_B_T * weights_B_T).where(mask_B_T, 0.0).sum()
    return LossOut(total, mask_B_T.sum(), {"nll": -logprobs_B_T.detach().where(mask_B_T, 0.0).sum()})
