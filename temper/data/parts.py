"""Where the parts of an assistant turn stand in the rendered text: its thinking, its text, its calls, their arguments.

A part is found by rendering the conversation again with another value in its place: where the two texts part and
where they meet again, the part begins and ends. Nothing is searched for, so text that quotes markup moves nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from temper.core.errors import TemplateError
from temper.data.encoding import Span
from temper.data.render import Chat
from temper.data.syntax import ThinkSyntax, loaded

THINKING = ("reasoning_content", "reasoning", "thinking")  # the keys under which templates look for it
DO = "train the whole turn, or none of it"


@dataclass(frozen=True)
class Turn:
    """Message `number` of `chat`, which `render` writes as `text`; its turn, end token included, stands at `span`."""

    chat: Chat
    number: int
    render: Callable[[Chat], str]
    text: str
    span: Span

    def spans_of(self, parts: Sequence[str], think: ThinkSyntax | None) -> list[Span]:
        """The characters of `parts`: thinking with its marks, calls with their names and brackets, arguments alone.

        The end token goes with the last of thinking, text and calls. Raises TemplateError where the message has none
        of the parts, or the template does not show where they stand.
        """
        found = self.parts(think)
        spans = [span for part in parts for span in found[part]]
        if not spans:
            raise TemplateError(
                f"assistant message {self.number} trains only its {', '.join(parts)}, and has none",
                why=f"it has {', '.join(part for part in found if found[part]) or 'no part at all'}",
                do="name a part that it has, or set train: false",
            )
        return spans

    def parts(self, think: ThinkSyntax | None) -> dict[str, list[Span]]:
        """The characters of each part that the message has; thinking, text and calls together are the turn."""
        item, (start, stop) = self.chat[self.number], self.span
        thought, content, calls = item.get(THINKING[0]), item["content"], item.get("tool_calls", [])
        arguments = [self.swap(call["function"]["arguments"], self._with_arguments(place)) for place, call in enumerate(calls)]
        said = self.swap(content, lambda other: {"content": other}) if content.strip() else None
        thought_ends = start if not thought else said[0] if said else stop
        if thought and calls and not said:
            thought_ends = self.swap(thought, lambda other: dict.fromkeys(THINKING, other))[1]
            close = think.close if think else ""
            thought_ends += next(len(mark) for mark in (close, close.rstrip(), "") if self.text.startswith(mark, thought_ends))
        calls_start = stop if not calls else said[1] if said else thought_ends
        if any(span[0] < calls_start for span in arguments):
            raise TemplateError(f"the template writes the calls of assistant message {self.number} before its text", do=DO)
        return {
            "thinking": [(start, thought_ends)] if thought else [],
            "text": [(thought_ends, calls_start)] if said else [],
            "calls": [(calls_start, stop)] if calls else [],
            "arguments": arguments,
        }

    def swap(self, value: Any, other: Callable[[str], dict[str, Any]]) -> Span:
        """The characters that change where `other` keys stand in the message for those of `value`. Raises TemplateError."""
        shown = value.strip() if isinstance(value, str) else "{}"
        letter = next(letter for letter in "xyz" if letter not in (shown[:1], shown[-1:]))
        chat = [*self.chat]
        chat[self.number] = chat[self.number] | other(letter)
        changed = self.render(chat)
        first = shared(self.text, changed)
        last = len(self.text) - shared(self.text[first:][::-1], changed[first:][::-1])
        part = self.text[first:last]
        whole = shown in part or json.dumps(shown, ensure_ascii=False)[1:-1] in part if isinstance(value, str) else loaded(part) == value
        if not (self.span[0] <= first <= last <= self.span[1] and whole):
            raise TemplateError(
                f"the template does not show where a part of assistant message {self.number} stands: {str(value)[:60]!r}",
                why=f"with another value in its place, {part[:60]!r} changes",
                do=DO,
            )
        return first, last

    def _with_arguments(self, place: int) -> Callable[[str], dict[str, Any]]:
        def replace(other: str) -> dict[str, Any]:
            calls = [*self.chat[self.number]["tool_calls"]]
            calls[place] = calls[place] | {"function": calls[place]["function"] | {"arguments": other}}
            return {"tool_calls": calls}

        return replace


def shared(one: str, other: str) -> int:
    """How many letters both start with."""
    return next((at for at, (first, second) in enumerate(zip(one, other, strict=False)) if first != second), min(len(one), len(other)))
