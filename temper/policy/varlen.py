"""Packed rows and shared beginnings on CUDA: PyTorch's variable-length kernel, without any mask.

The kernel takes runs of queries, each with its own run of keys, and aligns a causal run at its end: the last query sees
all keys. A span with a path is then one run of queries whose keys are gathered along the path; the gradient of a shared
key is the sum over the runs that saw it, which the gather's backward forms. Rows without padding or sharing are
already what the kernel takes, and nothing is gathered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from inspect import signature
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from temper.data.layout import Span

LARGEST_HEAD = 256  # of the kernel


class Ready(NamedTuple):
    """What the kernel is given: flat places of queries and of keys (None: all places in order), whether a key stands in
    several runs, running sums of the runs' lengths, the longest."""

    at_queries: Tensor | None
    at_keys: Tensor | None
    repeated: bool
    query_ends: Tensor
    key_ends: Tensor
    longest_queries: int
    longest_keys: int


@dataclass
class Paths:
    """Each span as one run of queries; its path and itself are the run of their keys. `ready` keeps what was made of it."""

    spans: Sequence[Span]
    ready: dict[tuple[int, int, torch.device], Ready] = field(default_factory=dict)

    def on(self, rows: int, width: int, device: torch.device) -> Ready:
        """For `rows` of `width` on `device`: made once a forward, used by every layer."""
        if (rows, width, device) not in self.ready:
            places = [(span.row * width, (*span.path, (span.start, span.end))) for span in self.spans]
            at_queries = [torch.arange(row + path[-1][0], row + path[-1][1]) for row, path in places]
            at_keys = [torch.arange(row + start, row + end) for row, path in places for start, end in path]
            of_queries = [span.end - span.start for span in self.spans]
            of_keys = [span.before + span.end - span.start for span in self.spans]
            ends = [torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(device) for lengths in (of_queries, of_keys)]
            in_order = torch.arange(rows * width)
            to_queries, to_keys = (None if torch.equal(at, in_order) else at.to(device) for at in map(torch.cat, (at_queries, at_keys)))
            repeated = any(span.path for span in self.spans)
            self.ready[rows, width, device] = Ready(to_queries, to_keys, repeated, ends[0], ends[1], max(of_queries), max(of_keys))
        return self.ready[rows, width, device]


def can(query: Tensor, value: Tensor) -> bool:
    """Whether the kernel computes these heads: CUDA, half precision, one size of at most LARGEST_HEAD."""
    return query.is_cuda and query.dtype in (torch.float16, torch.bfloat16) and query.shape[-1] == value.shape[-1] <= LARGEST_HEAD


def attention(query: Tensor, key: Tensor, value: Tensor, paths: Paths, scale: float, window: int | None) -> Tensor:
    """[rows, heads, positions, size] in, [rows, positions, heads, size] out; zero at padding."""
    from torch.nn.attention.varlen import varlen_attn

    rows, heads, positions, size = query.shape
    ready = paths.on(rows, positions, query.device)
    query_N, key_N, value_N = (item.transpose(1, 2).reshape(rows * positions, -1, size) for item in (query, key, value))
    if ready.at_queries is not None:
        query_N = _Gathered.apply(query_N, ready.at_queries, False)
    if ready.at_keys is not None:
        key_N, value_N = (_Gathered.apply(item_N, ready.at_keys, ready.repeated) for item_N in (key_N, value_N))
    out_N: Any = varlen_attn(
        query_N, key_N, value_N, ready.query_ends, ready.key_ends, ready.longest_queries, ready.longest_keys,
        scale=scale, window_size=(-1 if window is None else window - 1, 0), **grouped_heads(heads != key.shape[1]),
    )  # fmt: skip
    if ready.at_queries is not None:
        out_N = out_N.new_zeros(rows * positions, heads, size).index_copy(0, ready.at_queries, out_N)
    return out_N.view(rows, positions, heads, size)


@cache
def grouped_heads(grouped: bool) -> dict[str, Any]:
    """The word the kernel wants where several queries share a key's head; PyTorch 2.11 shares heads without it."""
    from torch.nn.attention.varlen import varlen_attn

    return {"enable_gqa": True} if grouped and "enable_gqa" in signature(varlen_attn).parameters else {}


class _Gathered(torch.autograd.Function):
    """Rows of x at some places; where a place is taken several times its gradients are summed in float32."""

    @staticmethod
    def forward(ctx: Any, x_N: Tensor, at_M: Tensor, repeated: bool) -> Tensor:
        ctx.save_for_backward(at_M)
        ctx.shape, ctx.repeated = x_N.shape, repeated
        return x_N.index_select(0, at_M)

    @staticmethod
    def backward(ctx: Any, grad_M: Tensor) -> Any:
        (at_M,) = ctx.saved_tensors
        if not ctx.repeated:
            return grad_M.new_zeros(ctx.shape).index_copy_(0, at_M, grad_M), None, None
        return torch.zeros(ctx.shape, dtype=torch.float32, device=grad_M.device).index_add_(0, at_M, grad_M.float()).to(grad_M.dtype), None, None
