"""Which library multiplies while the engine runs: the choice is by size, and the same for the same sizes.

`temper.policy.products` may have sent this process's float32 products to oneDNN, which wins on large ones. Attention
over short rows is thousands of tiny ones, where preparing each costs more than computing it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

FEW_TOKENS = 12  # a pass over fewer tokens than this has only tiny products

_switch: Any = getattr(torch.backends.mkldnn, "matmul", None)


@contextmanager
def tiny_products() -> Iterator[None]:
    """Inside the block float32 products go to the library that starts them fastest."""
    before = getattr(_switch, "fp32_precision", "none")
    if before == "none":
        yield
        return
    _switch.fp32_precision = "none"
    try:
        yield
    finally:
        _switch.fp32_precision = before
