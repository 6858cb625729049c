"""The language-model head at supervised positions only, in tiles: log-probs, entropy, cross-entropy.

The logits of all positions never exist at once: a tile of rows is multiplied out, reduced in float32 and
dropped. What the backward needs is formed where it is cheapest:

- cross-entropy with known weights: dH and dW in the forward (6 operations a weight and token);
- per-token log-probs with a frozen head: dH unscaled in the forward, scaled in the backward (4), because dH is
  row-wise linear in the gradient of the log-probs;
- anything else: the tile is multiplied out again in the backward (8).

With s = scale·cap(h·W + b)/temperature over the allowed tokens A:  log p(y) = s_y - logZ,
logZ = log Σ_A exp s,  H = logZ - Σ_A p s;  ∂log p(y)/∂s = 1_y - p,  ∂H/∂s = -p (log p + H),  ∂logZ/∂s = p.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from temper.core.errors import ShapeError
from temper.policy.products import accurate_times_transposed, add_times_, times
from temper.policy.support import Support

TILE_LOGITS = 1 << 22  # float32 logits of one tile: 16 MiB; smaller ones stay in the cache and multiply at two thirds of the rate


@dataclass(frozen=True)
class Head:
    """The output matrix of a model and how its logits are formed.

    `softcap` is Gemma 2's cap·tanh(x/cap); `dtype` the precision of the products in the backward.
    """

    weight_V_D: Tensor
    bias_V: Tensor | None = None
    softcap: float | None = None
    dtype: torch.dtype = torch.float32
    tile_logits: int = TILE_LOGITS

    @property
    def tile_rows(self) -> int:
        """Rows of one tile."""
        return max(16, self.tile_logits // self.weight_V_D.shape[0])

    def logits(self, hidden_R_D: Tensor, temperature: float = 1.0) -> Tensor:
        """The logits of one tile as float32 (float64 for float64), outside autograd."""
        logits_R_V = accurate_times_transposed(hidden_R_D, self.weight_V_D, self.dtype)
        if self.bias_V is not None:
            logits_R_V += self.bias_V
        if self.softcap is not None:
            logits_R_V.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits_R_V.div_(temperature) if temperature != 1.0 else logits_R_V

    def uncap_(self, grad_R_V: Tensor, logits_R_V: Tensor, temperature: float) -> Tensor:
        """In place, the gradient of scaled and capped logits as that of the raw products."""
        if temperature != 1.0:
            grad_R_V.div_(temperature)
        if self.softcap is not None:
            grad_R_V.mul_(1 - (logits_R_V * (temperature / self.softcap)).square().clamp_(max=1.0))
        return grad_R_V


Divergence = Callable[[Tensor, Tensor], Tensor]


class TokenValues(NamedTuple):
    """Per token: log-prob of the target, entropy (None unless asked for) and log Z, float32."""

    logprobs_N: Tensor
    entropy_N: Tensor | None
    logz_N: Tensor


def token_values(
    hidden_N_D: Tensor,
    head: Head,
    targets_N: Tensor,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    support: Support | None = None,
) -> TokenValues:
    """Log-probs, entropy and log Z of each row at `temperature`, over the allowed tokens; differentiable."""
    check_rows(hidden_N_D, head, targets_N)
    values = _TokenValues.apply(hidden_N_D, head.weight_V_D, head.bias_V, targets_N, head, support, temperature, entropy)
    return TokenValues(values[0], values[1] if entropy else None, values[2])


def cross_entropy(
    hidden_N_D: Tensor, head: Head, targets_N: Tensor, weights_N: Tensor, *, z_loss: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Σ weight·(-log p(target) + z_loss·logZ²), and the log-probs and log Z of each row (no gradient).

    Gradients are formed in the forward, so the backward costs one multiplication by a scalar.
    """
    check_rows(hidden_N_D, head, targets_N)
    total, logprobs_N, logz_N = _CrossEntropy.apply(hidden_N_D, head.weight_V_D, head.bias_V, targets_N, weights_N, head, z_loss)
    return total, logprobs_N, logz_N


