"""Causal attention on a CPU as a few dense matrix products: which queries meet which keys, and how they are gathered.

The library's batched products want each matrix whole in memory: what is a view of something wider it copies first, in
every product anew. So the queries and keys of a block (a sequence, or a piece of a long one) are gathered once, blocks
of about the same size become one batch, and the way back is another gather. What a query may not see is one mask a
batch, from positions alone: shared beginnings, windows and padding need no case of their own.

A sequence is computed whole up to QUERIES tokens. The half of its scores above the diagonal is work for nothing; smaller
blocks save it in multiplications and lose as much in calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from temper.data.layout import Span

QUERIES = 256  # of one block; a longer sequence is cut into equal ones
QUANTUM = 16  # blocks are padded to multiples of it, so that more of them have one shape
LARGEST_SCORES = 1 << 20  # float32 scores of one batch: 4 MiB
KEPT_BYTES = 64 << 20  # probabilities kept for the backward by one layer; above this they are formed again
FORBIDDEN = -1e30


class Block(NamedTuple):
    """Some queries and the keys that one of them sees, by flat place; `first` is the first query's position, `low` the first
    key's. The last keys are the queries' own."""

    queries: list[int]
    first: int
    keys: list[int]
    low: int

    @property
    def shape(self) -> tuple[int, int]:
        """(queries, keys), padded to the quantum."""
        return padded(len(self.queries)), padded(len(self.keys))


class Batch(NamedTuple):
    """`size` blocks of one shape, `queries` by `keys`: the places of their queries and of their keys, and which of the last H keys a
    query does not see. Every query sees all keys before those."""

    size: int
    queries: int
    keys: int
    at_queries: slice
    at_keys: slice
    hidden_n_Q_H: Tensor


@dataclass(frozen=True)
class Gather:
    """Rows (one a token and head) to places in blocks. `at` fills the places, `back` is the place that a row's result
    comes from (one past the last: none), `padding` the places that stand for no row; `again` are places of rows that
    another place stands for already."""

    at: Tensor
    back: Tensor
    padding: Tensor
    again: Tensor

    def __call__(self, x_B_H_T_S: Tensor) -> Tensor:
        """[places, S] in float32."""
        return x_B_H_T_S.transpose(1, 2).reshape(-1, x_B_H_T_S.shape[-1]).index_select(0, self.at).float()

    def room(self, size: int) -> Tensor:
        """Places for results, and a row of zeros at the end for the rows that have none."""
        places = torch.empty(len(self.at) + 1, size)
        places[-1] = 0
        return places

    def summed(self, places: Tensor) -> Tensor:
        """[rows, S]: what all places of each row gathered; `places` ends with the row of zeros."""
        found = places.index_select(0, self.back)
        return found.index_add_(0, self.at[self.again], places[self.again]) if len(self.again) else found


class Plan:
    """How attention of one layout is computed, for heads of one model: made once a forward, used by every layer."""

    def __init__(self, spans: Sequence[Span], rows: int, positions: int, heads: int, key_heads: int, window: int | None) -> None:
        by_shape: dict[tuple[int, int], list[Block]] = {}
        for span in spans:
            for block in cut(span, positions, window):
                by_shape.setdefault(block.shape, []).append(block)
        self.batches: list[Batch] = []
        batched: list[list[Block]] = []
        query = key = 0
        for (queries, keys), alike in by_shape.items():
            height = max(1, LARGEST_SCORES // (heads * queries * keys))
            for start in range(0, len(alike), height):
                some = alike[start : start + height]
                at_queries, at_keys = slice(query, query + len(some) * heads * queries), slice(key, key + len(some) * key_heads * keys)
                batched.append(some)
                self.batches.append(Batch(len(some), queries, keys, at_queries, at_keys, hidden(some, window)))
                query, key = at_queries.stop, at_keys.stop
        self.heads, self.key_heads = heads, key_heads
        total = rows * positions
        queries_of = [[(block.queries, len(block.queries)) for block in some] for some in batched]
        keys_of = [[(block.keys, len(block.queries)) for block in some] for some in batched]
        self.of_queries = gather(queries_of, [batch.queries for batch in self.batches], heads, total)
        self.of_keys = gather(keys_of, [batch.keys for batch in self.batches], key_heads, total)
        self.scores = heads * sum(batch.size * batch.queries * batch.keys for batch in self.batches)

    def blocks(self, places: Tensor, batch: Batch) -> Tensor:
        """A batch's gathered rows as matrices [blocks · key heads, ·, S]."""
        return places.view(batch.size * self.key_heads, -1, places.shape[-1])


