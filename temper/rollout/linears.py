"""Linear layers through the library that multiplies fastest here, for as long as the engine runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from temper.policy.products import onednn_is_faster

ROWS = 16  # fewer rows than this gain nothing


def through_onednn(layer: nn.Linear) -> Callable[[Tensor], Tensor]:
    """The forward of one layer as a oneDNN product; equal to PyTorch's but for the order of sums."""

    def forward(x: Tensor) -> Tensor:
        if x.numel() < ROWS * layer.in_features or x.dtype is not torch.float32 or layer.weight.dtype is not torch.float32:
            return nn.functional.linear(x, layer.weight, layer.bias)
        return torch.ops.mkldnn._linear_pointwise(x, layer.weight, layer.bias, "none", [], "")

    return forward


@contextmanager
def fast_linears(model: nn.Module) -> Iterator[None]:
    """Inside the block the model's plain linear layers use oneDNN where that is the faster library.

    Only sampling runs inside: no gradient passes through here. Layers of another class (an adapter's) keep their own way.
    """
    layers = [item for item in model.modules() if type(item) is nn.Linear] if _helps(model) else []
    for layer in layers:
        layer.__dict__["forward"] = through_onednn(layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.__dict__["forward"]


def _helps(model: nn.Module) -> bool:
    return onednn_is_faster() and next(model.parameters()).device.type == "cpu"