def check_rows(hidden_N_D: Tensor, head: Head, targets_N: Tensor) -> None:
    """Raise ShapeError where rows, widths or targets disagree with the head."""
    if hidden_N_D.ndim != 2 or hidden_N_D.shape[1] != head.weight_V_D.shape[1] or targets_N.shape != hidden_N_D.shape[:1]:
        raise ShapeError(
            f"hidden {tuple(hidden_N_D.shape)}, head {tuple(head.weight_V_D.shape)} and targets {tuple(targets_N.shape)} do not fit",
            do="pass hidden [N, D], weight [V, D] and targets [N]",
        )
    if targets_N.numel() and int(targets_N.max()) >= head.weight_V_D.shape[0]:
        raise ShapeError(
            f"token {int(targets_N.max())} is outside the vocabulary of {head.weight_V_D.shape[0]}", do="use the tokenizer of this model"
        )


def divergence(
    hidden_N_D: Tensor, head: Head, teacher: Callable[[slice], Tensor], weights_N: Tensor, measure: Divergence, *, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Σ weight·measure(student, teacher) over rows, and each row's value (no gradient), tile by tile.

    `teacher(rows)` gives the teacher's logits of these rows, `measure` takes log-probabilities [R, V] of both and
    returns [R]. Gradients are formed in the forward; neither model's logits ever exist whole.
    """
    total, values_N = _Divergence.apply(hidden_N_D, head.weight_V_D, head.bias_V, weights_N, head, teacher, measure, temperature)
    return total, values_N


class _Tile(NamedTuple):
    rows: slice
    logits_R_V: Tensor
    exp_R_V: Tensor  # exp(logits - max)
    sum_R_1: Tensor
    logz_R: Tensor
    logprobs_R: Tensor


def _tile(
    head: Head, hidden_N_D: Tensor, targets_N: Tensor, start: int, support: Support | None, temperature: float, keep_logits: bool
) -> _Tile:
    """One tile multiplied out and reduced. Without `keep_logits` the exponentials overwrite the logits."""
    rows = slice(start, min(start + head.tile_rows, hidden_N_D.shape[0]))
    logits_R_V = head.logits(hidden_N_D[rows], temperature)
    if support is not None:
        support.forbid(logits_R_V, start)
    target_R = logits_R_V.gather(1, targets_N[rows, None]).squeeze(1)
    largest_R_1 = logits_R_V.amax(-1, keepdim=True)
    # exp and sum apart: torch's logsumexp is six times slower than this on a CPU
    exp_R_V = (logits_R_V - largest_R_1 if keep_logits else logits_R_V.sub_(largest_R_1)).exp_()
    sum_R_1 = exp_R_V.sum(-1, keepdim=True)
    logz_R = (sum_R_1.log() + largest_R_1).squeeze(1)
    return _Tile(rows, logits_R_V, exp_R_V, sum_R_1, logz_R, target_R - logz_R)


def _tiles(head: Head, rows: int) -> range:
    return range(0, rows, head.tile_rows)


class _CrossEntropy(torch.autograd.Function):
    """Σ w(-log p + z logZ²) with dH and dW formed in the forward; dlogits = w (p(1 + 2 z logZ) - 1_y)."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_N_D: Tensor,
        weight_V_D: Tensor,
        bias_V: Tensor | None,
        targets_N: Tensor,
        weights_N: Tensor,
        head: Head,
        z_loss: float,
    ) -> Any:
        wide = _wide(hidden_N_D)
        count = hidden_N_D.shape[0]
        logprobs_N, logz_N = hidden_N_D.new_empty(count, dtype=wide), hidden_N_D.new_empty(count, dtype=wide)
        weights_N = weights_N.to(wide)
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        grads = _Gradients(hidden_N_D, head, need_hidden, need_weight, need_bias)
        total = hidden_N_D.new_zeros((), dtype=wide)
        for start in _tiles(head, count):
            tile = _tile(head, hidden_N_D, targets_N, start, None, 1.0, keep_logits=head.softcap is not None)
            logprobs_N[tile.rows], logz_N[tile.rows] = tile.logprobs_R, tile.logz_R
            weights_R = weights_N[tile.rows]
            total += (weights_R * (z_loss * tile.logz_R.square() - tile.logprobs_R)).sum()
            if grads.needed:
                scale_R = weights_R * (1 + 2 * z_loss * tile.logz_R)
                grad_R_V = tile.exp_R_V.mul_(scale_R[:, None] / tile.sum_R_1)
                grad_R_V.scatter_add_(1, targets_N[tile.rows, None], -weights_R[:, None])
                grads.add(tile.rows, head.uncap_(grad_R_V, tile.logits_R_V, 1.0))
        ctx.grads = grads
        ctx.mark_non_differentiable(logprobs_N, logz_N)
        return total, logprobs_N, logz_N

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> Any:
        return *ctx.grads.scaled(grad), None, None, None, None


