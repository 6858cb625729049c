"""A sampled turn read while it is sampled: what is certain of its thinking and its text, token by token."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from typing import NamedTuple

from temper.data.syntax import CallSyntax, ThinkSyntax

UNFINISHED = "�"  # what the bytes of a letter decode to before its last one has come


class Piece(NamedTuple):
    """What one more token made certain."""

    thinking: str = ""
    text: str = ""


class TurnReader:
    """Reads a turn as `Template.parse` would, but from the front: no later token changes what was given.

    `stops` are strings that end the text, and are no part of it.
    `dropped` are the control tokens that are no text, `bytewise` those that stand for one byte.
    What could still turn out to be a mark (of thinking, of a call) is kept back, and so is everything from a call on:
    at every moment the pieces given so far are the start of the parsed message's thinking and content.
    """

    def __init__(
        self, decode: Callable[[Sequence[int]], str], dropped: Container[int], bytewise: Container[int],
        think: ThinkSyntax | None, lead: str, calls: CallSyntax | None, stops: Sequence[str] = (),
    ) -> None:  # fmt: skip
        self.stops, self.tail, self.stopped = stops, "", False
        self.decode, self.dropped, self.bytewise = decode, dropped, bytewise
        self.think, self.lead, self.calls = think, lead, calls
        self.ids: list[int] = []
        self.settled = self.seen = 0  # decoding starts at `settled`: a token's text may depend on the one before it
        self.kept = ""  # decoded, and not given yet
        self.state: Callable[[], Piece] | None = self._opening if think else self._leading
        self.thought = False

    def read(self, token: int) -> Piece:
        """What `token` makes certain."""
        self.kept += self._decoded(token)
        thinking = text = ""
        state = None
        while self.state is not None and state is not self.state:  # a state that ends hands the rest to the next
            state = self.state
            piece = state()
            thinking, text = thinking + piece.thinking, text + piece.text
        return Piece(thinking, self._until_stop(text))

    def _until_stop(self, text: str) -> str:
        """What is certain to stand before any stop string."""
        self.tail += text
        place = min((place for stop in self.stops if (place := self.tail.find(stop)) >= 0), default=len(self.tail))
        certain = 0 if self.stopped else min(place, len(self.tail) - held(self.tail, *self.stops))
        self.stopped = self.stopped or certain == place < len(self.tail)
        given, self.tail = self.tail[:certain], self.tail[certain:]
        return given

    def _decoded(self, token: int) -> str:
        if token in self.dropped:
            return ""
        self.ids.append(token)
        if token in self.bytewise:  # a run of bytes is text as a whole, or not at all
            return ""
        before, now = self.decode(self.ids[self.settled : self.seen]), self.decode(self.ids[self.settled :])
        if now.endswith(UNFINISHED) or len(now) <= len(before):
            return ""
        self.settled, self.seen = self.seen, len(self.ids)
        return now[len(before) :]

    # --- states: each gives what is certain of `kept`, and says which comes next ---

    def _opening(self) -> Piece:
        """Does the turn start with thinking?"""
        assert self.think is not None
        opening, mark = self.think.open, self.think.open.strip()
        start = self.kept.lstrip()
        if not mark:  # the prompt has opened it: only its end shows that it was one
            if self.think.close.strip() in self.kept:
                self.kept, self.state = self.kept.removeprefix(opening), self._thinking
        elif not start.startswith(mark):
            self.state = self.state if mark.startswith(start) else self._leading
        elif self.kept.startswith(opening) or not opening.startswith(self.kept):
            self.kept = self.kept.removeprefix(opening) if self.kept.startswith(opening) else start.removeprefix(mark)
            self.state = self._thinking
        return Piece()

    def _thinking(self) -> Piece:
        assert self.think is not None
        mark = self.think.close.strip()
        before, _, behind = self.think.close.partition(mark)
        if mark not in self.kept:
            return Piece(thinking=self._give_thought(len(self.kept) - held(self.kept, before + mark, mark)))
        place = self.kept.index(mark)
        rest = self.kept[place + len(mark) :]
        if rest != behind and behind.startswith(rest):
            return Piece()
        self.kept = self.kept[:place].removesuffix(before)
        piece = Piece(thinking=self._give_thought(len(self.kept)))
        self.kept, self.state = rest.removeprefix(behind), self._leading
        return piece

    def _give_thought(self, length: int) -> str:
        """The first `length` letters of what is kept; nothing while the thinking is blank."""
        self.thought = self.thought or bool(self.kept[:length].strip())
        return self._give(length) if self.thought else ""

    def _leading(self) -> Piece:
        """What the template writes before any text is no part of it."""
        if self.kept and (self.kept.startswith(self.lead) or not self.lead.startswith(self.kept)):
            self.kept = self.kept.removeprefix(self.lead)
            self.state = self._text if self.calls is None or self.calls.mark else self._bare
        return Piece()

    def _bare(self) -> Piece:
        """Where nothing marks a call, a turn that starts with an object may be one."""
        if start := self.kept.lstrip():
            self.calls, self.state = None, None if start.startswith("{") else self._text
        return Piece()

    def _text(self) -> Piece:
        if self.calls is None:
            return Piece(text=self._give(len(self.kept)))
        mark, gap = self.calls.mark, self.calls.gap
        if mark not in self.kept:
            return Piece(text=self._give(len(self.kept) - held(self.kept, gap + mark, mark)))
        self.state = None
        return Piece(text=self.kept.partition(mark)[0].removesuffix(gap))

    def _give(self, length: int) -> str:
        given, self.kept = self.kept[:length], self.kept[length:]
        return given


def held(text: str, *marks: str) -> int:
    """How many letters at the end of `text` may be the start of one of `marks`."""
    return max(
        (size for mark in marks for size in range(min(len(mark), len(text)) + 1) if mark.startswith(text[len(text) - size :])), default=0
    )
