"""`temper template check`: does a model's chat template keep its contract between training and serving?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from temper.cli.output import Json

if TYPE_CHECKING:
    from temper.data.template import Template

app = typer.Typer(help="Chat templates.", no_args_is_help=True, epilog="Example: temper template check temper/environments/finops/base")


@app.callback()
def templates() -> None:
    """Chat templates."""


@app.command("check", epilog="Example: temper template check temper/environments/finops/base")
def check(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A checkpoint folder or hub name.")],
    as_json: Json = False,
) -> None:
    """Check that turns only append, tool calls and results survive, and the end of a turn is trained.

    Exit code 1 where the template breaks the contract.
    """
    from temper.cli.output import print_json, print_table

    template = template_of(model)
    findings = template.check()
    if as_json:
        print_json({"fingerprint": template.fingerprint, "findings": findings})
    else:
        rows = [(line.status, line.rule, line.observed, line.reason) for line in findings]
        print_table(f"template of {model} · {template.fingerprint[:16]}", ("", "check", "observed", "why"), rows)
    raise typer.Exit(1 if any(line.status == "fail" for line in findings) else 0)


def template_of(model: str) -> Template:
    """The template of a checkpoint's tokenizer. Raises DataError where there is none."""
    from pathlib import Path

    from transformers import AutoTokenizer

    from temper.core.errors import DataError
    from temper.data.template import Template

    folder = Path(model)
    looks_local = model.startswith((".", "/")) or model.count("/") > 1
    if looks_local and not folder.is_dir():
        raise DataError(f"{model} does not exist", do="give a checkpoint's folder, or a hub name such as Qwen/Qwen3-0.6B")
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{model} gives no tokenizer",
            why=str(error).splitlines()[0],
            do="give a checkpoint's folder, or a hub name such as Qwen/Qwen3-0.6B",
        ) from error
    return Template.of(tokenizer)
