"""How the head's logits are worked through: a tile of rows at a time, in one buffer, accumulated in float32.

A tile is tall enough for its three products (logits, dH, dW) to run near the processor's rate, and its logits are
turned into probabilities in place, a few rows at a time, while those lie in the cache: one pass over memory where
separate operations would make five. The derivative of a log-prob, 1_y - p, then needs no pass of its own: one number
a row is changed, and what scales a row is applied to [rows, D] instead of [rows, V].
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from temper.policy.kernels import kernels
from temper.policy.products import accurate_times_transposed, add_times_, times
from temper.policy.support import Support

# measured on a CPU: of 32 rows products run at two thirds of their best rate, of 256 at all of it; a GPU wants more
TILE_ROWS = {"cpu": 256, "cuda": 2048}
SHORTEST_TILE = 128
TILE_LOGITS = {"cpu": 7 << 20, "cuda": 1 << 28}  # 28 MiB: the largest block that glibc keeps for the next step; 1 GiB
BLOCK_LOGITS = 1 << 17  # of one core: half a MiB stays in its cache


@dataclass(frozen=True)
class Head:
    """The output matrix of a model and how its logits are formed.

    `softcap` is Gemma 2's cap·tanh(x/cap); `dtype` the precision of the products in the backward; `rows` the height
    of a tile (None: by device and vocabulary).
    """

    weight_V_D: Tensor
    bias_V: Tensor | None = None
    softcap: float | None = None
    dtype: torch.dtype = torch.float32
    rows: int | None = None

    @property
    def tile_rows(self) -> int:
        """The most rows of one tile."""
        device = "cpu" if self.weight_V_D.device.type == "cpu" else "cuda"
        return self.rows or min(TILE_ROWS[device], max(SHORTEST_TILE, TILE_LOGITS[device] // self.weight_V_D.shape[0]))

    def first(self, tokens: int) -> Head:
        """The head over the first `tokens` of its vocabulary alone."""
        bias_V = None if self.bias_V is None else self.bias_V[:tokens]
        return self if tokens == len(self.weight_V_D) else replace(self, weight_V_D=self.weight_V_D[:tokens], bias_V=bias_V)

    def ready(self, hidden_N_D: Tensor) -> Head:
        """The head with its matrix in the dtype that logits of these rows are multiplied in, so that no tile converts it again."""
        on_gpu = self.dtype is torch.bfloat16 and hidden_N_D.is_cuda
        return replace(self, weight_V_D=self.weight_V_D.to(torch.bfloat16 if on_gpu else wide(hidden_N_D)))

    def tiles(self, count: int) -> Iterator[slice]:
        """`count` rows in as few tiles as hold them, all about equally tall."""
        height = math.ceil(count / max(1, math.ceil(count / self.tile_rows)))
        return (slice(start, min(count, start + height)) for start in range(0, count, max(1, height)))

    def buffer(self, hidden_N_D: Tensor) -> Tensor | None:
        """Room for the logits of one tile, used again by the next; None where products have a place of their own."""
        if hidden_N_D.device.type != "cpu":
            return None
        return hidden_N_D.new_empty(min(len(hidden_N_D), self.tile_rows), self.weight_V_D.shape[0], dtype=wide(hidden_N_D))

    def logits(self, hidden_R_D: Tensor, temperature: float = 1.0, out: Tensor | None = None) -> Tensor:
        """The logits of one tile as float32 (float64 for float64), outside autograd; in the first rows of `out` where given."""
        room = None if out is None else out[: len(hidden_R_D)]
        logits_R_V = accurate_times_transposed(hidden_R_D, self.weight_V_D, self.dtype, out=room)
        if self.bias_V is not None:
            logits_R_V += self.bias_V
        if self.softcap is not None:
            logits_R_V.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits_R_V.div_(temperature) if temperature != 1.0 else logits_R_V

    def slope(self, logits_R_V: Tensor, temperature: float) -> Tensor | None:
        """What soft-capping multiplies the gradient of these logits with; None where there is none."""
        return None if self.softcap is None else 1 - (logits_R_V * (temperature / self.softcap)).square_().clamp_(max=1.0)


class Tile(NamedTuple):
    """One tile, reduced: probabilities (where the logits stood), and per row log Z, log p(target) and entropy (if asked)."""

    rows: slice
    p_R_V: Tensor
    logz_R: Tensor
    logprobs_R: Tensor
    entropy_R: Tensor | None
    slope_R_V: Tensor | None


def tiles(
    hidden_N_D: Tensor, head: Head, targets_N: Tensor, *, temperature: float = 1.0, support: Support | None = None, entropy: bool = False
) -> Iterator[Tile]:
    """Every tile in turn; the probabilities of one are gone when the next is asked for."""
    head, room = head.ready(hidden_N_D), head.buffer(hidden_N_D)
    for rows in head.tiles(len(hidden_N_D)):
        logits_R_V = head.logits(hidden_N_D[rows], temperature, room)
        if support is not None:
            support.forbid(logits_R_V, rows.start)
        target_R = logits_R_V.gather(1, targets_N[rows, None]).squeeze(1)
        slope_R_V = head.slope(logits_R_V, temperature)
        logz_R, entropy_R = softmax_(logits_R_V, entropy=entropy)
        yield Tile(rows, logits_R_V, logz_R, target_R - logz_R, entropy_R, slope_R_V)


def softmax_(logits_R_V: Tensor, *, entropy: bool = False) -> tuple[Tensor, Tensor | None]:
    """Logits become probabilities in place; returns log Z of each row and H = log Z - Σ p·s where asked.

    The largest probability is 1/Σ exp(s - max), so log Z = max - log(largest probability). Float32 rows on a GPU go to
    one Triton kernel where Triton works.
    """
    found = kernels(logits_R_V) if logits_R_V.dtype is torch.float32 and logits_R_V.is_contiguous() else None
    if found is not None:
        reduced: tuple[Tensor, Tensor | None] = found.softmax_rows_(logits_R_V, entropy=entropy)
        return reduced
    logz_R = logits_R_V.new_empty(len(logits_R_V))
    entropy_R = torch.empty_like(logz_R) if entropy else None
    for block in blocks(logits_R_V):
        part = logits_R_V[block]
        largest = part.amax(-1)
        if entropy_R is not None:
            p = torch.softmax(part, -1)
            entropy_R[block] = torch.linalg.vecdot(p, part).neg_()
            part.copy_(p)
        else:
            torch.softmax(part, -1, out=part)
        logz_R[block] = largest - part.amax(-1).log_()
    return logz_R, entropy_R if entropy_R is None else entropy_R.add_(logz_R)


def blocks(tile_R_V: Tensor) -> Iterator[slice]:
    """Rows that fit the caches of the cores that share them; on a GPU all rows at once."""
    rows, vocab = tile_R_V.shape
    height = rows if tile_R_V.is_cuda else torch.get_num_threads() * max(1, BLOCK_LOGITS // vocab)
    return (slice(start, min(rows, start + height)) for start in range(0, rows, max(1, height)))


def wide(tensor: Tensor) -> torch.dtype:
    """The dtype that sums are kept in."""
    return torch.float64 if tensor.dtype is torch.float64 else torch.float32


class Gradients:
    """dH, dW and db gathered tile by tile in float32 from the gradient of the logits."""

    def __init__(self, hidden_N_D: Tensor, head: Head, need_hidden: bool, need_weight: bool, need_bias: bool) -> None:
        self.needed = need_hidden or need_weight or need_bias
        self.input_N_D, self.head, self.wide = hidden_N_D, head, wide(hidden_N_D)
        self.dtype = self.wide if self.wide is torch.float64 else head.dtype
        self.weight_V_D = head.weight_V_D.to(self.dtype)
        self.hidden_N_D = torch.empty_like(hidden_N_D, dtype=self.wide) if need_hidden else None
        self.grad_weight_V_D = torch.zeros_like(head.weight_V_D, dtype=self.wide) if need_weight else None
        self.grad_bias_V = torch.zeros_like(head.bias_V, dtype=self.wide) if need_bias and head.bias_V is not None else None

    def add(self, rows: slice, grad_R_V: Tensor, scale_R: Tensor, slope_R_V: Tensor | None = None, temperature: float = 1.0) -> None:
        """Take in one tile: `grad_R_V`, of capped logits over `temperature`, is used up; row i counts `scale_R[i]` times."""
        if slope_R_V is not None:
            grad_R_V.mul_(slope_R_V)
        scale_R_1 = (scale_R / temperature)[:, None]
        if self.grad_bias_V is not None:
            self.grad_bias_V.addmv_(grad_R_V.T, scale_R_1.squeeze(1))
        grad_R_V = grad_R_V.to(self.dtype)
        if self.hidden_N_D is not None:
            torch.mul(times(grad_R_V, self.weight_V_D), scale_R_1, out=self.hidden_N_D[rows])
        if self.grad_weight_V_D is not None:
            add_times_(self.grad_weight_V_D, grad_R_V.T, (self.input_N_D[rows] * scale_R_1).to(self.dtype))

    def scaled(self, factor: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """(dH, dW, db), times `factor` where given, in the dtypes of what they belong to."""
        found = (self.hidden_N_D, self.grad_weight_V_D, self.grad_bias_V)
        dtypes = (self.input_N_D.dtype, self.head.weight_V_D.dtype, self.head.weight_V_D.dtype)
        made = [
            None if item is None else (item if factor is None else item * factor).to(dtype)
            for item, dtype in zip(found, dtypes, strict=True)
        ]
        return made[0], made[1], made[2]
