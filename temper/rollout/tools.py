"""Tools: a signature and a function. What a model does wrong with one comes back to it as data."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jsonschema
from jsonschema.exceptions import SchemaError, best_match

from temper.core.errors import ConfigError
from temper.core.hashing import canonical_json
from temper.core.records import ToolCall, ToolSpec
from temper.rollout.limits import OutOfTime, run_limited


class ToolFailure(Exception):
    """Raised by a tool that refuses a call or cannot serve it; the model reads the message as the result."""


@dataclass(frozen=True)
class Tool:
    """What a model sees (`spec`) and what runs: `function(**arguments)`, whose return value must be JSON."""

    spec: ToolSpec
    function: Callable[..., Any]


class Toolbox:
    """The tools of one session. Arguments are validated before anything runs.

    `expected` are the exceptions that are a tool's answer (ToolFailure always is one). Any other exception is a
    programming error and passes through. A call that takes longer than `timeout_s` is answered with an error.
    """

    def __init__(self, tools: Sequence[Tool], *, expected: tuple[type[Exception], ...] = (), timeout_s: float = 10.0) -> None:
        self.tools: dict[str, Tool] = {}
        for tool in tools:
            if tool.spec.name in self.tools:
                raise ConfigError(f"two tools are named {tool.spec.name!r}", do="give every tool its own name")
            validator_of(canonical_json(tool.spec.parameters))
            self.tools[tool.spec.name] = tool
        self.expected: tuple[type[Exception], ...] = (ToolFailure, *expected)
        self.timeout_s = timeout_s

    @property
    def specs(self) -> tuple[ToolSpec, ...]:
        """The signatures, in order."""
        return tuple(tool.spec for tool in self.tools.values())

    def call(self, call: ToolCall) -> str:
        """The result as JSON text, or `{"error": …}` where the call is invalid, refused or too slow."""
        fault = check_call(call, self.specs)
        if fault is not None:
            return error_text(fault)
        arguments = call.arguments if isinstance(call.arguments, dict) else {}
        try:
            result = run_limited(lambda: self.tools[call.name].function(**arguments), self.timeout_s)
        except self.expected as error:
            return error_text(str(error))
        except OutOfTime as error:
            return error_text(f"{call.name}: {error}")
        return json.dumps(result, ensure_ascii=False)


@lru_cache(maxsize=1024)
def validator_of(schema: str) -> jsonschema.Draft202012Validator:
    """The validator of a JSON Schema given as text, made once. Raises ConfigError where it is no schema."""
    try:
        parsed = json.loads(schema)
        jsonschema.Draft202012Validator.check_schema(parsed)
    except (SchemaError, json.JSONDecodeError) as error:
        why = str(error).partition("\n")[0]
        raise ConfigError(f"not a JSON Schema: {schema[:200]}", why=why, do="write it after draft 2020-12") from error
    return jsonschema.Draft202012Validator(parsed)


def check_call(call: ToolCall, specs: Sequence[ToolSpec]) -> str | None:
    """What is wrong with a call (unknown tool, arguments that are no object or break the schema); None where nothing is."""
    spec = next((spec for spec in specs if spec.name == call.name), None)
    if spec is None:
        return f"unknown tool {call.name!r}; tools: {', '.join(spec.name for spec in specs) or 'none'}"
    if isinstance(call.arguments, str):
        return f"the arguments of {call.name} are not a JSON object"
    fault = best_match(validator_of(canonical_json(spec.parameters)).iter_errors(call.arguments))
    if fault is None:
        return None
    where = ".".join(map(str, fault.absolute_path))
    return f"{call.name}: {where + ': ' if where else ''}{fault.message}"


def error_text(message: str) -> str:
    """A failed call as the model reads it."""
    return json.dumps({"error": message}, ensure_ascii=False)
