"""The FastAPI application: OpenAI's chat API over one release, told apart by tenant, written down line by line."""

from __future__ import annotations

import asyncio
import calendar
import datetime as dt
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException

from temper.core.config import parse_config
from temper.core.errors import TemperError
from temper.registry import Registry
from temper.rollout.environment import Environment
from temper.serve.answering import Answering, note
from temper.serve.audit import AuditLine, JsonLines, now, served_again
from temper.serve.chat import completion, plan, require_adapter
from temper.serve.config import ServeConfig
from temper.serve.episodes import EpisodeRequest, QueuedEngine, Tasks, run_episode, turns
from temper.serve.errors import ApiError
from temper.serve.loaded import Loaded, OpenEngine, opener
from temper.serve.metrics import Metrics
from temper.serve.schema import ChatRequest, parse_body, parse_request
from temper.serve.stream import Ear, EventStream
from temper.serve.tenancy import list_models, tenant_of
from temper.serve.worker import Worker

log = logging.getLogger("temper.serve")
Answer = Callable[[Request, AuditLine, float], Awaitable[Response]]


class Server:
    """What one application holds: the worker, the audit file, the counters."""

    def __init__(
        self,
        registry: Registry,
        alias: str,
        open_engine: OpenEngine,
        audit: Path,
        capture: Path | None,
        config: ServeConfig,
        environment: Environment | None,
    ) -> None:
        self.config, self.alias = config, alias
        self.audit, self.capture = JsonLines(audit), JsonLines(capture) if capture else None
        self.metrics, self.tasks = Metrics(), Tasks(environment) if environment else None
        self.worker = Worker(
            registry, alias, open_engine, max_rows=config.max_rows, max_waiting=config.max_waiting, gather_s=config.gather_ms / 1000,
            poll_s=config.poll_seconds, override=config.override_deprecation,
        )  # fmt: skip

    def close(self) -> None:
        """Finish what is queued and close the files."""
        self.worker.close()
        self.audit.close()
        if self.capture:
            self.capture.close()

    async def body(self, http: Request) -> bytes:
        """The request's body. Raises ApiError 413 where it is longer than allowed, without reading the rest."""
        found = bytearray()
        async for piece in http.stream():
            found += piece
            if len(found) > self.config.max_body_bytes:
                raise ApiError(413, "body_too_large", f"the body is longer than {self.config.max_body_bytes} bytes")
        return bytes(found)

    async def handle(self, http: Request, answer: Answer) -> Response:
        """One request through `answer`: whatever becomes of it, it is written down."""
        started, line = time.monotonic(), AuditLine(request_id=secrets.token_hex(12), time=now(), status=200)
        try:
            return await answer(http, line, started)
        except ApiError as error:
            refused = error
        except asyncio.CancelledError:
            line.status, line.code = 499, "client_gone"
            self._write(line, started)
            raise
        except Exception:
            log.exception("request %s failed", line.request_id)
            refused = ApiError(500, "internal_error", f"the server failed on request {line.request_id}; its log says why")
        line.status, line.code = refused.status, refused.code
        try:
            self._write(line, started)
        except ApiError as error:
            refused = error
        return JSONResponse(refused.body(), status_code=refused.status, headers={"X-Request-Id": line.request_id, **refused.headers})

    async def chat(self, http: Request, line: AuditLine, started: float) -> Response:
        """One chat completion: understood, queued, answered."""
        request = parse_request(await self.body(http))
        loaded = self.worker.current  # the release this request begins with, and ends on
        line.release, line.stream = loaded.release.id, bool(request.stream)
        tenant = self.tenant(http, loaded, request)
        line.tenant = tenant
        self._require_alive(loaded)
        made = plan(request, loaded, tenant, default_tokens=self.config.default_max_tokens, constrain_tools=self.config.constrain_tools)
        ear = Ear(len(made.rows), loaded.expected(tenant))
        rows = [replace(row, heard=ear.listener(number)) for number, row in enumerate(made.rows)]
        job = self.worker.submit(loaded, rows, ear.again)
        asked = Answering(
            http, line, loaded, tenant, made, job, ear, asyncio.wrap_future(job.future), self.config, self.capture,
            write=lambda: self._write(line, started),
        )  # fmt: skip
        headers = self._headers(line, loaded)
        if request.stream:
            await asked.first_token()
            return EventStream(asked.events(), headers)
        answers = await asked.whole()
        asked.write()  # before a byte leaves: no answer without its audit line
        asked.keep(answers)
        return JSONResponse(completion(line.request_id, asked.model, loaded.release.id, made, answers), headers=headers)

    async def episode(self, http: Request, line: AuditLine, started: float) -> Response:
        """One task of the environment, its tools executed here, with the verifier's outcome."""
        if self.tasks is None:
            raise ApiError(404, "no_environment", "this server was started without an environment, so it runs no tasks")
        request = parse_body(EpisodeRequest, await self.body(http))
        loaded = self.worker.current
        line.release, line.tenant = loaded.release.id, self.tenant(http, loaded, request)
        self._require_alive(loaded)
        task, engine = await asyncio.to_thread(self.tasks.find, request, line.tenant), QueuedEngine(self.worker, loaded)
        adapter = loaded.expected(line.tenant)
        record = await asyncio.to_thread(run_episode, engine, self.tasks.environment, task, request, adapter)
        if engine.jobs:  # an episode may fail before its first turn: that is data, in its outcome
            note(line, engine.jobs[-1], loaded, engine.sampled)
            require_adapter([row.adapter for row in engine.sampled], adapter)
            line.finish_reason = engine.sampled[-1].finish_reason
        self._write(line, started)
        if self.capture:
            self.capture.append(
                served_again(record, loaded.release, tenant=line.tenant, licence=self.config.capture_licence, request_id=line.request_id)
            )
        # the outcome's detail may hold the gold answer: it goes into the captured record, never to the client
        body = {
            "id": f"episode-{line.request_id}", "object": "episode", "model": request.model, "task": task.id, "slice": task.slice,
            "messages": turns(record, task), "outcome": record.outcome.model_dump(mode="json", exclude={"detail"}),
            "usage": {"prompt_tokens": line.prompt_tokens, "completion_tokens": line.completion_tokens},
        }  # fmt: skip
        return JSONResponse(body, headers=self._headers(line, loaded))

    def list_tasks(self) -> list[dict[str, Any]]:
        """The tasks that may be asked for, without their answers."""
        found = self.tasks.by_id.values() if self.tasks else ()
        return [{"id": task.id, "object": "task", "slice": task.slice, "split": task.split, "tenant": task.tenant} for task in found]

    def tenant(self, http: Request, loaded: Loaded, request: ChatRequest | EpisodeRequest) -> str | None:
        """Whose request it is. Raises ApiError."""
        return tenant_of(
            loaded.release, self.alias, model=request.model, headers=http.headers.getlist("x-tenant"),
            metadata=request.metadata, authorization=http.headers.get("authorization"),
        )  # fmt: skip

    def _require_alive(self, loaded: Loaded) -> None:
        end = loaded.release.deprecation_plan
        if end.expired(today()) and not self.config.override_deprecation:
            raise ApiError(410, "release_ended", f"release {loaded.release.id[:16]} ended on {end.end}. {end.notice}".strip())

    def _write(self, line: AuditLine, started: float) -> None:
        line.latency_ms = round((time.monotonic() - started) * 1000, 2)
        if line.phase != "opened":
            self.metrics.add(line)
        try:
            self.audit.append(asdict(line))
        except (TemperError, OSError) as error:
            log.error("the audit line of request %s cannot be written: %s", line.request_id, error)
            raise ApiError(503, "audit_unavailable", "the audit log cannot be written, and nothing is answered without it") from error

    def models(self, http: Request, name: str | None = None) -> Response:
        """The models that the caller may name: the release, and one entry a tenant; or the one of that name."""
        loaded = self.worker.current
        try:
            shown = list_models(loaded.release, self.alias, http.headers.get("authorization"))
        except ApiError as error:
            return JSONResponse(error.body(), status_code=error.status)
        if name is None:
            return JSONResponse({"object": "list", "data": shown})
        for entry in shown:
            if entry["id"] == name:
                return JSONResponse(entry)
        missing = ApiError(404, "model_not_found", f"model {name[:96]!r} is not served here", param="model")
        return JSONResponse(missing.body(), status_code=404)

    def health(self) -> Response:
        """Which release serves, and what stands in the way of the one the alias points at."""
        worker = self.worker
        state = "failed" if not worker.alive() else "degraded" if worker.fault else "ok"
        body = {
            "status": state,
            "alias": self.alias,
            "release": worker.current.release.id,
            "waiting": worker.waiting(),
            "fault": worker.fault,
        }
        return JSONResponse(body, status_code=503 if state == "failed" else 200)

    def metrics_text(self) -> Response:
        """Counters and gauges."""
        worker = self.worker
        gauges = {
            "waiting": worker.waiting(),
            "batches": worker.batches,
            "rows": worker.rows,
            "swaps": worker.swaps,
            "degraded": float(worker.fault is not None),
        }
        return PlainTextResponse(self.metrics.text(gauges, worker.current.release.id), media_type="text/plain; version=0.0.4")

    def _headers(self, line: AuditLine, loaded: Loaded) -> dict[str, str]:
        """Which release answered, and when it ends (RFC 9745 Deprecation, RFC 8594 Sunset)."""
        end = loaded.release.deprecation_plan
        found = {"X-Request-Id": line.request_id, "X-Temper-Release": loaded.release.id}
        if end.deprecated_from is not None and today() >= end.deprecated_from:
            found["Deprecation"] = f"@{calendar.timegm(end.deprecated_from.timetuple())}"
        if end.end is not None:
            found["Sunset"] = end.end.strftime("%a, %d %b %Y 23:59:59 GMT")
        return found


