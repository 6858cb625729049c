"""What a stage would cost, for `--dry-run`: rows, tokens, steps, memory and seconds, without training."""

from __future__ import annotations

import time
from collections.abc import Iterable
from collections.abc import Sequence as Rows

from torch import Tensor

from temper.core.records import Noun
from temper.data.batch import collate
from temper.data.layout import Kind
from temper.data.sequence import Sequence
from temper.policy.model import Policy
from temper.policy.scalar_head import RewardModel
from temper.train.cost import Cost, synchronise
from temper.train.learner import Loss
from temper.train.optimizers import Kind as OptimizerKind
from temper.train.optimizers import bytes_of
from temper.train.stage import Plan

PROBE_BELOW = 300_000_000  # parameters: a smaller model is timed on one batch, a larger one by its operations
LIMIT_SHARE = 0.4  # of the measured matrix-product rate, where no batch is timed


class Estimate(Noun):
    """The cost of a stage. `seconds_from` says how the time was found."""

    rows: int
    tokens: int
    supervised: int
    steps: int
    parameters: int
    trained: int
    weights_mb: float
    optimizer_mb: float
    seconds: float
    seconds_from: str


def estimate_rows(policy: Policy | RewardModel, rows: Rows[Sequence], plan: Plan, loss: Loss, optimizer: OptimizerKind, *, forwards: int = 0, kind: Kind = "padded") -> Estimate:
    """The cost of training on `plan` of `rows` by an `optimizer`: one batch is timed on a small model, operations counted on a large one.

    `forwards` counts extra passes without a backward (a reference, a teacher); `kind` is how rows are laid out.
    """
    visits = [row for step in plan for batch in step for row in batch]
    tokens = sum(len(rows[row].tokens) for row in visits)
    supervised = sum(sum(weight != 0 for weight in rows[row].weights) for row in visits)
    weights = list(policy.model.parameters())
    count, trained = sum(weight.numel() for weight in weights), sum(weight.numel() for weight in weights if weight.requires_grad)
    if count < PROBE_BELOW:
        middle = plan[len(plan) // 2]
        seconds = probe(policy, [[rows[row] for row in batch] for batch in middle], loss, kind) * len(plan)
        source = f"one step of {len(middle)} micro-batches, timed"
    else:
        pairs = sum(len(rows[row].tokens) ** 2 / 2 for row in visits)
        cost = Cost.of(policy)
        seconds = cost.of_counts(tokens, supervised, pairs) / (cost.limit * LIMIT_SHARE)
        source = f"operations at {LIMIT_SHARE:.0%} of the measured {cost.limit / 1e9:.0f} GFLOP/s"
    if forwards:
        seconds, source = seconds * (1 + forwards / 3), f"{source}; {forwards} more forward passes at a third each"
    return Estimate(
        rows=len(rows), tokens=tokens, supervised=supervised, steps=len(plan), parameters=count, trained=trained,
        weights_mb=round(sum(weight.numel() * weight.element_size() for weight in weights) / 2**20, 1),
        optimizer_mb=megabytes(optimizer, [weight for weight in weights if weight.requires_grad]), seconds=round(seconds, 3), seconds_from=source,
    )  # fmt: skip


def megabytes(optimizer: OptimizerKind, weights: Iterable[Tensor]) -> float:
    """What gradients and moments of trained `weights` take."""
    return round(bytes_of(optimizer, weights) / 2**20, 1)


def probe(policy: Policy | RewardModel, batches: list[list[Sequence]], loss: Loss, kind: Kind) -> float:
    """Seconds of one forward and backward over `batches`; gradients are thrown away."""
    device = str(policy.device)
    seconds = 0.0
    for warm in (False, True):
        started = time.perf_counter()
        for rows in batches if warm else batches[:1]:
            loss(collate(rows, policy.template.pad_id, kind).to(policy.device)).total.backward()
        synchronise(device)
        seconds = time.perf_counter() - started
    for weight in policy.model.parameters():
        weight.grad = None
    return seconds
