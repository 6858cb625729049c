"""The product of a linear layer whose weight may be packed and may have a low-rank update beside it.

One function for both passes, so that a frozen weight costs its forward and the gradient of its input and nothing
else: no gradient of its own, no second output to add, no unpacked copy kept for the backward.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from temper.policy.quantised import dense, is_packed, pack


class QuantisedLinear(nn.Linear):
    """A linear layer whose weight is packed: `weight` [out, in/2] uint8, two levels a byte, beside its magnitudes."""

    def __init__(self, base: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.register_parameter("bias", base.bias)
        for name, tensor in pack(base.weight.detach()).items():
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        self.train(base.training)

    def forward(self, x: Tensor) -> Tensor:
        """W x + b with W unpacked for this product alone."""
        return linear(self, x)


def pack_layers(model: nn.Module, head: nn.Module) -> int:
    """Pack every linear layer of `model` but its `head`; return how many."""
    chosen = [(path, module) for path, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head]
    for path, module in chosen:
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, QuantisedLinear(module))
    return len(chosen)


class Update(NamedTuple):
    """s·u Bᵀ beside a product, u = z Aᵀ: A [R, in], B [out, R]; `dropped` is z where it is not the layer's own input,
    `foreign_B_R` where a row's u is zero because the columns belong to another row's adapter."""

    A: Tensor
    B: Tensor
    scaling: float
    dropped: Tensor | None = None
    foreign_B_R: Tensor | None = None


def linear(layer: nn.Linear, x: Tensor, update: Update | None = None, *, with_bias: bool = True) -> Tensor:
    """W x + b of `layer`, its weight packed or not, plus `update`."""
    bias = layer.bias if with_bias else None
    if update is None:
        if not is_packed(layer):
            return F.linear(x, layer.weight, bias)
        return _Product.apply(x, None, layer.weight, bias, None, None, layer, 0.0, None)
    return _Product.apply(x, update.dropped, layer.weight, bias, update.A, update.B, layer, update.scaling, update.foreign_B_R)


class _Product(torch.autograd.Function):
    """y = u Bᵀ + x Wᵀ + b with u = s·z Aᵀ, where z is x or x after dropout, and u is zero in a row's foreign columns.

    With g the gradient of y and d = s·g B (zero where u is): dx = d A + g W, dA = dᵀ z, dB = gᵀ u. A frozen W costs no
    product of its own. The large products add to what the small ones wrote, and so read it while they multiply. A packed W is unpacked anew in the backward.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, z: Tensor | None, weight: Tensor, bias: Tensor | None, A: Tensor | None, B: Tensor | None,
        layer: nn.Linear, scaling: float, foreign_B_R: Tensor | None,
    ) -> Tensor:  # fmt: skip
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        u_N_R = None
        with torch.autocast(kind, enabled=False):
            x_N_K = x.reshape(-1, x.shape[-1]).to(dtype)
            z_N_K = x_N_K if z is None else z.reshape(x_N_K.shape).to(dtype)
            if A is None or B is None:
                y_N_M = F.linear(x_N_K, _matrix(layer, weight, dtype), None if bias is None else bias.to(dtype))
            else:
                u_N_R = F.linear(z_N_K, A.to(dtype)).mul_(scaling)
                _clear(u_N_R, foreign_B_R)
                y_N_M = F.linear(u_N_R, B.to(dtype), None if bias is None else bias.to(dtype)).addmm_(x_N_K, _matrix(layer, weight, dtype).T)
        ctx.save_for_backward(x_N_K, None if z is None else z_N_K, weight, A, B, u_N_R, foreign_B_R)
        ctx.layer, ctx.scaling, ctx.shape = layer, scaling, x.shape
        return y_N_M.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x_N_K, z_N_K, weight, A, B, u_N_R, foreign_B_R = ctx.saved_tensors
        dtype, dx, dz, dA, dB = x_N_K.dtype, None, None, None, None
        need_x, need_z, need_weight, need_bias, need_A, need_B = ctx.needs_input_grad[:6]
        with torch.autocast(grad.device.type, enabled=False):
            g_N_M = grad.reshape(-1, grad.shape[-1]).to(dtype)
            if A is not None:
                d_N_R = (g_N_M @ B.to(dtype)).mul_(ctx.scaling)
                _clear(d_N_R, foreign_B_R)
                if need_B:
                    dB = (u_N_R.T @ g_N_M).T.to(B.dtype)
                if need_A:
                    dA = (d_N_R.T @ (x_N_K if z_N_K is None else z_N_K)).to(A.dtype)
                if need_z:
                    dz = (d_N_R @ A.to(dtype)).view(ctx.shape)
                elif need_x and z_N_K is None:
                    dx = d_N_R @ A.to(dtype)
            if need_x:
                matrix = _matrix(ctx.layer, weight, dtype)
                dx = g_N_M @ matrix if dx is None else dx.addmm_(g_N_M, matrix)
            dweight = (g_N_M.T @ x_N_K).to(weight.dtype) if need_weight else None
            dbias = g_N_M.sum(0) if need_bias else None
        return None if dx is None else dx.view(ctx.shape), dz, dweight, dbias, dA, dB, None, None, None


def _matrix(layer: nn.Linear, weight: Tensor, dtype: torch.dtype) -> Tensor:
    return weight.to(dtype) if weight.is_floating_point() else dense(layer, dtype)


def _clear(inner_N_R: Tensor, foreign_B_R: Tensor | None) -> None:
    """Set a row's foreign columns to zero, NaN included."""
    if foreign_B_R is not None:
        inner_N_R.view(foreign_B_R.shape[0], -1, inner_N_R.shape[-1]).masked_fill_(foreign_B_R[:, None], 0.0)
