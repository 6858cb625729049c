"""The API as a real OpenAI client meets it: answers, streams, tools, JSON, errors, tenants, audit, capture, swaps."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
from serve_double import ScriptedEngine, digest, release

from temper.core.errors import ConfigError, IntegrityError, ReleaseError
from temper.core.records import Record
from temper.core.storage import read_jsonl
from temper.registry import AccessPolicy, DeprecationPlan, Registry
from temper.serve import ServeConfig, app_for, chat, create_app, serving
from temper.serve.audit import read_lines

TOOL = {
    "type": "function",
    "function": {"name": "query_budget", "parameters": {"type": "object", "properties": {"department": {"type": "string"}}}},
}
ASK = [{"role": "user", "content": "budget?"}]


def who(weights, adapter, request):
    return f"I am {adapter or weights}"


class House:
    """A registry and a server over it, on a real socket."""

    def __init__(self, root):
        self.root, self.registry = root, Registry(root / "registry")
        self.audit, self.capture = root / "audit.jsonl", root / "served.jsonl"
        self.engines, self.say, self.gate = [], who, None

    def open_engine(self, weights):
        self.engines.append(ScriptedEngine(weights, lambda *args: self.say(*args), self.gate))
        return self.engines[-1]

    def promote(self, text="one", **fields):
        made = release(self.registry, self.root, text, **fields)
        self.registry.promote(made.id, reason="test")
        return made

    def app(self, **settings):
        settings = {"audit": self.audit, "capture": self.capture, "poll_seconds": 0.05, **settings}
        return create_app(self.registry, open_engine=self.open_engine, **settings)

    def lines(self):
        return read_lines(self.audit)


@pytest.fixture
def house(tmp_path):
    return House(tmp_path)


@pytest.fixture
def served(house):
    house.release = house.promote()
    house.server = house.app()
    with serving(house.server) as url:
        house.url = url
        yield house


@pytest.fixture(scope="module")
def strict(tmp_path_factory):
    """One server for everything that is refused before it reaches the engine."""
    house = House(tmp_path_factory.mktemp("strict"))
    house.promote()
    with serving(house.app()) as house.url:
        yield house


def client(house, **options):
    return openai.OpenAI(base_url=house.url, api_key=options.pop("api_key", "unused"), max_retries=0, **options)


def test_each_tenant_is_answered_through_its_own_adapter_however_it_is_named(served):
    with client(served) as ai:
        ways = [
            {"model": "finops@bank_a"},
            {"model": "finops", "extra_headers": {"X-Tenant": "bank_a"}},
            {"model": "finops", "metadata": {"tenant": "bank_a"}},
            {"model": "production@bank_a", "extra_headers": {"X-Tenant": "bank_a"}, "metadata": {"tenant": "bank_a"}},
        ]
        answers = [ai.chat.completions.create(messages=ASK, **way) for way in ways]
        base = ai.chat.completions.create(model="finops", messages=ASK)
    assert [answer.choices[0].message.content for answer in answers] == ["I am one/bank_a"] * 4
    assert {answer.model for answer in answers} == {"finops@bank_a"}
    assert base.choices[0].message.content == "I am one"
    assert base.choices[0].finish_reason == "stop"
    assert base.usage.completion_tokens == len("I am one") + 1  # its stop token was sampled too
    assert base.usage.total_tokens == base.usage.prompt_tokens + base.usage.completion_tokens
    lines = served.lines()
    assert [line["adapter_hash"] for line in lines] == [served.release.adapters["bank_a"]] * 4 + [None]
    assert all(line["release"] == served.release.id and line["status"] == 200 for line in lines)
    assert lines[0]["tenant"] == "bank_a"
    assert lines[0]["adapter_numbers"] == digest("one/bank_a")
    assert lines[4]["tenant"] is None


@pytest.mark.parametrize(
    ("status", "code", "headers", "change"),
    [
        (400, "conflicting_tenants", {"X-Tenant": "bank_a"}, {"model": "finops@retail_b"}),
        (400, "conflicting_tenants", {"X-Tenant": "bank_a"}, {"metadata": {"tenant": "saas_c"}}),
        (403, "unknown_tenant", {"X-Tenant": "bank_z"}, {}),
        (403, "unknown_tenant", {"X-Tenant": "BANK_A"}, {}),
        (403, "unknown_tenant", {"X-Tenant": "bank_a,retail_b"}, {}),
        (400, "invalid_tenant", {"X-Tenant": ""}, {}),
        (400, "invalid_tenant", {}, {"model": "finops@"}),
        (400, "invalid_tenant", {}, {"metadata": {"tenant": 3}}),
        (404, "model_not_found", {}, {"model": "gpt-4o"}),
        (400, "invalid_value", {}, {"messages": []}),
        (400, "invalid_value", {}, {"temperature": 9}),
        (400, "invalid_value", {}, {"messages": [{"role": "robot", "content": "x"}]}),
        (400, "invalid_value", {}, {"messages": [*ASK, {"role": "assistant", "content": "x"}]}),
        (400, "tool_result_without_call", {}, {"messages": [*ASK, {"role": "tool", "tool_call_id": "c9", "content": "{}"}]}),
        (400, "invalid_value", {}, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}),
        (400, "invalid_value", {}, {"presence_penalty": 0.5}),
        (400, "unknown_parameter", {}, {"frequency": 1}),
        (400, "invalid_value", {}, {"tool_choice": "required"}),
        (400, "invalid_value", {}, {"tool_choice": {"type": "function", "function": {"name": "x"}}, "tools": [TOOL]}),
        (400, "invalid_request", {}, {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "no"}}}}),
        (400, "invalid_value", {}, {"response_format": {"type": "json_schema"}}),
        (400, "invalid_value", {}, {"tools": [TOOL, TOOL]}),
        (400, "context_length_exceeded", {}, {"max_tokens": 5000}),
        (400, "context_length_exceeded", {}, {"messages": [{"role": "user", "content": "x" * 5000}]}),
    ],
)
def test_what_is_refused_and_how_it_is_said(strict, status, code, headers, change):
    answer = httpx.post(f"{strict.url}/chat/completions", json={"model": "finops", "messages": ASK, **change}, headers=headers)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (status, code), error
    assert error["message"]
    assert strict.engines[0].batches == []
    (line,) = [line for line in strict.lines() if line["request_id"] == answer.headers["x-request-id"]]
    assert (line["status"], line["code"], line["adapter_hash"]) == (status, code, None)


def test_bad_bodies_and_places(strict):
    post = f"{strict.url}/chat/completions"
    assert httpx.post(post, content=b"{not json").json()["error"]["code"] == "invalid_json"
    assert httpx.post(post, content=b"\xff\xfe").json()["error"]["code"] == "invalid_json"
    assert httpx.post(post, content=b"[" * 100_000).json()["error"]["code"] == "invalid_json"
    assert httpx.post(post, content=b"x" * 4_000_001).status_code == 413
    assert httpx.get(post).json()["error"]["code"] == "method_not_allowed"
    assert httpx.get(f"{strict.url}/nowhere").json()["error"]["code"] == "not_found"
    with client(strict) as ai, pytest.raises(openai.PermissionDeniedError, match="bank_z"):
        ai.chat.completions.create(model="finops@bank_z", messages=ASK)


def test_two_x_tenant_headers_must_agree(strict):
    body = {"model": "finops", "messages": ASK}
    answer = httpx.post(f"{strict.url}/chat/completions", json=body, headers=[("X-Tenant", "bank_a"), ("X-Tenant", "retail_b")])
    assert answer.json()["error"]["code"] in ("conflicting_tenants", "unknown_tenant")  # proxies may join them with a comma
    assert answer.status_code in (400, 403)


def test_streaming_gives_the_same_text_and_usage(served):
    with client(served) as ai:
        plain = ai.chat.completions.create(model="finops@saas_c", messages=ASK, n=2, seed=1)
        pieces = list(
            ai.chat.completions.create(
                model="finops@saas_c", messages=ASK, n=2, seed=1, stream=True, stream_options={"include_usage": True}
            )
        )
    texts = ["".join(c.delta.content or "" for piece in pieces for c in piece.choices if c.index == index) for index in (0, 1)]
    assert texts == [choice.message.content for choice in plain.choices] == ["I am one/saas_c"] * 2
    assert [c.finish_reason for piece in pieces for c in piece.choices if c.finish_reason] == ["stop", "stop"]
    assert pieces[-1].usage == plain.usage
    assert len(pieces) > 6


def test_tools_are_offered_called_and_answered(served):
    def say(weights, adapter, request):
        prompt = bytes(request.prompt_ids).decode()
        if "tool:" in prompt:
            return "The budget is 120000."
        return (
            '<tool_call>{"name": "query_budget", "arguments": {"department": "Ops"}}</tool_call>'
            if "query_budget" in prompt
            else "no tools here"
        )

    served.say = say
    with client(served) as ai:
        first = ai.chat.completions.create(model="finops", messages=ASK, tools=[TOOL])
        (call,) = first.choices[0].message.tool_calls
        assert (first.choices[0].finish_reason, call.function.name, json.loads(call.function.arguments)) == (
            "tool_calls",
            "query_budget",
            {"department": "Ops"},
        )
        follow = [*ASK, first.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": '{"budget": 120000}'}]
        assert (
            ai.chat.completions.create(model="finops", messages=follow, tools=[TOOL]).choices[0].message.content == "The budget is 120000."
        )
        silent = ai.chat.completions.create(model="finops", messages=ASK, tools=[TOOL], tool_choice="none")
        assert silent.choices[0].message.content == "no tools here"
        with ai.chat.completions.stream(model="finops", messages=ASK, tools=[TOOL]) as stream:
            final = stream.get_final_completion()
    assert final.choices[0].message.tool_calls[0].function.arguments == call.function.arguments


def test_json_answers_are_constrained_and_checked(served):
    seen = []

    def say(weights, adapter, request):
        seen.append(request.grammar)
        return '{"name": "x", "arguments": {}}'  # looks like a tool call to some templates

    served.say = say
    schema = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}
    with client(served) as ai:
        answer = ai.chat.completions.create(
            model="finops",
            messages=ASK,
            response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}},
        )
        ai.chat.completions.create(model="finops", messages=ASK)
    assert json.loads(answer.choices[0].message.content) == {"name": "x", "arguments": {}}
    assert seen[0] is not None
    assert seen[1] is None
    assert [line["schema_valid"] for line in served.lines()] == [True, None]


def test_seeds_stops_limits_and_logprobs(served):
    seeds = []

    def say(weights, adapter, request):
        seeds.append((request.seed, request.temperature, request.top_p))
        return "alpha beta gamma"

    served.say = say
    with client(served) as ai:
        made = ai.chat.completions.create(
            model="finops", messages=ASK, seed=7, n=2, temperature=0.3, top_p=0.9, stop=["gamma", " beta"], logprobs=True
        )
        again = ai.chat.completions.create(model="finops", messages=ASK, seed=7, n=2, max_completion_tokens=5)
        ai.chat.completions.create(model="finops", messages=ASK)
        ai.chat.completions.create(model="finops", messages=ASK)
    assert [choice.message.content for choice in made.choices] == ["alpha", "alpha"]
    assert made.choices[0].finish_reason == "stop"
    assert made.choices[0].logprobs.content[0].token == "a"
    assert len(made.choices[0].logprobs.content) == len("alpha beta gamma")  # what was sampled, the stop token apart
    assert [(choice.message.content, choice.finish_reason) for choice in again.choices] == [("alpha", "length")] * 2
    assert seeds[0][0] == seeds[2][0] == 7
    assert seeds[1] != seeds[0]
    assert [seeds[1][0]] == [seeds[3][0]]
    assert seeds[0][1:] == (0.3, 0.9)
    assert seeds[4][0] != seeds[5][0]  # no seed was given: two requests differ


def test_models_name_each_tenant_with_its_parent_and_root(served):
    with client(served) as ai:
        listed = {model.id: model for model in ai.models.list()}
        assert ai.models.retrieve("finops@bank_a").id == "finops@bank_a"
        with pytest.raises(openai.NotFoundError):
            ai.models.retrieve("finops@bank_z")
    assert list(listed) == ["finops", "finops@bank_a", "finops@retail_b", "finops@saas_c"]
    assert listed["finops@bank_a"].parent == "finops"
    assert listed["finops@bank_a"].root == served.release.adapters["bank_a"]


def test_an_api_key_reaches_its_own_tenant_only(house):
    keys = {digest("sk-bank"): "bank_a", digest("sk-retail"): "retail_b"}
    house.promote(access_policy=AccessPolicy(api_keys=keys))
    with serving(house.app()) as house.url:
        with client(house, api_key="sk-bank") as ai:
            assert ai.chat.completions.create(model="finops", messages=ASK).choices[0].message.content == "I am one/bank_a"
            assert [model.id for model in ai.models.list()] == ["finops@bank_a"]
            for way in ({"model": "finops@retail_b"}, {"model": "finops", "extra_headers": {"X-Tenant": "retail_b"}}):
                with pytest.raises(openai.PermissionDeniedError, match="reaches no other"):
                    ai.chat.completions.create(messages=ASK, **way)
        with client(house, api_key="sk-wrong") as ai, pytest.raises(openai.AuthenticationError):
            ai.chat.completions.create(model="finops", messages=ASK)
        assert httpx.get(f"{house.url}/models").status_code == 401
    assert "sk-" not in house.audit.read_text()


def test_a_policy_may_shut_out_the_nameless_and_some_tenants(house):
    house.promote(access_policy=AccessPolicy(anonymous=False, tenants=("bank_a",)))
    with serving(house.app()) as house.url, client(house) as ai:
        assert [model.id for model in ai.models.list()] == ["finops@bank_a"]
        with pytest.raises(openai.PermissionDeniedError, match="named tenants only"):
            ai.chat.completions.create(model="finops", messages=ASK)
        with pytest.raises(openai.PermissionDeniedError, match="may not use"):
            ai.chat.completions.create(model="finops@saas_c", messages=ASK)


def test_concurrent_requests_share_mixed_batches(served):
    with client(served) as ai, ThreadPoolExecutor(16) as pool:
        tenants = ["bank_a", "retail_b", "saas_c"] * 20
        answers = list(
            pool.map(lambda tenant: ai.chat.completions.create(model=f"finops@{tenant}", messages=ASK).choices[0].message.content, tenants)
        )
    assert answers == [f"I am one/{tenant}" for tenant in tenants]
    assert max(len(set(batch)) for batch in served.engines[0].batches) == 3
    assert len(served.engines[0].batches) < 60


def test_an_answer_through_another_adapter_is_withheld(served):
    engine = served.engines[0]
    real = engine.sample
    other = served.server.state.server.worker.current.adapter_of["retail_b"]
    engine.sample = lambda requests: [row.model_copy(update={"adapter": other}) for row in real(requests)]
    answer = httpx.post(f"{served.url}/chat/completions", json={"model": "finops@bank_a", "messages": ASK})
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "isolation_violation")
    (line,) = served.lines()
    assert line["adapter_hash"] == served.release.adapters["retail_b"]  # the audit tells what was used, not what was asked
    assert not served.capture.read_text()


def test_one_request_that_breaks_the_engine_fails_alone(house):
    house.promote()
    house.gate = threading.Event()

    def say(weights, adapter, request):
        if b"poison" in bytes(request.prompt_ids):
            raise RuntimeError("boom")
        return "fine"

    house.say = say
    with serving(house.app(gather_ms=50)) as house.url, ThreadPoolExecutor(4) as pool:
        texts = ["a", "poison", "b", "c"]
        sent = [
            pool.submit(
                httpx.post, f"{house.url}/chat/completions", json={"model": "finops", "messages": [{"role": "user", "content": text}]}
            )
            for text in texts
        ]
        time.sleep(0.2)
        house.gate.set()
        answers = [item.result() for item in sent]
    assert [answer.status_code for answer in answers] == [200, 500, 200, 200]
    assert answers[1].json()["error"]["code"] == "internal_error"
    assert "boom" not in answers[1].text


def test_promotion_and_rollback_are_followed_without_a_restart(served):
    def ask():
        return httpx.post(f"{served.url}/chat/completions", json={"model": "finops@bank_a", "messages": ASK})

    def wait_for(text):
        deadline = time.monotonic() + 10
        while (answer := ask().json()["choices"][0]["message"]["content"]) != text:
            assert time.monotonic() < deadline, answer
            time.sleep(0.02)

    first = served.release
    second = served.promote("two")
    wait_for("I am two/bank_a")
    assert ask().headers["x-temper-release"] == second.id
    served.registry.rollback(reason="two is worse", who="test")
    wait_for("I am one/bank_a")
    assert ask().headers["x-temper-release"] == first.id
    by_release = {line["release"]: line["adapter_hash"] for line in served.lines()}
    assert by_release == {first.id: first.adapters["bank_a"], second.id: second.adapters["bank_a"]}
    assert "temper_swaps 2" in httpx.get(served.url.replace("/v1", "/metrics")).text


def test_a_request_ends_on_the_release_it_began_with(house):
    first = house.promote()
    house.gate = threading.Event()
    with serving(house.app()) as house.url, ThreadPoolExecutor(3) as pool:

        def post(text):
            return httpx.post(
                f"{house.url}/chat/completions",
                json={"model": "finops@bank_a", "messages": [{"role": "user", "content": text}]},
                timeout=30,
            )

        early = [pool.submit(post, "running"), pool.submit(post, "queued")]
        time.sleep(0.2)
        second = house.promote("two")
        deadline = time.monotonic() + 10
        while httpx.get(house.url.replace("/v1", "/healthz")).json()["release"] != second.id:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        late = pool.submit(post, "late")
        house.gate.set()
        answers = [item.result().json()["choices"][0]["message"]["content"] for item in (*early, late)]
    assert answers == ["I am one/bank_a", "I am one/bank_a", "I am two/bank_a"]
    assert sorted(line["release"] for line in house.lines()) == sorted([first.id, first.id, second.id])


def test_a_release_that_cannot_be_loaded_leaves_the_old_one_serving(house):
    first = house.promote()
    app = house.app(poll_seconds=60)
    with serving(app) as house.url:
        second = house.promote("two")
        damaged = house.registry.adapter_path(second, "bank_a") / "adapter"
        damaged.chmod(0o644)
        damaged.write_text("poisoned")
        app.state.server.worker.poll()
        health, deadline = house.url.replace("/v1", "/healthz"), time.monotonic() + 10
        while (state := httpx.get(health).json())["status"] != "degraded":
            assert time.monotonic() < deadline, state
            time.sleep(0.02)
        answer = httpx.post(f"{house.url}/chat/completions", json={"model": "finops@bank_a", "messages": ASK}).json()
    assert "adapter differs from its manifest" in state["fault"]
    assert state["release"] == first.id
    assert answer["choices"][0]["message"]["content"] == "I am one/bank_a"


def test_nothing_is_served_that_may_not_be(house, tmp_path):
    with pytest.raises(ReleaseError, match="no release or alias 'production'"):
        house.app()
    with pytest.raises(ReleaseError, match="is no registry"):
        app_for(ServeConfig(registry=tmp_path / "nowhere"))
    assert not (tmp_path / "nowhere").exists()
    made = house.promote(template_fingerprint="another")
    with pytest.raises(IntegrityError, match="another chat template"):
        house.app()
    changed = house.registry.adapter_path(made, "bank_a") / "adapter"
    changed.chmod(0o644)
    changed.write_text("poisoned")
    with pytest.raises(IntegrityError, match="differs from its manifest") as caught:
        house.app()
    assert caught.value.exit_code == 2


def test_a_release_without_a_template_fingerprint_is_served_with_a_warning(house, caplog):
    """Nothing can be compared then, and whoever serves it must know."""
    house.promote(template_fingerprint="double")  # what the doubles' template has
    with caplog.at_level("WARNING", logger="temper.serve"), serving(house.app()):
        assert caplog.messages == []
    made = house.promote("two")
    with caplog.at_level("WARNING", logger="temper.serve"), serving(house.app()):
        (told,) = caplog.messages
    for part in (made.id[:16], "records no chat template", "double", "template_fingerprint"):
        assert part in told


def test_a_release_past_its_last_day_stops_answering(house, monkeypatch):
    import datetime as dt

    house.promote(
        deprecation_plan=DeprecationPlan(deprecated_from=dt.date(2020, 1, 1), end=dt.date(2999, 6, 30), notice="use the next one")
    )
    with serving(house.app()) as house.url:
        fine = httpx.post(f"{house.url}/chat/completions", json={"model": "finops", "messages": ASK})
        assert fine.headers["sunset"].endswith("30 Jun 2999 23:59:59 GMT")
        assert fine.headers["deprecation"] == "@1577836800"  # 2020-01-01T00:00Z
        monkeypatch.setattr("temper.serve.app.today", lambda: dt.date(2999, 7, 1))
        ended = httpx.post(f"{house.url}/chat/completions", json={"model": "finops", "messages": ASK})
    assert (ended.status_code, ended.json()["error"]["code"]) == (410, "release_ended")


def test_served_traffic_is_kept_as_records_that_name_tenant_and_release(served):
    with client(served) as ai:
        ai.chat.completions.create(model="finops@bank_a", messages=ASK)
    (record,) = read_jsonl(served.capture, Record)
    assert [message.content for message in record.messages] == ["budget?", "I am one/bank_a"]
    told = record.provenance
    assert (told.privacy, told.access, told.tenant, told.generator) == ("internal", "bank_a", "bank_a", served.release.id)
    assert told.synthetic
    assert record.outcome.reward is None
    assert record.sampled[0].adapter.endswith(served.release.adapters["bank_a"])


def test_without_its_audit_line_nothing_is_answered(served, monkeypatch):
    def full(value):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(served.server.state.server.audit, "append", full)
    answer = httpx.post(f"{served.url}/chat/completions", json={"model": "finops", "messages": ASK})
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "audit_unavailable")
    assert "I am" not in answer.text


def test_too_many_waiting_requests_are_told_to_come_back(house):
    house.promote()
    house.gate = threading.Event()
    with serving(house.app(max_waiting=1, gather_ms=0)) as house.url, ThreadPoolExecutor(3) as pool:
        send = lambda: httpx.post(f"{house.url}/chat/completions", json={"model": "finops", "messages": ASK}, timeout=30)  # noqa: E731
        running = pool.submit(send)
        time.sleep(0.2)
        waiting = pool.submit(send)
        time.sleep(0.2)
        refused = send()
        house.gate.set()
        assert [running.result().status_code, waiting.result().status_code] == [200, 200]
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")


def test_a_taken_port_is_said_clearly(served):
    port = int(served.url.split(":")[2].split("/")[0])
    with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{port}"), serving(served.server, port=port):
        pass


def test_chat_talks_to_a_server(served):
    said, asked = [], iter(["hello", ""])
    chat(served.url, tenant="retail_b", ask=lambda prompt: next(asked), say=said.append)
    assert said == ["I am one/retail_b"]


def test_health_metrics_and_the_shipped_config(served):
    root = served.url.replace("/v1", "")
    assert httpx.get(f"{root}/healthz").json()["status"] == "ok"
    httpx.post(f"{served.url}/chat/completions", json={"model": "finops@bank_a", "messages": ASK})
    text = httpx.get(f"{root}/metrics").text
    assert 'temper_requests_total{tenant="bank_a",status="200",code=""} 1' in text
    assert 'temper_latency_seconds_bucket{le="+Inf"} 1' in text
    from pathlib import Path

    from temper.core.config import load_config

    assert load_config(ServeConfig, Path(__file__).parents[2] / "configs/serve.yaml").host == "127.0.0.1"
