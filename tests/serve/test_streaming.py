"""Streams: tokens leave as the engine commits them, and nothing that a whole answer is held to is lost on the way."""

import json
import threading
import time

import httpx
import openai
import pytest
from test_api import ASK, TOOL, House, client

from temper.serve import serving


@pytest.fixture
def slow(tmp_path):
    """A server whose engine takes 10 ms a token."""
    house = House(tmp_path)
    house.release = house.promote()
    house.server = house.app(look_for_client_seconds=0.05)
    house.engines[0].pace = 0.01
    with serving(house.server) as house.url:
        yield house


def arrivals(house, **body):
    """Each content piece of a stream with the seconds at which it came."""
    started, pieces = time.monotonic(), []
    with client(house) as ai:
        for chunk in ai.chat.completions.create(model="finops@bank_a", messages=ASK, stream=True, **body):
            pieces += [(choice.delta.content, time.monotonic() - started) for choice in chunk.choices if choice.delta.content]
    return pieces


def closed(house, lines=2):
    """The audit lines, once the last of them is written."""
    deadline = time.monotonic() + 10
    while len(found := house.lines()) < lines:
        assert time.monotonic() < deadline, found
        time.sleep(0.01)
    return found


def test_tokens_leave_while_the_engine_still_samples(slow):
    slow.say = lambda *_: "one two three four five six seven eight nine ten"  # 48 tokens, half a second
    pieces = arrivals(slow)
    assert "".join(text for text, _ in pieces) == slow.say()
    assert len(pieces) > 20
    assert pieces[0][1] < 0.5 * pieces[-1][1]
    opened, ended = closed(slow)
    assert (opened["phase"], opened["status"], opened["completion_tokens"]) == ("opened", 200, 0)
    assert (ended["phase"], ended["status"], ended["finish_reason"], ended["completion_tokens"]) == ("closed", 200, "stop", 49)
    assert opened["request_id"] == ended["request_id"]
    assert opened["adapter_hash"] == ended["adapter_hash"] == slow.release.adapters["bank_a"]
    metrics = httpx.get(slow.url.replace("/v1", "/metrics")).text
    assert 'temper_requests_total{tenant="bank_a",status="200",code=""} 1' in metrics  # one request, whatever it left in the audit file


def test_the_audit_line_is_there_before_the_first_byte(slow, monkeypatch):
    def full(value):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(slow.server.state.server.audit, "append", full)
    answer = httpx.post(f"{slow.url}/chat/completions", json={"model": "finops", "messages": ASK, "stream": True})
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "audit_unavailable")
    assert "I am" not in answer.text


def test_a_disk_that_fills_while_streaming_ends_the_stream_with_an_error(slow, monkeypatch):
    audit = slow.server.state.server.audit
    real = audit.append
    monkeypatch.setattr(
        audit, "append", lambda value: real(value) if value["phase"] == "opened" else (_ for _ in ()).throw(OSError(28, "full"))
    )
    with pytest.raises(openai.APIError, match="audit log cannot be written"):
        arrivals(slow)


def test_a_client_that_hangs_up_stops_its_row(slow):
    slow.say = lambda *_: "x" * 400  # four seconds
    with httpx.stream(
        "POST", f"{slow.url}/chat/completions", json={"model": "finops", "messages": ASK, "stream": True, "max_tokens": 500}
    ) as answer:
        for line in answer.iter_lines():
            if '"content": "x' in line:
                break
    ended = closed(slow)[-1]
    assert (ended["phase"], ended["status"], ended["code"]) == ("closed", 499, "client_gone")
    assert 1 <= ended["completion_tokens"] < 100
    deadline = time.monotonic() + 5
    while not slow.engines[0].cut:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert slow.engines[0].cut[0] < 100
    assert not slow.capture.read_text()


def test_a_client_that_hangs_up_stops_its_row_without_a_stream_too(slow):
    slow.say = lambda *_: "x" * 400
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{slow.url}/chat/completions", json={"model": "finops", "messages": ASK, "max_tokens": 500}, timeout=0.3)
    (line,) = closed(slow, 1)
    assert (line["status"], line["code"]) == (499, "client_gone")
    deadline = time.monotonic() + 5
    while not slow.engines[0].cut:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert slow.engines[0].cut[0] < 100


