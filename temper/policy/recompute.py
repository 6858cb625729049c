"""Activation checkpointing: a layer keeps only its input, and the backward runs it again (Chen et al. 2016, section 4.1).

It costs one more forward of the layers and changes no number: what runs again runs under the same contexts (the
rows' adapters, the precision, the lean norms and attention) and from the same random state.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from temper.core.errors import ShapeError
from temper.policy.forwarding import forwarding

Again = Callable[[], AbstractContextManager[Any]]


def decoder_layers(decoder: nn.Module) -> list[nn.Module]:
    """The decoder's blocks, first to last. Raises ShapeError where it has no list of them."""
    config: Any = decoder.config
    wanted = config.get_text_config().num_hidden_layers
    for module in decoder.modules():
        if isinstance(module, nn.ModuleList) and len(module) == wanted:
            return list(module)
    raise ShapeError(
        f"{type(decoder).__name__} has no list of its {wanted} layers",
        why="layers are recomputed, and sharded over ranks, one by one",
        do="train it on one process with recompute: false",
    )


def recomputing(layers: list[nn.Module], again: Again) -> AbstractContextManager[None]:
    """Inside the block each of `layers` drops what it computed; its backward runs it again inside `again()`."""
    return forwarding({layer: partial(_forward, layer, again) for layer in layers})


def _forward(layer: nn.Module, again: Again, *inputs: Any, **options: Any) -> Any:
    plain = partial(type(layer).forward, layer)
    if not torch.is_grad_enabled():
        return plain(*inputs, **options)
    return checkpoint(plain, *inputs, use_reentrant=False, context_fn=lambda: (nullcontext(), again()), **options)
