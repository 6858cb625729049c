"""Which device, and which precision it multiplies well in."""

from __future__ import annotations

import ctypes
import platform
from functools import cache
from typing import Literal

import torch

from temper.core.errors import DeviceError

Precision = Literal["auto", "float32", "bfloat16"]
# mallopt's options: largest block taken from the heap (the highest glibc allows), what the heap keeps free at its top, and grows by
MALLOC = {-3: 32 << 20, -1: 1 << 30, -2: 64 << 20}


def choose_device(asked: str) -> torch.device:
    """The device that `asked` names; `auto` takes a GPU where there is one. Raises DeviceError."""
    if asked == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if asked.startswith("cuda") and not torch.cuda.is_available():
        raise DeviceError(
            f"device {asked!r} was asked for and there is no GPU here",
            why=f"PyTorch {torch.__version__} sees none",
            do="set device=cpu or device=auto, or install a CUDA build of PyTorch",
        )
    try:
        return torch.device(asked)
    except RuntimeError as error:
        raise DeviceError(f"there is no device {asked!r}", do="set device to auto, cpu or cuda") from error


def choose_precision(asked: Precision, device: torch.device) -> tuple[torch.dtype, str]:
    """The compute dtype and why: bfloat16 where the hardware multiplies it, float32 elsewhere."""
    if asked == "float32":
        return torch.float32, "asked for"
    fast = device.type == "cuda" or has_bfloat16_units()
    if asked == "bfloat16":
        return torch.bfloat16, "asked for" if fast else "asked for; this processor has no bfloat16 units and emulates them slowly"
    return (torch.bfloat16, "this processor multiplies bfloat16") if fast else (torch.float32, "this processor has no bfloat16 units")


def has_bfloat16_units() -> bool:
    """Whether this CPU multiplies bfloat16 itself (AVX512-BF16 or AMX)."""
    found = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(
        found.get("avx512_bf16") or found.get("amx_bf16") or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    )


@cache
def keep_freed_memory() -> bool:
    """Tell glibc to keep what a training step frees, for the next step to use.

    By default it returns large blocks at once and takes them back page by page: a tenth of a step on a CPU.
    False where the C library is another one.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return all(libc.mallopt(option, size) for option, size in MALLOC.items())
