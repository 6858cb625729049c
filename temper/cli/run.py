"""`temper run`: a YAML file, the stage it names, and that room's `run`."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from temper.cli.output import Json, Overrides

EXAMPLE = "Example: temper run configs/sft.yaml optim.lr=5e-4 epochs=2"


def add_to(app: typer.Typer) -> None:
    """Put the command on `app`."""
    app.command("run", epilog=EXAMPLE)(run)


def run(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="The YAML file of a stage or of a pipeline.")],
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resolved config, the plan, and what it would cost. Nothing is trained.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Run the stage or pipeline that a YAML file describes.

    Done work is not done again. After an interruption the same command goes on from the last checkpoint.
    """
    from temper.cli.output import print_facts, print_json, print_plan, stdout_to_stderr

    started = time.monotonic()
    with stdout_to_stderr():
        title, result = run_file(config, overrides or [], dry_run=dry_run)
    if os.environ.get("RANK", "0") != "0":
        return  # of several processes that torchrun started, the first one answers
    if as_json:
        print_json(result)
    elif dry_run:
        print_plan(f"{title}: nothing was run", result)
    else:
        print_facts(f"{title} · {time.monotonic() - started:.1f} s", result)


def say_what_is_logged() -> None:
    """Put the rooms' log on stderr: how rows are laid out and why, what a base in four bits takes, what is not as it was asked for."""
    log = logging.getLogger("temper")
    if log.handlers or os.environ.get("RANK", "0") != "0":
        return
    spoken = logging.StreamHandler()
    spoken.setFormatter(logging.Formatter("%(message)s"))
    log.addHandler(spoken)
    log.setLevel(logging.INFO)


def run_file(path: Path, overrides: list[str], *, dry_run: bool) -> tuple[str, dict[str, Any]]:
    """Run, or only plan, what `path` describes; a title and what came of it."""
    from temper.cli.stages import config_class, load_module, read_values, stage_of, typed_config
    from temper.core.errors import ConfigError

    stage = stage_of(path, read_values(path, overrides))
    title = f"{stage} {path}"
    if stage == "pipeline":
        from temper.pipeline.lap import run as run_pipeline

        return title, run_pipeline(path, overrides, dry_run=dry_run)
    if stage == "serve":
        raise ConfigError(f"{path} configures a server", why="a server runs until it is stopped", do=f"temper serve {path}")
    if stage == "gate":
        do = f"temper gate {path} --candidate REPORT --baseline REPORT"
        raise ConfigError(f"{path} is a rule", why="a rule needs reports to judge", do=do)
    say_what_is_logged()
    cfg = typed_config(path, overrides)
    if stage == "evaluate":
        from temper.cli.judge import plan_evaluation, run_evaluation

        return title, plan_evaluation(cfg) if dry_run else run_evaluation(cfg)
    module = load_module(config_class(stage).__module__)
    if not dry_run:
        return title, module.run(cfg)
    plan = {"config": cfg.model_dump(mode="json")}
    return title, plan | ({"estimate": module.estimate(cfg).model_dump(mode="json")} if hasattr(module, "estimate") else {})
