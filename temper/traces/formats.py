"""One parser per row format: a row of somebody's file becomes one `Record`, or a DataError that names the row."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from temper.core.records import Message, Outcome, Preference, Provenance, Record, Sampled, ToolSpec
from temper.traces.messages import openai_message, openai_messages, pair_tools, sharegpt_messages, tool_specs
from temper.traces.rows import Row, check_text, describe

EXTRA = "temper"  # the field in which our own exporter keeps what a foreign format has no place for
EXTRA_KEYS = {"provenance", "shape", "slice", "task_id", "outcome", "sampled", "reason", "preference"}


def openai_row(row: Row, provenance: Provenance) -> Record:
    """OpenAI chat: `messages`, and `tools` (or the older `functions`)."""
    row.require("messages", shape="OpenAI chat")
    row.known(("messages", "tools", "functions", "parallel_tool_calls", EXTRA))
    tools = row.value.get("tools") if row.value.get("tools") is not None else row.value.get("functions")
    return _conversation(row, openai_messages(row, row.value["messages"]), tool_specs(row, tools), provenance)


def sharegpt_row(row: Row, provenance: Provenance) -> Record:
    """ShareGPT: `conversations` of from/value turns, and optionally `system` and `tools`."""
    row.require("conversations", shape="ShareGPT")
    row.known(("conversations", "system", "tools", EXTRA))
    messages = sharegpt_messages(row, row.value["conversations"])
    if row.text("system", default=""):
        messages.insert(0, Message(role="system", content=row.text("system")))
    return _conversation(row, pair_tools(row, messages, "conversations"), tool_specs(row, row.value.get("tools")), provenance)


def alpaca_row(row: Row, provenance: Provenance) -> Record:
    """Alpaca: `instruction`, `input` (may be empty or absent), `output`, and optionally `system` and `history`."""
    row.require("instruction", "output", shape="Alpaca")
    row.known(("instruction", "input", "output", "system", "history", EXTRA))
    question = "\n\n".join(part for part in (row.text("instruction"), row.text("input", default="")) if part)
    messages = [Message(role="system", content=row.text("system"))] if row.text("system", default="") else []
    for index, pair in enumerate(row.value.get("history") or []):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise row.fault(f"history[{index}] holds {describe(pair)}", why="history is a list of [question, answer]", do="mend it")
        messages += [
            Message(role="user", content=check_text(row, pair[0], f"history[{index}][0]")),
            Message(role="assistant", content=check_text(row, pair[1], f"history[{index}][1]")),
        ]
    messages += [Message(role="user", content=question), Message(role="assistant", content=row.text("output"))]
    return _conversation(row, tuple(messages), (), provenance)


def preference_row(row: Row, provenance: Provenance) -> Record:
    """`chosen` and `rejected`, each text or messages, after `prompt` (text or messages, or their shared start)."""
    row.require("chosen", "rejected", shape="preference")
    row.known(("prompt", "chosen", "rejected", "system", "tools", "reason", EXTRA))
    chosen, rejected = (_side(row, name) for name in ("chosen", "rejected"))
    prompt = _prompt(row)
    if row.text("system", default=""):
        prompt = [Message(role="system", content=row.text("system")), *prompt]
    shared = prompt or _shared_start(chosen, rejected)
    chosen, rejected = (_after(shared, side) for side in (chosen, rejected))
    if not shared:
        raise row.fault(
            "no 'prompt'",
            why="chosen and rejected share no opening messages either",
            do="add 'prompt', or put the question before both answers",
        )
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        _require_assistant(row, side, name)
    for name, side in (("prompt + chosen", chosen), ("prompt + rejected", rejected)):
        pair_tools(row, [*shared, *side], name)
    extra = _extra(row)
    reason = row.text("reason", default=str(extra.pop("reason", "")))
    pair = Preference(chosen=tuple(chosen), rejected=tuple(rejected), reason=reason)
    return _record(row, tuple(shared), tool_specs(row, row.value.get("tools")), provenance, extra, preference=pair, shape="preference")


def _side(row: Row, name: str) -> list[Message]:
    value = row.value[name]
    if isinstance(value, str):
        return [Message(role="assistant", content=check_text(row, value, name))]
    return _loose_messages(row, value, name)


def _prompt(row: Row) -> list[Message]:
    value = row.value.get("prompt")
    if value is None or value == []:
        return []
    if isinstance(value, str):
        return [Message(role="user", content=check_text(row, value, "prompt"))]
    return list(openai_messages(row, value, "prompt"))


def _loose_messages(row: Row, value: Any, name: str) -> list[Message]:
    """Messages that may open with a tool result whose call stands in the prompt: paired later, with the prompt."""
    if not isinstance(value, list) or not value:
        raise row.fault(f"{name!r} holds {describe(value)}", why="an answer is text or a list of messages, at least one", do="write text")
    return [openai_message(row, item, f"{name}[{index}]") for index, item in enumerate(value)]


def _shared_start(chosen: list[Message], rejected: list[Message]) -> list[Message]:
    """The messages both sides open with, up to the last that is not the assistant's."""
    same = 0
    while same < min(len(chosen), len(rejected)) and chosen[same] == rejected[same]:
        same += 1
    while same and chosen[same - 1].role == "assistant":
        same -= 1
    return chosen[:same]


