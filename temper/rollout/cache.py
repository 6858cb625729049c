"""Keys and values of every row the engine holds, in slots that are allocated once and reused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

PAD_TO = 64  # positions are allocated in steps of this many
GROWTH = 1.25  # and by at least this factor, so that growing stays rare


@dataclass(frozen=True)
class Writing:
    """Where one forward pass writes: `slots` (None: the first `rows` slots) at `positions_R_T`, reading up to `reach`.

    `fresh` rows have nothing before the new tokens, which are then all they can see.
    """

    rows: int
    positions_R_T: Tensor
    reach: int
    slots: Tensor | None = None
    fresh: bool = False


class SlotCache(Cache):
    """A transformers cache with one slot a row, each filled to its own length.

    Every layer keeps [slots, heads, positions + 1, head size]; the last position is where padding is written and
    is never read. The shapes come from the first keys that a layer hands over, so any decoder fits.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.slots = 0
        self.size = 0
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        self.writing: Writing | None = None

    def reserve(self, slots: int, positions: int) -> None:
        """Make room for that many rows of that many tokens; what is held is kept."""
        if slots <= self.slots and positions <= self.size:
            return
        before = self.size
        if positions > self.size:
            wanted = max(positions, int(self.size * GROWTH))
            self.size = -(-wanted // PAD_TO) * PAD_TO
        self.slots = max(slots, self.slots)
        for held in (self.keys, self.values):
            for layer, old in held.items():
                new = old.new_zeros(self.slots, old.shape[1], self.size + 1, old.shape[3])
                new[: len(old), :, :before] = old[:, :, :before]
                held[layer] = new

    @property
    def padding_position(self) -> int:
        """The position that is written by padding and never read."""
        return self.size

    @property
    def bytes(self) -> int:
        """Memory that the slots take."""
        return sum(item.nbytes for held in (self.keys, self.values) for item in held.values())

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the new keys and values where `writing` says, and return what the new tokens may look at."""
        writing = self.writing
        if writing is None:
            raise RuntimeError("SlotCache.update outside of a forward pass of the engine")
        return self._write(self.keys, key_states, layer_idx, writing), self._write(self.values, value_states, layer_idx, writing)

    def _write(self, held: dict[int, Tensor], new_R_H_T_D: Tensor, layer: int, writing: Writing) -> Tensor:
        if layer not in held:
            heads, size = new_R_H_T_D.shape[1], new_R_H_T_D.shape[3]
            held[layer] = new_R_H_T_D.new_zeros(self.slots, heads, self.size + 1, size)
        slots_S_H_L_D = held[layer]
        rows = torch.arange(writing.rows, device=slots_S_H_L_D.device) if writing.slots is None else writing.slots
        slots_S_H_L_D[rows[:, None], :, writing.positions_R_T] = new_R_H_T_D.transpose(1, 2)
        if writing.fresh:
            return new_R_H_T_D
        if writing.slots is None:
            return slots_S_H_L_D[: writing.rows, :, : writing.reach]
        return slots_S_H_L_D[writing.slots, :, : writing.reach]

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of a slot into another."""
        for held in (self.keys, self.values):
            for item in held.values():
                item[target, :, :length] = item[source, :, :length]

    def swap(self, first: int, second: int, length: int) -> None:
        """Exchange the first `length` positions of two slots."""
        for held in (self.keys, self.values):
            for item in held.values():
                kept = item[first, :, :length].clone()
                item[first, :, :length] = item[second, :, :length]
                item[second, :, :length] = kept

    # What transformers asks a cache when it builds a mask itself, which happens for fresh rows only.

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Nothing stands before the rows that transformers masks itself."""
        return 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """As `get_seq_length`."""
        return 0

    def get_mask_sizes(self, query_length: Any, layer_idx: int = 0) -> tuple[int, int]:
        """(keys, offset) of fresh rows: they see themselves."""
        return (query_length if isinstance(query_length, int) else len(query_length)), 0

    @property
    def is_compileable(self) -> bool:
        """Slots move between steps."""
        return False

    @property
    def is_sliding(self) -> list[bool]:
        """Every layer keeps all positions; windows are in the masks."""
        return [False] * max(1, len(self.keys))