def today() -> dt.date:
    """The day in UTC."""
    return dt.datetime.now(dt.UTC).date()


def create_app(
    registry: Registry, alias: str = "production", *, audit: Path, capture: Path | None = None, open_engine: OpenEngine | None = None,
    environment: Environment | None = None, **settings: Any,
) -> FastAPI:  # fmt: skip
    """The application over what `alias` points at, loaded before this returns. `settings` are fields of ServeConfig.

    Raises ReleaseError, IntegrityError, TemplateError or ConfigError where the release cannot be served.
    """
    config = parse_config(ServeConfig, {"alias": alias, "audit": audit, "capture": capture, **settings})
    server = Server(registry, alias, open_engine or opener(config), audit, capture, config, environment)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        server.close()

    app = FastAPI(title="temper", lifespan=lifespan, openapi_url=None)
    app.state.server = server
    app.add_exception_handler(HTTPException, _not_here)

    @app.post("/v1/chat/completions")
    async def chat_completions(http: Request) -> Response:
        return await server.handle(http, server.chat)

    @app.post("/v1/episodes")
    async def episodes(http: Request) -> Response:
        return await server.handle(http, server.episode)

    @app.get("/v1/tasks")
    async def tasks() -> Response:
        return JSONResponse({"object": "list", "data": await asyncio.to_thread(server.list_tasks)})

    @app.get("/v1/models")
    async def models(http: Request) -> Response:
        return server.models(http)

    @app.get("/v1/models/{name:path}")
    async def model(name: str, http: Request) -> Response:
        return server.models(http, name)

    @app.get("/healthz")
    async def healthz() -> Response:
        return server.health()

    @app.get("/metrics")
    async def metrics() -> Response:
        return server.metrics_text()

    return app


def _not_here(http: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    told = ApiError(status, "not_found" if status == 404 else "method_not_allowed", f"{http.method} {http.url.path} is not served here")
    return JSONResponse(told.body(), status_code=status)