def _after(prompt: list[Message], side: list[Message]) -> list[Message]:
    """`side` without the prompt, where it repeats it (with or without the system message)."""
    for start in (prompt, [message for message in prompt if message.role != "system"]):
        if start and side[: len(start)] == start:
            return side[len(start) :]
    return side


def gsm8k_row(row: Row, provenance: Provenance) -> Record:
    """GSM8K: `question`, and an `answer` that ends in `#### number`, kept word for word."""
    row.require("question", "answer", shape="GSM8K")
    row.known(("question", "answer", EXTRA))
    answer = row.text("answer")
    worked, mark, number = answer.rpartition("####")
    if not mark or not worked.strip() or not number.strip():
        raise row.fault(
            "the answer has no '#### number' at its end", why=f"it ends in {answer[-40:]!r}", do="mend the answer, or use the Alpaca format"
        )
    messages = (Message(role="user", content=row.text("question")), Message(role="assistant", content=answer))
    gold = Outcome(detail={"answer": number.strip().replace(",", "")})
    return _conversation(row, messages, (), provenance, outcome=gold, slice="gsm8k")


def tatqa_questions(row: Row) -> Iterator[Row]:
    """A TAT-QA context as one row a question, each with the context's table and paragraphs."""
    row.require("table", "paragraphs", "questions", shape="TAT-QA")
    row.known(("table", "paragraphs", "questions"))
    if not isinstance(row.value["questions"], list):
        raise row.fault(
            f"'questions' holds {describe(row.value['questions'])}", why="questions are a list", do="write one object a question"
        )
    for index, question in enumerate(row.value["questions"], start=1):
        fields = question if isinstance(question, dict) else {"question": None}  # refused below, with its place
        context = {"table": row.value["table"], "paragraphs": row.value["paragraphs"]}
        yield Row({**fields, **context}, f"{row.where} question {index}", row.parquet)


def tatqa_row(row: Row, provenance: Provenance) -> Record:
    """One TAT-QA question after its table and paragraphs; the answer gives derivation, value and scale."""
    row.require("question", "answer", "answer_type", shape="TAT-QA question")
    known = ("table", "paragraphs", "question", "answer", "answer_type", "derivation", "scale", "uid", "order", EXTRA)
    row.known((*known, "answer_from", "rel_paragraphs", "req_comparison", "facts", "consts"))
    table = row.value["table"]
    cells = table.get("table") if isinstance(table, dict) else table
    if not isinstance(cells, list) or not all(isinstance(line, list) for line in cells):
        raise row.fault(f"'table' holds {describe(table)}", why="a table is a list of lists of cells", do='write {"table": [[…], …]}')
    lines = ["| " + " | ".join(check_text(row, cell, "table cell") for cell in line) + " |" for line in cells]
    paragraphs = row.value["paragraphs"]
    if not isinstance(paragraphs, list) or not all(isinstance(item, dict) for item in paragraphs):
        raise row.fault(f"'paragraphs' holds {describe(paragraphs)}", why="paragraphs are a list of {order, text}", do="mend the context")
    texts = [check_text(row, item.get("text"), "paragraph text") for item in sorted(paragraphs, key=lambda item: item.get("order") or 0)]
    prompt = "\n".join(lines) + "\n\n" + "\n".join(texts) + "\n\nQuestion: " + row.text("question")
    answer, scale = _tatqa_answer(row), row.text("scale", default="")
    derivation = row.text("derivation", default="")
    final = f"Answer: {answer}" + (f" {scale}" if scale else "")
    said = f"Derivation: {derivation}\n{final}" if derivation else final
    detail = {"answer": row.value["answer"], "answer_type": row.text("answer_type"), "derivation": derivation, "scale": scale}
    task = row.text("uid", default="") or None
    messages = (Message(role="user", content=prompt), Message(role="assistant", content=said))
    return _conversation(
        row, messages, (), provenance, outcome=Outcome(detail=detail), slice=f"tatqa/{row.text('answer_type')}", task_id=task
    )


