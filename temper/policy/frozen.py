"""What is trained is float32; a frozen base takes no master weights, and is held in what it is multiplied in where that is exact."""

from __future__ import annotations

import torch
from torch import Tensor, nn


@torch.no_grad()
def hold_frozen(model: nn.Module, dtype: torch.dtype) -> None:
    """Hold the matrices of linear layers in `dtype` where it keeps every one of their numbers, as of a checkpoint of that dtype.

    Autocast rounds each use of a matrix to `dtype` anyway, so nothing changes but the bytes that are held and read.
    Embeddings, and a head that is one, stay: what they look up is added to in float32.
    """
    for weight in matrices(model):
        if weight.dtype is torch.float32:
            rounded = weight.to(dtype)
            if torch.equal(rounded.float(), weight):
                weight.data = rounded


@torch.no_grad()
def widen(model: nn.Module, *, but: torch.dtype | None) -> None:
    """Every weight in half precision to float32, one after the other; matrices of linear layers that are held in `but` stay."""
    kept = {id(weight) for weight in matrices(model) if weight.dtype is but}
    for weight in model.parameters():
        if weight.dtype in (torch.bfloat16, torch.float16) and id(weight) not in kept:
            weight.data = weight.float()


def matrices(model: nn.Module) -> list[Tensor]:
    """The weights of linear layers, a head that is the embedding left out."""
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    return [module.weight for module in model.modules() if isinstance(module, nn.Linear) and id(module.weight) not in tables]
