"""The language-model head at supervised positions only: log-probs, entropy, cross-entropy, divergences.

The logits of all positions never exist at once: a tile of rows is multiplied out, reduced in float32 and
dropped (`temper.policy.tiles`). What the backward needs is formed where it is cheapest:

- cross-entropy with known weights: dH and dW in the forward (6 operations a weight and token);
- per-token log-probs with a frozen head: dH unscaled in the forward, scaled in the backward (4), because dH is
  row-wise linear in the gradient of the log-probs;
- anything else: the tile is multiplied out again in the backward (8).

With s = cap(h·W + b)/temperature over the allowed tokens A:  log p(y) = s_y - logZ,
logZ = log Σ_A exp s,  H = logZ - Σ_A p s;  ∂log p(y)/∂s = 1_y - p,  ∂H/∂s = -p (log p + H),  ∂logZ/∂s = p.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from temper.core.errors import ShapeError
from temper.policy.losses import forward_kl, reverse_kl
from temper.policy.support import FORBIDDEN, Support
from temper.policy.tiles import Gradients, Head, Tile, blocks, tiles, wide

__all__ = ["Divergence", "Head", "TokenValues", "cross_entropy", "divergence", "token_values"]

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
    values = _TokenValues.apply(hidden_N_D, *trained(head), targets_N, head, support, temperature, entropy)
    return TokenValues(values[0], values[1] if entropy else None, values[2])


def cross_entropy(
    hidden_N_D: Tensor, head: Head, targets_N: Tensor, weights_N: Tensor, *, z_loss: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Σ weight·(-log p(target) + z_loss·logZ²), and the log-probs and log Z of each row (no gradient).

    Gradients are formed in the forward, so the backward costs one multiplication by a scalar.
    """
    check_rows(hidden_N_D, head, targets_N)
    total, logprobs_N, logz_N = _CrossEntropy.apply(hidden_N_D, *trained(head), targets_N, weights_N, head, z_loss)
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
    total, values_N = _Divergence.apply(hidden_N_D, *trained(head), weights_N, head, teacher, measure, temperature)
    return total, values_N


def trained(head: Head) -> tuple[Tensor, Tensor | None]:
    """Weight and bias as autograd is to see them: under `no_grad` a function is told all the same that they want gradients."""
    if torch.is_grad_enabled():
        return head.weight_V_D, head.bias_V
    return head.weight_V_D.detach(), None if head.bias_V is None else head.bias_V.detach()


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
        logprobs_N, logz_N = (hidden_N_D.new_empty(len(hidden_N_D), dtype=wide(hidden_N_D)) for _ in range(2))
        weights_N = weights_N.to(logz_N.dtype)
        grads = Gradients(hidden_N_D, head, *ctx.needs_input_grad[:3])
        for tile in tiles(hidden_N_D, head, targets_N):
            logprobs_N[tile.rows], logz_N[tile.rows] = tile.logprobs_R, tile.logz_R
            if grads.needed:
                if z_loss:
                    tile.p_R_V.mul_((1 + 2 * z_loss * tile.logz_R)[:, None])
                at_targets_(tile, targets_N, -1.0)
                grads.add(tile.rows, tile.p_R_V, weights_N[tile.rows], tile.slope_R_V)
        ctx.grads = grads
        ctx.mark_non_differentiable(logprobs_N, logz_N)
        return (weights_N * (z_loss * logz_N.square() - logprobs_N)).sum(), logprobs_N, logz_N

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
        logprobs_N, entropy_N, logz_N = (hidden_N_D.new_empty(len(hidden_N_D), dtype=wide(hidden_N_D)) for _ in range(3))
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        unscaled = Gradients(hidden_N_D, head, True, False, False) if need_hidden and not (need_weight or need_bias) else None
        for tile in tiles(hidden_N_D, head, targets_N, temperature=temperature, support=support, entropy=entropy):
            logprobs_N[tile.rows], logz_N[tile.rows] = tile.logprobs_R, tile.logz_R
            if tile.entropy_R is not None:
                entropy_N[tile.rows] = tile.entropy_R
            if unscaled is not None:
                at_targets_(tile, targets_N, -1.0)
                unscaled.add(tile.rows, tile.p_R_V, -torch.ones_like(tile.logz_R), tile.slope_R_V, temperature)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden_N_D, targets_N)
        ctx.head, ctx.support, ctx.temperature, ctx.unscaled = head, support, temperature, unscaled
        return logprobs_N, entropy_N, logz_N

    @staticmethod
    def backward(ctx: Any, grad_logprobs_N: Tensor | None, grad_entropy_N: Tensor | None, grad_logz_N: Tensor | None) -> Any:
        if ctx.unscaled is not None and grad_entropy_N is None and grad_logz_N is None:
            dhidden_N_D = None if grad_logprobs_N is None else ctx.unscaled.hidden_N_D * grad_logprobs_N[:, None]
            return None if dhidden_N_D is None else dhidden_N_D.to(ctx.unscaled.input_N_D.dtype), *[None] * 7
        hidden_N_D, targets_N = ctx.saved_tensors
        grads, zeros_N = Gradients(hidden_N_D, ctx.head, *ctx.needs_input_grad[:3]), hidden_N_D.new_zeros((), dtype=wide(hidden_N_D))
        of_logprobs_N = (zeros_N if grad_logprobs_N is None else grad_logprobs_N).expand(len(hidden_N_D))
        of_logz_N = (zeros_N if grad_logz_N is None else grad_logz_N).expand(len(hidden_N_D))
        entropy = grad_entropy_N is not None
        for tile in tiles(hidden_N_D, ctx.head, targets_N, temperature=ctx.temperature, support=ctx.support, entropy=entropy):
            factor_R = of_logz_N[tile.rows] - of_logprobs_N[tile.rows]
            if grad_entropy_N is not None and tile.entropy_R is not None:
                of_entropy_R = grad_entropy_N[tile.rows]
                tile.p_R_V.copy_(
                    tile.p_R_V * (factor_R - of_entropy_R * tile.entropy_R)[:, None]
                    - of_entropy_R[:, None] * torch.special.xlogy(tile.p_R_V, tile.p_R_V)
                )
            else:
                tile.p_R_V.mul_(factor_R[:, None])
            at_targets_(tile, targets_N, of_logprobs_N[tile.rows])
            grads.add(tile.rows, tile.p_R_V, torch.ones_like(factor_R), tile.slope_R_V, ctx.temperature)
        return *grads.scaled(None), *[None] * 5


