"""The decoder's forward with less waste: norms as one function, attention by blocks; on CUDA gates and rotations as well.

Nothing here knows a model family. A norm, an MLP or a rotation is replaced where trying it shows which formula it
follows, attention through transformers' own interface, and only inside `forward`: the model itself is left as it is.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
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
        self.rotations = rotations(decoder) if device == "cuda" else []

    @contextmanager
    def forward(self, dtype: torch.dtype, layout: Layout | None = None) -> Iterator[None]:
        """Inside the block the model runs the lean way, and sees what `layout` says. Norms that feed a layer's products
        give `dtype` at once, where autocast would round each of their uses; the others give float32."""
        functions: dict[nn.Module, Callable[..., Any]] = {
            module: partial(_norm, module, eps, offset, dtype if inside else torch.float32) for module, eps, offset, inside in self.norms
        }
        functions |= {module: partial(_gated, module) for module in self.gates}
        config = self.config
        with ExitStack() as stack:
            stack.enter_context(forwarding(functions))
            for modeling in self.rotations:
                stack.enter_context(setting(modeling, ROTARY, partial(_rotated, getattr(modeling, ROTARY))))
            if config is not None:
                stack.enter_context(setting(config, "_attn_implementation", attention.NAME))
            stack.enter_context(attention.seeing(None if layout is None else layout.spans))
            yield


@contextmanager
def setting(thing: Any, name: str, value: Any) -> Iterator[None]:
    """Inside the block `thing.name` is `value`."""
    before = getattr(thing, name)
    setattr(thing, name, value)
    try:
        yield
    finally:
        setattr(thing, name, before)


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
    tried: dict[tuple[type, type], bool] = {}
    found = []
    for module in decoder.modules():
        if not is_gated(module):
            continue
        key = (type(module), type(getattr(module, "act_fn", None)))
        if key not in tried:
            tried[key] = is_silu_gate(module)
        found += [module] if tried[key] else []
    return found


@torch.no_grad()
def is_silu_gate(mlp: nn.Module) -> bool:
    """Whether the MLP's forward is tanh(silu(x)·softplus(x)) once softplus and tanh stand for its matrices up and down."""
    alike = copy.copy(mlp)
    alike._modules = mlp._modules | {"gate_proj": nn.Identity(), "up_proj": nn.Softplus(), "down_proj": nn.Tanh()}
    x_1_2_D = torch.linspace(-4, 4, 16).view(1, 2, 8)
    try:
        found = type(mlp).forward(alike, x_1_2_D)
    except (RuntimeError, TypeError, ValueError, AttributeError):  # a forward that wants more, or other sizes, is another one
        return False
    return torch.allclose(found, torch.tanh(gate(x_1_2_D, nn.functional.softplus(x_1_2_D))), rtol=TOLERANCE, atol=TOLERANCE)


def _gated(mlp: Any, x: Tensor) -> Tensor:
    down: Tensor = mlp.down_proj(gate(mlp.gate_proj(x), mlp.up_proj(x)))
    return down


# --- rotations ---


def rotations(decoder: nn.Module) -> list[ModuleType]:
    """The modules of transformers that the decoder's classes come from and whose rotation is `rotate`."""
    modelings = dict.fromkeys(sys.modules[type(module).__module__] for module in decoder.modules())
    return [modeling for modeling in modelings if hasattr(modeling, ROTARY) and is_rotation(getattr(modeling, ROTARY))]


@torch.no_grad()
def is_rotation(function: Callable[..., Any]) -> bool:
    """Whether transformers' function of (queries, keys, cos, sin) turns both as `rotate` does."""
    q_1_H_L_C, k_1_H_L_C = torch.linspace(-2, 3, 48).view(1, 2, 3, 8), torch.linspace(1, 2, 24).view(1, 1, 3, 8)
    cos_1_L_C, sin_1_L_C = torch.linspace(-1, 1, 24).view(1, 3, 8), torch.linspace(0, 1, 24).view(1, 3, 8)
    try:
        found = function(q_1_H_L_C, k_1_H_L_C, cos_1_L_C, sin_1_L_C)
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError):
        return False
    expected = [rotate(item, cos_1_L_C, sin_1_L_C) for item in (q_1_H_L_C, k_1_H_L_C)]
    return len(found) == 2 and all(torch.allclose(one, other, rtol=TOLERANCE, atol=TOLERANCE) for one, other in zip(found, expected, strict=True))


def _rotated(given: Callable[..., Any], q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *others: Any, **options: Any) -> Any:
    if others or options:
        return given(q, k, cos, sin, *others, **options)
    return rotate(q, cos, sin), rotate(k, cos, sin)
