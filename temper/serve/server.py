"""Running the application: for good (`serve`), for a moment (`serving`), and talking to it (`chat`)."""

from __future__ import annotations

import errno
import ipaddress
import json
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI

from temper.core.config import parse_config
from temper.core.errors import ConfigError, ReleaseError, TemperError
from temper.registry import Registry
from temper.rollout.environment import Environment
from temper.serve.app import create_app
from temper.serve.config import ServeConfig

START_S = 30.0
APP_FIELDS = {"registry", "host", "port", "alias", "audit", "capture"}


def serve(
    registry_path: Path | str, alias: str = "production", host: str = "127.0.0.1", port: int = 8000, *,
    environment: Environment | None = None, **settings: Any,
) -> None:  # fmt: skip
    """Serve what `alias` points at until interrupted. `settings` are the other fields of ServeConfig.

    Raises ReleaseError, IntegrityError or ConfigError before anything listens.
    """
    serve_config(
        parse_config(ServeConfig, {"registry": registry_path, "alias": alias, "host": host, "port": port, **settings}), environment
    )


def serve_config(config: ServeConfig, environment: Environment | None = None) -> None:
    """`serve` for a whole ServeConfig, as configs/serve.yaml spells it."""
    app = app_for(config, environment)
    listener = listen(config.host, config.port)
    host, port = listener.getsockname()[:2]
    server = app.state.server
    release = server.worker.current.release
    if not _is_loopback(host) and not release.access_policy.api_keys:
        print(f"warning: {host} is reachable from other machines, and the release asks for no API key", file=sys.stderr)
    tenants = ", ".join(sorted(release.adapters)) or "none"
    print(f"serving {release.model_id} ({release.id[:16]}) on http://{host}:{port}/v1; tenants: {tenants}", file=sys.stderr, flush=True)
    uvicorn.Server(_uvicorn_config(app)).run(sockets=[listener])


def app_for(config: ServeConfig, environment: Environment | None = None) -> FastAPI:
    """The application that `config` describes."""
    registry = Registry(config.registry, create=False)
    settings = config.model_dump(exclude=APP_FIELDS)
    return create_app(registry, config.alias, audit=config.audit, capture=config.capture, environment=environment, **settings)


def listen(host: str, port: int) -> socket.socket:
    """A bound socket. Raises ConfigError where the address cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        why = "another program listens there" if error.errno == errno.EADDRINUSE else str(error)
        raise ConfigError(f"cannot listen on {host}:{port}", why=why, do="choose another port; 0 takes any free one") from error
    return listener


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _uvicorn_config(app: FastAPI) -> uvicorn.Config:
    return uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=30)


@contextmanager
def serving(app: FastAPI, *, host: str = "127.0.0.1", port: int = 0) -> Iterator[str]:
    """Serve `app` from a thread of this process for as long as the block runs; yields its URL, ending in /v1."""
    listener = listen(host, port)
    server = uvicorn.Server(_uvicorn_config(app))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="temper-http", daemon=True)
    thread.start()
    deadline = time.monotonic() + START_S
    while not server.started:
        if not thread.is_alive() or time.monotonic() > deadline:
            raise ReleaseError("the server did not start", why="its thread ended, or took too long", do="see the log above")
        time.sleep(0.01)
    try:
        yield f"http://{host}:{listener.getsockname()[1]}/v1"
    finally:
        server.should_exit = True
        thread.join(timeout=60)
        listener.close()


def chat(
    url: str, *, tenant: str | None = None, model: str | None = None, api_key: str | None = None, system: str | None = None,
    temperature: float = 0.0, ask: Callable[[str], str] = input, say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:  # fmt: skip
    """Talk to a server at `url` (ending in /v1) until end of input or an empty line; returns the conversation."""
    headers = {"X-Tenant": tenant} if tenant else {}
    if api_key:
        headers["Authorization"] = f"Bearer {api_key}"
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    with httpx.Client(base_url=url, headers=headers, timeout=300) as client:
        name = model or _first_model(client, tenant)
        while text := _ask(ask):
            messages.append({"role": "user", "content": text})
            answer = _post(client, {"model": name, "messages": messages, "temperature": temperature})
            message = {key: value for key, value in answer["choices"][0]["message"].items() if value is not None}
            messages.append(message)
            say(message.get("content") or "")
            for call in message.get("tool_calls", ()):
                say(f"→ {call['function']['name']}({call['function']['arguments']})")
            if message.get("tool_calls"):
                say("(no tool runs here; the conversation starts afresh)")
                messages = messages[: 1 if system else 0]
    return messages


def _first_model(client: httpx.Client, tenant: str | None) -> str:
    shown = _checked(client.get("models"))["data"]
    for entry in shown:
        if (tenant is None and entry["parent"] is None) or (tenant and entry["id"].endswith(f"@{tenant}")):
            return str(entry["id"])
    raise ReleaseError(
        f"the server has no model for tenant {tenant!r}", why=f"it serves {[entry['id'] for entry in shown]}", do="name one of them"
    )


def _ask(ask: Callable[[str], str]) -> str:
    try:
        return ask("> ").strip()
    except EOFError:
        return ""


def _post(client: httpx.Client, body: dict[str, Any]) -> dict[str, Any]:
    return _checked(client.post("chat/completions", json=body))


def _checked(response: httpx.Response) -> dict[str, Any]:
    if response.status_code == 200:
        found: dict[str, Any] = response.json()
        return found
    try:
        told = response.json()["error"]["message"]
    except (json.JSONDecodeError, KeyError, TypeError):
        told = response.text[:200]
    raise TemperError(
        f"the server answered {response.status_code}", why=told, do="see the server's log; X-Request-Id names the line of its audit file"
    )
