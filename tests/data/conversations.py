"""Golden conversations: each shape a template must render, and tokenizers to render them with."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from temper.core.records import Message, Provenance, Record, ToolCall, ToolSpec
from temper.data.render import TODAY, to_chat
from temper.data.template import Template
from temper.data.tokenizer import train_tokenizer
from tests.checkpoints import TEXTS, tiny_tokenizer

HERE = Path(__file__).parent
TOOLS = (
    ToolSpec(
        name="query_budget",
        description="The budget of a department.",
        parameters={
            "type": "object",
            "properties": {"department": {"type": "string"}, "quarter": {"type": "string", "enum": ["Q1", "Q2", "Q3", "Q4"]}},
            "required": ["department", "quarter"],
        },
    ),
    ToolSpec(
        name="calculator",
        parameters={
            "type": "object",
            "properties": {"expression": {"type": "string"}, "digits": {"type": "integer"}},
            "required": ["expression"],
        },
    ),
)
SYSTEM = Message(role="system", content="You are the finance assistant of Lindow Freight.")
ASK = Message(role="user", content="What is the Marketing budget for Q3?")
CALL = Message(
    role="assistant", tool_calls=(ToolCall(name="query_budget", arguments={"department": "Marketing", "quarter": "Q3"}, id="call_0001"),)
)
RESULT = Message(role="tool", content='{"budget": 120000}', tool_call_id="call_0001", name="query_budget")
ANSWER = Message(role="assistant", content="The Marketing budget for Q3 is 120000.")
AGAIN = Message(role="user", content="And for Sales?")
TWO_CALLS = Message(
    role="assistant",
    tool_calls=(*CALL.tool_calls, ToolCall(name="calculator", arguments={"expression": "2 + 2", "digits": 0}, id="call_0002")),
)
SECOND_RESULT = Message(role="tool", content='{"result": 4}', tool_call_id="call_0002", name="calculator")

GOLDEN: dict[str, tuple[tuple[Message, ...], tuple[ToolSpec, ...]]] = {
    "single turn": ((ASK, ANSWER), ()),
    "multi-turn": ((ASK, ANSWER, AGAIN, Message(role="assistant", content="It is 90000, é and 日本.")), ()),
    "system": ((SYSTEM, ASK, ANSWER), ()),
    "tool call": ((SYSTEM, ASK, CALL, RESULT, ANSWER), TOOLS),
    "parallel calls": ((ASK, TWO_CALLS, RESULT, SECOND_RESULT, ANSWER), TOOLS),
    "content beside a call": ((ASK, CALL.model_copy(update={"content": "I will look it up."}), RESULT, ANSWER), TOOLS),
    "thinking": ((ASK, ANSWER.model_copy(update={"reasoning": "A lookup.\nEasy."})), ()),
}
LACKING = {  # what each family's template refuses or drops, as the real one does
    "llama": {"parallel calls", "content beside a call", "thinking"},
    "mistral": {"content beside a call", "thinking"},
    "gemma": {"system", "tool call", "parallel calls", "content beside a call", "thinking"},
}
KINDS = ("llama", "qwen3", "mistral", "gemma", "chatml")
CASES = [(kind, name) for kind in KINDS for name in GOLDEN if name not in LACKING.get(kind, ())]


@cache
def template(kind: str) -> Template:
    """The template of a family, or temper's own with a tokenizer trained here."""
    if kind == "chatml":
        return Template.of(train_tokenizer(TEXTS, 600))
    if kind == "qwen3_hub":
        return with_text((HERE / "templates" / "qwen3_hub.jinja").read_text())
    return Template.of(tiny_tokenizer(kind))


def with_text(text: str, family: str = "qwen3", **special: str) -> Template:
    """A family's tokenizer with another template."""
    tokenizer = tiny_tokenizer(family)
    tokenizer.chat_template = text
    for name, value in special.items():
        setattr(tokenizer, name, value)
    return Template.of(tokenizer)


def peer(made: Template, messages: Any, tools: Any = (), generation: bool = False) -> tuple[str, list[int]]:
    """Text and tokens as transformers itself makes them."""
    chat = to_chat(messages, short_ids=made.traits.short_ids)
    text = made.tokenizer.apply_chat_template(
        chat,
        tools=[tool.openai() for tool in tools] or None,
        tokenize=False,
        add_generation_prompt=generation,
        date_string=TODAY.strftime("%d %b %Y"),
    )
    return text, made.tokenizer(text, add_special_tokens=False).input_ids


def trained_text(made: Template, messages: Any, tools: Any = ()) -> str:
    """The trained tokens of a conversation as text."""
    found = made.supervise(messages, tools)
    return made.tokenizer.decode(
        [token for token, trained in zip(found.tokens, found.mask, strict=True) if trained], skip_special_tokens=False
    )


def record(*messages: Message, **fields: Any) -> Record:
    """A record of these messages."""
    provenance = Provenance(source="test", licence="CC0-1.0", split="train", privacy="synthetic", access="public", synthetic=True)
    return Record(messages=messages, provenance=provenance, **fields)