def test_no_token_of_another_adapter_leaves(slow):
    engine, other = slow.engines[0], slow.server.state.server.worker.current.adapter_of["retail_b"]
    engine.routed = lambda request: other
    answer = httpx.post(f"{slow.url}/chat/completions", json={"model": "finops@bank_a", "messages": ASK, "stream": True})
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "isolation_violation")
    assert "I am" not in answer.text
    (line,) = slow.lines()
    assert line["adapter_hash"] == slow.release.adapters["retail_b"]
    spoken = []
    engine.routed = lambda request: spoken.append(0) or (request.adapter if len(spoken) < 4 else other)  # from the fourth token on
    answer = httpx.post(f"{slow.url}/chat/completions", json={"model": "finops@bank_a", "messages": ASK, "stream": True})
    events = [json.loads(line.removeprefix("data: ")) for line in answer.text.split("\n\n") if line and "[DONE]" not in line]
    assert "".join(choice["delta"].get("content", "") for event in events for choice in event.get("choices", ())) == "I a"
    assert events[-1]["error"]["code"] == "isolation_violation"
    assert "[DONE]" not in answer.text
    ended = closed(slow, 3)[-1]
    assert (ended["phase"], ended["status"], ended["code"], ended["adapter_hash"]) == (
        "closed", 500, "isolation_violation", slow.release.adapters["retail_b"],
    )  # fmt: skip


def test_calls_come_whole_and_text_beside_them_as_it_is_said(slow):
    slow.say = lambda *_: 'Let me look.<tool_call>{"name": "query_budget", "arguments": {"department": "Ops"}}</tool_call>'
    with client(slow) as ai:
        chunks = list(ai.chat.completions.create(model="finops", messages=ASK, tools=[TOOL], stream=True))
    deltas = [choice.delta for chunk in chunks for choice in chunk.choices]
    assert "".join(delta.content or "" for delta in deltas) == "Let me look."
    (tool,) = [item for delta in deltas for item in delta.tool_calls or ()]
    assert (tool.function.name, json.loads(tool.function.arguments)) == ("query_budget", {"department": "Ops"})
    assert [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason] == ["tool_calls"]


def test_what_may_be_a_stop_string_is_kept_back(slow):
    slow.say = lambda *_: "alpha END beta ENDING gamma"
    texts = ["".join(text for text, _ in arrivals(slow, stop=stop)) for stop in (["ENDING"], ["ING", "END "], ["ga"], ["no such"])]
    assert texts == ["alpha END beta ", "alpha ", "alpha END beta ENDING ", slow.say()]


def test_letters_of_several_bytes_come_whole(slow):
    slow.say = lambda *_: "né 日本"
    pieces = [text for text, _ in arrivals(slow)]
    assert "".join(pieces) == "né 日本"
    assert not any("�" in piece for piece in pieces)


def test_an_engine_that_breaks_before_and_after_the_first_token(slow):
    def broken(*_):
        raise RuntimeError("boom")

    slow.say = broken
    answer = httpx.post(f"{slow.url}/chat/completions", json={"model": "finops", "messages": ASK, "stream": True})
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal_error")
    slow.say, engine = (lambda *_: "well then"), slow.engines[0]
    routed = []
    engine.routed = lambda request: routed.append(0) or (request.adapter if len(routed) < 5 else broken())
    with pytest.raises(openai.APIError, match="its log says why"):
        arrivals(slow)
    ended = closed(slow, 3)[-1]
    assert (ended["phase"], ended["status"], ended["code"]) == ("closed", 500, "internal_error")


def test_a_batch_that_is_sampled_again_tells_nothing_twice(tmp_path):
    house = House(tmp_path)
    house.promote()
    house.gate = threading.Event()
    poisoned = []

    def say(weights, adapter, request):
        if b"poison" in bytes(request.prompt_ids):
            poisoned.append(0)
            raise RuntimeError("boom")
        return "fine"

    house.say = say
    texts: list[str] = []
    with serving(house.app(gather_ms=100)) as house.url:
        bad = {"model": "finops", "messages": [{"role": "user", "content": "poison"}]}
        good = threading.Thread(target=lambda: texts.extend(text for text, _ in arrivals(house)))
        good.start()
        time.sleep(0.03)
        other = threading.Thread(target=lambda: httpx.post(f"{house.url}/chat/completions", json=bad))
        other.start()
        time.sleep(0.2)
        house.gate.set()
        good.join()
        other.join()
    assert len(house.engines[0].batches[0]) == 2  # both were in the batch that broke
    assert len(poisoned) == 2
    assert "".join(texts) == "fine"
