"""A frozen base in four bits: NF4 with double quantisation (QLoRA, Dettmers et al. 2023, sections 3 and 4).

Weights in blocks of 64 are divided by their largest magnitude and rounded to the 16 NormalFloat levels; the magnitudes
are themselves held in 8 bits, in blocks of 256, around their mean. That is 0.516 bytes a weight instead of four.
Packing and unpacking are bitsandbytes'; the product is ours, the same on every device, so that training, sampling
and merging see one and the same matrix.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

from temper.core.errors import ConfigError, MissingDependency

Quantisation = Literal["nf4"]
BLOCK, ABSMAX_BLOCK = 64, 256


@cache
def bitsandbytes(purpose: str) -> Any:
    """The library. Raises MissingDependency where it is absent or cannot be loaded."""
    # its word about a kernel for inference that is not installed; the product here is another one
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        import bitsandbytes as library
    except (ImportError, OSError, RuntimeError) as error:
        raise MissingDependency(
            f"{purpose} needs bitsandbytes", why=str(error).splitlines()[0], do="pip install 'temper[quantised]', or leave it out of the config"
        ) from error
    return library


def is_packed(layer: nn.Linear) -> bool:
    """Whether the layer's weight is held in four bits."""
    return layer.weight.dtype is torch.uint8


def pack(weight: Tensor) -> dict[str, Tensor]:
    """`weight` [out, in] as NF4: levels [out, in/2] and magnitudes [blocks] in uint8, the magnitudes' own [blocks/256] and mean."""
    if weight.shape[1] % 2:
        raise ConfigError(f"a layer with {weight.shape[1]} inputs cannot be packed", why="two levels share a byte", do="leave quantise out")
    library = bitsandbytes("quantise: nf4")
    packed, state = library.functional.quantize_4bit(
        weight.float().contiguous(), blocksize=BLOCK, compress_statistics=True, quant_type="nf4"
    )
    return {
        "weight": packed.view(weight.shape[0], -1),
        "absmax": state.absmax,
        "nested_absmax": state.state2.absmax,
        "absmax_mean": state.offset,
    }


def dense(layer: nn.Linear, dtype: torch.dtype) -> Tensor:
    """The layer's weight, [out, in] in `dtype`, unpacked where it is packed."""
    if not is_packed(layer):
        return layer.weight.to(dtype)
    functional, held = bitsandbytes("quantise: nf4").functional, layer._parameters
    inner = functional.QuantState(
        absmax=held["nested_absmax"], code=_absmax_levels(layer.weight.device), blocksize=ABSMAX_BLOCK, dtype=torch.float32
    )
    # as one long row: bitsandbytes 0.50's kernel for CPUs starts a block anew in each row, where its packing does not,
    # and so gives other numbers for a width that is no multiple of the block
    outer = functional.QuantState(
        absmax=held["absmax"], shape=torch.Size((1, layer.out_features * layer.in_features)), dtype=dtype, blocksize=BLOCK,
        quant_type="nf4", code=_levels(layer.weight.device), offset=held["absmax_mean"], state2=inner,
    )  # fmt: skip
    return functional.dequantize_4bit(layer.weight.view(-1, 1), outer).view(layer.out_features, layer.in_features)


@cache
def _levels(device: torch.device) -> Tensor:
    """The 16 levels of NF4."""
    return bitsandbytes("quantise: nf4").functional.get_4bit_type("nf4", device=device)


@cache
def _absmax_levels(device: torch.device) -> Tensor:
    """The 256 levels that magnitudes are rounded to."""
    return bitsandbytes("quantise: nf4").functional.create_dynamic_map().to(device)


@torch.no_grad()
def repack_(layer: nn.Linear, weight: Tensor) -> None:
    """Overwrite the layer's packed weight with `weight`."""
    for name, tensor in pack(weight).items():
        getattr(layer, name).copy_(tensor)
