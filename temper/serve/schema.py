"""What a chat completion request may hold. A parameter that is not honoured is refused, never ignored in silence."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from temper.core.records import Message, ToolCall, ToolSpec
from temper.serve.errors import ApiError

MAX_STOPS, MAX_CHOICES, MAX_TOOLS = 4, 16, 128
Name = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_.-]+$")]


class Part(BaseModel):
    """One part of a message's content; only text parts are understood."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["text"]
    text: str


class CalledFunction(BaseModel):
    """The function of a tool call in a conversation: a name, and arguments as JSON text."""

    model_config = ConfigDict(extra="forbid")
    name: str
    arguments: str


class Call(BaseModel):
    """A tool call that an assistant turn made."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(BaseModel):
    """One message as clients send it. Fields that replies carry (refusal, audio …) may come back only empty."""

    model_config = ConfigDict(extra="forbid")
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None
    reasoning_content: str | None = None
    name: str | None = None
    tool_calls: list[Call] | None = None
    tool_call_id: str | None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: list[Any] | None = Field(default=None, max_length=0)

    def text(self) -> str:
        """The content as one string."""
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


class Function(BaseModel):
    """A tool's signature."""

    model_config = ConfigDict(extra="forbid")
    name: Name
    description: str = ""
    parameters: dict[str, Any] = Field(default_factory=lambda: {"type": "object", "properties": {}})
    strict: bool | None = None


class Tool(BaseModel):
    """A tool that the model may call."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["function"]
    function: Function


class ToolName(BaseModel):
    """The name of one offered tool."""

    model_config = ConfigDict(extra="forbid")
    name: str


class NamedTool(BaseModel):
    """A tool_choice that leaves no way but calling this tool."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["function"]
    function: ToolName


class JsonSchema(BaseModel):
    """A named JSON Schema that the answer must fit."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True)
    name: Name
    body: dict[str, Any] = Field(alias="schema")
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """Free text, any JSON object, or JSON of one schema."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StreamOptions(BaseModel):
    """Whether a stream ends with a chunk that holds the usage."""

    include_usage: bool = False
    include_obfuscation: bool = False


class ChatRequest(BaseModel):
    """The body of POST /v1/chat/completions."""

    model_config = ConfigDict(extra="forbid")
    model: str
    messages: list[ChatMessage] = Field(min_length=1)
    tools: list[Tool] | None = Field(default=None, max_length=MAX_TOOLS)
    tool_choice: Literal["auto", "none", "required"] | NamedTool | None = None
    response_format: ResponseFormat | None = None
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=0)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    n: int | None = Field(default=None, ge=1, le=MAX_CHOICES)
    stop: str | list[str] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=0)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    metadata: dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    presence_penalty: float | None = Field(default=None, ge=0, le=0)
    frequency_penalty: float | None = Field(default=None, ge=0, le=0)
    logit_bias: dict[str, float] | None = Field(default=None, max_length=0)
    # these change nothing in the answer, and are accepted as they come
    user: str | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    def token_limit(self) -> int | None:
        """The limit on sampled tokens, by either of its names."""
        return self.max_completion_tokens or self.max_tokens

    def stops(self) -> list[str]:
        """The stop strings."""
        found = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return [text for text in found if text]

    def tool_specs(self) -> tuple[ToolSpec, ...]:
        """The tools the model is shown: none where tool_choice is `none`."""
        if self.tool_choice == "none":
            return ()
        return tuple(ToolSpec(**tool.function.model_dump(exclude={"strict"})) for tool in self.tools or ())

    def schema_of_answer(self) -> dict[str, Any] | None:
        """The JSON Schema that response_format asks for; None for free text."""
        wanted = self.response_format
        if wanted is None or wanted.type == "text":
            return None
        if wanted.type == "json_object":
            return {"type": "object"}
        return wanted.json_schema.body if wanted.json_schema else None


B = TypeVar("B", bound=BaseModel)