class _TokenValues(torch.autograd.Function):
    """log p, H and log Z of each row; see the module docstring for the derivatives."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_N_D: Tensor,
        weight_V_D: Tensor,
        bias_V: Tensor | None,
        targets_N: Tensor,
        head: Head,
        support: Support | None,
        temperature: float,
        entropy: bool,
    ) -> Any:
        wide = _wide(hidden_N_D)
        count = hidden_N_D.shape[0]
        logprobs_N, entropy_N, logz_N = (hidden_N_D.new_empty(count, dtype=wide) for _ in range(3))
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        unscaled = _Gradients(hidden_N_D, head, True, False, False) if need_hidden and not (need_weight or need_bias) else None
        for start in _tiles(head, count):
            tile = _tile(head, hidden_N_D, targets_N, start, support, temperature, keep_logits=entropy or head.softcap is not None)
            logprobs_N[tile.rows], logz_N[tile.rows] = tile.logprobs_R, tile.logz_R
            if entropy:
                entropy_N[tile.rows] = tile.logz_R - (tile.exp_R_V * tile.logits_R_V).sum(-1) / tile.sum_R_1.squeeze(1)
            if unscaled is not None:
                grad_R_V = tile.exp_R_V.div_(-tile.sum_R_1)
                grad_R_V.scatter_add_(1, targets_N[tile.rows, None], torch.ones_like(tile.sum_R_1))
                unscaled.add(tile.rows, head.uncap_(grad_R_V, tile.logits_R_V, temperature))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden_N_D, targets_N)
        ctx.head, ctx.support, ctx.temperature, ctx.unscaled = head, support, temperature, unscaled
        return logprobs_N, entropy_N, logz_N

    @staticmethod
    def backward(ctx: Any, grad_logprobs_N: Tensor | None, grad_entropy_N: Tensor | None, grad_logz_N: Tensor | None) -> Any:
        if ctx.unscaled is not None and grad_entropy_N is None and grad_logz_N is None:
            dhidden_N_D = None if grad_logprobs_N is None else ctx.unscaled.hidden_N_D * grad_logprobs_N[:, None]
            return dhidden_N_D, *[None] * 7
        hidden_N_D, targets_N = ctx.saved_tensors
        head: Head = ctx.head
        grads = _Gradients(hidden_N_D, head, *ctx.needs_input_grad[:3])
        for start in _tiles(head, hidden_N_D.shape[0]):
            tile = _tile(
                head,
                hidden_N_D,
                targets_N,
                start,
                ctx.support,
                ctx.temperature,
                keep_logits=grad_entropy_N is not None or head.softcap is not None,
            )
            p_R_V = tile.exp_R_V.div_(tile.sum_R_1)
            factor_R_1 = torch.zeros_like(tile.sum_R_1)
            if grad_logprobs_N is not None:
                factor_R_1 = factor_R_1 - grad_logprobs_N[tile.rows, None]
            if grad_logz_N is not None:
                factor_R_1 = factor_R_1 + grad_logz_N[tile.rows, None]
            if grad_entropy_N is not None:
                logp_R_V = tile.logits_R_V - tile.logz_R[:, None]
                entropy_R_1 = -(p_R_V * logp_R_V).sum(-1, keepdim=True)
                factor_R_V = factor_R_1 - grad_entropy_N[tile.rows, None] * (logp_R_V + entropy_R_1)
                grad_R_V = p_R_V * factor_R_V
            else:
                grad_R_V = p_R_V.mul_(factor_R_1)
            if grad_logprobs_N is not None:
                grad_R_V.scatter_add_(1, targets_N[tile.rows, None], grad_logprobs_N[tile.rows, None].to(grad_R_V.dtype))
            grads.add(tile.rows, head.uncap_(grad_R_V, tile.logits_R_V, ctx.temperature))
        return *grads.scaled(None), *[None] * 5


class _Divergence(torch.autograd.Function):
    """Σ w·measure with the gradient of one tile of logits at a time taken by autograd, in the forward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_N_D: Tensor,
        weight_V_D: Tensor,
        bias_V: Tensor | None,
        weights_N: Tensor,
        head: Head,
        teacher: Callable[[slice], Tensor],
        measure: Divergence,
        temperature: float,
    ) -> Any:
        grads = _Gradients(hidden_N_D, head, *ctx.needs_input_grad[:3])
        values_N = hidden_N_D.new_empty(len(hidden_N_D), dtype=_wide(hidden_N_D))
        for start in _tiles(head, len(hidden_N_D)):
            rows = slice(start, min(start + head.tile_rows, len(hidden_N_D)))
            logits_R_V = head.logits(hidden_N_D[rows], temperature)
            with torch.enable_grad():
                leaf_R_V = logits_R_V.detach().requires_grad_(grads.needed)
                values_R = measure(log_softmax(leaf_R_V), log_softmax(teacher(rows) / temperature))
            values_N[rows] = values_R.detach()
            if grads.needed:
                (grad_R_V,) = torch.autograd.grad(values_R, leaf_R_V, weights_N[rows].to(values_R.dtype))
                grads.add(rows, head.uncap_(grad_R_V, logits_R_V, temperature))
        ctx.grads = grads
        ctx.mark_non_differentiable(values_N)
        return (values_N * weights_N).sum(), values_N

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> Any:
        return *ctx.grads.scaled(grad), *[None] * 5


