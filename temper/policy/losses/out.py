"""What a loss returns, and the shape check that every loss begins with."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from temper.core.errors import ShapeError

LARGEST_LOGRATIO = 20.0  # keeps a ratio and its gradient finite for a token that one of two policies has all but forgotten


@dataclass
class LossOut:
    """A loss as a sum: `total` carries the gradient, `count` is what it was summed over, `sums` are metrics' sums."""

    total: Tensor
    count: Tensor
    sums: dict[str, Tensor] = field(default_factory=dict)


def same_shape(**tensors: Tensor | None) -> None:
    """Raise ShapeError naming the first tensor whose shape differs from that of the first; None has no shape."""
    (first, expected), *others = ((name, tensor) for name, tensor in tensors.items() if tensor is not None)
    for name, tensor in others:
        if tensor.shape != expected.shape:
            raise ShapeError(f"{name} is {tuple(tensor.shape)}, {first} is {tuple(expected.shape)}", do="pass tensors with the same axes")
