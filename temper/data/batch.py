"""Batches: sequences with their streams, one a row, padded on the right; computed as they stand or by a `Layout`."""

from __future__ import annotations

import random
from collections.abc import Callable
from collections.abc import Sequence as Rows
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from temper.core.errors import DataError, ShapeError
from temper.data.layout import Kind, Layout, Work, alike, lay_out, positions_of
from temper.data.sequence import Sequence, Support

WORTH_LAYING = 0.98  # of the padded positions: a layout that takes more of them is not used
STREAMS = ("advantages", "old_logprobs", "ref_logprobs", "values", "targets")


@dataclass(frozen=True)
class Batch:
    """Rows of tokens with their streams, all [rows, positions]; each row is one sequence, whatever the layout.

    `layout` says where each token is computed; None: in these very rows. A policy that cannot follow a layout computes
    the rows as they stand. `adapters`, `groups`, `records` and `support` go by row.
    """

    tokens_B_T: Tensor
    attention_B_T: Tensor
    positions_B_T: Tensor
    weights_B_T: Tensor
    advantages_B_T: Tensor | None = None
    old_logprobs_B_T: Tensor | None = None
    ref_logprobs_B_T: Tensor | None = None
    values_B_T: Tensor | None = None
    targets_B_T: Tensor | None = None
    layout: Layout | None = None
    support: list[Support] | None = None
    adapters: list[str | None] = ()  # type: ignore[assignment]
    groups: list[str | None] = ()  # type: ignore[assignment]
    records: list[str] = ()  # type: ignore[assignment]

    @property
    def mask_B_T(self) -> Tensor:
        """True where a token is trained."""
        return self.weights_B_T != 0

    @property
    def tokens_real(self) -> int:
        """How many tokens are not padding."""
        return int(self.attention_B_T.sum())

    @property
    def work(self) -> Work:
        """What computing this batch takes, as it is laid out."""
        if self.layout is None:
            lengths_B = self.attention_B_T.sum(-1).double()
            return Work(self.tokens_real, float((lengths_B * (lengths_B + 1) / 2).sum()), self.tokens_B_T.numel())
        sizes = [(span.end - span.start, span.before) for span in self.layout.spans]
        return Work(sum(size for size, _ in sizes), sum(size * before + size * (size + 1) / 2 for size, before in sizes), self.layout.tokens_R_L.numel())

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on `device`."""
        moved: dict[str, Any] = {
            field.name: value.to(device) for field in fields(self) if isinstance(value := getattr(self, field.name), Tensor)
        }
        return replace(self, **moved, layout=self.layout and self.layout.to(device))


def collate(sequences: Rows[Sequence], pad_id: int, kind: Kind = "padded") -> Batch:
    """One row for each sequence, padded on the right to the longest. Raises DataError, ShapeError.

    `kind` is how they are computed: `padded` as they stand; `packed` side by side; `shared` side by side with what rows
    begin with alike computed once. Where that saves nothing, they are computed as they stand. Values and gradients are
    the same; with dropout on, rows that share a beginning share its noise as well.
    """
    if not sequences:
        raise DataError("a batch has no rows", do="give at least one sequence")
    _check(sequences)
    width = max(len(sequence.tokens) for sequence in sequences)

    def filled(values: Callable[[Sequence], Rows[float]], padding: float, dtype: torch.dtype) -> Tensor:
        rows = [list(values(sequence)) for sequence in sequences]
        return torch.tensor([row + [padding] * (width - len(row)) for row in rows], dtype=dtype)

    lengths_B = torch.tensor([len(sequence.tokens) for sequence in sequences])
    present = [name for name in STREAMS if getattr(sequences[0], name) is not None]
    support = None
    if any(sequence.support for sequence in sequences):
        support = [[*(row.support or [None] * len(row.tokens)), *[None] * (width - len(row.tokens))] for row in sequences]
    return Batch(
        tokens_B_T=filled(attrgetter("tokens"), pad_id, torch.long), attention_B_T=torch.arange(width)[None] < lengths_B[:, None],
        positions_B_T=torch.arange(width).repeat(len(sequences), 1), weights_B_T=filled(attrgetter("weights"), 0.0, torch.float32),
        **{f"{name}_B_T": filled(attrgetter(name), 0.0, torch.float32) for name in present},
        layout=_layout(sequences, pad_id, kind, width), support=support, adapters=[row.adapter for row in sequences],
        groups=[row.group for row in sequences], records=[row.record for row in sequences],
    )  # fmt: skip


def _layout(sequences: Rows[Sequence], pad_id: int, kind: Kind, width: int) -> Layout | None:
    """The layout of `kind`, or None where rows may as well be computed as they stand."""
    if kind == "padded":
        return None
    layout = lay_out([row.tokens for row in sequences], [row.adapter for row in sequences], pad_id, share=kind == "shared")
    return layout if layout.tokens_R_L.numel() <= WORTH_LAYING * len(sequences) * width else None


def _check(sequences: Rows[Sequence]) -> None:
    """Raise ShapeError where streams and tokens differ in length, or only some sequences carry a stream."""
    for sequence in sequences:
        streams = {name: getattr(sequence, name) for name in ("weights", *STREAMS, "support")}
        for name, values in streams.items():
            if values is not None and len(values) != len(sequence.tokens):
                raise ShapeError(
                    f"sequence {sequence.record[:16]} has {len(sequence.tokens)} tokens and {len(values)} {name}",
                    do="align every stream to the tokens",
                )
        if not sequence.tokens or sequence.weights[0] != 0:
            raise ShapeError(
                f"sequence {sequence.record[:16]} trains its first token",
                why="nothing stands before it to predict it from",
                do="set weights[0] to 0",
            )
    for name in STREAMS:
        without = [sequence.record[:16] for sequence in sequences if getattr(sequence, name) is None]
        if without and len(without) < len(sequences):
            raise ShapeError(
                f"{len(without)} of {len(sequences)} sequences have no {name}",
                why=f"the first is {without[0]!r}",
                do="batch rows of one kind",
            )


def plan_batches(lengths: Rows[int], token_budget: int, shuffle_rng: random.Random | None = None) -> list[list[int]]:
    """Which rows share a padded batch of at most `token_budget` positions: rows of like length, every row once.

    Rows of equal length are drawn in random order, and so are the batches; equal random streams give equal plans. A row
    longer than the budget is a batch of its own.
    """
    order = _order(lengths, token_budget, shuffle_rng)
    batches: list[list[int]] = []
    for row in order:  # rising, so the row at hand is the longest of its batch
        if batches and lengths[row] * (len(batches[-1]) + 1) <= token_budget:
            batches[-1].append(row)
        else:
            batches.append([row])
    if shuffle_rng is not None:
        shuffle_rng.shuffle(batches)
    return batches


def plan_packed(sizes: Rows[int], token_budget: int, shuffle_rng: random.Random | None = None) -> list[list[int]]:
    """Which units (rows, pairs) share a packed batch of at most `token_budget` positions, every unit once.

    The batches are as even as they can be: the longest first, each into the emptiest. A unit above the budget is a
    batch of its own.
    """
    order = _order(sizes, token_budget, shuffle_rng)
    batches: list[list[int]] = [[] for _ in range(max(1, -(-sum(sizes) // token_budget)))]
    filled = [0] * len(batches)
    for unit in reversed(order):
        emptiest = min(range(len(batches)), key=filled.__getitem__)
        if batches[emptiest] and filled[emptiest] + sizes[unit] > token_budget:
            emptiest = len(batches)
            batches.append([])
            filled.append(0)
        batches[emptiest].append(unit)
        filled[emptiest] += sizes[unit]
    batches = [batch for batch in batches if batch]
    if shuffle_rng is not None:
        shuffle_rng.shuffle(batches)
    return batches


def plan_shared(units: Rows[Rows[Sequence]], token_budget: int, shuffle_rng: random.Random | None = None) -> list[list[int]]:
    """Which units share a batch of about `token_budget` positions where what begins alike is computed once.

    In the order of their tokens those that begin alike stand together, and each adds what it does not share with the
    one before: exact but for stretches that are not worth sharing, fewer than WORTH_SHARING tokens a row. The batches
    are about even; a unit above the budget is a batch of its own.
    """
    sizes = [positions_of([row.tokens for row in unit], "shared") for unit in units]
    order = _order(sizes, token_budget, shuffle_rng)
    order.sort(key=lambda unit: (units[unit][0].adapter or "", units[unit][0].tokens))
    starts = [0, *(_start(units[one][0], units[other][0]) for one, other in pairwise(order))]
    added = [sizes[unit] - start for unit, start in zip(order, starts, strict=True)] if order else []
    share = sum(added) / max(1, -(-sum(added) // token_budget))
    batches: list[list[int]] = []
    filled = 0
    for unit, more in zip(order, added, strict=True):
        if not batches or filled + more > token_budget or filled >= share:
            batches.append([])
            filled, more = 0, sizes[unit]
        batches[-1].append(unit)
        filled += more
    if shuffle_rng is not None:
        shuffle_rng.shuffle(batches)
    return batches


def _start(one: Sequence, other: Sequence) -> int:
    """How many tokens two rows can share."""
    return alike(one.tokens, other.tokens) if one.adapter == other.adapter else 0


def plan_units(units: Rows[Rows[Sequence]], kind: Kind, token_budget: int, shuffle_rng: random.Random | None = None) -> list[list[int]]:
    """Which units share a micro-batch of `kind` with at most `token_budget` computed positions, every unit once.

    A unit is what must stay together: a row, or the two of a pair.
    """
    if kind == "shared":
        return plan_shared(units, token_budget, shuffle_rng)
    sizes = [positions_of([row.tokens for row in unit], kind) for unit in units]
    return plan_batches(sizes, token_budget, shuffle_rng) if kind == "padded" else plan_packed(sizes, token_budget, shuffle_rng)


def _order(sizes: Rows[int], token_budget: int, shuffle_rng: random.Random | None) -> list[int]:
    """Numbers by rising size, equal ones in random order. Raises DataError for a budget below one."""
    if token_budget < 1:
        raise DataError(f"the token budget is {token_budget}", do="give at least 1")
    order = list(range(len(sizes)))
    if shuffle_rng is not None:
        shuffle_rng.shuffle(order)
    order.sort(key=sizes.__getitem__)
    return order