def _tatqa_answer(row: Row) -> str:
    value = row.value["answer"]
    items = value if isinstance(value, list) else [value]
    if not items or not all(isinstance(item, str | int | float) and not isinstance(item, bool) for item in items):
        raise row.fault(f"'answer' holds {describe(value)}", why="an answer is a number, text, or a list of texts", do="mend the answer")
    return "; ".join(map(str, items))


def _conversation(row: Row, messages: tuple[Message, ...], tools: tuple[ToolSpec, ...], provenance: Provenance, **fields: Any) -> Record:
    """A record of one conversation. Raises DataError where the assistant never speaks."""
    extra = _extra(row)
    if "preference" in extra:
        raise row.fault("a preference pair in a chat row", why="a chat row holds one continuation", do="use the preference format")
    _require_assistant(row, list(messages), "the conversation")
    calls = any(message.tool_calls for message in messages)
    turns = sum(message.role == "user" for message in messages)
    shape = "tool" if calls else "multi_turn" if turns > 1 else "instruction"
    return _record(row, messages, tools, provenance, {**fields, **extra}, shape=shape)


def _require_assistant(row: Row, messages: list[Message], name: str) -> None:
    spoken = [message for message in messages if message.role == "assistant"]
    if not spoken:
        roles = [message.role for message in messages]
        why = f"its roles are {', '.join(roles) or 'none'}; there is nothing to train on"
        raise row.fault(f"{name} has no assistant turn", why=why, do="add the answer, or remove the row")
    if not any(message.content.strip() or message.tool_calls for message in spoken):
        raise row.fault(
            f"{name} has no assistant turn with content", why="every one of them is empty", do="add the answer, or remove the row"
        )


def _extra(row: Row) -> dict[str, Any]:
    """The fields that our exporter put under `temper`, checked; provenance may be given in part."""
    value = row.value.get(EXTRA)
    if value is None:
        return {}
    if not isinstance(value, dict) or value.keys() - EXTRA_KEYS:
        raise row.fault(f"'{EXTRA}' holds {describe(value)}", why=f"it may hold {', '.join(sorted(EXTRA_KEYS))}", do="mend or remove it")
    return {key: item for key, item in value.items() if item is not None}


def _record(
    row: Row,
    messages: tuple[Message, ...],
    tools: tuple[ToolSpec, ...],
    provenance: Provenance,
    extra: dict[str, Any],
    *,
    shape: str,
    preference: Preference | None = None,
) -> Record:
    try:
        given = extra.pop("provenance", {})
        fields: dict[str, Any] = {"shape": shape, **extra}
        if given:
            fields["provenance"] = Provenance.model_validate({**provenance.model_dump(), **given})
        fields["sampled"] = tuple(Sampled.model_validate(item) for item in fields.get("sampled", ()))
        fields["outcome"] = Outcome.model_validate(fields.get("outcome", {}))
        return Record(**{"messages": messages, "tools": tools, "provenance": provenance, "preference": preference, **fields})
    except ValidationError as error:
        fault = error.errors()[0]
        place = ".".join(map(str, fault["loc"]))
        raise row.fault(
            f"{place}: {fault['msg']}", why=f"it holds {describe(fault.get('input'))}", do=f"mend the row's '{EXTRA}' field"
        ) from error


def one_row(row: Row) -> Iterator[Row]:
    """The row itself: what every format but TAT-QA reads."""
    yield row


@dataclass(frozen=True)
class Format:
    """How one format's rows are read: `marks` are the keys it is known by, `split` opens a row that holds several."""

    marks: tuple[str, ...]
    parse: Callable[[Row, Provenance], Record]
    example: str
    split: Callable[[Row], Iterator[Row]] = one_row


# In the order in which `sniff` tries them.
FORMATS: dict[str, Format] = {
    "preference": Format(("chosen", "rejected"), preference_row, "{prompt, chosen, rejected}"),
    "openai": Format(("messages",), openai_row, "{messages: [{role, content}]}"),
    "sharegpt": Format(("conversations",), sharegpt_row, "{conversations: [{from, value}]}"),
    "tatqa": Format(("table", "paragraphs", "questions"), tatqa_row, "{table, paragraphs, questions}", tatqa_questions),
    "alpaca": Format(("instruction", "output"), alpaca_row, "{instruction, input, output}"),
    "gsm8k": Format(("question", "answer"), gsm8k_row, "{question, answer}"),
}
