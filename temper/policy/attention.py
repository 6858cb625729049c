"""Causal attention on a CPU, forward and backward as float32 matrix products over blocks that stay in the cache.

PyTorch's own kernel multiplies at a tenth of what the processor can; batched products of oneDNN come near it. The
sums are softmax(q kᵀ·scale) v over the keys a query may see; blocks of queries skip the keys after them, heads that
share a key head are one product, and the probabilities are kept for the backward, or formed again where they are many.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "temper_blocks"
QUERIES = 64  # of one block
BLOCK_SCORES = 1 << 20  # float32 scores of one block: 4 MiB
KEEP_BYTES = 64 << 20  # probabilities kept for the backward by one layer; above this they are formed again
FORBIDDEN = -1e30


def attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, dropout: float = 0.0,
    scaling: float | None = None, **options: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """transformers' attention interface: [rows, heads, positions, size] in, [rows, positions, heads, size] out.

    What is more than plain causal attention (a mask, dropout, a position bias) goes to transformers' own.
    """
    plain = attention_mask is None and not dropout and query.shape[2] == key.shape[2] and options.get("position_bias") is None
    if not plain or options.get("is_causal") is False or not getattr(module, "is_causal", True) or query.shape[-1] != value.shape[-1]:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options)
    return _CausalAttention.apply(query, key, value, query.shape[-1] ** -0.5 if scaling is None else scaling), None


# under its own name transformers must be told to form masks as for sdpa, or it forms none at all
ALL_ATTENTION_FUNCTIONS.register(NAME, attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


class _CausalAttention(torch.autograd.Function):
    """Axes: b rows, K key heads, R query heads of each, T positions, S size of a head."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        rows, heads, positions, size = query.shape
        q_bKRTS = (query.float() * scale).view(rows, key.shape[1], -1, positions, size)
        k_bKTS, v_bKTS = key.float().contiguous(), value.float().contiguous()
        out_bTKRS = q_bKRTS.new_empty(rows, positions, key.shape[1], heads // key.shape[1], size)
        needed = any(ctx.needs_input_grad)
        kept: list[Tensor] | None = [] if needed and rows * heads * positions * positions * 2 <= KEEP_BYTES else None
        with torch.autocast("cpu", enabled=False):
            for part, first, end in _blocks(rows, heads, positions):
                p = _probabilities(q_bKRTS[part, :, :, first:end], k_bKTS[part, :, :end], first)
                out = torch.bmm(p, v_bKTS[part, :, :end].flatten(0, 1))
                out_bTKRS[part, first:end] = out.view(-1, *q_bKRTS.shape[1:3], end - first, size).permute(0, 3, 1, 2, 4)
                if kept is not None:
                    kept.append(p)
        ctx.save_for_backward(q_bKRTS, k_bKTS, v_bKTS)
        ctx.kept, ctx.scale, ctx.dtypes = kept, scale, (query.dtype, key.dtype, value.dtype)
        return out_bTKRS.view(rows, positions, heads, size).to(value.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        q_bKRTS, k_bKTS, v_bKTS = ctx.saved_tensors
        rows, key_heads, share, positions, size = q_bKRTS.shape
        g_bKRTS = grad.float().view(rows, positions, key_heads, share, size).permute(0, 2, 3, 1, 4)
        dq_bKRTS, dk_bKTS, dv_bKTS = torch.empty_like(q_bKRTS), torch.zeros_like(k_bKTS), torch.zeros_like(v_bKTS)
        for number, (part, first, end) in enumerate(_blocks(rows, key_heads * share, positions)):
            q, k, v = q_bKRTS[part, :, :, first:end], k_bKTS[part, :, :end], v_bKTS[part, :, :end].flatten(0, 1)
            p = ctx.kept[number] if ctx.kept is not None else _probabilities(q, k, first)
            g = g_bKRTS[part, :, :, first:end].reshape(p.shape[0], -1, size)
            dv_bKTS[part, :, :end] += torch.bmm(p.transpose(1, 2), g).view(-1, key_heads, end, size)
            # softmax's backward, p·(dp - Σ p·dp): what is forbidden has p = 0 and so gets nothing
            ds = torch._softmax_backward_data(torch.bmm(g, v.transpose(1, 2)), p, -1, p.dtype)
            dq_bKRTS[part, :, :, first:end] = torch.bmm(ds, k.flatten(0, 1)).view(-1, key_heads, share, end - first, size)
            dk_bKTS[part, :, :end] += torch.bmm(ds.transpose(1, 2), q.reshape(p.shape[0], -1, size)).view(-1, key_heads, end, size)
        ctx.kept = None
        of_query, of_key, of_value = ctx.dtypes
        dq = dq_bKRTS.mul_(ctx.scale).view(rows, -1, positions, size)
        return dq.to(of_query), dk_bKTS.to(of_key), dv_bKTS.to(of_value), None


def _blocks(rows: int, heads: int, positions: int) -> Iterator[tuple[slice, int, int]]:
    """(rows, first query, end of queries and keys) of every block."""
    for first in range(0, positions, QUERIES):
        end = min(positions, first + QUERIES)
        height = max(1, BLOCK_SCORES // (heads * (end - first) * end))
        for row in range(0, rows, height):
            yield slice(row, min(rows, row + height)), first, end


def _probabilities(q_bKRnS: Tensor, k_bKeS: Tensor, first: int) -> Tensor:
    """softmax of one block's scores, [b·K, R·n, e]; of the last n keys each query sees those up to itself."""
    rows, key_heads, share, queries, size = q_bKRnS.shape
    keys = k_bKeS.shape[2]
    scores = torch.bmm(q_bKRnS.reshape(rows * key_heads, share * queries, size), k_bKeS.flatten(0, 1).transpose(1, 2))
    after_n_n = torch.ones(queries, queries, dtype=torch.bool, device=scores.device).triu(1)
    scores.view(-1, queries, keys)[:, :, first:].masked_fill_(after_n_n, FORBIDDEN)
    return torch.softmax(scores, -1)
