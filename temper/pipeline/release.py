"""From a passing verdict to a served release and back: gate, register, promote, serve, roll back."""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from temper.core.config import load_config
from temper.core.errors import MissingDependency
from temper.core.records import Message, ToolCall
from temper.core.reports import Report, Verdict
from temper.core.run import TRAINING_ROOMS, RunDirectory
from temper.core.storage import folder_hash, read_json, write_json
from temper.data.golden import read_card
from temper.data.template import Template
from temper.gate.decide import decide
from temper.gate.rule import GateRule
from temper.pipeline.config import Phase, PipelineConfig
from temper.registry import Registry
from temper.registry.release import AccessPolicy, Release
from temper.serve.config import ServeConfig
from temper.serve.routing import route
from temper.serve.server import app_for, serving

CLIENTS, ROUTING_UNIQUE = 32, 48
AFTERWARDS = ("serve", "report")  # work that reads a release: were it part of one, each lap would make another


def judge(rule_path: Path, candidate: Report, baseline: Report | None, out: Path, *, teacher: Report | None = None) -> Verdict:
    """The gate's verdict, written to `out`."""
    verdict = decide(candidate, baseline, load_config(GateRule, rule_path), teacher=teacher)
    write_json(out, verdict)
    return verdict


def register(cfg: PipelineConfig, phase: Phase, report: Report, verdict: Verdict, parents: tuple[str, ...] = ()) -> Release:
    """The complete snapshot of a phase in the registry: weights, adapters, manifests, report, verdict."""
    data = Path(cfg.run) / "data"
    manifests = {path.parent.name: folder_hash(path.parent) for path in sorted(data.glob("*/manifest.json"))}
    reward = {"verifier": report.settings["environment_version"]}
    return Registry(cfg.release.registry).register(
        model_id=cfg.release.model_id, base_model_id=cfg.release.base_model_id, weights=Path(phase.model),
        adapters={tenant: Path(path) for tenant, path in phase.adapters.items()}, parents=parents, training_data_manifest=manifests,
        reward_manifest=reward, eval_manifest={report.split: report.suite_hash}, policy_manifest=stage_keys(cfg), report=report, verdict=verdict,
        access_policy=AccessPolicy(tenants=tuple(phase.adapters)), template_fingerprint=trained_template(phase.model),
    )  # fmt: skip


def trained_template(model: str) -> str:
    """The fingerprint of the template that `model` was trained with: its card's, or its tokenizer's where it has none."""
    kept = read_card(Path(model))
    return kept.fingerprint if kept else Template.of(AutoTokenizer.from_pretrained(model)).fingerprint


def stage_keys(cfg: PipelineConfig) -> dict[str, str]:
    """Every stage that stands behind the models, by the hash of its config, inputs and code; not what is made of a release."""
    described = {path.parent.name: read_json(path) for path in sorted(Path(cfg.run).glob("*/stage.json"))}
    return {name: found["key"] for name, found in described.items() if found["stage"] not in AFTERWARDS}


def exercised(cfg: PipelineConfig, first: Release, second: Release, environment: Any) -> dict[str, Any]:
    """What `exercise` found, made once for these releases; read back while the registry still holds the alias."""
    release, started = cfg.release, time.monotonic()
    settings = {"alias": release.alias, "registry": release.registry, "routing_requests": release.routing_requests}
    folder = RunDirectory.create(
        Path(cfg.run) / "serve", stage="serve", config=settings, rooms=(*TRAINING_ROOMS, "serve", "registry", "pipeline"),
        inputs={"first": first.id, "second": second.id, "environment": environment.version},
    )  # fmt: skip
    if folder.done and Registry(release.registry).current(release.alias) is not None:
        print(f"unchanged: {release.alias} was served and rolled back in {folder.path} (key {folder.key[:12]})", file=sys.stderr)
        return folder.result()
    return folder.finish(exercise(cfg, first, second, environment, folder.path), started)


