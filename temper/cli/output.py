"""What commands print: one JSON value for a program, a table for a person."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, redirect_stdout
from typing import Annotated, Any

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON value, for a program to read.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Keys to set over the file's, dotted: optim.lr=1e-4.")
]


def print_json(value: Any) -> None:
    """One JSON value on stdout."""
    from temper.core.hashing import canonical_json

    print(json.dumps(json.loads(canonical_json(value)), indent=1, ensure_ascii=False))


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """A table on stdout. What is None is shown as a dash: absent is not zero."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, header_style="dim", show_header=any(columns), pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(show(cell)) for cell in row))
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    if title:
        console.print(Text(title, style="bold"))
    console.print(table)


def print_facts(title: str, facts: dict[str, Any]) -> None:
    """A nested mapping as one line a leaf."""
    print_table(title, ("", ""), flat(facts))


def flat(value: dict[str, Any], above: str = "") -> list[tuple[str, Any]]:
    """The leaves of a nested mapping with their dotted names."""
    rows: list[tuple[str, Any]] = []
    for name, item in value.items():
        dotted = f"{above}{name}"
        rows += flat(item, f"{dotted}.") if isinstance(item, dict) and item else [(dotted, item)]
    return rows


def show(value: Any) -> str:
    """A cell as text: numbers with six significant digits, lists comma-separated, None as a dash."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(show, value)) or "–"
    return str(value) if value != {} else "–"


def stdout_to_stderr() -> AbstractContextManager[Any]:
    """While this is open, what rooms print goes to stderr: stdout is for the command's own answer."""
    return redirect_stdout(sys.stderr)


def print_plan(title: str, plan: dict[str, Any]) -> None:
    """A dry run: the resolved config as YAML, then the plan; one row a step where it has several."""
    import yaml

    print(f"# {title}\n# resolved config")
    print(yaml.safe_dump(plan["config"], sort_keys=False, allow_unicode=True, width=120))
    for name, part in plan.items():
        if name == "steps":
            print_table("steps", ("phase", "stage", "config", "writes", *ESTIMATED, "how it was found"), [step_row(step) for step in part])
        elif name == "evaluations":
            print_table("evaluations", EVALUATED, [[item.get(key) for key in EVALUATED[:-1]] + [item["seconds_from"]] for item in part])
        elif name != "config":
            print_facts(name, part if isinstance(part, dict) else {"": part})


ESTIMATED = ("rows", "tokens", "steps", "memory MB", "seconds")
EVALUATED = ("phase", "split", "tasks", "tokens", "seconds", "how it was found")


def step_row(step: dict[str, Any]) -> tuple[Any, ...]:
    """One step of a plan: what it is, and what it is estimated to cost (memory: weights, gradients and the optimizer's moments)."""
    cost, named = step.get("estimate"), (step["phase"], step["stage"], step["config"], step["out"])
    if not isinstance(cost, dict):
        return (*named, *[None] * len(ESTIMATED), cost)
    memory = sum(cost.get(part) or 0 for part in ("weights_mb", "optimizer_mb"))
    return (*named, cost.get("rows"), cost.get("tokens"), cost.get("steps"), memory or None, cost.get("seconds"), cost.get("seconds_from"))
