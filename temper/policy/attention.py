"""Causal attention of padded rows, packed rows and rows that share a beginning, through transformers' own interface.

A layout's spans come in through the mask: transformers asks `mask` for one, gets `Seen` (what queries may see, in a few
numbers) where a layout is at hand, and passes it to every layer as it would a tensor. On a CPU the sums are float32
matrix products over blocks that stay in the cache: PyTorch's own kernel multiplies at a tenth of what the processor
can; batched products of oneDNN come near it. Blocks of queries skip the keys they do not see, heads that share a key head
are one product, and the probabilities are kept for the backward, or formed again where they are many. On CUDA a layout
goes to the variable-length kernel. No mask of positions by positions is made, save where neither can compute the layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from temper.core.errors import ShapeError
from temper.data.layout import Span
from temper.policy import varlen

NAME = "temper_blocks"
QUERIES = 64  # of one block; twice as many where it has one row, for which larger products outweigh the scores above the diagonal
BLOCK_SCORES = 1 << 20  # float32 scores of one block: 4 MiB
KEEP_BYTES = 64 << 20  # probabilities kept for the backward by one layer; above this they are formed again
FORBIDDEN = -1e30
MORE = ("position_bias", "softcap")  # what a layer may pass that the blocks do not compute

_spans: ContextVar[tuple[Span, ...] | None] = ContextVar("spans", default=None)
_count: ContextVar[list[int]] = ContextVar("count")


@dataclass(frozen=True)
class Seen:
    """What each query sees: the path and the beginning of its own span, at most `window` keys (None: all of them)."""

    spans: tuple[Span, ...]
    window: int | None

    def dense(self, rows: int, positions: int, device: torch.device) -> Tensor:
        """The mask [rows, 1, positions, positions], True where a query sees a key. Padding sees itself."""
        sees = torch.eye(positions, dtype=torch.bool, device=device).repeat(rows, 1, 1)
        for span in self.spans:
            keys = torch.cat([torch.arange(*stretch, device=device) for stretch in (*span.path, (span.start, span.end))])
            at = torch.arange(len(keys), device=device)
            ahead = at[span.before :, None] - at[None]
            own = (ahead >= 0) if self.window is None else (ahead >= 0) & (ahead < self.window)
            sees[span.row, span.start : span.end] = sees.new_zeros(()).expand(len(own), positions).index_copy(1, keys, own)
        return sees[:, None]

    @cached_property
    def paths(self) -> varlen.Paths:
        """The spans as the variable-length kernel takes them."""
        return varlen.Paths(self.spans)


@contextmanager
def seeing(spans: tuple[Span, ...] | None) -> Iterator[None]:
    """Masks formed inside the block are `Seen` of `spans`; None leaves them to transformers."""
    token = _spans.set(spans)
    try:
        yield
    finally:
        _spans.reset(token)


@contextmanager
def counted() -> Iterator[list[int]]:
    """Inside the block the one number of the list is how often a layer computed `Seen`."""
    token = _count.set([0])
    try:
        yield _count.get()
    finally:
        _count.reset(token)


def mask(*, mask_function: Callable[..., Any] = causal_mask_function, local_size: int | None = None, **options: Any) -> Tensor | Seen | None:
    """transformers' mask interface. Raises ShapeError for a layout under a mask that is neither causal nor a causal window."""
    spans = _spans.get()
    if spans is None:
        return ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](mask_function=mask_function, local_size=local_size, **options)
    if mask_function is causal_mask_function:
        return Seen(spans, None)
    if local_size is not None and not options.get("use_vmap"):
        at = torch.tensor([0, 1, local_size - 1, local_size, local_size + 1, 2 * local_size, 2 * local_size + 1], device=options.get("device"))
        query, key = at[:, None], at[None]
        if torch.equal(mask_function(torch.zeros_like(query), 0, query, key), (key <= query) & (key > query - local_size)):
            return Seen(spans, local_size)
    raise ShapeError("this model's layers see in a way that a layout cannot follow", why="it is neither causal nor a causal window", do="pad the rows")


def attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | Seen | None, dropout: float = 0.0,
    scaling: float | None = None, **options: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """transformers' attention interface: [rows, heads, positions, size] in, [rows, positions, heads, size] out.

    What is more than causal attention (another mask, dropout, a position bias, capped scores) goes to transformers' own.
    """
    seen = attention_mask if isinstance(attention_mask, Seen) else None
    if seen is not None and (count := _count.get(None)) is not None:
        count[0] += 1
    plain = (seen is not None or attention_mask is None) and not dropout and query.shape[2] == key.shape[2] and all(options.get(name) is None for name in MORE)
    plain = plain and options.get("is_causal") is not False and getattr(module, "is_causal", True)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if plain and seen is not None and varlen.can(query, value):
        return varlen.attention(query, key, value, seen.paths, scale, seen.window), None
    if plain and query.device.type == "cpu":
        whole = (_Item(slice(0, query.shape[0]), 0, query.shape[2], ()),)
        items = whole if seen is None else tuple(_Item(slice(span.row, span.row + 1), span.start, span.end, span.path) for span in seen.spans)
        return _Attention.apply(query, key, value, scale, items, None if seen is None else seen.window), None
    dense = attention_mask.dense(query.shape[0], query.shape[2], query.device) if isinstance(attention_mask, Seen) else attention_mask
    return sdpa_attention_forward(module, query, key, value, dense, dropout=dropout, scaling=scaling, **options)


# under its own name transformers must be told how masks are formed, or it forms none at all
ALL_ATTENTION_FUNCTIONS.register(NAME, attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, mask)


class _Item(NamedTuple):
    """Queries [start, end) of `rows`, that see the stretches of `path` and then themselves."""

    rows: slice
    start: int
    end: int
    path: tuple[tuple[int, int], ...]

    @property
    def stretches(self) -> tuple[tuple[int, int], ...]:
        """Where the keys stand, those that follow each other as one stretch."""
        if self.path and self.path[-1][1] == self.start:
            return (*self.path[:-1], (self.path[-1][0], self.end))
        return (*self.path, (self.start, self.end))


class _Block(NamedTuple):
    """Some rows of an item, its queries [first, end) and the first of its keys that they see."""

    rows: slice
    first: int
    end: int
    low: int


