"""From an OpenAI chat request to engine rows, and from sampled tokens back to an OpenAI answer."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import jsonschema

from temper.core.errors import TemperError
from temper.core.hashing import stream_seed
from temper.core.records import Message, Sampled, ToolCall, ToolSpec
from temper.rollout.engine import Request
from temper.rollout.grammar import Grammar
from temper.serve.errors import ApiError
from temper.serve.loaded import Loaded
from temper.serve.schema import ChatRequest, NamedTool, to_messages

SEED_MASK = 2**63 - 1


@dataclass(frozen=True)
class Plan:
    """A request understood: what the model is shown, and the engine rows that answer it."""

    request: ChatRequest
    messages: tuple[Message, ...]
    tools: tuple[ToolSpec, ...]
    schema: dict[str, Any] | None
    rows: list[Request]

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt, counted once."""
        return len(self.rows[0].prompt_ids)


@dataclass(frozen=True)
class Choice:
    """One finished answer."""

    message: Message
    sampled: Sampled
    finish_reason: str
    schema_valid: bool | None
    logprobs: list[dict[str, Any]] | None


def plan(request: ChatRequest, loaded: Loaded, tenant: str | None, *, default_tokens: int, constrain_tools: str) -> Plan:
    """The engine rows for a request. Raises ApiError 400 for what the template, a schema or the context refuses."""
    messages, tools, schema = to_messages(request.messages), request.tool_specs(), request.schema_of_answer()
    try:
        prompt = tuple(loaded.engine.policy.template.prompt_ids(messages, tools))
        grammar = _grammar(request, tools, schema, constrain_tools)
    except TemperError as error:
        raise ApiError(400, "invalid_request", str(error)) from error
    limit = _token_limit(request.token_limit(), len(prompt), context_length(loaded), default_tokens)
    seed = secrets.randbits(63) if request.seed is None else request.seed & SEED_MASK
    temperature = 1.0 if request.temperature is None else request.temperature
    rows = [
        Request(
            prompt_ids=prompt, max_tokens=limit, temperature=temperature, top_p=request.top_p or 1.0, top_k=request.top_k or 0,
            seed=seed if number == 0 else stream_seed(seed, "choice", number), adapter=loaded.expected(tenant), grammar=grammar,
        )
        for number in range(request.n or 1)
    ]  # fmt: skip
    return Plan(request, messages, tools, schema, rows)


def _grammar(request: ChatRequest, tools: tuple[ToolSpec, ...], schema: dict[str, Any] | None, constrain_tools: str) -> Grammar | None:
    """What the answer may be. A forced call and a JSON answer always need a grammar; a free call where it is asked for."""
    choice = request.tool_choice
    if isinstance(choice, NamedTool):
        return Grammar.tool_call([tool for tool in tools if tool.name == choice.function.name], text=False)
    if choice == "required":
        return Grammar.tool_call(tools, text=False)
    if not tools:
        return None if schema is None else Grammar.json_schema(schema)
    strict = any(tool.function.strict for tool in request.tools or ())
    if schema is not None or constrain_tools == "always" or (constrain_tools == "strict" and strict):
        return Grammar.tool_call(tools, schema=schema)
    return None


def context_length(loaded: Loaded) -> int:
    """How many tokens the release's model can hold."""
    return int(loaded.engine.context)


def _token_limit(asked: int | None, prompt: int, context: int, default: int) -> int:
    room = context - prompt
    if room < 1 or (asked is not None and asked > room):
        told = f"this model's context is {context} tokens; the messages take {prompt}" + (
            f" and {asked} more are asked for" if asked else ""
        )
        raise ApiError(400, "context_length_exceeded", told, param="messages")
    return asked if asked is not None else min(default, room)


def require_adapter(used: Iterable[str | None], expected: str | None) -> None:
    """Raise ApiError 500 where a row came through another adapter than the tenant's: then nothing leaves the house."""
    if any(adapter != expected for adapter in used):
        raise ApiError(500, "isolation_violation", "the answer was withheld: it came through another adapter than the tenant's")


