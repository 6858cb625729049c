"""Text to tokens in segments: the tokens of a prefix never depend on what follows it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

CACHED_SEGMENTS = 20_000
Span = tuple[int, int]  # the characters of a text that a token stands for


@dataclass
class Encoded:
    """Tokens, and for each cut how many tokens stand before it.

    `stretches` says what was encoded at once: where it starts, the token text before it, its text, and how many of
    its tokens stood in an earlier stretch already.
    """

    ids: list[int] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    stretches: list[tuple[int, str, str, int]] = field(default_factory=list)

    def add(self, other: Encoded, at: int) -> None:
        """What was encoded of the text from `at` on."""
        self.places += [len(self.ids) + count for count in other.places]
        self.ids += other.ids
        self.stretches += [(at + start, previous, text, skip) for start, previous, text, skip in other.stretches]


class Encoder:
    """Encodes rendered chat text with a fast tokenizer, cut where one turn's prompt ends and its answer begins.

    Text between two added tokens (`<|im_start|>`, `[INST]` …) is encoded alone, right after the token before it,
    as the tokenizer itself does; equal stretches are encoded once. Where an added token takes the spaces beside it,
    or matches normalised text, the whole text is one stretch.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.backend = tokenizer.backend_tokenizer
        added = {number: token for number, token in tokenizer.added_tokens_decoder.items() if token.content}
        self.added_ids = {token.content: number for number, token in added.items()}
        self.added_texts = {number: text for text, number in self.added_ids.items()}
        plain = all(
            not (t.lstrip or t.rstrip or t.single_word) and (not t.normalized or self.backend.normalizer is None) for t in added.values()
        )
        longest_first = sorted(self.added_ids, key=len, reverse=True)
        self.splitter = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if plain and longest_first else None
        spelled = (self.backend.token_to_id(f"<0x{byte:02X}>") for byte in range(256))
        self.bytewise = frozenset(number for number in spelled if number is not None)  # what stands for a byte that no other token holds
        self.segment = lru_cache(maxsize=CACHED_SEGMENTS)(self._segment)

    def encode(self, text: str, cuts: Sequence[int] = (), before: int | None = None) -> Encoded:
        """The tokens of `text`. `cuts` are rising character positions, `before` the token that `text` follows.

        No token crosses a cut, and the tokens before a cut are those of the text before it alone.
        """
        found = Encoded()
        previous = self.added_texts.get(before, "") if before is not None else ""
        at = passed = 0
        for piece in self.splitter.split(text) if self.splitter else [text]:
            if not piece:
                continue
            end = at + len(piece)
            known = self.added_ids.get(piece) if self.splitter else None
            inside = []
            while passed < len(cuts) and cuts[passed] < end:
                inside.append(cuts[passed] - at)
                passed += 1
            if known is not None:
                found.add(Encoded([known], [0] * len(inside), [(0, "", piece, 0)]), at)
                previous = piece
            else:
                found.add(self._cut(previous, piece, inside), at)
            at = end
        found.places += [len(found.ids)] * (len(cuts) - passed)
        return found

    def spans(self, found: Encoded) -> list[Span]:
        """The characters that each token stands for. The tokens of one letter's bytes all stand for that letter."""
        spans: list[Span] = []
        for at, previous, text, skip in found.stretches:
            offsets = self.backend.encode(previous + text, add_special_tokens=False).offsets[bool(previous) + skip :]
            shift = at - len(previous)
            spans += [(start + shift, stop + shift) for start, stop in offsets]
        return spans

    def _segment(self, previous: str, text: str) -> tuple[int, ...]:
        ids = self.backend.encode(previous + text, add_special_tokens=False).ids
        return tuple(ids[1:] if previous else ids)

    def _cut(self, previous: str, text: str, inside: list[int]) -> Encoded:
        """`text` encoded whole up to each cut in turn, wherever that leaves the tokens before the last cut as they were."""
        found = Encoded()
        last = 0
        for cut in [*inside, len(text)]:
            skip = len(found.ids)
            whole = self.segment(previous, text[:cut]) if cut else ()
            if list(whole[:skip]) == found.ids:
                found.ids += whole[skip:]
                found.stretches.append((0, previous, text[:cut], skip))
            else:
                found.ids += self.segment(previous, text[last:cut])
                found.stretches.append((last, previous, text[last:cut], 0))
            found.places.append(len(found.ids))
            last = cut
        found.places.pop()
        return found
