"""Tasks of an environment run on the server: tools executed, outcome verified, tenants kept apart, records captured."""

import json
import re

import httpx
import pytest
from serve_double import ScriptedEngine, release

from temper.core.records import Message, Outcome, Record, ToolSpec
from temper.core.storage import read_jsonl
from temper.registry import Registry
from temper.rollout.environment import Task
from temper.serve import create_app, serving
from temper.serve.audit import read_lines

ADD = ToolSpec(name="add", parameters={"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}})


class Sums:
    """Two numbers are added by a tool; the answer must be their sum."""

    name, version = "sums", "sums-1"

    def tasks(self, split, limit=None):
        made = [
            Task(id=f"{split}-{n}", messages=(Message(role="user", content=f"{n} plus 2?"),), tools=(ADD,), split=split, slice="sum",
                 answer={"sum": n + 2}, tenant="bank_a" if n == 1 else None, max_tokens=200)
            for n in (1, 2)
        ]  # fmt: skip
        return made[:limit]

    def open(self, task):
        return self

    def close(self):
        return None

    def call(self, call):
        return json.dumps({"sum": call.arguments["a"] + call.arguments["b"]})

    def verify(self, task, turns, session):
        right = turns[-1].content == f"It is {task.answer['sum']}."
        return Outcome(reward=float(right), checks={"sum": right}, detail={"expected": f"gold {task.answer['sum']}"})


def say(weights, adapter, request):
    prompt = bytes(i for i in request.prompt_ids if i).decode()
    if found := re.search(r'tool:\{"sum": (\d+)\}', prompt):
        return f"It is {found[1]}."
    number = re.search(r"(\d+) plus", prompt)[1]
    return f'<tool_call>{{"name": "add", "arguments": {{"a": {number}, "b": 2}}}}</tool_call>'


@pytest.fixture
def served(tmp_path):
    registry = Registry(tmp_path / "registry")
    made = release(registry, tmp_path)
    registry.promote(made.id, reason="test")
    app = create_app(
        registry,
        audit=tmp_path / "audit.jsonl",
        capture=tmp_path / "served.jsonl",
        environment=Sums(),
        open_engine=lambda path: ScriptedEngine(path, say),
    )
    with serving(app) as url:
        yield url, made, tmp_path


def test_a_task_is_run_with_its_tools_and_verified(served):
    url, made, root = served
    answer = httpx.post(f"{url}/episodes", json={"model": "finops@bank_a", "task": "dev-1"}).json()
    assert [message["role"] for message in answer["messages"]] == ["assistant", "tool", "assistant"]
    assert answer["messages"][1]["content"] == '{"sum": 3}'
    assert answer["messages"][2]["content"] == "It is 3."
    assert answer["outcome"]["reward"] == 1.0
    assert "gold" not in json.dumps(answer)
    (line,) = read_lines(root / "audit.jsonl")
    assert (line["tenant"], line["adapter_hash"], line["choices"]) == ("bank_a", made.adapters["bank_a"], 2)
    assert line["completion_tokens"] == answer["usage"]["completion_tokens"] > 0
    (record,) = read_jsonl(root / "served.jsonl", Record)
    assert (record.provenance.tenant, record.provenance.access, record.provenance.generator) == ("bank_a", "bank_a", made.id)
    assert record.outcome.reward == 1.0  # what was served and verified can be learnt from, after the firewall


def test_another_prompt_is_answered_but_not_judged(served):
    url, _, _ = served
    body = {"model": "finops", "task": "train-2", "messages": [{"role": "user", "content": "40 plus 2?"}]}
    answer = httpx.post(f"{url}/episodes", json=body).json()
    assert answer["messages"][-1]["content"] == "It is 42."
    assert answer["outcome"]["reward"] is None


def test_what_may_not_be_run(served):
    url, _, _ = served

    def refused(**body):
        answer = httpx.post(f"{url}/episodes", json={"model": "finops@retail_b", **body})
        return answer.status_code, answer.json()["error"]["code"]

    assert refused(task="dev-1") == (403, "tenant_not_yours")
    assert refused(task="dev-1", model="finops") == (403, "tenant_not_yours")
    assert refused(task="test-2") == (404, "task_not_found")  # the sealed split is not served
    assert refused(task="dev-2", temperature=-1) == (400, "invalid_value")
    assert refused(task="dev-2", model="finops@bank_z") == (403, "unknown_tenant")
    assert [task["id"] for task in httpx.get(f"{url}/tasks").json()["data"]] == ["train-1", "train-2", "dev-1", "dev-2"]


def test_without_an_environment_there_are_no_tasks(tmp_path):
    registry = Registry(tmp_path / "registry")
    registry.promote(release(registry, tmp_path).id, reason="test")
    with serving(create_app(registry, audit=tmp_path / "audit.jsonl", open_engine=lambda path: ScriptedEngine(path, say))) as url:
        assert httpx.post(f"{url}/episodes", json={"model": "finops", "task": "dev-1"}).json()["error"]["code"] == "no_environment"
        assert httpx.get(f"{url}/tasks").json()["data"] == []
