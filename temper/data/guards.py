"""What no conversation may hold, and what no template may drop."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

from temper.core.errors import TemplateError
from temper.core.records import Message, ToolSpec
from temper.data.contract import Traits


def check_control(control: re.Pattern[str] | None, messages: Iterable[Message]) -> None:
    """Refuse text that would become a control token: it could end a turn, or open one in another's name."""
    if control is None:
        return
    for number, message in enumerate(messages):
        for text in (message.content, message.reasoning, *(text for call in message.tool_calls for text in texts_in(call.arguments))):
            if text and (found := control.search(text)):
                raise TemplateError(
                    f"message {number} ({message.role}) holds the control token {found.group()!r} as text",
                    why="it would be read as the end or the start of a turn",
                    do="remove it from the text, or write it another way",
                )


def check_supported(template: str, traits: Traits, messages: Sequence[Message], tools: Sequence[ToolSpec]) -> None:
    """Raise TemplateError for tools, calls or results that the template would refuse or drop."""
    needs = {
        "tools": bool(tools) and not traits.tools,
        "calls": not traits.calls and any(message.tool_calls for message in messages),
        "results": not traits.results and any(message.role == "tool" for message in messages),
        "parallel calls": not traits.parallel and any(len(message.tool_calls) > 1 for message in messages),
    }
    for about, lacking in needs.items():
        if lacking:
            raise TemplateError(
                f"the chat template of {template} has no {about}",
                why=traits.faults.get(about, "it drops them"),
                do="use a template that renders them, for example temper/data/chatml.jinja, or remove them from the rows",
            )


def check_kept(template: str, messages: Sequence[Message], text: str, *, thinking: bool = False) -> None:
    """Raise TemplateError for a message whose text or call (with `thinking`: trained thinking too) the rendered `text` lacks."""
    for number, message in enumerate(messages):
        content = message.content.strip()
        thought = thinking and message.role == "assistant" and message.train is not False
        for part in (content, *(call.name for call in message.tool_calls), (message.reasoning or "").strip() if thought else ""):
            if part and part not in text and json.dumps(part, ensure_ascii=False)[1:-1] not in text:
                beside = " beside its tool call" if message.tool_calls and part == content else ""
                raise TemplateError(
                    f"the chat template of {template} drops a part of message {number} ({message.role}){beside}: {part[:60]!r}",
                    why="what is not rendered is neither trained nor seen",
                    do="remove it from the row, or use a template that renders it",
                )


def texts_in(value: Any) -> Iterable[str]:
    """Every string inside a JSON value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from texts_in(item)
    elif isinstance(value, list):
        for item in value:
            yield from texts_in(item)
