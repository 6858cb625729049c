"""What a model does wrong with a tool is data; what a tool's author does wrong raises."""

from __future__ import annotations

import json
import signal
import threading
import time

import pytest

from temper.core.errors import ConfigError
from temper.core.records import ToolCall, ToolSpec
from temper.rollout.limits import OutOfTime, run_limited
from temper.rollout.tools import Tool, Toolbox, ToolFailure, check_call

ADD = ToolSpec(
    name="add",
    parameters={"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}, "required": ["a", "b"], "additionalProperties": False},
)


def box(function, **options) -> Toolbox:
    return Toolbox([Tool(ADD, function)], **options)


def call(arguments, name="add") -> ToolCall:
    return ToolCall(name=name, arguments=arguments)


def test_a_valid_call_runs_and_returns_json():
    assert box(lambda a, b: {"sum": a + b, "unit": "€"}).call(call({"a": 2, "b": 3})) == '{"sum": 5, "unit": "€"}'


@pytest.mark.parametrize(
    ("made", "told"),
    [
        (call({"a": 1}), "'b' is a required property"),
        (call({"a": 1, "b": "2"}), "b: '2' is not of type 'integer'"),
        (call({"a": 1, "b": 2, "c": 3}), "'c' was unexpected"),
        (call('{"a": 1, '), "not a JSON object"),
        (call({"a": 1, "b": 2}, name="subtract"), "unknown tool 'subtract'; tools: add"),
    ],
)
def test_an_invalid_call_comes_back_as_an_error_and_runs_nothing(made, told):
    def never(**arguments):
        raise AssertionError("ran")

    assert told in json.loads(box(never).call(made))["error"]


def test_expected_failures_are_data_and_others_raise():
    def refuses(a, b):
        raise ToolFailure("needs approval")

    def looks_up(a, b):
        raise LookupError("no such account")

    assert json.loads(box(refuses).call(call({"a": 1, "b": 2}))) == {"error": "needs approval"}
    assert json.loads(box(looks_up, expected=(LookupError,)).call(call({"a": 1, "b": 2}))) == {"error": "no such account"}
    with pytest.raises(LookupError):
        box(looks_up).call(call({"a": 1, "b": 2}))


def test_a_slow_tool_is_cut_off_even_where_it_swallows_exceptions():
    def stubborn(a, b):
        while True:
            try:
                time.sleep(0.01)
            except Exception:
                continue

    started = time.monotonic()
    result = json.loads(box(stubborn, timeout_s=0.2).call(call({"a": 1, "b": 2})))
    assert "no result within 0.2 s" in result["error"]
    assert time.monotonic() - started < 2


def test_the_limit_works_on_other_threads_and_restores_an_outer_timer():
    found = []

    def elsewhere():
        try:
            run_limited(lambda: time.sleep(5), 0.1)
        except OutOfTime as error:
            found.append(error)
        found.append(run_limited(lambda: 7, 1.0))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join(3)
    assert isinstance(found[0], OutOfTime)
    assert found[1] == 7

    before = signal.getitimer(signal.ITIMER_REAL)[0]
    handler = signal.getsignal(signal.SIGALRM)
    assert run_limited(lambda: 1, 0.5) == 1
    assert signal.getsignal(signal.SIGALRM) is handler
    assert (signal.getitimer(signal.ITIMER_REAL)[0] > 0) == (before > 0)
    with pytest.raises(ZeroDivisionError):
        run_limited(lambda: 1 / 0, 0.5)


def test_faulty_tools_are_refused_when_the_box_is_made():
    with pytest.raises(ConfigError, match="two tools are named 'add'"):
        Toolbox([Tool(ADD, print), Tool(ADD, print)])
    with pytest.raises(ConfigError, match="not a JSON Schema"):
        Toolbox([Tool(ToolSpec(name="x", parameters={"type": "objekt"}), print)])


def test_check_call_finds_nothing_wrong_with_a_valid_call():
    assert check_call(call({"a": 1, "b": 2}), [ADD]) is None
