"""How the tokens of a batch are computed: padded, packed side by side, or packed with what rows share computed once.

A batch's streams always have one sequence a row; a `Layout` only says where each token is computed. Rows of one
adapter lie side by side in one row of the layout. Where rows begin alike (the prompt of a pair, of the samples of one
task, a system prompt), the beginning is laid once and each continuation sees it before itself: a radix tree of the
rows, laid flat. Positions go on where the beginning ended, so every token is computed as it would be in a row alone.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Kind = Literal["padded", "packed", "shared"]
WORTH_SHARING = 16  # tokens saved: where a common stretch saves fewer, each row computes it, for laying it apart costs as much


class Span(NamedTuple):
    """Tokens [start, end) of a layout's row that see, causally, the stretches of `path` and then themselves."""

    row: int
    start: int
    end: int
    path: tuple[tuple[int, int], ...] = ()

    @property
    def before(self) -> int:
        """How many tokens stand before the first one: its position."""
        return sum(end - start for start, end in self.path)


@dataclass(frozen=True)
class Layout:
    """Tokens as they are computed, [rows R, positions L], and `at_B_T`: the flat place of each token of the batch.

    `spans` cover all but padding. Padding of `at_B_T` points at place 0.
    """

    tokens_R_L: Tensor
    positions_R_L: Tensor
    at_B_T: Tensor
    spans: tuple[Span, ...]
    adapters: list[str | None]

    def to(self, device: torch.device | str) -> Layout:
        """The same layout on `device`."""
        return replace(self, tokens_R_L=self.tokens_R_L.to(device), positions_R_L=self.positions_R_L.to(device), at_B_T=self.at_B_T.to(device))


@dataclass(frozen=True)
class Work:
    """What a batch costs: tokens that differ from padding and from each other's copies, pairs of (query, key) they
    attend, and positions that are really computed."""

    tokens: int
    attended: float
    positions: int


def lay_out(rows: Rows[list[int]], adapters: Rows[str | None], pad_id: int, *, share: bool) -> Layout:
    """The rows of each adapter side by side; with `share` what they begin with alike is laid once."""
    names = list(dict.fromkeys(adapters))
    laid = [_lay([number for number, adapter in enumerate(adapters) if adapter == name], rows, at, share) for at, name in enumerate(names)]
    width = max(len(tokens) for tokens, _, _, _ in laid)
    places: list[list[int]] = [[]] * len(rows)
    for row, (_, _, _, found) in enumerate(laid):
        for number, at in found.items():
            places[number] = [row * width + place for place in at]
    longest = max(map(len, rows))
    return Layout(
        tokens_R_L=torch.tensor([tokens + [pad_id] * (width - len(tokens)) for tokens, _, _, _ in laid]),
        positions_R_L=torch.tensor([positions + [0] * (width - len(positions)) for _, positions, _, _ in laid]),
        at_B_T=torch.tensor([at + [0] * (longest - len(at)) for at in places]),
        spans=tuple(span for _, _, spans, _ in laid for span in spans),
        adapters=names,
    )


def _lay(members: list[int], rows: Rows[list[int]], row: int, share: bool) -> tuple[list[int], list[int], list[Span], dict[int, list[int]]]:
    """(tokens, positions, spans, places of every token of each member) of one row of a layout."""
    tokens: list[int] = []
    positions: list[int] = []
    spans: list[Span] = []
    places: dict[int, list[int]] = {number: [] for number in members}
    for holders, start, end, path in tree(members, rows) if share else [([number], 0, len(rows[number]), ()) for number in members]:
        at = len(tokens)
        found = tuple(_stretches(places[holders[0]])) if path else ()
        tokens += rows[holders[0]][start:end]
        positions += range(start, end)
        spans.append(Span(row, at, len(tokens), found))
        for number in holders:
            places[number] += range(at, len(tokens))
    return tokens, positions, spans, places


def tree(members: Rows[int], rows: Rows[list[int]]) -> list[tuple[list[int], int, int, bool]]:
    """The stretches that make up `members`, parents first: (rows that hold it, start, end, whether something stands before).

    Where sharing a stretch saves fewer than WORTH_SHARING tokens, it goes to each of the rows' own stretches.
    """
    found: list[tuple[list[int], int, int, bool]] = []
    waiting = [(sorted(members, key=rows.__getitem__), 0)]  # rows in order that agree up to `start`, where their next stretch begins
    while waiting:
        holders, start = waiting.pop()
        if len(holders) == 1:
            if len(rows[holders[0]]) > start:
                found.append((holders, start, len(rows[holders[0]]), start > 0))
            continue
        first, last = rows[holders[0]], rows[holders[-1]]
        common = alike(first, last)  # in order, the first and the last row differ soonest
        if first == last or (common - start) * (len(holders) - 1) >= WORTH_SHARING:
            if common > start:
                found.append((holders, start, common, start > 0))
            start = common
            holders = [number for number in holders if len(rows[number]) > common]
        ended = [[number] for number in holders if len(rows[number]) == common]
        going_on = groupby((number for number in holders if len(rows[number]) > common), key=lambda number: rows[number][common])
        waiting += reversed([(part, start) for part in [*ended, *(list(part) for _, part in going_on)]])
    return found


def alike(one: list[int], other: list[int]) -> int:
    """How many tokens two rows begin with alike."""
    differ = (at for at, (token, another) in enumerate(zip(one, other, strict=False)) if token != another)
    return next(differ, min(len(one), len(other)))


def _stretches(places: list[int]) -> list[tuple[int, int]]:
    """Rising runs of `places`, as (start, end)."""
    runs: list[tuple[int, int]] = []
    for place in places:
        if runs and runs[-1][1] == place:
            runs[-1] = (runs[-1][0], place + 1)
        else:
            runs.append((place, place + 1))
    return runs


def positions_of(rows: Rows[list[int]], kind: Kind) -> int:
    """The positions that rows of one adapter take: padded to the longest, side by side, or with shared beginnings once."""
    if kind == "padded":
        return len(rows) * max(map(len, rows))
    return sum(end - start for _, start, end, _ in tree(range(len(rows)), rows)) if kind == "shared" else sum(map(len, rows))
