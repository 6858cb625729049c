"""`temper evaluate` and `temper gate`: what a model does, and whether that suffices."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from temper.cli.output import Json, Overrides

EXIT_CODES = {"promote": 0, "hold": 1, "cannot_tell": 3}


def add_to(app: typer.Typer) -> None:
    """Put the commands on `app`."""
    app.command(
        "evaluate", epilog="Example: temper evaluate configs/evaluate.yaml model=runs/demo/sft/model name=sft out=runs/evaluate/sft"
    )(evaluate)
    app.command("gate", epilog="Example: temper gate configs/gate.yaml --candidate runs/demo/evaluate/release --baseline runs/demo/evaluate/base")(gate)


def evaluate(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="The YAML file of an evaluation.")],
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Measure a model on one split of an environment; write report.json and records.jsonl."""
    from temper.cli.output import print_json, print_table
    from temper.cli.stages import typed_config

    cfg: Any = typed_config(config, overrides, stage="evaluate")
    result = run_evaluation(cfg)
    if as_json:
        print_json(result)
        return
    rows = [(name, *figure_row(item)) for name, item in result["figures"].items()]
    print_table(f"{cfg.name} on {cfg.split}", ("metric", "value", "95% interval", "cases"), rows)
    print(solved(result["figures"]))
    print(f"written: {result['report']}")


def solved(figures: dict[str, dict[str, Any]]) -> str:
    """Task success in a sentence; a score near zero is said as plainly as any other."""
    success = figures.get("instruction.task_success")
    if success is None or success["value"] is None:
        return "task success was not measured"
    done, count = round(success["value"] * success["count"]), success["count"]
    ends = "" if success["low"] is None else f"; 95% interval {success['low']:.1%} to {success['high']:.1%}"
    return f"{done or 'none'} of {count} tasks solved{ends}"


def figure_row(figure: dict[str, Any]) -> tuple[str, str, str]:
    """Value, interval and count as text."""
    if figure["value"] is None:
        return "not measured", "", str(figure["count"])
    percent = figure["unit"] == "rate"
    ends = [figure["low"], figure["high"]]
    text = [f"{end:.1%}" if percent else f"{end:.4g}" for end in ends if end is not None]
    value = f"{figure['value']:.1%}" if percent else f"{figure['value']:.4g} {figure['unit']}"
    return value, " to ".join(text) if len(text) == 2 else "none", str(figure["count"])


def run_evaluation(cfg: Any) -> dict[str, Any]:
    """Open the model, its adapters and the environment, and hand them to `evaluate.run`."""
    from temper.environments import load_environment
    from temper.evaluate.run import run
    from temper.rollout.engine import Engine

    environment = load_environment(cfg.environment, **cfg.environment_options)
    engine = Engine.load(cfg.model, precision=cfg.precision, device=cfg.device)
    for tenant, folder in cfg.adapters.items():
        engine.policy.load_adapter(tenant, folder)
    return run(cfg, engine, environment)


def plan_evaluation(cfg: Any) -> dict[str, Any]:
    """What an evaluation would ask: tasks by slice. No model is opened."""
    from collections import Counter

    from temper.environments import load_environment
    from temper.evaluate.suite import pick_tasks

    tasks = pick_tasks(load_environment(cfg.environment, **cfg.environment_options), cfg.split, cfg.limit)
    turns = sum(task.max_turns * task.max_tokens for task in tasks)
    plan = {"tasks": len(tasks), "by_slice": dict(sorted(Counter(task.slice for task in tasks).items())), "sampled_tokens_at_most": turns}
    return {"config": cfg.model_dump(mode="json"), "plan": plan}


def gate(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="The YAML file of a rule.")],
    overrides: Overrides = None,
    candidate: Annotated[Path, typer.Option("--candidate", help="The report to judge: report.json or its folder.")] = Path("report.json"),
    baseline: Annotated[Path | None, typer.Option("--baseline", help="The report it is compared with.")] = None,
    teacher: Annotated[
        Path | None, typer.Option("--teacher", help="The report of the teacher, where the rule asks what a student keeps.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Write the verdict here as JSON.")] = None,
    as_json: Json = False,
) -> None:
    """Judge reports by a rule, line by line. Exit code 0: promote; 1: hold; 3: cannot tell."""
    from temper.cli.output import print_json, print_table
    from temper.cli.stages import typed_config
    from temper.core.storage import write_json
    from temper.gate import decide

    rule: Any = typed_config(config, overrides, stage="gate")
    verdict = decide(read(candidate), read(baseline) if baseline else None, rule, teacher=read(teacher) if teacher else None)
    if out:
        write_json(out, verdict)
    if as_json:
        print_json(verdict)
    else:
        rows = [(line.status, line.rule, line.observed, line.required, line.reason) for line in verdict.findings]
        print_table(f"verdict: {verdict.decision.replace('_', ' ')}", ("", "line", "observed", "required", "why"), rows)
    raise typer.Exit(EXIT_CODES[verdict.decision])


def read(path: Path) -> Any:
    """The report in a file, or in a folder's report.json."""
    from temper.evaluate.run import read_report

    return read_report(path / "report.json" if path.is_dir() else path)