def parse_body(cls: type[B], body: bytes) -> B:
    """A request body as a `cls`. Raises ApiError 400 naming the parameter at fault."""
    try:
        return cls.model_validate(json.loads(body))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ApiError(400, "invalid_json", f"the body is not JSON: {error}") from error
    except ValidationError as error:
        fault = error.errors()[0]
        param = ".".join(str(part) for part in fault["loc"])
        if fault["type"] == "extra_forbidden":
            raise ApiError(400, "unknown_parameter", f"unknown parameter {param!r}: this server does not honour it", param=param) from error
        raise ApiError(400, "invalid_value", f"{param}: {fault['msg']} (got {str(fault.get('input'))[:80]!r})", param=param) from error


def parse_request(body: bytes) -> ChatRequest:
    """A chat request's body. Raises ApiError 400 naming the parameter at fault."""
    request = parse_body(ChatRequest, body)
    _require_consistent(request)
    return request


def _require_consistent(request: ChatRequest) -> None:
    if len(request.stops()) > MAX_STOPS:
        raise ApiError(400, "invalid_value", f"stop: at most {MAX_STOPS} strings", param="stop")
    wanted = request.response_format
    if wanted and wanted.type == "json_schema" and wanted.json_schema is None:
        raise ApiError(400, "invalid_value", "response_format: type json_schema needs json_schema", param="response_format.json_schema")
    if request.max_tokens and request.max_completion_tokens and request.max_tokens != request.max_completion_tokens:
        raise ApiError(400, "invalid_value", "max_tokens and max_completion_tokens differ; give one", param="max_tokens")
    names = [tool.function.name for tool in request.tools or ()]
    if request.tool_choice == "required" and not names:
        raise ApiError(400, "invalid_value", "tool_choice is 'required', but no tools are given", param="tool_choice")
    if isinstance(request.tool_choice, NamedTool) and request.tool_choice.function.name not in names:
        wanted_tool = request.tool_choice.function.name
        raise ApiError(400, "invalid_value", f"tool_choice names {wanted_tool!r}, which is not among the tools", param="tool_choice")
    if len(set(names)) != len(names):
        raise ApiError(400, "invalid_value", "tools: two tools have one name", param="tools")


def to_messages(sent: list[ChatMessage]) -> tuple[Message, ...]:
    """Messages as core Messages. Raises ApiError for a tool result without its call, and the like."""
    messages: list[Message] = []
    open_calls: dict[str, str] = {}
    for index, item in enumerate(sent):
        where = f"messages.{index}"
        if item.tool_calls and item.role != "assistant":
            raise ApiError(400, "invalid_value", f"{where}: a {item.role} message cannot call tools", param=f"{where}.tool_calls")
        name = item.name
        if item.role == "tool":
            if item.tool_call_id not in open_calls:
                raise ApiError(
                    400, "tool_result_without_call", f"{where}: no earlier call has id {item.tool_call_id!r}", param=f"{where}.tool_call_id"
                )
            name = name or open_calls[item.tool_call_id]
        if item.role == "assistant" and not item.text() and not item.tool_calls:
            raise ApiError(400, "invalid_value", f"{where}: an assistant message needs content or tool_calls", param=f"{where}.content")
        calls = tuple(
            ToolCall(name=call.function.name, arguments=_arguments(call.function.arguments), id=call.id) for call in item.tool_calls or ()
        )
        open_calls.update({call.id: call.name for call in calls})
        role = "system" if item.role == "developer" else item.role
        messages.append(
            Message(
                role=role,
                content=item.text(),
                reasoning=item.reasoning_content,
                tool_calls=calls,
                tool_call_id=item.tool_call_id,
                name=name,
            )
        )
    if messages[-1].role == "assistant":
        raise ApiError(400, "invalid_value", "the last message is the assistant's; there is nothing to answer", param="messages")
    return tuple(messages)


def _arguments(text: str) -> dict[str, Any] | str:
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return text
    return value if isinstance(value, dict) else text
