"""How a template writes tool calls and thinking, learned from what it renders; and the way back from text."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from temper.core.records import ToolCall

ARGUMENT_KEYS = ("arguments", "parameters", "args")
NAME = re.compile(r'"name"\s*:\s*"((?:[^"\\]|\\.)*)"')
BETWEEN_CALLS = " \t\r\n,;[]"
DECODER = json.JSONDecoder()


@dataclass(frozen=True)
class CallSyntax:
    """Each call is a JSON object after `mark` ("" where a bare object at the start of the turn is a call).

    `close` ends a call or list of calls; `gap` stands between text and a call beside it.
    """

    mark: str
    close: str
    arguments_key: str
    gap: str = ""


@dataclass(frozen=True)
class ThinkSyntax:
    """Thinking stands between `open` and `close`, whitespace included, before the text."""

    open: str
    close: str


def learn_calls(rendered: str, name: str, arguments: dict[str, Any], added: Iterable[str]) -> CallSyntax | None:
    """The syntax of a rendered turn that holds nothing but the call of `name`; None where no JSON object states it."""
    for start in (place for place, letter in enumerate(rendered) if letter == "{"):
        try:
            found, end = DECODER.raw_decode(rendered, start)
        except ValueError:
            continue
        keys = [key for key, value in found.items() if value == arguments or (isinstance(value, str) and loaded(value) == arguments)]
        if found.get("name") != name or not keys:
            continue
        opening, closing = rendered[:start], rendered[end:]
        marks = [(opening.index(text) + len(text), text) for text in added if text in opening]
        mark = opening[: min(marks)[0]].strip() if marks else opening.strip()
        return CallSyntax(mark=mark, close=closing.strip(), arguments_key=keys[0])
    return None


def learn_thinking(rendered: str, thought: str, text: str) -> ThinkSyntax | None:
    """The syntax of a rendered turn that holds `thought`, then `text`; None where the thought was dropped."""
    before, found, rest = rendered.partition(thought)
    between, follows, _ = rest.partition(text)
    return ThinkSyntax(open=before, close=between) if found and follows and between.strip() else None


def loaded(text: str) -> Any:
    """`text` read as JSON, or None where it is not."""
    try:
        return json.loads(text)
    except ValueError:
        return None


def split_thinking(text: str, syntax: ThinkSyntax | None) -> tuple[str | None, str]:
    """(thinking, the rest). A thought that never closes is all there is: the turn was cut short inside it."""
    if syntax is None:
        return None, text
    mark = syntax.open.strip()
    if mark and not text.lstrip().startswith(mark):
        return None, text
    if not mark and syntax.close.strip() not in text:
        return None, text
    rest = text.removeprefix(syntax.open) if text.startswith(syntax.open) else text.lstrip().removeprefix(mark)
    close = syntax.close.strip()
    space, _, space_behind = syntax.close.partition(close)
    before, closed, after = rest.partition(close)
    return (before.removesuffix(space), after.removeprefix(space_behind)) if closed else (rest, "")


def split_calls(text: str, syntax: CallSyntax | None) -> tuple[str, tuple[ToolCall, ...]]:
    """(text outside calls, calls). Whatever follows the mark is a call, be it well-formed or not."""
    if syntax is None:
        return text, ()
    if not syntax.mark:
        return bare_calls(text, syntax)
    content, _, rest = text.partition(syntax.mark)
    if not _:
        return text, ()
    calls: list[ToolCall] = []
    after = ""
    for chunk in rest.split(syntax.mark):
        found, after = read_calls(chunk, syntax)
        calls += found
    return content.removesuffix(syntax.gap) + after, tuple(calls)


def bare_calls(text: str, syntax: CallSyntax) -> tuple[str, tuple[ToolCall, ...]]:
    """Calls where nothing marks them: the turn starts with an object that has a name and arguments."""
    stripped = text.strip()
    if not stripped.startswith("{"):
        return text, ()
    try:
        found, _ = DECODER.raw_decode(stripped)
    except ValueError:
        return ("", (malformed(stripped, syntax),)) if re.match(r'\{\s*"name"\s*:', stripped) else (text, ())
    if not isinstance(found.get("name"), str) or not any(key in found for key in (syntax.arguments_key, *ARGUMENT_KEYS)):
        return text, ()
    calls, after = read_calls(stripped, syntax)
    return after, tuple(calls)


def read_calls(chunk: str, syntax: CallSyntax) -> tuple[list[ToolCall], str]:
    """The calls of one chunk after a mark, and the text after them."""
    calls: list[ToolCall] = []
    at = 0
    while True:
        while at < len(chunk) and chunk[at] in BETWEEN_CALLS:
            at += 1
        if calls and not chunk.startswith("{", at):
            rest = chunk[at:].removeprefix(syntax.close)
            return calls, rest if rest.strip() else ""
        try:
            found, at = DECODER.raw_decode(chunk, at)
        except ValueError:
            raw, _, after = chunk[at:].partition(syntax.close) if syntax.close else (chunk[at:], "", "")
            return [*calls, malformed(raw.strip(), syntax)], after if after.strip() else ""
        calls.append(to_call(found, syntax))


def to_call(found: Any, syntax: CallSyntax) -> ToolCall:
    """A decoded value as a call: arguments that are no object stay text, and so does a call that has no name."""
    if not isinstance(found, dict) or not isinstance(found.get("name"), str):
        return ToolCall(name="", arguments=json.dumps(found, ensure_ascii=False))
    key = next((key for key in (syntax.arguments_key, *ARGUMENT_KEYS) if key in found), None)
    value = found[key] if key else ""
    if isinstance(value, str) and isinstance(inner := loaded(value), dict):
        value = inner
    arguments = value if isinstance(value, (dict, str)) else json.dumps(value, ensure_ascii=False)
    own = found.get("id")
    return ToolCall(name=found["name"], arguments=arguments, id=own if isinstance(own, str) else "")


def malformed(raw: str, syntax: CallSyntax) -> ToolCall:
    """A call whose JSON does not parse: the name where one can be read, the arguments as they were written."""
    name = NAME.search(raw)
    key = re.search(rf'"(?:{"|".join({re.escape(key): None for key in (syntax.arguments_key, *ARGUMENT_KEYS)})})"\s*:\s*', raw)
    arguments = raw[key.end() :].removesuffix("}") if key else raw
    return ToolCall(name=name.group(1) if name else "", arguments=arguments)
