"""From a batch to what a decoder and the head take, and back."""

from __future__ import annotations

import torch
from torch import Tensor

from temper.data.batch import Batch
from temper.data.layout import Layout
from temper.policy.support import Support


def decoder_inputs(batch: Batch, layout: Layout | None) -> dict[str, Tensor]:
    """What a decoder is given. Right padding needs no mask: no real token sees what stands after it.

    A layout's mask is made of its spans, so here it is all ones: with none, transformers would part rows by positions.
    """
    if layout is not None:
        return {"input_ids": layout.tokens_R_L, "attention_mask": torch.ones_like(layout.tokens_R_L), "position_ids": layout.positions_R_L}
    real_B_T = batch.attention_B_T
    if bool((real_B_T[:, 1:] & ~real_B_T[:, :-1]).any()):
        return {"input_ids": batch.tokens_B_T, "attention_mask": real_B_T.long(), "position_ids": batch.positions_B_T}
    straight_1_T = torch.arange(batch.positions_B_T.shape[1], device=batch.positions_B_T.device)[None]
    if bool((batch.positions_B_T == straight_1_T).where(real_B_T, True).all()):
        return {"input_ids": batch.tokens_B_T}
    return {"input_ids": batch.tokens_B_T, "position_ids": batch.positions_B_T}  # packed by hand: transformers parts rows where positions restart


def support_of(batch: Batch, targets_N: Tensor) -> Support | None:
    """The batch's support at its supervised positions, in their order; None where it carries none."""
    support_B = batch.support
    if support_B is None:
        return None
    allowed_N = [support_B[row][at] for row, at in batch.mask_B_T.nonzero().tolist()]
    return Support.of(allowed_N, targets_N)


def scatter(value_N: Tensor, at_N: Tensor, shape: torch.Size) -> Tensor:
    """`value_N` at the flat positions `at_N` of zeros of `shape`."""
    return value_N.new_zeros(shape.numel()).index_copy(0, at_N, value_N).view(shape)
