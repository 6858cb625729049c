"""The proof of isolation: a mixed crowd of requests, each answer compared with what its tenant's adapter says alone."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

from temper.core.progress import track
from temper.core.records import Message
from temper.registry import Registry, Release
from temper.rollout.engine import Request
from temper.serve.app import create_app
from temper.serve.audit import read_lines
from temper.serve.config import ServeConfig
from temper.serve.loaded import opener
from temper.serve.server import serving

QUESTIONS = (
    "How much of the {} budget is left?", "May I pay 48,000 to a new supplier for {}?", "Summarise {} spend in Q3 as JSON.",
    "Which policy covers {} travel?", "Transfer 90,000 from {} tonight.", "List the payables of {}.", "Close the month for {}.",
    "Is there a discrepancy in {}?",
)  # fmt: skip
DEPARTMENTS = ("Marketing", "Operations", "Finance", "Research", "Sales", "Legal")
PROMPTS = tuple(question.format(department) for question in QUESTIONS for department in DEPARTMENTS)


def make_requests(
    prompts: Sequence[str], tenants: list[str | None], unique: int, total: int, max_tokens: int, seed: int
) -> list[dict[str, Any]]:
    """`total` requests over `unique` different (tenant, prompt, seed) triples, shuffled."""
    chance = random.Random(seed)
    made = [
        {
            "tenant": tenants[i % len(tenants)], "prompt": prompts[(i // len(tenants)) % len(prompts)], "seed": i,
            "temperature": chance.choice((0.0, 1.0)), "max_tokens": max_tokens,
        }
        for i in range(unique)
    ]  # fmt: skip
    chosen = [made[i % unique] for i in range(total)]
    chance.shuffle(chosen)
    return chosen


def send_all(url: str, model: str, requests: list[dict[str, Any]], clients: int) -> list[tuple[str, str]]:
    """(request id, text) of every answer, in the order of `requests`."""
    with httpx.Client(base_url=url, timeout=600, limits=httpx.Limits(max_connections=clients)) as http, ThreadPoolExecutor(clients) as pool:

        def send(request: dict[str, Any]) -> tuple[str, str]:
            body = {"model": model, "messages": [{"role": "user", "content": request["prompt"]}]}
            body |= {name: request[name] for name in ("seed", "temperature", "max_tokens")}
            headers = {"X-Tenant": request["tenant"]} if request["tenant"] else {}
            answer = http.post("chat/completions", json=body, headers=headers)
            answer.raise_for_status()
            message = answer.json()["choices"][0]["message"]
            calls = [[call["function"]["name"], call["function"]["arguments"]] for call in message.get("tool_calls", ())]
            return answer.headers["x-request-id"], json.dumps([message["content"] or "", calls])

        return list(track(pool.map(send, requests), "mixed requests", total=len(requests)))


def say_alone(
    registry: Registry, release: Release, config: ServeConfig, wanted: list[dict[str, Any]], tenant: str | None
) -> dict[int, str]:
    """Request number -> what one tenant's adapter, alone in a fresh engine, answers to the request's prompt and seed."""
    engine = opener(config)(registry.weights_path(release))
    adapter = None
    if tenant is not None:
        adapter = "alone"
        engine.policy.load_adapter(adapter, registry.adapter_path(release, tenant))
    template, found = engine.policy.template, {}
    for request in track(wanted, f"{tenant or 'base'} alone"):
        prompt = tuple(template.prompt_ids([Message(role="user", content=request["prompt"])]))
        limits = {name: request[name] for name in ("seed", "temperature", "max_tokens")}
        (row,) = engine.sample([Request(prompt_ids=prompt, adapter=adapter, **limits)])
        found[request["seed"]] = json.dumps([template.parse(list(row.token_ids), calls=False).content, []])
    return found


def route(
    registry: Registry, alias: str, *, total: int = 1000, unique: int = 200, clients: int = 32, max_tokens: int = 24, seed: int = 0,
    scratch: Path, precision: str = "float32", prompts: Sequence[str] = PROMPTS,
) -> dict[str, Any]:  # fmt: skip
    """Serve `alias`, send `total` mixed requests, compare every one, and return the counts.

    An answer differs from what the adapter says alone by no more than rounding would make it (float32, precision kept
    equal on both sides); it never equals what another tenant's adapter says where that differs.
    """
    release, config = registry.resolve(alias), ServeConfig(precision=precision)  # type: ignore[arg-type]
    tenants: list[str | None] = [*sorted(release.adapters), None]
    requests = make_requests(prompts, tenants, min(unique, total), total, max_tokens, seed)
    audit = scratch / "audit.jsonl"
    app = create_app(registry, alias, audit=audit, precision=precision)
    with serving(app) as url:
        started = time.monotonic()
        answers = send_all(url, release.model_id, requests, clients)
        seconds = time.monotonic() - started
        rows, batches = app.state.server.worker.rows, app.state.server.worker.batches
    lines = {line["request_id"]: line for line in read_lines(audit)}
    different = list({request["seed"]: request for request in requests}.values())
    alone = {tenant: say_alone(registry, release, config, different, tenant) for tenant in tenants}
    wrong_hash = wrong_text = foreign_text = 0
    for request, (request_id, text) in zip(requests, answers, strict=True):
        tenant, number = request["tenant"], request["seed"]
        wrong_hash += lines[request_id]["adapter_hash"] != release.adapters.get(tenant or "")
        if text != alone[tenant][number]:
            wrong_text += 1
            foreign_text += any(text == alone[other][number] for other in tenants if other != tenant)
    told_apart = sum(all(alone[r["tenant"]][r["seed"]] != alone[o][r["seed"]] for o in tenants if o != r["tenant"]) for r in requests)
    return {
        "release": release.id, "tenants": len(release.adapters), "requests": total, "different_requests": len(different), "clients": clients,
        "audit_names_another_adapter": wrong_hash, "answers_equal_to_another_tenants": foreign_text, "answers_not_as_alone": wrong_text,
        "requests_where_tenants_differ": told_apart, "rows_per_batch": round(rows / max(batches, 1), 2), "seconds": round(seconds, 2),
        "requests_per_second": round(total / seconds, 2),
    }  # fmt: skip
