"""Where Triton's kernels may be used: on CUDA, if it is installed and can build there."""

from __future__ import annotations

import logging
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

log = logging.getLogger("temper.policy")


def kernels(tensor: Tensor) -> ModuleType | None:
    """`temper.policy.triton_kernels` for a tensor that lies on CUDA; None for any other, and where Triton cannot run."""
    return built(tensor.device) if tensor.is_cuda else None


@cache
def built(device: torch.device) -> ModuleType | None:
    """The kernels, every one tried once: Triton builds its launcher where it runs, with a C compiler that may be missing."""
    try:
        from temper.policy import triton_kernels

        triton_kernels.trial(device)
    except Exception as error:  # whatever Triton raises, PyTorch's operations can take the kernels' place
        log.warning("no Triton kernels, PyTorch's operations take their place: %s", error)
        return None
    return triton_kernels
