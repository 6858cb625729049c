"""Conversations for the eye: the shared question once, then what each model did with it, and what the verifier found."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from temper.core.records import Noun
from temper.core.reports import Report

LINE = 72  # characters: longer JSON is broken into lines
LONG = 700  # characters: a longer tool result is folded away
SHORT = 160  # characters: longer instructions are folded away
STILL_FAILING = 2
GOOD_IF_TRUE = (
    "_success", "_valid", "_ok", "_complete", "_correct", "_right", "_present", "_followed", "_offered", "_supported", "_matches", "_balanced", "_zero",
)  # fmt: skip
FINDING_ORDER = ("task_success", "policy_violation")


class Part(Noun):
    """One thing in a turn: `kind` is text, reasoning, call or result."""

    kind: str
    text: str
    name: str = ""
    folded: bool = False


class Turn(Noun):
    """One message as shown."""

    role: str
    parts: tuple[Part, ...]


class Finding(Noun):
    """One verifier finding: its name, what it found, and whether that is good, bad or neither."""

    name: str
    found: str
    tone: str


class Side(Noun):
    """What one model did."""

    turns: tuple[Turn, ...]
    findings: tuple[Finding, ...]
    reward: str
    error: str | None


class Pair(Noun):
    """One task, answered by both models."""

    case: str
    slice: str
    tenant: str | None
    prompt: tuple[Turn, ...]
    before: Side | None
    after: Side
    expected: str


def pairs(before: Report | None, after: Report, most: int = 10) -> list[Pair]:
    """One conversation of each kind of task, those first that show a change; then some that still fail."""
    earlier = {item["case"]: item for item in before.conversations} if before else {}
    ranked = sorted(after.conversations, key=lambda item: (-improvement(earlier.get(item["case"]), item), item["case"]))
    chosen: list[Mapping[str, Any]] = []
    for item in ranked:
        if item["slice"] not in {other["slice"] for other in chosen}:
            chosen.append(item)
    chosen.sort(key=lambda item: item["slice"])
    failing = [item for item in ranked if item not in chosen and item.get("reward") is not None and item["reward"] < 1]
    return [pair(earlier.get(item["case"]), item) for item in (chosen + failing[:STILL_FAILING])[:most]]


def improvement(before: Mapping[str, Any] | None, after: Mapping[str, Any]) -> float:
    """How much better the later answer was scored; conversations without a partner come last."""
    if before is None or before.get("reward") is None or after.get("reward") is None:
        return -2.0
    return float(after["reward"]) - float(before["reward"])


def pair(before: Mapping[str, Any] | None, after: Mapping[str, Any]) -> Pair:
    """Two answers to one task."""
    ours, theirs = after["messages"], before["messages"] if before else ()
    shared = prompt_length(ours) if before is None else shared_length(ours, theirs)
    expected = after.get("expected")
    return Pair(
        case=after["case"], slice=after["slice"], tenant=after.get("tenant"), prompt=tuple(map(turn, ours[:shared])),
        before=side(before, shared) if before else None, after=side(after, shared), expected=pretty(expected) if expected else "",
    )  # fmt: skip


def prompt_length(messages: Sequence[Mapping[str, Any]]) -> int:
    """How many messages stand before the first assistant turn that ends the prompt."""
    users = [place for place, message in enumerate(messages) if message["role"] == "user"]
    return users[-1] + 1 if users else 0


def shared_length(ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]]) -> int:
    """How many messages both open with, at most to the last question."""
    same = 0
    while same < min(len(ours), len(theirs)) and ours[same] == theirs[same]:
        same += 1
    return min(same, prompt_length(ours))


def side(item: Mapping[str, Any], start: int) -> Side:
    """One model's turns after the shared start, with what the verifier found."""
    checks = item.get("checks") or {}
    known = [name for name in FINDING_ORDER if name in checks] + [name for name in checks if name not in FINDING_ORDER]
    reward = item.get("reward")
    return Side(
        turns=tuple(map(turn, item["messages"][start:])),
        findings=tuple(finding(name, checks[name]) for name in known if checks[name] is not None),
        reward="not judged" if reward is None else f"{float(reward):.2f}",
        error=item.get("error"),
    )


def finding(name: str, found: bool) -> Finding:
    """A finding with its tone; only findings that are good or bad by themselves get one."""
    tone = "plain"
    if name.endswith(GOOD_IF_TRUE):
        tone = "good" if found else "bad"
    elif name.endswith("violation"):
        tone = "bad" if found else "good"
    return Finding(name=name.replace("_", " "), found="yes" if found else "no", tone=tone)


def turn(message: Mapping[str, Any]) -> Turn:
    """A message of a record, or of the OpenAI API, as parts."""
    role, content = message["role"], message.get("content") or ""
    parts: list[Part] = []
    if message.get("reasoning"):
        parts.append(Part(kind="reasoning", text=message["reasoning"], folded=len(message["reasoning"]) > LONG))
    if role == "tool":
        parts.append(Part(kind="result", text=pretty(content), name=message.get("name") or "", folded=len(content) > LONG))
    elif content:
        parts.append(Part(kind="text", text=content, folded=len(content) > (SHORT if role == "system" else 3 * LONG)))
    for call in message.get("tool_calls") or ():
        spoken = call.get("function", call)
        parts.append(Part(kind="call", text=pretty(spoken.get("arguments", "")), name=str(spoken.get("name", ""))))
    return Turn(role=role, parts=tuple(parts) or (Part(kind="text", text="(an empty answer)"),))


def pretty(value: Any) -> str:
    """JSON with line breaks where it is longer than a line; anything else as it is."""
    if isinstance(value, str):
        try:
            parsed = json.loads(value)
        except ValueError:
            return value
        if not isinstance(parsed, dict | list):
            return value
        value = parsed
    return spread(value, "")


def spread(value: Any, indent: str) -> str:
    """JSON that breaks a line only where it would grow too long."""
    short = json.dumps(value, ensure_ascii=False)
    if len(indent) + len(short) <= LINE or not isinstance(value, dict | list) or not value:
        return short
    deeper = indent + "  "
    if isinstance(value, dict):
        items = [f"{json.dumps(key, ensure_ascii=False)}: {spread(item, deeper)}" for key, item in value.items()]
    else:
        items = [spread(item, deeper) for item in value]
    opened, closed = ("{", "}") if isinstance(value, dict) else ("[", "]")
    return opened + "\n" + ",\n".join(deeper + item for item in items) + "\n" + indent + closed
