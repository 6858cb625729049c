"""Batches: sequences padded on the right, or packed side by side; and the plan of which rows share one."""

from __future__ import annotations

import random
from collections.abc import Callable
from collections.abc import Sequence as Rows
from dataclasses import dataclass, fields, replace
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from temper.core.errors import DataError, ShapeError
from temper.data.sequence import Sequence, Support

STREAMS = ("advantages", "old_logprobs", "ref_logprobs")


@dataclass(frozen=True)
class Batch:
    """Rows of tokens with their streams, all [rows, positions].

    `positions_B_T` restart where a packed sequence begins; `segments_B_T` numbers the sequences of a packed row from
    0 (−1: padding) and is None where each row is one sequence. `adapters` and `support` go by row; `records` and
    `groups` by sequence, in order.
    """

    tokens_B_T: Tensor
    attention_B_T: Tensor
    positions_B_T: Tensor
    weights_B_T: Tensor
    advantages_B_T: Tensor | None = None
    old_logprobs_B_T: Tensor | None = None
    ref_logprobs_B_T: Tensor | None = None
    segments_B_T: Tensor | None = None
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

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on `device`."""
        moved: dict[str, Any] = {
            field.name: value.to(device) for field in fields(self) if isinstance(value := getattr(self, field.name), Tensor)
        }
        return replace(self, **moved)


def collate(sequences: Rows[Sequence], pad_id: int) -> Batch:
    """One row for each sequence, padded on the right to the longest. Raises DataError, ShapeError."""
    return _lay([[sequence] for sequence in sequences], pad_id)


def pack(sequences: Rows[Sequence], pad_id: int, row_tokens: int) -> Batch:
    """Sequences side by side in rows of at most `row_tokens`, longest first into the fullest row with room for it.

    Sequences of one row share its adapter, and see neither each other (positions restart) nor a loss across the seam
    (a sequence's first weight is 0): transformers parts a row where positions restart, given position ids, no attention
    mask, and use_cache=False (with a cache it does not). A sequence longer than `row_tokens` has a row of its own.
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for number in sorted(range(len(sequences)), key=lambda number: -len(sequences[number].tokens)):
        length = len(sequences[number].tokens)
        fitting = [at for at, free in enumerate(room) if free >= length and sequences[bins[at][0]].adapter == sequences[number].adapter]
        best = min(fitting, key=room.__getitem__, default=None)
        if best is None:
            bins.append([number])
            room.append(row_tokens - length)
        else:
            bins[best].append(number)
            room[best] -= length
    return _lay([[sequences[number] for number in sorted(members)] for members in sorted(bins, key=min)], pad_id, packed=True)


def _lay(rows: list[list[Sequence]], pad_id: int, *, packed: bool = False) -> Batch:
    every = [sequence for row in rows for sequence in row]
    if not every:
        raise DataError("a batch has no rows", do="give at least one sequence")
    _check(every)
    width = max(sum(len(sequence.tokens) for sequence in row) for row in rows)

    def filled(values: Callable[[Sequence], Rows[float]], padding: float, dtype: torch.dtype) -> Tensor:
        flat = [[value for sequence in row for value in values(sequence)] for row in rows]
        return torch.tensor([values + [padding] * (width - len(values)) for values in flat], dtype=dtype)

    lengths_B = torch.tensor([sum(len(sequence.tokens) for sequence in row) for row in rows])
    attention_B_T = torch.arange(width)[None] < lengths_B[:, None]
    positions_B_T = torch.arange(width).repeat(len(rows), 1)
    segments_B_T = torch.full_like(positions_B_T, -1) if packed else None
    if segments_B_T is not None:
        for row, members in enumerate(rows):
            at = 0
            for number, length in enumerate([*(len(sequence.tokens) for sequence in members), width]):
                end = min(width, at + length)  # the padding after the last sequence is a stretch of its own
                positions_B_T[row, at:end] = torch.arange(end - at)
                segments_B_T[row, at:end] = number if number < len(members) else -1
                at = end
    streams = {f"{name}_B_T": filled(attrgetter(name), 0.0, torch.float32) for name in STREAMS if getattr(every[0], name) is not None}
    support = None
    if any(sequence.support for sequence in every):
        allowed = [[item for sequence in row for item in sequence.support or [None] * len(sequence.tokens)] for row in rows]
        support = [items + [None] * (width - len(items)) for items in allowed]
    return Batch(
        tokens_B_T=filled(attrgetter("tokens"), pad_id, torch.long), attention_B_T=attention_B_T, positions_B_T=positions_B_T,
        weights_B_T=filled(attrgetter("weights"), 0.0, torch.float32), **streams, segments_B_T=segments_B_T, support=support,
        adapters=[row[0].adapter for row in rows], groups=[sequence.group for sequence in every], records=[sequence.record for sequence in every],
    )  # fmt: skip


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
    if token_budget < 1:
        raise DataError(f"the token budget is {token_budget}", do="give at least 1")
    order = list(range(len(lengths)))
    if shuffle_rng is not None:
        shuffle_rng.shuffle(order)
    order.sort(key=lengths.__getitem__)
    batches: list[list[int]] = []
    for row in order:  # rising, so the row at hand is the longest of its batch
        if batches and lengths[row] * (len(batches[-1]) + 1) <= token_budget:
            batches[-1].append(row)
        else:
            batches.append([row])
    if shuffle_rng is not None:
        shuffle_rng.shuffle(batches)
    return batches
