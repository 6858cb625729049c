"""The rows of a running batch, and what the slots of its cache hold."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from temper.core.records import Sampled
from temper.rollout.grammar import Grammar

WORTH_SHARING = 16  # tokens: a shorter common prefix is computed again rather than copied
PASS_TOKENS = 4096  # padded tokens of one prefill pass


@dataclass(frozen=True)
class Request:
    """One turn to sample. Temperature 0 is greedy; top_p 1 and top_k 0 truncate nothing.

    `stop_ids` defaults to the template's. `seed` alone decides what is drawn from the model's distributions.
    With `keep_support` the tokens that grammar or truncation allowed are recorded with every sampled token.
    `heard` is told each token as it is sampled, and the adapter it came through; where it answers false the row ends
    there, with finish reason `error`.
    """

    prompt_ids: Sequence[int]
    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    adapter: str | None = None
    grammar: Grammar | None = None
    stop_ids: frozenset[int] | None = None
    keep_support: bool = False
    heard: Callable[[int, str | None], bool] | None = field(default=None, compare=False)

    @property
    def truncated(self) -> bool:
        """Whether top-k or top-p restrict what is sampled."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1)


@dataclass
class Row:
    """One conversation in the batch: its tokens, how many of them are cached, and the turn being sampled."""

    index: int
    request: Request
    stop_ids: frozenset[int]
    matcher: Any = None
    tokens: list[int] = field(default_factory=list)
    cached: int = 0
    logprobs: list[float] = field(default_factory=list)
    support: list[tuple[int, ...] | None] = field(default_factory=list)
    failed: bool = False

    def __post_init__(self) -> None:
        self.tokens = list(self.request.prompt_ids)

    @property
    def sampled(self) -> int:
        """How many tokens this turn has so far."""
        return len(self.logprobs)

    @property
    def need(self) -> int:
        """How many positions the turn may take in all."""
        return len(self.request.prompt_ids) + self.request.max_tokens

    @property
    def done(self) -> bool:
        """Whether the turn has ended."""
        return self.failed or self.sampled >= self.request.max_tokens or (self.sampled > 0 and self.tokens[-1] in self.stop_ids)

    def finish(self, version: str) -> Sampled:
        """The turn as it was sampled."""
        prompt = len(self.request.prompt_ids)
        stopped = self.sampled > 0 and self.tokens[-1] in self.stop_ids
        kept = self.request.keep_support and any(item is not None for item in self.support)
        return Sampled(
            prompt_ids=tuple(self.tokens[:prompt]), token_ids=tuple(self.tokens[prompt:]), logprobs=tuple(self.logprobs),
            finish_reason="error" if self.failed else "stop" if stopped else "length", support=tuple(self.support) if kept else None,
            temperature=self.request.temperature, adapter=self.request.adapter, version=version,
        )  # fmt: skip


class Residents:
    """Which tokens each slot holds keys and values for, and through which adapter (`owner`) they were computed."""

    def __init__(self) -> None:
        self.tokens_S_L: NDArray[np.int64] = np.full((0, 0), -1, dtype=np.int64)
        self.lengths_S: NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        self.owners: list[Hashable] = []

    def reserve(self, slots: int, positions: int) -> None:
        """Make room; what is held is kept."""
        old_slots, old_positions = self.tokens_S_L.shape
        if slots <= old_slots and positions <= old_positions:
            return
        tokens_S_L = np.full((max(slots, old_slots), max(positions, old_positions)), -1, dtype=np.int64)
        tokens_S_L[:old_slots, :old_positions] = self.tokens_S_L
        self.tokens_S_L = tokens_S_L
        self.lengths_S = np.concatenate([self.lengths_S, np.zeros(len(tokens_S_L) - old_slots, dtype=np.int64)])
        self.owners += [None] * (len(tokens_S_L) - old_slots)

    def clear(self) -> None:
        """Forget everything: the weights changed."""
        self.lengths_S[:] = 0

    def put(self, slot: int, tokens: Sequence[int], owner: Hashable) -> None:
        """The slot now holds exactly these tokens."""
        self.tokens_S_L[slot, : len(tokens)] = tokens
        self.lengths_S[slot] = len(tokens)
        self.owners[slot] = owner

    def swap(self, first: int, second: int) -> None:
        """Two slots exchanged what they hold."""
        self.tokens_S_L[[first, second]] = self.tokens_S_L[[second, first]]
        self.lengths_S[[first, second]] = self.lengths_S[[second, first]]
        self.owners[first], self.owners[second] = self.owners[second], self.owners[first]

    def longest(self, tokens: Sequence[int] | NDArray[np.int64], owner: Hashable) -> tuple[int, int]:
        """(slot, length) of the longest prefix of `tokens` that some slot of the same owner holds; length 0 for none."""
        wanted_L = np.asarray(tokens, dtype=np.int64)[: self.tokens_S_L.shape[1]]
        if not len(wanted_L) or not len(self.owners):
            return 0, 0
        shared_S = np.minimum(shared_prefix(self.tokens_S_L[:, : len(wanted_L)], wanted_L), self.lengths_S)
        shared_S[[held != owner for held in self.owners]] = 0
        best = int(shared_S.argmax())
        return best, int(shared_S[best])


def shared_prefix(rows_S_L: NDArray[np.int64], wanted_L: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many leading tokens each row shares with `wanted_L`."""
    equal_S_L = rows_S_L == wanted_L
    return np.where(equal_S_L.all(1), equal_S_L.shape[1], equal_S_L.argmin(1)).astype(np.int64)


def heads_first(rows: Sequence[Row], owner_of: Callable[[Row], Hashable], residents: Residents) -> tuple[list[Row], list[Row]]:
    """Which rows to prefill first, and which to leave until those are there because they share a prefix with one of them.

    Identical prompts of a group, and prompts with a common system text, are so computed once.
    """
    heads: list[Row] = []
    later: list[Row] = []
    alike: dict[Hashable, list[NDArray[np.int64]]] = {}  # heads by owner and first tokens: no others share enough
    for row in rows:
        wanted = np.asarray(row.tokens[:-1], dtype=np.int64)
        others = alike.setdefault((owner_of(row), wanted[:WORTH_SHARING].tobytes()), [])
        lengths = [min(len(other), len(wanted)) for other in others]
        shared = max((int(shared_prefix(other[None, :n], wanted[:n])[0]) for other, n in zip(others, lengths, strict=True)), default=0)
        if shared >= residents.longest(wanted, owner_of(row))[1] + WORTH_SHARING:
            later.append(row)
        else:
            heads.append(row)
            others.append(wanted)
    return heads, later


def passes(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows in prefill passes of similar length, so that little is padding; fresh rows apart from extended ones."""
    plan: list[list[Row]] = []
    for fresh in (True, False):
        group: list[Row] = []
        waiting = [row for row in rows if (row.cached == 0) == fresh and len(row.tokens) - 1 > row.cached]
        for row in sorted(waiting, key=lambda row: len(row.tokens) - row.cached):
            length = len(row.tokens) - 1 - row.cached
            shortest = len(group[0].tokens) - 1 - group[0].cached if group else length
            full = length * (len(group) + 1) > PASS_TOKENS or (length > 1.5 * shortest and len(group) * length > PASS_TOKENS // 8)
            if group and full:
                plan.append(group)
                group = []
            group.append(row)
        if group:
            plan.append(group)
    return plan
