"""Imports point one way. The table is the house plan's; imports inside functions count as much as those at the top."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1] / "temper"
INTERFACE = ("rollout.environment", "rollout.tools", "rollout.retrieval", "rollout.verifiers")

# room -> the rooms, or modules of rooms, that it may import beside itself
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "core": (),
    "traces": ("core",),
    "firewall": ("core",),
    "data": ("core",),
    "policy": ("core", "data"),
    "rollout": ("core", "data", "policy"),
    "environments": ("core", *INTERFACE),
    "train": ("core", "data", "policy", "rollout", "environments"),  # environments by name alone: see BY_NAME
    "evaluate": ("core", "data", "rollout"),
    "gate": ("core",),
    "registry": ("core",),
    "serve": ("core", "rollout", "registry"),
    "report": ("core",),
}
KNOWS_ALL = ("cli", "pipeline")
BY_NAME = {"train": ("environments",)}  # never by an import statement: only importlib.import_module("temper.environments")

# room -> libraries that have no business in it
MUST_NOT_IMPORT: dict[str, tuple[str, ...]] = {
    "core": ("torch", "transformers", "httpx", "requests", "urllib", "typer"),
    "traces": ("torch", "transformers", "typer"),
    "firewall": ("torch", "transformers", "typer"),
    "data": ("typer",),
    "policy": ("typer", "argparse"),
    "rollout": ("typer", "argparse"),
    "environments": ("torch", "transformers", "typer"),
    "train": ("typer", "argparse", "click"),
    "evaluate": ("typer", "argparse"),
    "gate": ("torch", "transformers", "typer", "httpx", "sqlalchemy", "pathlib", "os", "json"),
    "registry": ("torch", "transformers", "typer"),
    "serve": ("typer", "argparse"),
    "report": ("torch", "transformers", "typer", "httpx"),
}


def imports_of(path: Path, *, by_name: bool = True) -> list[tuple[int, str]]:
    """(line, dotted name) of every import in a file, wherever it stands; `from a import b` counts as a.b.

    With `by_name`, import_module("a.b") counts too.
    """
    found: list[tuple[int, str]] = []
    package = ("temper", *path.relative_to(ROOT).parent.parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            found += [(node.lineno, f"{module}.{alias.name}") for alias in node.names]
        elif by_name and isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            found += [(node.lineno, argument.value) for argument in node.args if isinstance(argument, ast.Constant)]
    return found


def faults_of(path: Path) -> list[str]:
    """Every import of a file that its room may not make."""
    room = path.relative_to(ROOT).parts[0].removesuffix(".py")
    faults = []
    for line, name in imports_of(path):
        top, _, inner = name.partition(".")
        if top in MUST_NOT_IMPORT.get(room, ()):
            faults.append(f"{path.relative_to(ROOT)}:{line} imports {name}, which has no business in {room}")
        if top != "temper" or not inner or room in KNOWS_ALL:
            continue
        allowed = (room, *MAY_IMPORT[room])
        if not any(inner == entry or inner.startswith(f"{entry}.") for entry in allowed):
            faults.append(f"{path.relative_to(ROOT)}:{line} imports {name}; {room} may import {', '.join(allowed)}")
    return faults


def files() -> list[Path]:
    return [path for path in sorted(ROOT.rglob("*.py")) if path != ROOT / "__init__.py"]


def test_every_room_stands_in_the_table():
    rooms = {path.relative_to(ROOT).parts[0].removesuffix(".py") for path in files()}
    assert rooms == set(MAY_IMPORT) | set(KNOWS_ALL)
    assert set(MUST_NOT_IMPORT) == set(MAY_IMPORT)


@pytest.mark.parametrize("room", sorted(MAY_IMPORT))
def test_a_room_imports_only_what_the_table_allows(room):
    faults = [fault for path in files() if path.relative_to(ROOT).parts[0] == room for fault in faults_of(path)]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("room", sorted(BY_NAME))
def test_what_is_known_by_name_is_never_imported(room):
    statements = [name for path in files() if path.relative_to(ROOT).parts[0] == room for _, name in imports_of(path, by_name=False)]
    assert [name for name in statements for entry in BY_NAME[room] if name.startswith(f"temper.{entry}")] == []


def test_no_room_that_others_stand_on_knows_the_pipeline_or_the_command_line():
    above = [(path, name) for path in files() for _, name in imports_of(path) if name.split(".")[:2] in (["temper", "cli"], ["temper", "pipeline"])]
    assert {path.relative_to(ROOT).parts[0] for path, _ in above} <= set(KNOWS_ALL)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import torch", "imports torch"),
        ("def f():\n    from temper.train import sft", "imports temper.train.sft"),
        ("from temper import serve", "imports temper.serve"),
        ("from ..registry import Registry", "imports temper.registry.Registry"),
        ("import os.path", "imports os.path"),
        ("import importlib\nimportlib.import_module('temper.train.rl')", "imports temper.train.rl"),
    ],
)
def test_the_check_sees_an_import_wherever_it_hides(tmp_path, monkeypatch, source, expected):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    hidden = tmp_path / "gate" / "hidden.py"
    hidden.parent.mkdir()
    hidden.write_text(source)
    assert [fault for fault in faults_of(hidden) if expected in fault]


def test_the_check_lets_through_what_is_allowed(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    fine = tmp_path / "gate" / "fine.py"
    fine.parent.mkdir()
    fine.write_text("import math\nfrom temper.core.reports import Report\nfrom temper.gate.rule import GateRule\nfrom . import rule\n")
    assert faults_of(fine) == []
