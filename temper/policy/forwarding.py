"""Modules that compute in another way for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def forwarding(functions: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Inside the block each module runs its function in place of its `forward`; of nested blocks the inner one counts."""
    before = {module: module.__dict__.get("forward") for module in functions}
    for module in functions:
        module.__dict__["forward"] = functions[module]
    try:
        yield
    finally:
        for module, function in before.items():
            if function is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = function