def choices(made: Plan, loaded: Loaded, tenant: str | None, sampled: list[Sampled]) -> list[Choice]:
    """Sampled rows as choices. Raises ApiError 500 where one came through another adapter than the tenant's."""
    require_adapter((row.adapter for row in sampled), loaded.expected(tenant))
    return [_choice(made, loaded, row) for row in sampled]


def _choice(made: Plan, loaded: Loaded, row: Sampled) -> Choice:
    policy = loaded.engine.policy
    ids = [token for token in row.token_ids if token not in policy.template.stop_ids]
    message: Message = policy.template.parse(list(row.token_ids), calls=bool(made.tools))
    calls = tuple(call.model_copy(update={"id": call.id or f"call_{secrets.token_hex(12)}"}) for call in message.tool_calls)
    text, stopped = cut_at_stop(message.content, made.request.stops())
    message = message.model_copy(update={"content": text, "tool_calls": calls})
    reason = "tool_calls" if calls and row.finish_reason == "stop" else "stop" if stopped else row.finish_reason
    if reason == "error":
        raise ApiError(500, "sampling_failed", "the engine could not finish this answer")
    valid = None if made.schema is None or calls or reason == "length" else fits(text, made.schema)
    return Choice(message, row, reason, valid, _logprobs(policy.tokenizer, ids, row) if made.request.logprobs else None)


def cut_at_stop(text: str, stops: list[str]) -> tuple[str, bool]:
    """`text` up to the first stop string in it, and whether there was one."""
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return (text[: min(places)], True) if places else (text, False)


def fits(text: str, schema: dict[str, Any]) -> bool:
    """Whether `text` is JSON that `schema` accepts."""
    try:
        jsonschema.validate(json.loads(text), schema)
    except (ValueError, jsonschema.ValidationError):
        return False
    return True


def _logprobs(tokenizer: Any, ids: list[int], row: Sampled) -> list[dict[str, Any]]:
    shown = []
    for token, logprob in zip(ids, row.logprobs, strict=False):  # the stop token, last in the row, is not shown
        text = tokenizer.decode([token])
        shown.append({"token": text, "logprob": logprob, "bytes": list(text.encode()), "top_logprobs": []})
    return shown


def usage(made: Plan, sampled: list[Sampled]) -> dict[str, int]:
    """Tokens used, as OpenAI counts them."""
    completion = sum(len(row.token_ids) for row in sampled)
    return {"prompt_tokens": made.prompt_tokens, "completion_tokens": completion, "total_tokens": made.prompt_tokens + completion}


def calls_shown(calls: tuple[ToolCall, ...]) -> list[dict[str, Any]]:
    """Tool calls as OpenAI writes them, arguments as JSON text."""

    def text(arguments: dict[str, Any] | str) -> str:
        return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)

    return [{"id": call.id, "type": "function", "function": {"name": call.name, "arguments": text(call.arguments)}} for call in calls]


def completion(request_id: str, model: str, release_id: str, made: Plan, answers: list[Choice]) -> dict[str, Any]:
    """The body of an answer that is not streamed."""
    shown = []
    for index, choice in enumerate(answers):
        message: dict[str, Any] = {
            "role": "assistant",
            "content": choice.message.content or (None if choice.message.tool_calls else ""),
            "refusal": None,
        }
        if choice.message.reasoning:
            message["reasoning_content"] = choice.message.reasoning
        if choice.message.tool_calls:
            message["tool_calls"] = calls_shown(choice.message.tool_calls)
        logprobs = {"content": choice.logprobs, "refusal": None} if choice.logprobs is not None else None
        shown.append({"index": index, "message": message, "finish_reason": choice.finish_reason, "logprobs": logprobs})
    head = head_of(request_id, model, release_id, "chat.completion")
    return {**head, "choices": shown, "usage": usage(made, [choice.sampled for choice in answers])}


def head_of(request_id: str, model: str, release_id: str, kind: str) -> dict[str, Any]:
    """What every answer and every event of a stream begins with."""
    return {
        "id": f"chatcmpl-{request_id}",
        "object": kind,
        "created": int(time.time()),
        "model": model,
        "system_fingerprint": release_id[:16],
    }
