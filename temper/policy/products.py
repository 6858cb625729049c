"""Matrix products in float32 by the library that is fast on this machine.

PyTorch sends float32 products on a CPU to MKL, which runs at about half the rate of oneDNN on processors
that are not Intel's. The choice is by vendor, never by a stopwatch: the same machine gives the same bytes.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROUNDING = 1e-5  # relative: float32 stays below it, bfloat16 far above
SMALLEST = 1 << 20  # multiply-adds: below this the reordering of operands costs more than it saves


@cache
def onednn_is_faster() -> bool:
    """Whether float32 products on this CPU go through oneDNN: x86 that is not Intel's, with oneDNN built in."""
    cpuinfo = Path("/proc/cpuinfo")
    amd = cpuinfo.is_file() and "AuthenticAMD" in cpuinfo.read_text()
    return amd and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@cache
def prefer_onednn() -> bool:
    """Send this process's float32 products, batched ones and backwards included, to oneDNN where it is faster.

    PyTorch has one switch that does so: it allows oneDNN bfloat16 inside float32 products. The processors in question
    have no such kernel and multiply in float32; where trying it shows otherwise, the switch is put back.
    """
    if not onednn_is_faster():
        return False
    matmul: Any = getattr(torch.backends.mkldnn, "matmul", None)
    if matmul is None:
        return False
    before, matmul.fp32_precision = matmul.fp32_precision, "bf16"
    left = torch.linspace(-1, 1, 256 * 256).view(256, 256)
    exact = left.double() @ left.double().T
    kept = all(
        float((found - exact).abs().max() / exact.abs().max()) < ROUNDING
        for found in (left @ left.T, torch.bmm(left[None], left.T[None])[0])
    )
    if not kept:
        matmul.fp32_precision = before
    return kept


def times_transposed(left_N_K: Tensor, right_M_K: Tensor, out: Tensor | None = None) -> Tensor:
    """`left @ right.T`, outside autograd; into `out` where given."""
    large = left_N_K.shape[0] * left_N_K.shape[1] * right_M_K.shape[0] >= SMALLEST
    plain = left_N_K.dtype is not torch.float32 or left_N_K.device.type != "cpu" or not large
    if plain or not onednn_is_faster() or prefer_onednn():
        return torch.mm(left_N_K, right_M_K.T, out=out)
    found = torch.ops.mkldnn._linear_pointwise(left_N_K, right_M_K.contiguous(), None, "none", [], "")
    return found if out is None else out.copy_(found)


def times(left_N_K: Tensor, right_K_M: Tensor) -> Tensor:
    """`left @ right`, outside autograd."""
    return times_transposed(left_N_K, right_K_M.T)


def add_times_(sum_N_M: Tensor, left_N_K: Tensor, right_K_M: Tensor) -> None:
    """`sum += left @ right` in place, outside autograd; of one dtype the product itself sums: one pass over `sum`, not three.

    A GPU multiplies bfloat16 into float32, so that no partial sum is rounded; a CPU rounds each product once.
    """
    if sum_N_M.dtype is left_N_K.dtype:
        sum_N_M.addmm_(left_N_K, right_K_M)
    elif left_N_K.is_cuda and left_N_K.dtype is torch.bfloat16:
        sum_N_M += torch.mm(left_N_K, right_K_M, out_dtype=torch.float32)
    else:
        sum_N_M += times(left_N_K, right_K_M)


def accurate_times_transposed(left_N_K: Tensor, right_M_K: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """`left @ right.T` as float32 (float64 for float64): inputs may be rounded to `dtype`, the result is not.

    A CPU has no product of bfloat16 with a float32 result, so there the operands stay float32. Written into `out`
    where given, which must be of that dtype.
    """
    if dtype is torch.bfloat16 and left_N_K.is_cuda:
        found: Tensor = torch.mm(left_N_K.to(dtype), right_M_K.to(dtype).T, out_dtype=torch.float32)
        return found if out is None else out.copy_(found)
    wide = torch.float64 if left_N_K.dtype is torch.float64 else torch.float32
    return times_transposed(left_N_K.to(wide), right_M_K.to(wide), out)
