"""The decoder's forward with less waste: norms as one function, attention by blocks; on CUDA gates and rotations as well.

Nothing here knows a model family. A norm, an MLP or a rotation is replaced where trying it shows which formula it
follows, attention through transformers' own interface, and only inside `forward`: the model itself is left as it is.
A rotation is a function of transformers' module: one that asks whether it is called from inside `forward` stands in its place.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from temper.data.layout import Layout
from temper.policy import attention
from temper.policy.forwarding import forwarding
from temper.policy.last_layer import is_gated, last_mlp
from temper.policy.layers import gate, rms_norm, rotate

TOLERANCE = 1e-5
ROTARY = "apply_rotary_pos_emb"  # what transformers' models call it


class Lean:
    """What can be replaced in one model: norms, gated MLPs, rotations, whether attention can, and the MLP that need not run everywhere."""

    def __init__(self, model: nn.Module, decoder: nn.Module) -> None:
        device = next(model.parameters()).device.type
        config: Any = decoder.config
        self.given = config._attn_implementation
        self.config = config if self.given == "sdpa" else None
        self.last_mlp = last_mlp(decoder)
        self.norms = norms(decoder) if device in ("cpu", "cuda") else []
        self.gates = gates(decoder) if device == "cuda" else []
        self.rotations = take_over_rotations(decoder) if device == "cuda" else []

    @contextmanager
    def forward(self, dtype: torch.dtype, layout: Layout | None = None) -> Iterator[None]:
        """Inside the block the model runs the lean way, and sees what `layout` says. Norms that feed a layer's products
        give `dtype` at once, where autocast would round each of their uses; the others give float32."""
        functions: dict[nn.Module, Callable[..., Any]] = {
            module: partial(_norm, module, eps, offset, dtype if inside else torch.float32) for module, eps, offset, inside in self.norms
        }
        functions |= {module: partial(_gated, module) for module in self.gates}
        with ExitStack() as stack:
            stack.enter_context(forwarding(functions))
            if self.rotations:
                stack.enter_context(turning())
            if self.config is not None:
                stack.enter_context(attending(self.config))
            stack.enter_context(attention.seeing(None if layout is None else layout.spans))
            yield


@contextmanager
def attending(config: Any) -> Iterator[None]:
    """Inside the block layers of `config` attend through `temper.policy.attention`."""
    before = config._attn_implementation
    config._attn_implementation = attention.NAME
    try:
        yield
    finally:
        config._attn_implementation = before


# --- norms ---


def norms(decoder: nn.Module) -> list[tuple[nn.Module, float, float, bool]]:
    """(norm, ε, offset of its weight, whether it feeds a layer's products) for every norm whose formula `rms_norm` is."""
    config: Any = decoder.config
    tried: dict[tuple[type, float], float | None] = {}
    found = []
    for path, module in decoder.named_modules():
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        weight = getattr(module, "weight", None)
        if not type(module).__name__.endswith("RMSNorm") or not isinstance(eps, float) or not isinstance(weight, nn.Parameter):
            continue
        key = (type(module), eps)
        if key not in tried:
            tried[key] = formula(module, weight, eps)
        offset = tried[key]
        if offset is not None:
            found.append((module, eps, offset, "layers." in path and weight.shape[0] == config.hidden_size))
    return found


@torch.no_grad()
def formula(module: Callable[[Tensor], Tensor], weight_D: Tensor, eps: float) -> float | None:
    """The offset of the weight under which `rms_norm` gives what `module` gives (0: Llama, 1: Gemma); None for neither."""
    x_2_D = torch.linspace(-2, 3, 2 * weight_D.shape[0], device=weight_D.device, dtype=torch.float32).view(2, -1)
    expected = module(x_2_D)
    for offset in (0.0, 1.0):
        if torch.allclose(rms_norm(x_2_D, weight_D, eps, offset, torch.float32), expected, rtol=TOLERANCE, atol=TOLERANCE):
            return offset
    return None


def _norm(module: Any, eps: float, offset: float, dtype: torch.dtype, x: Tensor) -> Tensor:
    return rms_norm(x, module.weight, eps, offset, dtype)


# --- gates ---


def gates(decoder: nn.Module) -> list[nn.Module]:
    """The MLPs that compute down(silu(gate x)·up x)."""
    return [module for module in decoder.modules() if is_gated(module) and is_silu_gate(module)]


@torch.no_grad()
def is_silu_gate(mlp: nn.Module) -> bool:
    """Whether the MLP's forward is silu(x)·softplus(x) once identities and softplus stand for its matrices, near and far
    from zero (a clamp shows far out) and while training (so does dropout)."""
    alike = copy.copy(mlp)
    alike._modules = mlp._modules | {"gate_proj": nn.Identity(), "up_proj": nn.Softplus(), "down_proj": nn.Identity()}
    x_1_2_D = torch.cat([torch.linspace(-4, 4, 16), torch.linspace(-1e3, 1e3, 16)]).view(1, 2, 16)
    expected = gate(x_1_2_D, nn.functional.softplus(x_1_2_D))
    try:
        for alike.training in (True, False):
            if not torch.allclose(type(mlp).forward(alike, x_1_2_D), expected, rtol=TOLERANCE, atol=TOLERANCE):
                return False
    except (RuntimeError, TypeError, ValueError, AttributeError):  # a forward that wants more, or other sizes, is another one
        return False
    return True


def _gated(mlp: Any, x: Tensor) -> Tensor:
    down: Tensor = mlp.down_proj(gate(mlp.gate_proj(x), mlp.up_proj(x)))
    return down


# --- rotations ---

_turning: ContextVar[bool] = ContextVar("turning", default=False)


def take_over_rotations(decoder: nn.Module) -> list[ModuleType]:
    """The modules of transformers that the decoder's classes come from, their rotation behind `Dispatch` where it is `rotate`.

    It is a function of a module, which several models and threads share: so it stays in place, and asks who calls.
    """
    modelings = dict.fromkeys(sys.modules[type(module).__module__] for module in decoder.modules())
    found = [modeling for modeling in modelings if is_rotation(getattr(modeling, ROTARY, None))]
    for modeling in found:
        if not isinstance(getattr(modeling, ROTARY), Dispatch):
            setattr(modeling, ROTARY, Dispatch(getattr(modeling, ROTARY)))
    return found


class Dispatch:
    """A rotation of transformers; inside `Lean.forward`, of whole heads, `rotate` in its place."""

    def __init__(self, given: Callable[..., Any]) -> None:
        self.given = given

    def __call__(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *others: Any, **options: Any) -> Any:
        """Queries and keys [R, H, L, C], turned; what turns a part of a head alone goes to `given`."""
        whole = cos.ndim == 3 and cos.shape[-1] == sin.shape[-1] == q.shape[-1] == k.shape[-1]
        if not _turning.get() or not whole or others or options:
            return self.given(q, k, cos, sin, *others, **options)
        return rotate(q, cos, sin), rotate(k, cos, sin)


@contextmanager
def turning() -> Iterator[None]:
    """Inside the block, in this thread, dispatched rotations are `rotate`."""
    token = _turning.set(True)
    try:
        yield
    finally:
        _turning.reset(token)


@torch.no_grad()
def is_rotation(function: Callable[..., Any] | None) -> bool:
    """Whether transformers' function of (queries, keys, cos, sin) turns whole heads of both as `rotate` does."""
    if function is None:
        return False
    q_1_H_L_C, k_1_H_L_C = torch.linspace(-2, 3, 48).view(1, 2, 3, 8), torch.linspace(1, 2, 24).view(1, 1, 3, 8)
    cos_1_L_C, sin_1_L_C = torch.linspace(-1, 1, 24).view(1, 3, 8), torch.linspace(0, 1, 24).view(1, 3, 8)
    try:
        found = function(q_1_H_L_C, k_1_H_L_C, cos_1_L_C, sin_1_L_C)
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError):
        return False
    expected = [rotate(item, cos_1_L_C, sin_1_L_C) for item in (q_1_H_L_C, k_1_H_L_C)]
    return len(found) == 2 and all(torch.allclose(one, other, rtol=TOLERANCE, atol=TOLERANCE) for one, other in zip(found, expected, strict=True))