def exercise(cfg: PipelineConfig, first: Release, second: Release, environment: Any, folder: Path) -> dict[str, Any]:
    """Promote both releases in turn, serve, route mixed tenants, roll back under the running server, and go forward again.

    What the server audits and captures stands in `folder`.
    """
    registry, alias, reason = Registry(cfg.release.registry), cfg.release.alias, f"pipeline {cfg.run}"
    registry.promote(first.id, alias, reason=reason)
    registry.promote(second.id, alias, reason=reason)
    audit, capture = folder / "audit.jsonl", folder / "captured.jsonl"
    for left in (audit, capture):  # by a go that was killed
        left.unlink(missing_ok=True)
    settings = ServeConfig(registry=Path(cfg.release.registry), alias=alias, audit=audit, capture=capture, poll_seconds=0.2)
    with serving(app_for(settings, environment)) as url:
        shown = conversation(url, environment, second)
        started = time.monotonic()
        registry.rollback(alias, reason="rollback exercised by the pipeline")
        back = wait_for(url, first.id)
        seconds = time.monotonic() - started
        registry.promote(second.id, alias, reason="forward again after the rollback exercise")
        forward = wait_for(url, second.id)
    routing = prove_routing(cfg, registry, alias, folder / "routing")
    check = registry.rollback_check(second.id, previous=first.id)
    return {
        "conversation": shown, "routing": routing or {},
        "rollback": {"to": first.id, "worked": back and forward, "seconds": round(seconds, 2), "check": check.model_dump(mode="json")},
        "history": [event.model_dump(mode="json") for event in registry.history(alias)],
    }  # fmt: skip


def openai_client(url: str) -> Any:
    """The real OpenAI client, pointed at our server. Raises MissingDependency."""
    try:
        from openai import OpenAI
    except ImportError as error:
        raise MissingDependency(
            "the package `openai` is absent",
            why="the pipeline talks to its server through the real client",
            do="pip install 'temper[demo]'",
        ) from error
    return OpenAI(base_url=url, api_key="unused", max_retries=0, timeout=120)


def conversation(url: str, environment: Any, release: Release) -> list[dict[str, Any]]:
    """One tool conversation through the real client: ask, run the tools the model calls, and hand their results back."""
    client = openai_client(url)
    tasks = environment.tasks("dev", 4)
    task = next((task for task in tasks if task.slice == "lookup"), tasks[0])
    messages: list[dict[str, Any]] = [openai_message(message) for message in task.messages]
    tools = [spec.openai() for spec in task.tools]
    session = environment.open(task)
    for _ in range(task.max_turns):
        reply = client.chat.completions.create(
            model=client.models.list().data[0].id,
            messages=messages,
            tools=tools,
            temperature=0,
            max_tokens=task.max_tokens,
            extra_headers={"X-Tenant": task.tenant} if release.adapters else {},
        )
        message = reply.choices[0].message
        messages.append(message.model_dump(exclude_none=True))
        if not message.tool_calls:
            break
        for call in message.tool_calls:
            result = session.call(ToolCall(name=call.function.name, arguments=json.loads(call.function.arguments)))
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
    session.close()
    return messages


def openai_message(message: Message) -> dict[str, Any]:
    """A message as the OpenAI API spells it."""
    spelt: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        spelt["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": json.dumps(call.arguments)}}
            for call in message.tool_calls
        ]
    if message.role == "tool":
        spelt["tool_call_id"] = message.tool_call_id
    return spelt


def prove_routing(cfg: PipelineConfig, registry: Registry, alias: str, scratch: Path) -> dict[str, Any] | None:
    """Mixed requests of all tenants, each answer compared with what its adapter says alone; None where none are asked for."""
    if not cfg.release.routing_requests:
        return None
    shutil.rmtree(scratch, ignore_errors=True)
    return route(
        registry, alias, total=cfg.release.routing_requests, unique=ROUTING_UNIQUE, clients=CLIENTS, max_tokens=12, scratch=scratch
    )


def wait_for(url: str, release_id: str, seconds: float = 30.0) -> bool:
    """Whether the running server came to serve that release in time."""
    client = openai_client(url)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if any(release_id in json.dumps(model.model_dump()) for model in client.models.list().data):
            return True
        time.sleep(0.1)
    return False
