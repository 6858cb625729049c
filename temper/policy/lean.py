"""The decoder's forward with less waste on a CPU: norms as one function, attention by blocks.

Nothing here knows a model family. A norm is replaced where trying it shows which formula it follows, attention
through transformers' own interface, and only inside `lean`: the model itself is left as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from temper.data.layout import Layout
from temper.policy import attention
from temper.policy.last_layer import last_mlp

TOLERANCE = 1e-5


class _RMSNorm(torch.autograd.Function):
    """x·rsqrt(mean x² + ε)·(w + offset) in float32 (Zhang & Sennrich 2019, eq. 4), rounded once to `dtype`.

    With x̂ = x·r, r the rsqrt and c = mean(g·w·x̂): dx = r·(g·w - x̂·c), dw = Σ g·x̂.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float, offset: float, dtype: torch.dtype) -> Tensor:
        wide, factor_D = x.float(), weight_D.float() + offset if offset else weight_D.float()
        r = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, factor_D, r)
        ctx.weight_dtype = weight_D.dtype
        return (wide * r).mul_(factor_D).to(dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, factor_D, r = ctx.saved_tensors
        grad, normed = grad.float().contiguous(), x.float() * r
        product_N_D = (grad * normed).reshape(-1, x.shape[-1])
        dweight_D = product_N_D.sum(0) if ctx.needs_input_grad[1] else None
        c = torch.mv(product_N_D, factor_D).div_(-x.shape[-1]).view(r.shape)
        dx = (grad * factor_D).addcmul_(normed, c).mul_(r)
        return dx.to(x.dtype), dweight_D if dweight_D is None else dweight_D.to(ctx.weight_dtype), None, None, None


class Lean:
    """What can be replaced in one model: its norms by path, whether its attention can, and the MLP that need not run everywhere."""

    def __init__(self, model: nn.Module, decoder: nn.Module) -> None:
        on_cpu = next(model.parameters()).device.type == "cpu"
        config: Any = decoder.config
        self.on_cpu = on_cpu
        self.given = config._attn_implementation
        self.config = config if self.given == "sdpa" else None
        self.last_mlp = last_mlp(decoder)
        tried: dict[tuple[type, float], float | None] = {}
        self.norms: list[tuple[nn.Module, float, float, bool]] = []
        for path, module in decoder.named_modules() if on_cpu else ():
            eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
            weight = getattr(module, "weight", None)
            if not type(module).__name__.endswith("RMSNorm") or not isinstance(eps, float) or not isinstance(weight, nn.Parameter):
                continue
            key = (type(module), eps)
            if key not in tried:
                tried[key] = formula(module, weight, eps)
            offset = tried[key]
            if offset is not None:
                inside = "layers." in path and weight.shape[0] == config.hidden_size
                self.norms.append((module, eps, offset, inside))

    @contextmanager
    def forward(self, dtype: torch.dtype, layout: Layout | None = None) -> Iterator[None]:
        """Inside the block the model runs the lean way, and sees what `layout` says. Norms that feed a layer's products
        give `dtype` at once, where autocast would round each of their uses; the others give float32."""
        config = self.config if self.on_cpu or layout is not None else None
        before = None if config is None else config._attn_implementation
        for module, eps, offset, inside in self.norms:
            module.__dict__["forward"] = partial(_apply, module, eps, offset, dtype if inside else torch.float32)
        if config is not None:
            config._attn_implementation = attention.NAME
        try:
            with attention.seeing(None if layout is None else layout.spans):
                yield
        finally:
            if config is not None:
                config._attn_implementation = before
            for module, *_ in self.norms:
                del module.__dict__["forward"]


def _apply(module: nn.Module, eps: float, offset: float, dtype: torch.dtype, x: Tensor) -> Tensor:
    return _RMSNorm.apply(x, module.weight, eps, offset, dtype)


@torch.no_grad()
def formula(module: Callable[[Tensor], Tensor], weight_D: Tensor, eps: float) -> float | None:
    """The offset of the weight under which `_RMSNorm` gives what `module` gives (0: Llama, 1: Gemma); None for neither."""
    x_2_D = torch.linspace(-2, 3, 2 * weight_D.shape[0], device=weight_D.device, dtype=torch.float32).view(2, -1)
    expected = module(x_2_D)
    for offset in (0.0, 1.0):
        if torch.allclose(_RMSNorm.apply(x_2_D, weight_D, eps, offset, torch.float32), expected, rtol=TOLERANCE, atol=TOLERANCE):
            return offset
    return None
