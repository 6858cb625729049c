"""Causal attention of padded rows, packed rows and rows that share a beginning, through transformers' own interface.

A layout's spans come in through the mask: transformers asks `mask` for one, gets `Seen` (what queries may see, in a few
numbers) where a layout is at hand, and passes it to every layer as it would a tensor. On a CPU the sums are float32
matrix products of blocks (`temper.policy.blocks`): PyTorch's own kernel multiplies at a tenth of what the processor
can. On CUDA a layout goes to the variable-length kernel, rows as they stand to PyTorch's flash kernel. No mask of
positions by positions is made, save where neither can compute the layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from temper.core.errors import ShapeError
from temper.data.layout import Span
from temper.policy import varlen
from temper.policy.blocks import Plan, attend

NAME = "temper_blocks"
MORE = ("position_bias", "softcap")  # what a layer may pass that neither the blocks nor the kernels compute
# without cuDNN's: it plans anew for every shape, and micro-batches differ in shape
BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

_spans: ContextVar[tuple[Span, ...] | None] = ContextVar("spans", default=None)
_count: ContextVar[list[int]] = ContextVar("count")


@dataclass(frozen=True)
class Seen:
    """What each query sees: the path and the beginning of its own span, at most `window` keys (None: all of them)."""

    spans: tuple[Span, ...]
    window: int | None
    plans: dict[tuple[int, int], Plan] = field(default_factory=dict, compare=False)

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

    def plan(self, rows: int, positions: int, heads: int, key_heads: int) -> Plan:
        """The products that compute it on a CPU: made by the first layer, used by all that have as many heads."""
        if (heads, key_heads) not in self.plans:
            self.plans[heads, key_heads] = Plan(self.spans, rows, positions, heads, key_heads, self.window)
        return self.plans[heads, key_heads]


@lru_cache(maxsize=4)
def causal(rows: int, positions: int, heads: int, key_heads: int) -> Plan:
    """The products of rows that see nothing but what stands before."""
    return Plan([Span(row, 0, positions) for row in range(rows)], rows, positions, heads, key_heads, None)


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

    What is more than causal attention (another mask, dropout, a position bias) goes to transformers' own. Raises ShapeError
    for capped scores, and for a position bias under a layout.
    """
    if query.is_cuda and torch.is_autocast_enabled("cuda"):  # angles are float32, and so may be what they turned
        query, key, value = (item.to(torch.get_autocast_dtype("cuda")) for item in (query, key, value))
    seen = attention_mask if isinstance(attention_mask, Seen) else None
    if seen is not None and (count := _count.get(None)) is not None:
        count[0] += 1
    more = [name for name in MORE if options.get(name) is not None]
    if "softcap" in more or (more and seen is not None):  # the sdpa of transformers 5.17 leaves a softcap out without a word
        raise ShapeError(f"this model's layers attend with {more[0]}, which these products leave out", do="use a transformers that computes such layers eagerly")
    plain = (seen is not None or attention_mask is None) and not dropout and query.shape[2] == key.shape[2] and not more
    plain = plain and options.get("is_causal") is not False and getattr(module, "is_causal", True)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if plain and seen is not None and varlen.can(query, value):
        return varlen.attention(query, key, value, seen.paths, scale, seen.window), None
    if plain and seen is None and query.is_cuda:
        with sdpa_kernel(BACKENDS):
            return sdpa_attention_forward(module, query, key, value, None, scaling=scaling, **options)
    if plain and query.device.type == "cpu":
        rows, heads, positions, _ = query.shape
        plan = (causal if seen is None else seen.plan)(rows, positions, heads, key.shape[1])
        return attend(query, key, value, scale, plan), None
    dense = attention_mask.dense(query.shape[0], query.shape[2], query.device) if isinstance(attention_mask, Seen) else attention_mask
    return sdpa_attention_forward(module, query, key, value, dense, dropout=dropout, scaling=scaling, **options)


# under its own name transformers must be told how masks are formed, or it forms none at all
ALL_ATTENTION_FUNCTIONS.register(NAME, attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, mask)
