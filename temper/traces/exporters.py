"""Exporters: records as files that other trainers read. Text is real text, and what a format cannot hold is said."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from temper.core.errors import DataError
from temper.core.records import Message, Outcome, Record
from temper.core.storage import write_jsonl
from temper.traces.formats import EXTRA

PRIVACY = ("public", "synthetic", "internal")  # the classes that may leave without being asked for by name


@dataclass(frozen=True)
class Exported:
    """What was written: the file, its rows, and how many records had each part that the file does not hold."""

    path: Path
    rows: int
    left_out: dict[str, int]


def export_records(
    records: Iterable[Record], path: Path, *, format: str = "openai", extras: bool = True, privacy: tuple[str, ...] = PRIVACY
) -> Exported:
    """Write `records` in `format`, whole or not at all.

    With `extras` each row keeps under `temper` what the format has no place for, so that importing the file
    gives the same records; without, that is left out and counted. Raises DataError where a record cannot be
    written in that format, or is of a privacy class outside `privacy`.
    """
    if format not in EXPORTERS:
        raise DataError(f"unknown export format {format!r}", why=f"known formats are {', '.join(EXPORTERS)}", do="name one of them")
    rows, left_out = [], Counter[str]()
    for number, record in enumerate(records, start=1):
        where = f"record {number} ({record.id[:12]})"
        if record.provenance.privacy not in privacy:
            why = f"its privacy class is {record.provenance.privacy!r}; this export may hold {', '.join(privacy)}"
            raise DataError(f"{where} may not be exported", why=why, do="leave it out, redact it, or name the class in `privacy`")
        rest = _rest(record)
        row = EXPORTERS[format](record, where)
        if extras:
            row[EXTRA] = rest
        else:
            left_out.update(rest.keys())
        rows.append(row)
    write_jsonl(path, rows)
    return Exported(path, len(rows), dict(left_out))


def openai_form(record: Record, where: str = "record") -> dict[str, Any]:
    """A record as an OpenAI chat row. Raises DataError for a preference pair, which is two conversations."""
    if record.preference is not None:
        raise DataError(f"{where} is a preference pair", why="a chat row holds one continuation", do="export it as 'preference'")
    row: dict[str, Any] = {"messages": [message_form(message) for message in record.messages]}
    return {**row, **_tools(record)}


def preference_form(record: Record, where: str = "record") -> dict[str, Any]:
    """A record as prompt, chosen and rejected messages. Raises DataError where it holds no pair."""
    if record.preference is None:
        raise DataError(f"{where} holds no preference pair", why="prompt/chosen/rejected needs both answers", do="export it as 'openai'")
    row: dict[str, Any] = {
        "prompt": [message_form(message) for message in record.messages],
        "chosen": [message_form(message) for message in record.preference.chosen],
        "rejected": [message_form(message) for message in record.preference.rejected],
    }
    if record.preference.reason:
        row["reason"] = record.preference.reason
    return {**row, **_tools(record)}


def message_form(message: Message) -> dict[str, Any]:
    """A message as OpenAI's chat format has it; `reasoning_content` and `weight` are its common extensions, `train` ours."""
    form: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.reasoning is not None:
        form["reasoning_content"] = message.reasoning
    if message.tool_calls:
        form["content"] = message.content or None
        form["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": _arguments(call.arguments)}}
            for call in message.tool_calls
        ]
    if message.tool_call_id is not None:
        form["tool_call_id"] = message.tool_call_id
    if message.name is not None:
        form["name"] = message.name
    if isinstance(message.train, tuple):
        form["train"] = list(message.train)
    elif message.train is not None:
        form["weight"] = int(message.train)
    return form


def _arguments(arguments: dict[str, Any] | str) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _tools(record: Record) -> dict[str, Any]:
    return {"tools": [tool.openai() for tool in record.tools]} if record.tools else {}


def _rest(record: Record) -> dict[str, Any]:
    """The parts of a record that a foreign format has no place for, where they are filled."""
    rest: dict[str, Any] = {"provenance": record.provenance.model_dump(mode="json"), "shape": record.shape}
    if record.slice:
        rest["slice"] = record.slice
    if record.task_id is not None:
        rest["task_id"] = record.task_id
    if record.outcome != Outcome():
        rest["outcome"] = record.outcome.model_dump(mode="json")
    if record.sampled:
        rest["sampled"] = [item.model_dump(mode="json") for item in record.sampled]
    return rest


EXPORTERS: dict[str, Callable[[Record, str], dict[str, Any]]] = {"openai": openai_form, "preference": preference_form}
