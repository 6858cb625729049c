"""What stands between a decoder's matrix products, as functions with a gradient of their own: norm, gate, rotation.

On CUDA each is a Triton kernel (`temper.policy.triton_kernels`), where transformers' operations pass over memory several
times. Sums are float32 and results are rounded once.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from temper.policy.kernels import kernels


def rms_norm(x: Tensor, weight_D: Tensor, eps: float, offset: float, dtype: torch.dtype) -> Tensor:
    """x·rsqrt(mean x² + ε)·(w + offset) over the last axis (Zhang & Sennrich 2019, eq. 4), rounded once to `dtype`."""
    y: Tensor = _RMSNorm.apply(x, weight_D, eps, offset, dtype)
    return y


def gate(g: Tensor, u: Tensor) -> Tensor:
    """silu(g)·u (Shazeer 2020, eq. 6), of one shape, rounded once to g's dtype."""
    y: Tensor = _Gate.apply(g, u)
    return y


def rotate(x_R_H_L_C: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions (Su et al. 2021, eq. 34): halves (a, b) of C become (a·cos - b·sin, b·cos + a·sin), in x's dtype.

    `cos` and `sin` are [R or 1, L, C] and take no gradient.
    """
    y: Tensor = _Rotation.apply(x_R_H_L_C, cos, sin)
    return y


class _RMSNorm(torch.autograd.Function):
    """With x̂ = x·r, r the rsqrt and c = mean(g·w·x̂): dx = r·(g·w - x̂·c), dw = Σ g·x̂."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float, offset: float, dtype: torch.dtype) -> Tensor:
        ctx.offset, found = offset, norm_kernels(x)
        if found is not None:
            x = x.contiguous()
            y, r = found.norm_rows(x, weight_D, eps, offset, dtype)
            ctx.save_for_backward(x, weight_D, r)
            return y
        wide, factor_D = x.float(), weight_D.float() + offset if offset else weight_D.float()
        r = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight_D, r)
        return (wide * r).mul_(factor_D).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight_D, r = ctx.saved_tensors
        found, need_weight = norm_kernels(x), ctx.needs_input_grad[1]
        if found is not None:
            dx, dweight_D = found.norm_rows_backward(grad.contiguous(), x, weight_D, r, ctx.offset, need_weight=need_weight)
        else:
            factor_D = weight_D.float() + ctx.offset if ctx.offset else weight_D.float()
            grad, normed = grad.float().contiguous(), x.float() * r
            product_N_D = (grad * normed).reshape(-1, x.shape[-1])
            dweight_D = product_N_D.sum(0) if need_weight else None
            c = torch.mv(product_N_D, factor_D).div_(-x.shape[-1]).view(r.shape)
            dx = (grad * factor_D).addcmul_(normed, c).mul_(r).to(x.dtype)
        return dx, dweight_D if dweight_D is None else dweight_D.to(weight_D.dtype), None, None, None


class _Gate(torch.autograd.Function):
    """With σ = sigmoid(g): dg = dy·u·σ(1 + g(1 - σ)), du = dy·g·σ. Keeps its inputs alone."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate, up, found = gate.contiguous(), up.contiguous(), kernels(gate)
        ctx.save_for_backward(gate, up)
        return found.gate(gate, up) if found is not None else (F.silu(gate.float()) * up.float()).to(gate.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        gate, up = ctx.saved_tensors
        grad, found = grad.contiguous(), kernels(gate)
        if found is not None:
            return found.gate_backward(gate, up, grad)
        wide, s = gate.float(), torch.sigmoid(gate.float())
        grad = grad.float()
        return (grad * up * s * (1 + wide * (1 - s))).to(gate.dtype), (grad * wide * s).to(up.dtype)


class _Rotation(torch.autograd.Function):
    """The gradient is turned back: the rotation is linear, and its transpose turns the other way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return rotated(x, cos, sin, back=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        cos, sin = ctx.saved_tensors
        return rotated(grad, cos, sin, back=True), None, None


def rotated(x: Tensor, cos: Tensor, sin: Tensor, *, back: bool) -> Tensor:
    """x turned by its positions' angles; `back` by the transposed rotation."""
    found = kernels(x)
    if found is not None:
        x = x if x.stride(-1) == 1 else x.contiguous()
        turned: Tensor = found.rotate(x, cos.contiguous(), sin.contiguous(), back=back)
        return turned
    a, b = x.float().chunk(2, -1)
    (cos1, cos2), (sin1, sin2) = cos.float().unsqueeze(1).chunk(2, -1), sin.float().unsqueeze(1).chunk(2, -1)
    halves = (a * cos1 + b * sin2, b * cos2 - a * sin1) if back else (a * cos1 - b * sin1, b * cos2 + a * sin2)
    return torch.cat(halves, -1).to(x.dtype)


def norm_kernels(x: Tensor) -> ModuleType | None:
    """The kernels for rows as wide as x's."""
    found = kernels(x)
    return found if found is not None and x.shape[-1] <= found.WIDEST else None
