"""How many of 1,000 mixed requests are answered through another tenant's adapter? It must be none.

    python benchmarks/tenant_routing.py --registry runs/demo/registry --alias production --requests 1000

A release is served for a moment on a free port of this machine. Clients send requests of every tenant (and of none) at
once, greedy and sampled with seeds, so that the engine decodes them in mixed batches. Each answer is then compared with
what the tenant's adapter says alone: a fresh engine that holds this one adapter, one row at a time. The audit file must
name, for every request, the content hash of the tenant's adapter. The exit code is 1 where one request fails either test.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
from temper.rollout.engine import Request

from temper.core.progress import track
from temper.core.storage import write_json
from temper.registry import Registry, Release
from temper.serve import ServeConfig, create_app, serving
from temper.serve.audit import read_lines
from temper.serve.loaded import opener

QUESTIONS = (
    "How much of the {} budget is left?", "May I pay 48,000 to a new supplier for {}?", "Summarise {} spend in Q3 as JSON.",
    "Which policy covers {} travel?", "Transfer 90,000 from {} tonight.", "List the payables of {}.", "Close the month for {}.",
    "Is there a discrepancy in {}?",
)  # fmt: skip
DEPARTMENTS = ("Marketing", "Operations", "Finance", "Research", "Sales", "Legal")


def make_requests(tenants: list[str | None], unique: int, total: int, max_tokens: int, seed: int) -> list[dict[str, Any]]:
    """`total` requests over `unique` different (tenant, prompt, seed) triples, shuffled."""
    chance = random.Random(seed)
    prompts = [question.format(department) for question in QUESTIONS for department in DEPARTMENTS]
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
) -> dict[int, list[str]]:
    """Request number -> what one tenant's adapter, alone in a fresh engine, answers to the request's prompt and seed."""
    from temper.core.records import Message

    engine = opener(config)(registry.weights_path(release))
    adapter = None
    if tenant is not None:
        adapter = "alone"
        engine.policy.load_adapter(adapter, registry.adapter_path(release, tenant))
    template, tokenizer, found = engine.policy.template, engine.policy.tokenizer, {}
    for request in track(wanted, f"{tenant or 'base'} alone"):
        prompt = tuple(template.prompt_ids([Message(role="user", content=request["prompt"])]))
        limits = {name: request[name] for name in ("seed", "temperature", "max_tokens")}
        (row,) = engine.sample([Request(prompt_ids=prompt, adapter=adapter, **limits)])
        ids = [token for token in row.token_ids if token not in template.stop_ids]
        message = template.parse(list(row.token_ids))
        text = tokenizer.decode(ids, skip_special_tokens=True) if message.tool_calls else message.content
        found[request["seed"]] = json.dumps([text, []])
    return found


def route(
    registry: Registry, alias: str, *, total: int = 1000, unique: int = 200, clients: int = 32, max_tokens: int = 24, seed: int = 0,
    scratch: Path, precision: str = "float32",
) -> dict[str, Any]:  # fmt: skip
    """Serve `alias`, send `total` mixed requests, compare every one, and return the counts."""
    release, config = registry.resolve(alias), ServeConfig(precision=precision)  # type: ignore[arg-type]
    tenants: list[str | None] = [*sorted(release.adapters), None]
    requests = make_requests(tenants, min(unique, total), total, max_tokens, seed)
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


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--registry", type=Path, default=Path("runs/registry"))
    parser.add_argument("--alias", default="production")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--unique", type=int, default=200)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--max-tokens", type=int, default=24)
    parser.add_argument("--out", type=Path)
    told = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        found = route(
            Registry(told.registry, create=False), told.alias, total=told.requests, unique=told.unique, clients=told.clients,
            max_tokens=told.max_tokens, scratch=Path(scratch),
        )  # fmt: skip
    print(json.dumps(found, indent=1))
    if told.out:
        write_json(told.out, found)
    return int(found["audit_names_another_adapter"] + found["answers_equal_to_another_tenants"] + found["answers_not_as_alone"] > 0)


if __name__ == "__main__":
    sys.exit(main())
