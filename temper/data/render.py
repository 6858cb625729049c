"""Chat templates as compiled Jinja, and messages in the form that templates read."""

from __future__ import annotations

import datetime
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from temper.core.errors import TemplateError
from temper.core.records import Message, ToolCall, ToolSpec

# What a template that asks for today's date is told (Llama 3.1's own default): with a real clock, the same row would
# have other tokens tomorrow, and a resumed run another end.
TODAY = datetime.datetime(2024, 7, 26)
SHORT_ID = re.compile(r"[A-Za-z0-9]{9}\Z")  # the only form of call id that Mistral's templates accept
Chat = list[dict[str, Any]]


class GenerationBlock(Extension):
    """Lets `{% generation %}` stand in a template. Masks do not come from it, so it renders as if it were not there."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The block's body."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _refuse(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@lru_cache(maxsize=64)
def compiled(text: str) -> jinja2.Template:
    """A chat template, compiled once a process under the settings that transformers documents. Raises TemplateError."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = TODAY.strftime
    try:
        return environment.from_string(text)
    except jinja2.TemplateSyntaxError as error:
        raise TemplateError(
            f"the chat template is not valid Jinja (line {error.lineno})", why=str(error.message), do="mend chat_template.jinja"
        ) from error


def short_id(call_id: str) -> str:
    """`call_id` where it has nine letters or digits, else nine that stand for it."""
    return call_id if SHORT_ID.match(call_id) else hashlib.sha256(call_id.encode()).hexdigest()[:9]


def to_chat(messages: Sequence[Message], *, short_ids: bool = False) -> Chat:
    """Messages as the dicts that chat templates read. A key is there only where it holds something.

    A call without an id is given one from its place, and each result without one that of the call it answers.
    """
    chat: Chat = []
    waiting: list[str] = []
    for number, message in enumerate(messages):
        item: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.reasoning:
            item |= {"reasoning_content": message.reasoning, "reasoning": message.reasoning, "thinking": message.reasoning}
        if message.tool_calls:
            waiting = [call.id or f"call-{number}-{place}" for place, call in enumerate(message.tool_calls)]
            item["tool_calls"] = [
                _call(call, short_id(own) if short_ids else own) for call, own in zip(message.tool_calls, waiting, strict=True)
            ]
        if message.role == "tool":
            answered = message.tool_call_id or (waiting[0] if waiting else f"call-{number}-0")
            waiting = [own for own in waiting if own != answered]
            item["tool_call_id"] = short_id(answered) if short_ids else answered
        if message.name:
            item["name"] = message.name
        chat.append(item)
    return chat


def _call(call: ToolCall, own: str) -> dict[str, Any]:
    return {"id": own, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def to_tools(tools: Iterable[ToolSpec]) -> list[dict[str, Any]] | None:
    """Tools in OpenAI's form, or None where there are none."""
    return [tool.openai() for tool in tools] or None


def special_roles(tokenizer: Any) -> dict[str, str]:
    """The tokens that templates call `bos_token`, `eos_token` and so on."""
    return {name: str(value) for name, value in tokenizer.special_tokens_map.items() if isinstance(value, str) or hasattr(value, "content")}