def padded(count: int) -> int:
    """`count` rounded up to the quantum."""
    return -(-count // QUANTUM) * QUANTUM


def cut(span: Span, positions: int, window: int | None) -> list[Block]:
    """The blocks of one span, of about equally many queries."""
    row, length = span.row * positions, span.end - span.start
    path = [row + place for start, end in span.path for place in range(start, end)]
    count = -(-length // QUERIES)
    ends = [span.start + length * number // count for number in range(count + 1)]
    found = []
    for start, end in pairwise(ends):
        first = len(path) + start - span.start
        low = 0 if window is None else max(0, first - window + 1)
        keys = [*path, *range(row + span.start, row + end)][low:]
        found.append(Block(list(range(row + start, row + end)), first, keys, low))
    return found


def hidden(blocks: Sequence[Block], window: int | None) -> Tensor:
    """[blocks, queries, H] bool: which of the last H keys a query does not see; padding sees what the last query sees, and nobody sees it.

    Without a window nothing before the queries themselves is hidden, so H does not grow with what stands before them.
    """
    queries, keys = blocks[0].shape
    seen = min(block.first - block.low for block in blocks) if window is None else 0
    last_n_1 = torch.tensor([[block.first + len(block.queries) - 1] for block in blocks])
    at_n_Q = torch.minimum(torch.arange(queries) + torch.tensor([[block.first] for block in blocks]), last_n_1)
    key_n_H = torch.arange(seen, keys) + torch.tensor([[block.low] for block in blocks])
    ahead_n_Q_H = at_n_Q[:, :, None] - key_n_H[:, None]
    return (ahead_n_Q_H < 0) if window is None else (ahead_n_Q_H < 0) | (ahead_n_Q_H >= window)


def gather(batches: Sequence[Sequence[tuple[list[int], int]]], lengths: Sequence[int], heads: int, total: int) -> Gather:
    """The gather of `total` tokens into batches of blocks, each (tokens, how many of the last are its own), head by head."""
    at: list[Tensor] = []
    own: list[Tensor] = []
    real: list[Tensor] = []
    for blocks, length in zip(batches, lengths, strict=True):
        tokens_n_Q = torch.tensor([tokens + tokens[-1:] * (length - len(tokens)) for tokens, _ in blocks])
        end_n_1 = torch.tensor([[len(tokens)] for tokens, _ in blocks])
        owned_n_1, place_Q = torch.tensor([[owned] for _, owned in blocks]), torch.arange(length)
        real_n_Q = place_Q < end_n_1
        at.append((tokens_n_Q[:, None] * heads + torch.arange(heads)[:, None]).flatten())
        for found, mask_n_Q in ((own, real_n_Q & (place_Q >= end_n_1 - owned_n_1)), (real, real_n_Q)):
            found.append(mask_n_Q[:, None].expand(-1, heads, -1).flatten())
    at_P, own_P, real_P = torch.cat(at), torch.cat(own), torch.cat(real)
    back = torch.full((total * heads,), len(at_P))
    mine = own_P.nonzero().squeeze(1)
    back[at_P[mine]] = mine
    return Gather(at_P, back, (~real_P).nonzero().squeeze(1), (real_P & ~own_P).nonzero().squeeze(1))


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float, plan: Plan) -> Tensor:
    """softmax(q kᵀ·scale) v of [rows, heads, positions, size], as [rows, positions, heads, size]; zero where no span stands."""
    found: Tensor = _BlockAttention.apply(query, key, value, scale, plan)
    return found


class _BlockAttention(torch.autograd.Function):
    """With p the probabilities, g the gradient of the output and dp = g vᵀ: dv = pᵀ g, ds = p·(dp - Σ p·dp), dq = ds k,
    dk = dsᵀ q. What is hidden has p = 0 and so gets nothing, and gives nothing.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, plan: Plan) -> Tensor:
        rows, heads, positions, _ = query.shape
        q, k, v = plan.of_queries(query).mul_(scale), plan.of_keys(key), plan.of_keys(value)
        keeps = any(ctx.needs_input_grad) and plan.scores * 4 <= KEPT_BYTES
        kept, out = [], plan.of_queries.room(v.shape[-1])
        with torch.autocast("cpu", enabled=False):
            for batch in plan.batches:
                p = probabilities(plan, batch, q[batch.at_queries], k[batch.at_keys])
                torch.bmm(p, plan.blocks(v[batch.at_keys], batch), out=plan.blocks(out[batch.at_queries], batch))
                kept += [p] if keeps else []
        ctx.save_for_backward(query, key, value)
        ctx.plan, ctx.scale, ctx.kept = plan, scale, kept if keeps else None
        return out.index_select(0, plan.of_queries.back).view(rows, positions, heads, -1).to(value.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        plan: Plan = ctx.plan
        query, key, value = ctx.saved_tensors
        q, k, v = plan.of_queries(query).mul_(ctx.scale), plan.of_keys(key), plan.of_keys(value)
        g = plan.of_queries(grad.transpose(1, 2)).index_fill_(0, plan.of_queries.padding, 0.0)
        dq, dk, dv = plan.of_queries.room(q.shape[-1]), plan.of_keys.room(k.shape[-1]), plan.of_keys.room(v.shape[-1])
        kept = iter(ctx.kept or ())
        with torch.autocast("cpu", enabled=False):
            for batch in plan.batches:
                queries, keys = batch.at_queries, batch.at_keys
                q_n, g_n, k_n, v_n = (plan.blocks(x, batch) for x in (q[queries], g[queries], k[keys], v[keys]))
                p = next(kept, None)
                p = probabilities(plan, batch, q[queries], k[keys]) if p is None else p
                torch.bmm(p.transpose(1, 2), g_n, out=plan.blocks(dv[keys], batch))
                ds = torch._softmax_backward_data(torch.bmm(g_n, v_n.transpose(1, 2)), p, -1, p.dtype)
                torch.bmm(ds, k_n, out=plan.blocks(dq[queries], batch))
                torch.bmm(ds.transpose(1, 2), q_n, out=plan.blocks(dk[keys], batch))
        ctx.kept = None
        dquery = dq.index_select(0, plan.of_queries.back).mul_(ctx.scale)
        return _headed(dquery, query), _headed(plan.of_keys.summed(dk), key), _headed(plan.of_keys.summed(dv), value), None, None


def probabilities(plan: Plan, batch: Batch, q: Tensor, k: Tensor) -> Tensor:
    """softmax of a batch's scores, [blocks · key heads, queries of all heads that share it, keys]."""
    scores = torch.bmm(plan.blocks(q, batch), plan.blocks(k, batch).transpose(1, 2))
    hidden_n_1_Q_H = batch.hidden_n_Q_H[:, None]
    scores.view(batch.size, plan.heads, batch.queries, batch.keys)[..., -hidden_n_1_Q_H.shape[-1] :].masked_fill_(hidden_n_1_Q_H, FORBIDDEN)
    return torch.softmax(scores, -1, out=scores)


def _headed(found: Tensor, like: Tensor) -> Tensor:
    """Rows [·, S] as [rows, heads, positions, S] in the dtype of `like`."""
    rows, heads, positions, size = like.shape
    return found.view(rows, positions, heads, size).transpose(1, 2).to(like.dtype)
