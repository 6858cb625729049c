"""`temper serve` and `temper chat`: a release behind OpenAI's chat API, and a way to talk to it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from temper.cli.output import Overrides


def add_to(app: typer.Typer) -> None:
    """Put the commands on `app`."""
    app.command("serve", epilog="Example: temper serve configs/serve.yaml port=8080")(serve)
    app.command("chat", epilog="Example: temper chat --tenant bank_a")(chat)


def serve(
    config: Annotated[Path | None, typer.Argument(metavar="[CONFIG]", help="The YAML file of a server; without one, the defaults.")] = None,
    overrides: Overrides = None,
) -> None:
    """Serve the release that an alias points at, until interrupted."""
    from temper.cli.stages import typed_config
    from temper.core.config import apply_overrides, parse_config
    from temper.serve import ServeConfig, serve_config

    if config is not None and "=" in str(config):  # the file left out, and a key given first
        overrides, config = [str(config), *(overrides or [])], None
    cfg: Any = typed_config(config, overrides, stage="serve") if config else parse_config(ServeConfig, apply_overrides({}, overrides or []))
    serve_config(cfg)


def chat(
    url: Annotated[str, typer.Option("--url", help="The server, ending in /v1.")] = "http://127.0.0.1:8000/v1",
    tenant: Annotated[str | None, typer.Option("--tenant", help="Whose adapter answers.")] = None,
    model: Annotated[str | None, typer.Option("--model", help="A model that the server lists; else its first.")] = None,
    system: Annotated[str | None, typer.Option("--system", help="What stands before the conversation.")] = None,
    temperature: Annotated[float, typer.Option("--temperature", min=0.0, help="0 is greedy.")] = 0.0,
    api_key: Annotated[
        str | None, typer.Option("--api-key", envvar="TEMPER_API_KEY", help="The key, where the release asks for one.")
    ] = None,
) -> None:
    """Talk to a served release; an empty line ends it. Start one first with `temper serve`."""
    import httpx

    from temper.core.errors import TemperError
    from temper.serve import chat as talk

    try:
        talk(url, tenant=tenant, model=model, api_key=api_key, system=system, temperature=temperature)
    except httpx.HTTPError as error:
        raise TemperError(
            f"no answer from {url}", why=str(error), do="start a server with `temper serve`, or give its address with --url"
        ) from error
