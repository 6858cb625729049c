"""Golden conversations: a template as data, pinned as text and as token ids beside the checkpoint that it belongs to.

The fingerprint says that a template's files are the same; the golden conversations say that they still *do* the same,
under another version of the tokenizer or of Jinja too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from temper.core.errors import TemplateError
from temper.core.hashing import hash_text
from temper.core.records import Message, Noun, ToolCall, ToolSpec
from temper.core.reports import Finding
from temper.core.storage import read_json, write_json
from temper.data.inspect import token_diff
from temper.data.template import Template
from temper.data.turns import REMEDY

PIN = "template.json"  # beside the weights
Conversation = tuple[tuple[Message, ...], tuple[ToolSpec, ...]]

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

GOLDEN: dict[str, Conversation] = {
    "single turn": ((ASK, ANSWER), ()),
    "multi-turn": ((ASK, ANSWER, AGAIN, Message(role="assistant", content="It is 90000, é and 日本.")), ()),
    "system": ((SYSTEM, ASK, ANSWER), ()),
    "tool call": ((SYSTEM, ASK, CALL, RESULT, ANSWER), TOOLS),
    "parallel calls": ((ASK, TWO_CALLS, RESULT, SECOND_RESULT, ANSWER), TOOLS),
    "content beside a call": ((ASK, CALL.model_copy(update={"content": "I will look it up."}), RESULT, ANSWER), TOOLS),
    "thinking": ((ASK, ANSWER.model_copy(update={"reasoning": "A lookup.\nEasy."})), ()),
}


class Pinned(Noun):
    """One conversation under one template: its text, its token ids, and `trained`, 1 or 0 for each of them.

    `refused` says why the template cannot hold it; then the others are empty.
    """

    text: str = ""
    ids: tuple[int, ...] = ()
    trained: tuple[int, ...] = ()
    refused: str | None = None


class TemplateCard(Noun):
    """A template as versioned data: what it is, and what it does with each golden conversation."""

    version: int = 1
    fingerprint: str
    tokenizer: str
    text: str
    special_tokens: dict[str, str]
    golden: dict[str, Pinned]


def pinned(template: Template, conversation: Conversation) -> Pinned:
    """What `template` makes of a conversation: the last question's turns where it rewrites earlier ones."""
    messages, tools = conversation
    if not template.traits.keeps_history:
        last = max(number for number, message in enumerate(messages) if message.role == "user")
        messages = tuple(m.model_copy(update={"train": False}) if at < last else m for at, m in enumerate(messages))
    try:
        row, text = template.supervise(messages, tools), template.render(messages, tools)
    except TemplateError as error:
        return Pinned(refused=error.what.replace(f" of {template.name}", ""))  # a folder may be renamed
    return Pinned(text=text, ids=tuple(row.tokens), trained=tuple(map(int, row.mask)))


def card(template: Template) -> TemplateCard:
    """`template` as data."""
    return TemplateCard(
        fingerprint=template.fingerprint,
        tokenizer=template.tokenizer_fingerprint,
        text=template.text,
        special_tokens=template.special_roles,
        golden={name: pinned(template, conversation) for name, conversation in GOLDEN.items()},
    )


def write_card(tokenizer: Any, folder: Path) -> None:
    """Pin the template of `tokenizer` in `folder`; a tokenizer without one leaves nothing there."""
    if getattr(tokenizer, "chat_template", None) and getattr(tokenizer, "is_fast", False):
        write_json(Path(folder) / PIN, card(Template.of(tokenizer)).model_dump(mode="json"))


def read_card(folder: Path) -> TemplateCard | None:
    """The card pinned in `folder`; None where there is none. Raises TemplateError where it cannot be read."""
    file = Path(folder) / PIN
    if not file.is_file():
        return None
    try:
        return TemplateCard.model_validate(read_json(file))
    except ValueError as error:
        raise TemplateError(f"{file} is no template card", why=str(error).splitlines()[0], do="save the checkpoint again") from error


def require_card(tokenizer: Any, folder: Path) -> None:
    """Raise TemplateError where the template of `tokenizer` is not the one pinned in `folder`, or no longer renders as it did.

    A folder without a card, from another program, says nothing and is taken as it is.
    """
    kept = read_card(folder)
    if kept is None:
        return
    template = Template.of(tokenizer)
    if kept.fingerprint != template.fingerprint:
        part = (
            "text"
            if hash_text(kept.text) != hash_text(template.text)
            else "tokenizer"
            if kept.tokenizer != template.tokenizer_fingerprint
            else "special tokens"
        )
        raise TemplateError(
            f"the chat template of {folder} is not the one that its weights were trained with",
            why=f"pinned {kept.fingerprint[:16]}, found {template.fingerprint[:16]}: the {part} differs",
            do="restore the folder; a checkpoint that is to have another template must be trained with it and saved again",
        )
    for name, was in kept.golden.items():
        now = pinned(template, GOLDEN[name]) if name in GOLDEN else was
        if now != was and not (now.refused and was.refused):  # a refusal's words are ours, not the template's
            lines = [line.shown() for line in token_diff(was.ids, now.ids, template.tokenizer) if line.kind != "="]
            raise TemplateError(
                f"the chat template of {folder} no longer renders the golden conversation {name!r} as it did",
                why="; ".join(lines[:6]) or f"pinned: {was.refused or was.text!r}, found: {now.refused or now.text!r}",
                do="install the versions of transformers, tokenizers and Jinja2 that the checkpoint was saved with (its run.json names them), or "
                + REMEDY,
            )


def card_findings(template: Template, folder: Path) -> Finding:
    """Whether `template` does what was pinned beside the weights, as a line of the contract."""
    required = "the fingerprint and every golden conversation are what the weights were trained with"
    if read_card(folder) is None:
        return Finding(
            rule="pinned", status="unknown", observed="no card", required=required, reason=f"there is no {PIN} beside the weights"
        )
    try:
        require_card(template.tokenizer, folder)
    except TemplateError as error:
        return Finding(rule="pinned", status="fail", observed="no", required=required, reason=f"{error.what}: {error.why}")
    return Finding(rule="pinned", status="pass", observed="yes", required=required, reason="")
