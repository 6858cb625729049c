"""What a step costs: operations the objective needs, and the machine's measured limit to hold them against."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn

from temper.data.batch import Batch, collate
from temper.data.sequence import Sequence
from temper.policy.products import times_transposed

FORWARD, BACKWARD_INPUT, BACKWARD_WEIGHT = 2, 2, 2  # operations a weight and token
PROBE_POSITIONS = 128


@dataclass(frozen=True)
class Cost:
    """The operations of one training step of a model, and the machine's limit in operations a second.

    `body` and `body_trained` count the weights of matrices outside embeddings and head, `last_mlp` and `last_mlp_trained`
    those of them that run only where their output is read, `head` those of the head; attention costs `attention` operations for each pair of positions (all layers, queries and values).
    """

    body: int
    body_trained: int
    last_mlp: int
    last_mlp_trained: int
    head: int
    head_trained: bool
    attention: int
    limit: float

    @classmethod
    def of(cls, policy: Any) -> Cost:
        """Count the matrices of a Policy (or RewardModel) and measure the machine once a process."""
        config = policy.model.config.get_text_config()
        tables = {id(module.weight) for module in policy.model.modules() if isinstance(module, nn.Embedding)}
        head = getattr(policy.model, "lm_head", None)
        head_weight = head.weight if isinstance(head, nn.Linear) else None
        matrices = [weight for weight in policy.model.parameters() if weight.ndim == 2 and id(weight) not in tables and weight is not head_weight]
        last = getattr(policy, "policy", policy).lean.last_mlp
        within = {id(weight) for weight in last.parameters()} if last is not None else set()
        width = config.num_attention_heads * (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
        dtype = getattr(policy, "compute_dtype", torch.float32)
        return cls(
            body=sum(map(_size, matrices)),
            body_trained=sum(weight.numel() for weight in matrices if weight.requires_grad),
            last_mlp=sum(_size(weight) for weight in matrices if id(weight) in within),
            last_mlp_trained=sum(weight.numel() for weight in matrices if id(weight) in within and weight.requires_grad),
            head=head_weight.numel() if head_weight is not None else 0,
            head_trained=bool(head_weight is not None and head_weight.requires_grad),
            attention=4 * config.num_hidden_layers * width,
            limit=matmul_rate(str(policy.device), dtype),
        )

    def of_counts(self, tokens: float, supervised: float, pairs: float) -> float:
        """Operations of one forward and backward: `pairs` counts attended (query, key) pairs."""
        body = tokens * ((FORWARD + BACKWARD_INPUT) * self.body + BACKWARD_WEIGHT * self.body_trained)
        body -= (tokens - supervised) * ((FORWARD + BACKWARD_INPUT) * self.last_mlp + BACKWARD_WEIGHT * self.last_mlp_trained)
        head = supervised * self.head * (FORWARD + BACKWARD_INPUT + BACKWARD_WEIGHT * self.head_trained)
        return body + head + 3 * self.attention * pairs

    def flops(self, batch: Batch) -> float:
        """Operations that one batch needs: padding is not counted, nor a beginning that the layout shares a second time."""
        work = batch.work
        return self.of_counts(work.tokens, float(batch.mask_B_T.sum()), work.attended)

    @property
    def recomputed_share(self) -> float:
        """What running the layers a second time adds to a step's operations outside the head."""
        return FORWARD * self.body / ((FORWARD + BACKWARD_INPUT) * self.body + BACKWARD_WEIGHT * self.body_trained)


def _size(weight: torch.Tensor) -> int:
    """Numbers in a weight; one held in four bits keeps two a byte."""
    return weight.numel() * (2 if weight.dtype is torch.uint8 else 1)


def kept_bytes(policy: Any, *, recompute: bool) -> float:
    """Bytes a position that a forward of a Policy's decoder keeps for the backward, weights not counted; measured on one row.

    What an operation keeps beside autograd's own store (attention's probabilities on a CPU) is not seen, so it is the least.
    """
    weights = {weight.untyped_storage().data_ptr() for weight in policy.model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    row = collate([Sequence([policy.template.pad_id] * PROBE_POSITIONS, [0.0] * PROBE_POSITIONS)], policy.template.pad_id).to(policy.device)
    before, policy.recompute = policy.recompute, recompute
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            alive = policy.computed(row, None)  # until it is let go, nothing that was kept is freed and its place used again
    finally:
        policy.recompute = before
    return sum(kept.values()) / alive.shape[1]


def price_of_recomputing(cost: Cost, policy: Any) -> str:
    """What activation checkpointing costs and saves on this model, in words."""
    less, all_of_it = (kept_bytes(policy, recompute=recompute) for recompute in (True, False))
    return (f"recompute: {cost.recomputed_share:.0%} more operations outside the head; the layers keep {less / 1e3:.1f} MB "
            f"instead of {all_of_it / 1e3:.1f} MB for 1,000 positions")  # fmt: skip


@cache
def matmul_rate(device: str, dtype: torch.dtype) -> float:
    """The machine's measured matrix-product rate, operations a second: the best of a few products."""
    size = 8192 if device.startswith("cuda") else 768
    left, right = (torch.linspace(-1, end, size * size, device=device).view(size, size).to(dtype) for end in (1, 2))  # a GPU is faster on equal numbers
    best = float("inf")
    for _ in range(4):
        synchronise(device)
        started = time.perf_counter()
        times_transposed(left, right)
        synchronise(device)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def synchronise(device: str) -> None:
    """Wait for the device; a CPU has nothing to wait for."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
