"""Chat messages of a row as `Message`s: roles, contents, tool calls, and each tool result beside its call."""

from __future__ import annotations

import re
from typing import Any, get_args

from temper.core.records import Message, Part, Role, ToolCall, ToolSpec
from temper.traces.rows import Row, check_text, describe, strict_json

ROLES: dict[str, Role] = {
    "system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool", "function": "tool",
}  # fmt: skip
SHAREGPT_ROLES: dict[str, Role] = {
    "system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
    "model": "assistant", "function_call": "assistant", "tool": "tool", "observation": "tool", "function_response": "tool",
}  # fmt: skip
MESSAGE_KEYS = {
    "role",
    "content",
    "reasoning_content",
    "reasoning",
    "tool_calls",
    "function_call",
    "tool_call_id",
    "name",
    "weight",
    "train",
    "refusal",
}
CALL = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.S)
RESPONSE = re.compile(r"<tool_response>\s*(.*?)\s*</tool_response>", re.S)


def openai_messages(row: Row, value: Any, name: str = "messages") -> tuple[Message, ...]:
    """A list of OpenAI chat messages, with ids given to calls that lack them and every tool result answered for.

    Raises DataError, with the message's index, on a wrong type, an unknown role, or a result without a call.
    """
    if not isinstance(value, list) or not value:
        raise row.fault(
            f"{name!r} holds {describe(value)}", why="a conversation is a list of messages, at least one", do="write [{role, content}, …]"
        )
    return pair_tools(row, [openai_message(row, item, f"{name}[{index}]") for index, item in enumerate(value)], name)


def openai_message(row: Row, item: Any, name: str) -> Message:
    """One OpenAI chat message, its calls and results not yet paired. Raises DataError naming it."""
    if not isinstance(item, dict):
        raise row.fault(f"{name} holds {describe(item)}", why="a message is an object with a role", do='write {"role": …, "content": …}')
    role = _role(row, item.get("role"), name, ROLES)
    row.unused |= {f"messages[].{key}" for key in item.keys() - MESSAGE_KEYS if item[key] not in (None, "", [], {})}
    calls = _calls(row, item.get("tool_calls"), f"{name}.tool_calls")
    if item.get("function_call") is not None:
        calls += (_call(row, item["function_call"], f"{name}.function_call"),)
    content = item.get("content") if item.get("content") is not None else item.get("refusal")
    reasoning = item.get("reasoning_content") if item.get("reasoning_content") is not None else item.get("reasoning")
    if content is None and not (role == "assistant" and (calls or reasoning is not None)):
        raise row.fault(
            f"{name} ({role}) has no content", why="only an assistant turn with tool calls may go without", do="fill or remove the message"
        )
    if calls and role != "assistant":
        raise row.fault(f"{name} ({role}) carries tool calls", why="only the assistant calls tools", do="mend the role")
    return Message(
        role=role,
        content=_content(row, content, f"{name}.content") if content is not None else "",
        reasoning=check_text(row, reasoning, f"{name}.reasoning") if reasoning is not None else None,
        tool_calls=calls,
        tool_call_id=_optional(row, item, "tool_call_id", name),
        name=_optional(row, item, "name", name),
        train=_train(row, item, name),
    )


def _role(row: Row, value: Any, name: str, roles: dict[str, Role]) -> Role:
    if value not in roles if isinstance(value, str) else True:
        raise row.fault(
            f"{name} has the unknown role {value!r}", why=f"known roles are {', '.join(roles)}", do="rename the role, or remove the message"
        )
    return roles[value]


def _content(row: Row, value: Any, name: str) -> str:
    """Text, or OpenAI's list of text parts joined; any other part (an image, audio) is refused, not dropped."""
    if not isinstance(value, list):
        return check_text(row, value, name)
    parts = []
    for index, part in enumerate(value):
        if not isinstance(part, dict) or part.get("type") not in ("text", "input_text", "output_text"):
            raise row.fault(
                f"{name}[{index}] is {describe(part)}",
                why="only text parts can be trained on",
                do="remove the row, or write the part as text",
            )
        parts.append(check_text(row, part.get("text"), f"{name}[{index}].text"))
    return "".join(parts)


def _optional(row: Row, item: dict[str, Any], key: str, name: str) -> str | None:
    return check_text(row, item[key], f"{name}.{key}") if item.get(key) is not None else None


