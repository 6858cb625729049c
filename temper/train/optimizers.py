"""The optimizers: AdamW with float32 moments, or with moments in eight bits by bitsandbytes.

Eight bits (Dettmers et al. 2022, section 2): moments in blocks of 256, each divided by its largest magnitude and rounded
to 256 levels: 2 bytes a weight instead of 8. Weights of fewer than 4,096 numbers keep float32 moments. The paged kind
holds them in memory that CUDA moves to the host when the device is full (Dettmers et al. 2023, section 3).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from temper.core.errors import ConfigError
from temper.policy.quantised import bitsandbytes

log = logging.getLogger("temper.train")
Kind = Literal["adamw", "adamw8bit", "paged_adamw8bit"]
SMALLEST, BLOCK = 4096, 256  # numbers of a weight from which its moments have eight bits, and of one block
EIGHT_BIT = {"adamw8bit": "AdamW8bit", "paged_adamw8bit": "PagedAdamW8bit"}


def make_optimizer(kind: Kind, groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float) -> torch.optim.Optimizer:
    """The optimizer of that kind over `groups`, each with its own weight_decay.

    Its state is tensors throughout, so that a checkpoint can hold it. Raises MissingDependency where the kind needs
    bitsandbytes and it is not here, ConfigError where weights are sharded over ranks.
    """
    if kind == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)
    library = bitsandbytes(f"optim.kind: {kind}")
    weights = [weight for group in groups for weight in group["params"]]
    if any(isinstance(weight, DTensor) for weight in weights):
        raise ConfigError(f"optim.kind: {kind} cannot update weights that are sharded over ranks",
                          why="its kernels read a weight as one block of memory", do="use adamw, or one process")  # fmt: skip
    if kind == "paged_adamw8bit" and not all(weight.is_cuda for weight in weights):
        log.warning("optim.kind: paged_adamw8bit pages on CUDA only; here it is adamw8bit")
        kind = "adamw8bit"
    optimizer = getattr(library.optim, EIGHT_BIT[kind])(groups, lr=lr, betas=betas, eps=eps)
    optimizer.register_step_pre_hook(_lend_levels)
    optimizer.register_step_post_hook(_settle)
    return optimizer


def bytes_of(kind: Kind, weights: Iterable[Tensor]) -> int:
    """Bytes of the gradients, in float32, and the moments of trained `weights`."""
    sizes = [weight.numel() for weight in weights]
    if kind == "adamw":
        return 12 * sum(sizes)
    # two moments of one byte a number, and one float32 a block for each
    return 4 * sum(sizes) + sum(2 * size + 8 * -(-size // BLOCK) if size >= SMALLEST else 8 * size for size in sizes)


def _lend_levels(optimizer: Any, *_: Any) -> None:
    """Put the tables of levels, one for all weights, beside the moments in eight bits."""
    for weight, state in optimizer.state.items():
        if "absmax1" in state:
            state["qmap1"], state["qmap2"] = (optimizer.name2qmap[name].to(weight.device) for name in ("dynamic", "udynamic"))


def _settle(optimizer: Any, *_: Any) -> None:
    """Leave in the state what a checkpoint must hold: every tensor once, and the count of steps as a tensor.

    And say that weights changed: bitsandbytes writes past autograd's count of versions, by which what is kept of a
    weight (stacked adapters) is known to be old.
    """
    for weight, state in optimizer.state.items():
        torch.autograd.graph.increment_version(weight)
        state["step"] = torch.as_tensor(state["step"])
        state.pop("qmap1", None)
        state.pop("qmap2", None)
