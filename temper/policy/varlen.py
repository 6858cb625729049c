"""Packed rows and shared beginnings on CUDA: PyTorch's variable-length kernel, without any mask.

The kernel takes runs of queries, each with its own run of keys, and aligns a causal run at its end: the last query sees
all keys. A span with a path is then one run of queries whose keys are gathered along the path; the gradient of a shared
key is the sum over the runs that saw it, which the gather's backward forms.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from temper.data.layout import Span

LARGEST_HEAD = 256  # of the kernel


class Ready(NamedTuple):
    """What the kernel is given: flat places of queries and of keys, running sums of the runs' lengths, the longest."""

    at_queries: Tensor
    at_keys: Tensor
    query_ends: Tensor
    key_ends: Tensor
    longest_queries: int
    longest_keys: int


@dataclass
class Paths:
    """Each span as one run of queries; its path and itself are the run of their keys. `ready` keeps what was made of it."""

    spans: Sequence[Span]
    ready: dict[tuple[int, torch.device], Ready] = field(default_factory=dict)

    def on(self, width: int, device: torch.device) -> Ready:
        """For rows of `width` on `device`: made once a forward, used by every layer."""
        if (width, device) not in self.ready:
            places = [(span.row * width, (*span.path, (span.start, span.end))) for span in self.spans]
            at_queries = torch.cat([torch.arange(row + path[-1][0], row + path[-1][1]) for row, path in places])
            at_keys = torch.cat([torch.arange(row + start, row + end) for row, path in places for start, end in path])
            of_queries = [span.end - span.start for span in self.spans]
            of_keys = [span.before + span.end - span.start for span in self.spans]
            ends = [torch.tensor([0, *accumulate(lengths)], dtype=torch.int32) for lengths in (of_queries, of_keys)]
            at_queries, at_keys, query_ends, key_ends = (item.to(device, non_blocking=True) for item in (at_queries, at_keys, *ends))
            self.ready[width, device] = Ready(at_queries, at_keys, query_ends, key_ends, max(of_queries), max(of_keys))
        return self.ready[width, device]


def can(query: Tensor, value: Tensor) -> bool:
    """Whether the kernel computes these heads: CUDA, half precision, one size of at most LARGEST_HEAD."""
    return query.is_cuda and query.dtype in (torch.float16, torch.bfloat16) and query.shape[-1] == value.shape[-1] <= LARGEST_HEAD


def attention(query: Tensor, key: Tensor, value: Tensor, paths: Paths, scale: float, window: int | None) -> Tensor:
    """[rows, heads, positions, size] in, [rows, positions, heads, size] out; zero at padding."""
    from torch.nn.attention.varlen import varlen_attn

    rows, heads, positions, size = query.shape
    ready = paths.on(positions, query.device)
    flat_query, flat_key, flat_value = (item.transpose(1, 2).reshape(rows * positions, -1, size) for item in (query, key, value))
    out: Any = varlen_attn(
        flat_query[ready.at_queries], flat_key[ready.at_keys], flat_value[ready.at_keys], *ready[2:], scale=scale,
        window_size=(-1 if window is None else window - 1, 0), enable_gqa=heads != key.shape[1],
    )  # fmt: skip
    return out.new_zeros(rows * positions, heads, size).index_copy(0, ready.at_queries, out).view(rows, positions, heads, size)
