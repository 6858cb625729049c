"""`temper.policy.tiles.softmax_` as one Triton kernel: each logit is read twice and written once.

Imported only where a tile lies on CUDA, because it needs `triton`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096  # logits read at once by a program, 16 a thread: a common size, not a measured one
WARPS = 8
LOWEST = tl.constexpr(-1e38)  # below every logit and finite: -inf - -inf would be NaN in a block that allows nothing


@triton.jit
def softmax_kernel(logits_R_V, logz_R, entropy_R, vocab, BLOCK: tl.constexpr):
    """One row: a running maximum, Σ exp and Σ exp·(s - max) while it is read, then its probabilities where it stood.

    The sums of what was read before a new maximum are moved to it (Milakov & Gimelshein 2018, algorithm 3):
    Σ e becomes k Σ e, and Σ e·(s - max) becomes k (Σ e·(s - max) + (max - max') Σ e), with k = exp(max - max').
    H = log Σ e - Σ e·(s - max) / Σ e, which is log Z - Σ p·s without the difference of two large numbers.
    """
    row = tl.program_id(0).to(tl.int64)  # rows · vocabulary may exceed 2^31
    logits_V = logits_R_V + row * vocab
    column_B = tl.arange(0, BLOCK)
    largest = tl.full((), LOWEST, tl.float32)
    sum_B = tl.zeros((BLOCK,), tl.float32)  # added up over the block at the end: sums of few terms, and one reduction
    weighted_B = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocab, BLOCK):
        s_B = tl.load(logits_V + start + column_B, mask=start + column_B < vocab, other=-float("inf"))
        before = largest
        largest = tl.maximum(before, tl.max(s_B, axis=0))
        keep = tl.exp(before - largest)
        e_B = tl.exp(s_B - largest)
        if entropy_R is not None:
            # p = 0 counts 0, also where s is -inf
            own_B = tl.where(e_B > 0, e_B * (s_B - largest), 0.0)
            weighted_B = keep * (weighted_B + (before - largest) * sum_B) + own_B
        sum_B = keep * sum_B + e_B
    total = tl.sum(sum_B, axis=0)
    tl.store(logz_R + row, largest + tl.log(total))
    if entropy_R is not None:
        tl.store(entropy_R + row, tl.log(total) - tl.sum(weighted_B, axis=0) / total)
    for start in range(0, vocab, BLOCK):
        inside_B = start + column_B < vocab
        s_B = tl.load(logits_V + start + column_B, mask=inside_B)
        tl.store(logits_V + start + column_B, tl.exp(s_B - largest) / total, mask=inside_B)


def softmax_rows_(logits_R_V: Tensor, *, entropy: bool = False) -> tuple[Tensor, Tensor | None]:
    """Float32 logits in contiguous rows become probabilities in place; log Z [R], and the entropy [R] where asked."""
    rows, vocab = logits_R_V.shape
    logz_R = logits_R_V.new_empty(rows)
    entropy_R = torch.empty_like(logz_R) if entropy else None
    with torch.cuda.device_of(logits_R_V):  # Triton launches on the current device, which need not be the tile's
        softmax_kernel[(rows,)](logits_R_V, logz_R, entropy_R, vocab, BLOCK=BLOCK, num_warps=WARPS)
    return logz_R, entropy_R