def at_targets_(tile: Tile, targets_N: Tensor, value: Tensor | float) -> None:
    """Add `value` to each row's number at its target."""
    column_R_1 = targets_N[tile.rows, None]
    values_R_1 = value[:, None] if isinstance(value, Tensor) else tile.p_R_V.new_full(column_R_1.shape, value)
    tile.p_R_V.scatter_add_(1, column_R_1, values_R_1.to(tile.p_R_V.dtype))


class _Divergence(torch.autograd.Function):
    """Σ w·measure with the gradient of the logits formed in the forward, a few rows at a time."""

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
        grads = Gradients(hidden_N_D, head, *ctx.needs_input_grad[:3])
        values_N = hidden_N_D.new_empty(len(hidden_N_D), dtype=wide(hidden_N_D))
        value_and_gradient, room, ready = GRADIENTS.get(measure, by_autograd(measure)), head.buffer(hidden_N_D), head.ready(hidden_N_D)
        for rows in head.tiles(len(hidden_N_D)):
            logits_R_V = ready.logits(hidden_N_D[rows], temperature, room)
            teacher_R_V, slope_R_V = teacher(rows), head.slope(logits_R_V, temperature)
            for block in blocks(logits_R_V):
                logq = torch.log_softmax(teacher_R_V[block] / temperature if temperature != 1.0 else teacher_R_V[block], -1)
                values_N[rows][block], gradient = value_and_gradient(torch.log_softmax(logits_R_V[block], -1), logq)
                logits_R_V[block] = gradient
            if grads.needed:
                grads.add(rows, logits_R_V, weights_N[rows].to(values_N.dtype), slope_R_V, temperature)
        ctx.grads = grads
        ctx.mark_non_differentiable(values_N)
        return (values_N * weights_N).sum(), values_N

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> Any:
        return *ctx.grads.scaled(grad), *[None] * 5


def reverse_kl_gradient(logp_R_V: Tensor, logq_R_V: Tensor) -> tuple[Tensor, Tensor]:
    """KL(p ‖ q) of each row and its gradient by the logits of p: p (log p - log q - KL)."""
    apart_R_V = logp_R_V - logq_R_V.clamp_(min=FORBIDDEN)
    p_R_V = logp_R_V.exp()
    values_R = torch.linalg.vecdot(p_R_V, apart_R_V)
    return values_R, apart_R_V.sub_(values_R[:, None]).mul_(p_R_V)


def forward_kl_gradient(logp_R_V: Tensor, logq_R_V: Tensor) -> tuple[Tensor, Tensor]:
    """KL(q ‖ p) of each row and its gradient by the logits of p: p - q."""
    q_R_V = logq_R_V.clamp_(min=FORBIDDEN).exp()
    return torch.linalg.vecdot(q_R_V, logq_R_V - logp_R_V), logp_R_V.exp().sub_(q_R_V)


# measures whose gradient is short enough to write down: a third of autograd's passes
GRADIENTS: dict[Divergence, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    reverse_kl: reverse_kl_gradient,
    forward_kl: forward_kl_gradient,
}


def by_autograd(measure: Divergence) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Value and gradient of any other measure: g - p Σ g, where g is its gradient by the log-probabilities."""

    def value_and_gradient(logp_R_V: Tensor, logq_R_V: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            leaf_R_V = logp_R_V.detach().requires_grad_()
            values_R = measure(leaf_R_V, logq_R_V)
        (grad_R_V,) = torch.autograd.grad(values_R, leaf_R_V, torch.ones_like(values_R))
        return values_R.detach(), grad_R_V - logp_R_V.exp().mul_(grad_R_V.sum(-1, keepdim=True))

    return value_and_gradient