def _train(row: Row, item: dict[str, Any], name: str) -> bool | tuple[Part, ...] | None:
    """What of a message is trained: `weight` 0 or 1, or the parts that `train` lists."""
    weight, parts = item.get("weight"), item.get("train")
    if weight is not None and weight not in (0, 1):
        raise row.fault(f"{name}.weight is {weight!r}", why="a message is trained (1) or not (0)", do="write 0, 1, or nothing")
    if parts is None:
        return None if weight is None else bool(weight)
    known = get_args(Part)
    if not isinstance(parts, list) or not parts or not set(map(str, parts)) <= set(known):
        raise row.fault(f"{name}.train is {parts!r}", why="it lists the parts of a turn to train", do=f"list some of {', '.join(known)}")
    if weight == 0:
        raise row.fault(f"{name} has weight 0 and trains {parts}", why="the two contradict each other", do="give one of them")
    return tuple(parts)


def _calls(row: Row, value: Any, name: str) -> tuple[ToolCall, ...]:
    if value is None:
        return ()
    if not isinstance(value, list):
        raise row.fault(f"{name} holds {describe(value)}", why="tool calls are a list", do="write [{id, type, function}, …]")
    calls = []
    for index, item in enumerate(value):
        place = f"{name}[{index}]"
        inner = item.get("function", item) if isinstance(item, dict) else item
        call = _call(row, inner, place)
        calls.append(call.model_copy(update={"id": _optional(row, item, "id", place) or ""}))
    return tuple(calls)


def _call(row: Row, item: Any, name: str) -> ToolCall:
    """One {name, arguments}; arguments are an object, or JSON text of one, or stay the raw text they are."""
    if not isinstance(item, dict) or not isinstance(item.get("name"), str) or not item["name"]:
        raise row.fault(
            f"{name} holds {describe(item)}", why="a call needs a tool's name and arguments", do='write {"name": …, "arguments": {…}}'
        )
    given = item.get("arguments", item.get("parameters", {}))
    given = {} if given is None else given
    if isinstance(given, dict):
        return ToolCall(name=item["name"], arguments=_without_nulls(row, given, "tool_calls[].arguments"))
    text = check_text(row, given, f"{name}.arguments")
    return ToolCall(name=item["name"], arguments=parse_arguments(text))


def _without_nulls(row: Row, value: Any, name: str) -> Any:
    """`value` without the nulls that a Parquet struct column adds: it gives every row the union of all keys,
    and null and absent look the same there. What was left out is noted; JSON rows are untouched."""
    if not row.parquet:
        return value
    if isinstance(value, list):
        return [_without_nulls(row, item, name) for item in value]
    if not isinstance(value, dict):
        return value
    if None in value.values():
        row.unused.add(f"{name}: nulls of a Parquet struct (store it as JSON text to keep them)")
    return {key: _without_nulls(row, item, name) for key, item in value.items() if item is not None}


def parse_arguments(text: str) -> dict[str, Any] | str:
    """JSON text as the object it spells, or the raw text where it spells none: nothing is guessed."""
    try:
        value = strict_json(text)
    except ValueError:
        return text
    return value if isinstance(value, dict) else text


def pair_tools(row: Row, messages: list[Message], name: str = "messages") -> tuple[Message, ...]:
    """`messages` with an id on every call and every tool result naming the call it answers.

    A result without an id answers the first open call of its name, or the first open one. Raises DataError
    where no open call is left for a result, or where two calls of one turn share an id.
    """
    open_calls: dict[str, str] = {}
    paired: list[Message] = []
    given = 0
    taken = {call.id for message in messages for call in message.tool_calls}
    for index, message in enumerate(messages):
        if message.tool_calls:
            calls = []
            for call in message.tool_calls:
                while not call.id:
                    call = call.model_copy(update={"id": "" if f"call_{given}" in taken else f"call_{given}"})
                    given += 1
                calls.append(call)
            if len({call.id for call in calls}) < len(calls):
                raise row.fault(
                    f"{name}[{index}] makes two calls of one id", why=f"ids {[call.id for call in calls]}", do="give each call its own id"
                )
            open_calls = {call.id: call.name for call in calls}
            message = message.model_copy(update={"tool_calls": tuple(calls)})
        elif message.role == "tool":
            answered = _answered(message, open_calls)
            if answered is None:
                named = message.tool_call_id or message.name or "no call in particular"
                why = f"it answers {named}; open calls are {', '.join(open_calls) or 'none'}"
                raise row.fault(
                    f"{name}[{index}] is a tool result without a call", why=why, do="put the assistant's tool call before it, or remove it"
                )
            message = message.model_copy(update={"tool_call_id": answered})
            del open_calls[answered]
        paired.append(message)
    return tuple(paired)


