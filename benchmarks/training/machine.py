"""What the machine is, and how fast it multiplies: the limit that every share is a share of.

    python benchmarks/training/machine.py DEVICE THREADS
"""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SIZES = (512, 768, 1024, 2048)
SECONDS = 0.5  # of each size and library
VERSIONS = ("torch", "triton", "transformers", "peft", "trl", "liger_kernel", "accelerate")


def main() -> None:
    """Print both as JSON."""
    device, threads = sys.argv[1], int(sys.argv[2])
    torch.set_num_threads(threads)
    print(json.dumps({"machine": describe(device, threads), "limit": limit(device)}))


def describe(device: str, threads: int) -> dict[str, Any]:
    """Processor, memory, system and versions; no name of a host and no path."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    fields = dict(line.split(":", 1) for line in info.splitlines() if ":" in line)
    found = {name.strip(): value.strip() for name, value in fields.items()}
    memory = Path("/proc/meminfo").read_text().split()[1] if Path("/proc/meminfo").is_file() else "0"
    flags = set(found.get("flags", "").split())
    made: dict[str, Any] = {
        "processor": f"{found.get('model name', platform.processor())} (family {found.get('cpu family', '?')}, model {found.get('model', '?')})",
        "cores": info.count("processor\t:"), "threads": threads, "memory_gib": round(int(memory) / 2**20),
        "vector_units": sorted(flags & {"avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16"}),
        "system": f"{platform.system()} {platform.machine()}", "python": platform.python_version(),
        "versions": versions(),
    }  # fmt: skip
    return made | {"gpu": torch.cuda.get_device_name()} if device.startswith("cuda") else made


def versions() -> dict[str, str]:
    """Versions of what is compared, where installed."""
    found = {}
    for name in VERSIONS:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def limit(device: str) -> dict[str, float]:
    """Operations a second of the best product, by library: float32 through MKL and oneDNN on a CPU, bfloat16 on a GPU."""
    if device.startswith("cuda"):
        return {"bfloat16": max(rate(torch.mm, size, device, torch.bfloat16) for size in (4096, 8192))}
    libraries = {"default": torch.mm}
    if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        libraries["onednn"] = onednn
    return {name: max(rate(product, size, device, torch.float32) for size in SIZES) for name, product in libraries.items()}


def onednn(left_N_K: Tensor, right_K_M: Tensor) -> Tensor:
    """`left @ right` by oneDNN in float32; the right operand is taken transposed, which is no copy here."""
    return torch.ops.mkldnn._linear_pointwise(left_N_K, right_K_M.T, None, "none", [], "")


def rate(product: Callable[[Tensor, Tensor], Tensor], size: int, device: str, dtype: torch.dtype) -> float:
    """Operations a second over SECONDS of products of `size`: the mean, for a limit must be one that can be kept up."""
    left, right = torch.randn(size, size, dtype=dtype, device=device), torch.randn(size, size, dtype=dtype, device=device).T
    product(left, right)
    wait(device)
    started, done = time.perf_counter(), 0
    while time.perf_counter() - started < SECONDS:
        for _ in range(max(1, 4096 // size)):
            product(left, right)
            done += 1
        wait(device)
    return 2 * size**3 * done / (time.perf_counter() - started)


def wait(device: str) -> None:
    """Until the GPU is done."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