class _Attention(torch.autograd.Function):
    """Axes: b rows, K key heads, R query heads of each, T positions, S size of a head, U of a value."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, items: tuple[_Item, ...], window: int | None) -> Tensor:
        rows, heads, positions, size = query.shape
        q_bKRTS = (query.float() * scale).view(rows, key.shape[1], -1, positions, size)
        k_bKTS, v_bKTU = key.float().contiguous(), value.float().contiguous()
        out_bTKRU = q_bKRTS.new_zeros(rows, positions, key.shape[1], heads // key.shape[1], value.shape[-1])
        work = [(item, _blocks(item, heads, window)) for item in items]
        many = sum(_scores(item, blocks) for item, blocks in work) * heads * 4 > KEEP_BYTES
        kept: list[Tensor] | None = [] if any(ctx.needs_input_grad) and not many else None
        with torch.autocast("cpu", enabled=False):
            for item, blocks in work:
                k, v = _joined(k_bKTS[item.rows], item), _joined(v_bKTU[item.rows], item)
                before = k.shape[2] - (item.end - item.start)
                for part, first, end, low in blocks:
                    p = _probabilities(q_bKRTS[item.rows][part, :, :, item.start + first : item.start + end], k[part, :, low : before + end], low, before + first, window)
                    out = torch.bmm(p, v[part, :, low : before + end].flatten(0, 1)).view(-1, *q_bKRTS.shape[1:3], end - first, v.shape[-1])
                    out_bTKRU[item.rows][part, item.start + first : item.start + end] = out.permute(0, 3, 1, 2, 4)
                    if kept is not None:
                        kept.append(p)
        ctx.save_for_backward(q_bKRTS, k_bKTS, v_bKTU)
        ctx.kept, ctx.scale, ctx.dtypes, ctx.work, ctx.window = kept, scale, (query.dtype, key.dtype, value.dtype), work, window
        return out_bTKRU.view(rows, positions, heads, -1).to(value.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        q_bKRTS, k_bKTS, v_bKTU = ctx.saved_tensors
        rows, key_heads, share, positions, size = q_bKRTS.shape
        g_bKRTU = grad.float().view(rows, positions, key_heads, share, -1).permute(0, 2, 3, 1, 4)
        dq_bKRTS, dk_bKTS, dv_bKTU = torch.zeros_like(q_bKRTS), torch.zeros_like(k_bKTS), torch.zeros_like(v_bKTU)
        kept = iter(ctx.kept) if ctx.kept is not None else None
        for item, blocks in ctx.work:
            k_item, v_item = _joined(k_bKTS[item.rows], item), _joined(v_bKTU[item.rows], item)
            dk_item, dv_item = _target(dk_bKTS[item.rows], item), _target(dv_bKTU[item.rows], item)
            before = k_item.shape[2] - (item.end - item.start)
            for part, first, end, low in blocks:
                at, keys = slice(item.start + first, item.start + end), slice(low, before + end)
                q, k, v = q_bKRTS[item.rows][part, :, :, at], k_item[part, :, keys], v_item[part, :, keys].flatten(0, 1)
                p = next(kept) if kept is not None else _probabilities(q, k, low, before + first, ctx.window)
                g = g_bKRTU[item.rows][part, :, :, at].reshape(p.shape[0], -1, v.shape[-1])
                dv_item[part, :, keys] += torch.bmm(p.transpose(1, 2), g).view(-1, key_heads, p.shape[-1], v.shape[-1])
                # softmax's backward, p·(dp - Σ p·dp): what is forbidden has p = 0 and so gets nothing
                ds = torch._softmax_backward_data(torch.bmm(g, v.transpose(1, 2)), p, -1, p.dtype)
                dq_bKRTS[item.rows][part, :, :, at] = torch.bmm(ds, k.flatten(0, 1)).view(-1, key_heads, share, end - first, size)
                dk_item[part, :, keys] += torch.bmm(ds.transpose(1, 2), q.reshape(p.shape[0], -1, size)).view(-1, key_heads, p.shape[-1], size)
            _give_back(dk_bKTS[item.rows], dk_item, item)
            _give_back(dv_bKTU[item.rows], dv_item, item)
        ctx.kept = None
        of_query, of_key, of_value = ctx.dtypes
        dq = dq_bKRTS.mul_(ctx.scale).view(rows, -1, positions, size)
        return dq.to(of_query), dk_bKTS.to(of_key), dv_bKTU.to(of_value), None, None, None


def _joined(x_bKTS: Tensor, item: _Item) -> Tensor:
    """The keys (or values) an item sees, in order: a view where they follow each other."""
    parts = [x_bKTS[:, :, start:end] for start, end in item.stretches]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def _target(dx_bKTS: Tensor, item: _Item) -> Tensor:
    """Where the gradient of `_joined` is gathered: in its own place, or apart where the keys do not follow each other."""
    if len(item.stretches) == 1:
        return _joined(dx_bKTS, item)
    return dx_bKTS.new_zeros(*dx_bKTS.shape[:2], sum(end - start for start, end in item.stretches), dx_bKTS.shape[3])


def _give_back(dx_bKTS: Tensor, found: Tensor, item: _Item) -> None:
    """Add what was gathered apart to its place."""
    at = 0
    for start, end in item.stretches if len(item.stretches) > 1 else ():
        dx_bKTS[:, :, start:end] += found[:, :, at : at + end - start]
        at += end - start


def _blocks(item: _Item, heads: int, window: int | None) -> list[_Block]:
    """The blocks of an item: of QUERIES queries (twice that for one row) and at most BLOCK_SCORES scores, with the keys that one of them sees."""
    rows, length = item.rows.stop - item.rows.start, item.end - item.start
    before = sum(end - start for start, end in item.path)
    found = []
    step = QUERIES if rows > 1 else 2 * QUERIES
    for first in range(0, length, step):
        end = min(length, first + step)
        low = 0 if window is None else max(0, before + first - window + 1)
        height = max(1, BLOCK_SCORES // (heads * (end - first) * (before + end - low)))
        found += [_Block(slice(row, min(rows, row + height)), first, end, low) for row in range(0, rows, height)]
    return found


def _scores(item: _Item, blocks: Sequence[_Block]) -> int:
    """How many scores of one head the blocks of an item have."""
    before = sum(end - start for start, end in item.path)
    return sum((part.stop - part.start) * (end - first) * (before + end - low) for part, first, end, low in blocks)


def _probabilities(q_bKRnS: Tensor, k_bKeS: Tensor, low: int, first: int, window: int | None) -> Tensor:
    """softmax of one block's scores, [b·K, R·n, e]. Keys stand at positions from `low`, the n queries at those from
    `first`; each sees the keys up to itself, at most `window` of them."""
    rows, key_heads, share, queries, size = q_bKRnS.shape
    keys = k_bKeS.shape[2]
    scores = torch.bmm(q_bKRnS.reshape(rows * key_heads, share * queries, size), k_bKeS.flatten(0, 1).transpose(1, 2))
    wide = scores.view(-1, queries, keys)
    after_n_n = torch.ones(queries, queries, dtype=torch.bool, device=scores.device).triu(1)
    wide[:, :, first - low :].masked_fill_(after_n_n, FORBIDDEN)
    if window is not None and (passed := first + queries - window - low) > 0:  # keys that the last query no longer sees
        at = torch.arange(low, low + passed, device=scores.device)
        wide[:, :, :passed].masked_fill_(at <= torch.arange(first - window, first - window + queries, device=scores.device)[:, None], FORBIDDEN)
    return torch.softmax(scores, -1)
