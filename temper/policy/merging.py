"""An adapter folded into the weights it adapts, and taken out again with proof."""

from __future__ import annotations

import hashlib
import logging
import math

import torch
from torch import nn

from temper.core.errors import IntegrityError
from temper.policy.adapters import layers_of
from temper.policy.lora_linear import LoraLinear
from temper.policy.quantised import dense, is_packed, repack_

log = logging.getLogger("temper.policy")


class Merge:
    """Adapter `name` folded into the weights, with the originals and their checksum to restore them from.

    `error` is ‖W' - (W + ΔW)‖/‖ΔW‖ over all adapted layers, W' the weights as they are held: rounding where they are
    float32; in four bits they are rounded to levels again, and the error may be larger than the adapter itself.
    """

    def __init__(self, model: nn.Module, name: str) -> None:
        self.name, self.layers = name, layers_of(model, name)
        self.originals = {path: own_weights(layer) for path, layer in self.layers.items()}
        self.checksum = checksum(self.layers)
        missed = changed = 0.0
        with torch.no_grad():
            for layer in self.layers.values():
                before, wanted = dense(layer, torch.float32).clone(), layer.pair(name).merged(layer)
                if is_packed(layer):
                    repack_(layer, wanted)
                else:
                    write_(layer.weight, wanted)
                missed += float((dense(layer, torch.float32) - wanted).square().sum(dtype=torch.float64))
                changed += float((wanted - before).square().sum(dtype=torch.float64))
        self.error = math.sqrt(missed / changed) if changed else (math.inf if missed else 0.0)
        self.merged = checksum(self.layers)
        if any(is_packed(layer) for layer in self.layers.values()):
            log.warning(
                "adapter %s was merged into a base in four bits: rounding to its levels moved the weights by %.3g times what the adapter"
                " itself changed; serve the adapter beside the base, or merge it into the base in full precision",
                name,
                self.error,
            )

    def undo(self) -> None:
        """Put the originals back. Raises IntegrityError where what was merged changed meanwhile, or what is restored differs."""
        if checksum(self.layers) != self.merged:
            raise IntegrityError(
                f"the weights changed after adapter {self.name!r} was merged", do="unmerge before training, or load the base again"
            )
        with torch.no_grad():
            for path, layer in self.layers.items():
                for name, original in self.originals[path].items():
                    write_(getattr(layer, name), original)
        if checksum(self.layers) != self.checksum:
            raise IntegrityError(f"unmerging {self.name!r} did not restore the weights", do="load the base again")


def own_weights(layer: LoraLinear) -> dict[str, torch.Tensor]:
    """A copy of the layer's weight, and of the magnitudes of a packed one."""
    return {name: weight.detach().clone() for name, weight in layer._parameters.items() if weight is not None and name != "bias"}


def write_(weight: torch.Tensor, value: torch.Tensor) -> None:
    """Overwrite `weight` with `value`; where their dtypes differ (a frozen base in bfloat16, its merge in float32) it takes value's."""
    if weight.dtype is value.dtype:
        weight.copy_(value)
    else:
        weight.data = torch.empty_like(value)
        weight.copy_(value)  # through the parameter, so that its version says it changed


def checksum(layers: dict[str, LoraLinear]) -> str:
    """SHA-256 of the layers' own weights."""
    digest = hashlib.sha256()
    for path, layer in sorted(layers.items()):
        for name, weight in sorted(own_weights(layer).items()):
            digest.update(f"{path}.{name}".encode())
            digest.update(weight.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
