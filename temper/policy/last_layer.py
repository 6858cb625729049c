"""The last layer's MLP where its output is read, and nowhere else.

What stands above the last attention works position by position, so at a position whose hidden state nobody reads (a
prompt, a tool's result) it is work for nothing. Attention needs every position and is left alone. At the positions
that are read no number changes.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn

from temper.policy.forwarding import forwarding

GATED = {"gate_proj", "up_proj", "down_proj"}


def is_gated(module: nn.Module) -> bool:
    """Whether the module has the three matrices of a gated MLP."""
    return {name for name, _ in module.named_children()} >= GATED


def last_mlp(decoder: nn.Module) -> nn.Module | None:
    """The last block's MLP where it is a plain one; None for experts and other forms."""
    layers = getattr(decoder, "layers", None)
    mlp = getattr(layers[-1], "mlp", None) if isinstance(layers, nn.ModuleList) and len(layers) else None
    return mlp if isinstance(mlp, nn.Module) and is_gated(mlp) else None


def computing_only(mlp: nn.Module | None, at_N: Tensor | None) -> AbstractContextManager[None]:
    """Inside the block `mlp` runs at the flat positions `at_N` (each once) of its input and gives zeros elsewhere; None: everywhere."""
    if mlp is None or at_N is None:
        return nullcontext()
    return forwarding({mlp: partial(_only_at, mlp.forward, at_N)})


def _only_at(forward: Callable[[Tensor], Tensor], at_N: Tensor, x_R_L_D: Tensor) -> Tensor:
    found_N_D = forward(x_R_L_D.flatten(0, 1).index_select(0, at_N)[None])[0]
    out_M_D = torch.zeros(x_R_L_D.shape[0] * x_R_L_D.shape[1], found_N_D.shape[1], dtype=found_N_D.dtype, device=found_N_D.device)
    return out_M_D.index_copy(0, at_N, found_N_D).view(*x_R_L_D.shape[:2], -1)