def _answered(message: Message, open_calls: dict[str, str]) -> str | None:
    if message.tool_call_id:
        return message.tool_call_id if message.tool_call_id in open_calls else None
    named = [key for key, tool in open_calls.items() if tool == message.name]
    return named[0] if named else next(iter(open_calls), None)


def sharegpt_messages(row: Row, value: Any, name: str = "conversations") -> list[Message]:
    """ShareGPT's from/value turns, with <tool_call> and <tool_response> tags read as calls and results."""
    if not isinstance(value, list) or not value:
        raise row.fault(
            f"{name!r} holds {describe(value)}", why="a conversation is a list of turns, at least one", do="write [{from, value}, …]"
        )
    messages: list[Message] = []
    for index, item in enumerate(value):
        place = f"{name}[{index}]"
        if not isinstance(item, dict):
            raise row.fault(f"{place} holds {describe(item)}", why="a turn is an object", do='write {"from": …, "value": …}')
        row.unused |= {f"{name}[].{key}" for key in item.keys() - {"from", "value", "weight", "train"} if item[key] not in (None, "", [], {})}
        role = _role(row, item.get("from"), place, SHAREGPT_ROLES)
        text = check_text(row, item.get("value"), f"{place}.value")
        train = _train(row, item, place)
        if item["from"] == "function_call":
            messages.append(Message(role=role, tool_calls=_json_calls(row, text, f"{place}.value"), train=train))
        else:
            messages += _tagged(row, role, text, f"{place}.value", train)
    return messages


def _tagged(row: Row, role: Role, text: str, name: str, train: bool | tuple[Part, ...] | None) -> list[Message]:
    if role == "assistant" and CALL.search(text):
        calls = tuple(call for found in CALL.findall(text) for call in _json_calls(row, found, name))
        return [Message(role=role, content=CALL.sub("", text).strip(), tool_calls=calls, train=train)]
    if role == "tool" and RESPONSE.search(text):
        return [Message(role=role, content=found) for found in RESPONSE.findall(text)]
    return [Message(role=role, content=text, train=train)]


def _json_calls(row: Row, text: str, name: str) -> tuple[ToolCall, ...]:
    """The calls that JSON text spells: one object, or a list of them. Raises DataError where it is no JSON."""
    try:
        value = strict_json(text)
    except ValueError as error:
        why = f"{error}: {text[:60]!r}"
        raise row.fault(f"{name} is a function call that is not JSON", why=why, do='write {"name": …, "arguments": {…}}') from error
    items = value if isinstance(value, list) else [value]
    return tuple(_call(row, item, name) for item in items)


def tool_specs(row: Row, value: Any) -> tuple[ToolSpec, ...]:
    """The `tools` field: OpenAI's list, bare {name, description, parameters} objects, or either as JSON text."""
    if isinstance(value, str) and value.strip():
        try:
            value = strict_json(value)
        except ValueError as error:
            raise row.fault("'tools' is text that is not JSON", why=str(error), do="write a list of tools") from error
    if value in (None, "", []):
        return ()
    if not isinstance(value, list):
        raise row.fault(f"'tools' holds {describe(value)}", why="tools are a list", do="write [{type: function, function: {…}}, …]")
    return tuple(_tool(row, item, f"tools[{index}]") for index, item in enumerate(value))


def _tool(row: Row, item: Any, name: str) -> ToolSpec:
    inner = item.get("function", item) if isinstance(item, dict) else item
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str) or not inner["name"]:
        raise row.fault(f"{name} holds {describe(item)}", why="a tool needs a name", do="write {name, description, parameters}")
    parameters = inner.get("parameters")
    if isinstance(parameters, str):
        parameters = parse_arguments(parameters)
    if parameters is not None and not isinstance(parameters, dict):
        raise row.fault(
            f"{name}.parameters holds {describe(parameters)}", why="a tool's parameters are a JSON Schema", do="write an object schema"
        )
    row.unused |= {f"tools[].{key}" for key in inner.keys() - {"name", "description", "parameters", "type"} if inner[key] is not None}
    spec: dict[str, Any] = {"name": inner["name"], "description": inner.get("description") or ""}
    check_text(row, spec["description"], f"{name}.description")
    if parameters is not None:
        spec["parameters"] = _without_nulls(row, parameters, "tools[].parameters")
    return ToolSpec(**spec)
