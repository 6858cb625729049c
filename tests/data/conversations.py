"""Tokenizers of every family to render the golden conversations with, and what each family refuses."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from temper.core.records import Message, Provenance, Record
from temper.data.golden import AGAIN, ANSWER, ASK, CALL, GOLDEN, RESULT, SECOND_RESULT, SYSTEM, TOOLS, TWO_CALLS
from temper.data.render import TODAY, to_chat
from temper.data.template import Template
from temper.data.tokenizer import train_tokenizer
from tests.checkpoints import TEXTS, tiny_tokenizer

__all__ = [
    "AGAIN", "ANSWER", "ASK", "CALL", "CASES", "GOLDEN", "HERE", "KINDS", "LACKING", "RESULT", "SECOND_RESULT", "SYSTEM", "TOOLS", "TWO_CALLS",
    "peer", "record", "template", "trained_text", "with_text",
]  # fmt: skip
HERE = Path(__file__).parent
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