def log_softmax(logits_R_V: Tensor) -> Tensor:
    """Row-wise log-softmax; on a CPU faster than torch's, which goes through the rows with a scalar logarithm."""
    shifted_R_V = logits_R_V - logits_R_V.detach().amax(-1, keepdim=True)
    return shifted_R_V - shifted_R_V.exp().sum(-1, keepdim=True).log()


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype is torch.float64 else torch.float32


class _Gradients:
    """dH, dW and db gathered tile by tile in float32 from the gradient of the logits."""

    def __init__(self, hidden_N_D: Tensor, head: Head, need_hidden: bool, need_weight: bool, need_bias: bool) -> None:
        wide = _wide(hidden_N_D)
        self.needed = need_hidden or need_weight or need_bias
        self.dtype = wide if wide is torch.float64 else head.dtype
        self.hidden_dtype, self.weight_dtype = hidden_N_D.dtype, head.weight_V_D.dtype
        self.input_N_D = hidden_N_D.to(self.dtype) if need_weight else None
        self.weight_V_D = head.weight_V_D.to(self.dtype)
        self.hidden_N_D = torch.empty_like(hidden_N_D, dtype=wide) if need_hidden else None
        self.grad_weight_V_D = torch.zeros_like(head.weight_V_D, dtype=wide) if need_weight else None
        self.grad_bias_V = torch.zeros_like(head.bias_V, dtype=wide) if need_bias and head.bias_V is not None else None

    def add(self, rows: slice, grad_R_V: Tensor) -> None:
        """Take in one tile's gradient of the logits."""
        if self.grad_bias_V is not None:
            self.grad_bias_V += grad_R_V.sum(0)
        grad_R_V = grad_R_V.to(self.dtype)
        if self.hidden_N_D is not None:
            self.hidden_N_D[rows] = times(grad_R_V, self.weight_V_D)
        if self.grad_weight_V_D is not None and self.input_N_D is not None:
            add_times_(self.grad_weight_V_D, grad_R_V.T, self.input_N_D[rows])

    def scaled(self, factor: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """(dH, dW, db), times `factor` where given, in the dtypes of what they belong to."""
        found = (self.hidden_N_D, self.grad_weight_V_D, self.grad_bias_V)
        dtypes = (self.hidden_dtype, self.weight_dtype, self.weight_dtype)
        made = [
            None if item is None else (item if factor is None else item * factor).to(dtype)
            for item, dtype in zip(found, dtypes, strict=True)
        ]
        return made[0], made[1], made[2]
