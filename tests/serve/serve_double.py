"""A scripted engine behind the real server: it says what the test tells it to, through the engine's own door."""

import hashlib
import json
import threading
import time
from types import SimpleNamespace

from temper.core.records import Message, Sampled, ToolCall
from temper.core.reports import Finding, Verdict
from temper.core.storage import whole_folder
from temper.data.reading import TurnReader
from temper.data.syntax import CallSyntax
from temper.registry import AccessPolicy, artifact_hash

STOP = 0


def folder(path, **files):
    with whole_folder(path) as scratch:
        for name, text in files.items():
            (scratch / name).write_text(text)
    return path


def verdict_on(artifact):
    finding = Finding(rule="tools.precision", status="pass", observed="0.95", required=">= 0.90", reason="enough")
    return Verdict(decision="promote", findings=(finding,), evidence={"candidate_model": artifact})


def release(registry, root, text="one", tenants=("bank_a", "retail_b", "saas_c"), **fields):
    """Register and return a release whose 'weights' are `text`, with one adapter a tenant."""
    weights = folder(root / f"w-{text}", weights=text)
    adapters = {tenant: folder(root / f"a-{text}-{tenant}", adapter=f"{text}/{tenant}") for tenant in tenants}
    hashes = {tenant: registry.store.add(path) for tenant, path in adapters.items()}
    judged = verdict_on(artifact_hash(registry.store.add(weights), hashes))
    fields.setdefault("access_policy", AccessPolicy())
    return registry.register(model_id="finops", base_model_id="finops-base", weights=weights, adapters=adapters, verdict=judged, **fields)


class Template:
    fingerprint, stop_ids, pad_id = "double", frozenset({STOP}), STOP

    def require(self):
        return None

    def prompt_ids(self, messages, tools=()):
        shown = "|".join(f"{m.role}:{m.content}{[c.name for c in m.tool_calls]}" for m in messages) + "|" + ",".join(t.name for t in tools)
        return list(shown.encode())

    def append(self, ids, messages, tools=()):
        return [*ids, *"".join(f"|{m.role}:{m.content}" for m in messages).encode()]

    def reader(self, calls=True, stops=()):
        marked = CallSyntax("<tool_call>", "</tool_call>", "arguments") if calls else None
        return TurnReader(lambda ids: bytes(ids).decode(errors="replace"), {STOP}, (), None, "", marked, stops)

    def parse(self, ids, calls=True):
        text = bytes(i for i in ids if i != STOP).decode()
        said, marked, written = text.partition("<tool_call>")
        if calls and marked:
            call = json.loads(written.removesuffix("</tool_call>"))
            return Message(role="assistant", content=said, tool_calls=(ToolCall(name=call["name"], arguments=call["arguments"]),))
        return Message(role="assistant", content=text)


class ScriptedEngine:
    """`say(weights, adapter text, request)` gives the answer; `gate` holds every batch back while it is cleared."""

    def __init__(self, weights, say, gate=None):
        self.weights, self.say, self.gate = (weights / "weights").read_text(), say, gate
        self.adapters, self.batches, self.thread = {}, [], None
        self.pace, self.cut, self.routed = 0.0, [], lambda request: request.adapter
        self.context = 4096
        text = SimpleNamespace(max_position_embeddings=self.context)
        config = SimpleNamespace(get_text_config=lambda: text)
        tokenizer = SimpleNamespace(decode=lambda ids, **_: bytes(ids).decode(errors="replace"))
        self.policy = SimpleNamespace(
            template=Template(), tokenizer=tokenizer, model=SimpleNamespace(config=config), path='double', version=0,
            adapter_hash=lambda name: digest(self.adapters[name]),
            load_adapter=lambda name, path: self.adapters.__setitem__(name, (path / "adapter").read_text()),
        )  # fmt: skip

    def sample(self, requests):
        assert self.thread in (None, threading.get_ident()), "two threads used one engine"
        self.thread = threading.get_ident()
        if self.gate is not None:
            self.gate.wait(20)
        self.batches.append([request.adapter for request in requests])
        time.sleep(0.002)
        return [self._one(request) for request in requests]

    def _one(self, request):
        text = self.say(self.weights, self.adapters.get(request.adapter), request)
        ids = list(text.encode())
        short = len(ids) + 1 > request.max_tokens
        ids = ids[: request.max_tokens] if short else [*ids, STOP]
        for number, token in enumerate(ids):
            time.sleep(self.pace)
            if request.heard is not None and not request.heard(token, self.routed(request)):
                self.cut.append(number)
                return self._sampled(request, ids[: number + 1], "error")
        return self._sampled(request, ids, "length" if short else "stop")

    def _sampled(self, request, ids, reason):
        return Sampled(
            prompt_ids=tuple(request.prompt_ids), token_ids=tuple(ids), logprobs=tuple(-0.5 for _ in ids),
            finish_reason=reason, temperature=request.temperature, adapter=request.adapter,
        )  # fmt: skip


def digest(text):
    return hashlib.sha256(text.encode()).hexdigest()
