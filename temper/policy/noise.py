"""NEFTune: noise on the embeddings while a model is fine-tuned, so that it learns less of the exact wording."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from temper.data.batch import Batch
from temper.policy.model import Policy


@contextmanager
def neftune(policy: Policy, batch: Batch, alpha: float) -> Iterator[None]:
    """Inside the block each embedding gets uniform noise in ±α/√(L·d) (Jain et al. 2024, algorithm 1); α = 0 adds none.

    L is the number of tokens of the row itself, not of the padded batch, so neighbours change no one's noise level; d is
    the width. Only in training mode. Draws come from torch's generator, whose state is part of a checkpoint. A token
    that several rows share in the layout has the level of the longest of them.
    """
    if not alpha or not policy.model.training:
        yield
        return
    lengths_B_T = batch.attention_B_T.sum(-1, keepdim=True).expand_as(batch.tokens_B_T)
    lengths_X = laid_out(lengths_B_T, batch) if batch.layout is not None and not policy.padded_because else lengths_B_T

    def add_noise(module: Any, inputs: Any, embedded_B_T_D: Tensor) -> Tensor:
        level_B_T_1 = alpha / (lengths_X.clamp(min=1) * embedded_B_T_D.shape[-1]).sqrt()[..., None].to(embedded_B_T_D.dtype)
        return embedded_B_T_D + level_B_T_1 * (2 * torch.rand_like(embedded_B_T_D) - 1)

    handle = policy.model.get_input_embeddings().register_forward_hook(add_noise)
    try:
        yield
    finally:
        handle.remove()


def laid_out(values_B_T: Tensor, batch: Batch) -> Tensor:
    """The largest value of the rows that a token belongs to, where the layout computes it; 0 at its padding."""
    assert batch.layout is not None
    real_N = batch.attention_B_T.flatten().nonzero().squeeze(1)
    places_N = batch.layout.at_B_T.flatten()[real_N]
    return torch.zeros_like(batch.layout.tokens_R_L).flatten().scatter_reduce(0, places_N, values_B_T.flatten()[real_N], "amax").view_as(batch.layout.tokens_R_L)
