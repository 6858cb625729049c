"""Text to tokens in segments: the tokens of a prefix never depend on what follows it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

CACHED_SEGMENTS = 20_000


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
        self.segment = lru_cache(maxsize=CACHED_SEGMENTS)(self._segment)

    def encode(self, text: str, cuts: Sequence[int] = (), before: int | None = None) -> tuple[list[int], list[int]]:
        """The tokens of `text`, and for each character position in `cuts` (rising) how many tokens stand before it.

        No token crosses a cut, and the tokens before a cut are those of the text before it alone. `before` is the
        token that `text` follows.
        """
        ids: list[int] = []
        places: list[int] = []
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
                places += [len(ids)] * len(inside)
                ids.append(known)
                previous = piece
            else:
                found, within = self._cut(previous, piece, inside) if inside else (self.segment(previous, piece), [])
                places += [len(ids) + count for count in within]
                ids += found
            at = end
        places += [len(ids)] * (len(cuts) - passed)
        return ids, places

    def _segment(self, previous: str, text: str) -> tuple[int, ...]:
        ids = self.backend.encode(previous + text, add_special_tokens=False).ids
        return tuple(ids[1:] if previous else ids)

    def _cut(self, previous: str, text: str, inside: list[int]) -> tuple[tuple[int, ...], list[int]]:
        """`text` encoded whole up to each cut in turn, wherever that leaves the tokens before the last cut as they were."""
        ids: tuple[int, ...] = ()
        places = []
        last = 0
        for cut in [*inside, len(text)]:
            whole = self.segment(previous, text[:cut]) if cut else ()
            ids = whole if whole[: len(ids)] == ids else ids + self.segment(previous, text[last:cut])
            places.append(len(ids))
            last = cut
        return ids, places[:-1]
