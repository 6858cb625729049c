"""`temper config schema`: every key of every config, with its type and default."""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer(help="Configs: the keys that a YAML file may hold.", no_args_is_help=True, epilog="Example: temper config schema sft")


@app.callback()
def configs() -> None:
    """Configs: the keys that a YAML file may hold."""


@app.command("schema", epilog="Example: temper config schema rl > rl.schema.json")
def schema(
    stage: Annotated[str | None, typer.Argument(metavar="[STAGE]", help="Which config; without it, the names there are.")] = None,
) -> None:
    """Print the JSON Schema of a stage's config."""
    from temper.cli.output import print_json, print_table
    from temper.cli.stages import CONFIGS, config_class

    if stage is None:
        print_table(
            "temper config schema STAGE", ("stage", "its config"), [(name, place.replace(":", ".")) for name, place in CONFIGS.items()]
        )
    else:
        print_json(config_class(stage).model_json_schema())
