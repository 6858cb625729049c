"""`temper releases`: what there is, what is served, and the way back."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from temper.cli.output import Json

if TYPE_CHECKING:
    from temper.registry import AliasEvent, Registry

app = typer.Typer(help="Releases: list, show, promote, roll back.", no_args_is_help=True, epilog="Example: temper releases show production")

Where = Annotated[Path, typer.Option("--registry", help="The registry's folder.")]
Reason = Annotated[str, typer.Option("--reason", help="Why: it stays in the alias's history.")]
RUNS = Path("runs/registry")


def open_registry(path: Path) -> Registry:
    """The registry in a folder that is one. Raises ReleaseError."""
    from temper.registry import Registry

    return Registry(path, create=False)


@app.command("list", epilog="Example: temper releases list --json")
def list_releases(registry: Where = RUNS, as_json: Json = False) -> None:
    """Every release, oldest first, with the aliases that point at it."""
    from temper.cli.output import print_json, print_table

    opened = open_registry(registry)
    aliases = opened.aliases()
    found = opened.list()
    pointing = {item.id: [name for name, target in aliases.items() if target == item.id] for item in found}
    decisions = {item.id: item.verdict.decision if item.verdict else None for item in found}
    if as_json:
        print_json([
            {"id": item.id, "model_id": item.model_id, "created": item.created, "decision": decisions[item.id],
             "tenants": sorted(item.adapters), "aliases": pointing[item.id]}
            for item in found
        ])  # fmt: skip
        return
    cells = [
        (item.id[:16], item.model_id, item.created[:19], decisions[item.id] or "no verdict", sorted(item.adapters), pointing[item.id])
        for item in found
    ]
    print_table("releases", ("id", "model", "created (UTC)", "verdict", "tenants", "aliases"), cells)


@app.command("show", epilog="Example: temper releases show production")
def show(
    release: Annotated[str, typer.Argument(metavar="RELEASE", help="An id, the first 8 digits or more of one, or an alias.")],
    registry: Where = RUNS,
    as_json: Json = False,
) -> None:
    """All that one release holds: hashes, manifests, verdict, policies, and its lineage."""
    from temper.cli.output import print_facts, print_json, print_table

    opened = open_registry(registry)
    found = opened.show(release)
    content = {"id": found.id, **found.model_dump(mode="json"), "lineage": opened.lineage(found.id)}
    if as_json:
        print_json(content)
        return
    facts = {name: value for name, value in content.items() if name not in ("verdict", "lineage")}
    print_facts(f"release {found.id[:16]}", facts)
    if found.verdict:
        lines = [(line.status, line.rule, line.observed, line.required) for line in found.verdict.findings]
        print_table(f"verdict: {found.verdict.decision.replace('_', ' ')}", ("", "line", "observed", "required"), lines)
    print("\n".join(["lineage", *lineage_lines(content["lineage"])]))


def lineage_lines(tree: dict[str, Any], depth: int = 1) -> list[str]:
    """A lineage tree as indented lines, parents below their child."""
    indent = "  " * depth
    lines = [f"{indent}{tree['id'][:16]} {tree.get('model_id', 'outside this registry')}"]
    lines += [f"{indent}  {item['role']}: {item['name']} {item['hash'][:16]}" for item in tree.get("manifests", ())]
    for parent in tree.get("parents", ()):
        lines += lineage_lines(parent, depth + 1)
    return lines


@app.command("promote", epilog='Example: temper releases promote 3f9ac2d1 --reason "spring release"')
def promote(
    release: Annotated[str, typer.Argument(metavar="RELEASE", help="An id, or the first 8 digits or more of one.")],
    reason: Reason,
    alias: Annotated[str, typer.Option("--alias", help="The alias to move.")] = "production",
    registry: Where = RUNS,
    as_json: Json = False,
) -> None:
    """Point an alias at a release. Refused unless its verdict promotes exactly these bytes."""
    print_move(open_registry(registry).promote(release, alias, reason=reason), as_json)


@app.command("rollback", epilog='Example: temper releases rollback production --reason "refuses month-end postings"')
def rollback(
    reason: Reason,
    alias: Annotated[str, typer.Argument(metavar="[ALIAS]", help="The alias to move back.")] = "production",
    override: Annotated[bool, typer.Option("--override", help="Go back even to a release past its last day.")] = False,
    registry: Where = RUNS,
    as_json: Json = False,
) -> None:
    """Point an alias at the release before the current one."""
    print_move(open_registry(registry).rollback(alias, reason=reason, override=override), as_json)


@app.command("history", epilog="Example: temper releases history production")
def history(
    alias: Annotated[str, typer.Argument(metavar="[ALIAS]", help="Whose moves.")] = "production",
    registry: Where = RUNS,
    as_json: Json = False,
) -> None:
    """Every move of an alias, oldest first, its chain of hashes checked."""
    from temper.cli.output import print_json, print_table

    events = open_registry(registry).history(alias)
    if as_json:
        print_json([event.model_dump(mode="json") for event in events])
        return
    rows = [(event.number, event.moved[:19], event.action, event.release_id[:16], event.who, event.why) for event in events]
    print_table(f"history of {alias}", ("", "when (UTC)", "move", "release", "who", "why"), rows)


@app.command("verify", epilog="Example: temper releases verify production")
def verify(
    release: Annotated[str, typer.Argument(metavar="RELEASE", help="An id, the first 8 digits or more of one, or an alias.")],
    registry: Where = RUNS,
    as_json: Json = False,
) -> None:
    """Read every byte of a release and compare it with what was registered."""
    from temper.cli.output import print_json

    found = open_registry(registry).verify(release)
    if as_json:
        print_json({"id": found.id, "verified": True})
    else:
        print(f"release {found.id[:16]}: every byte is as registered")


def print_move(event: AliasEvent, as_json: bool) -> None:
    """One move of an alias."""
    from temper.cli.output import print_json

    if as_json:
        print_json(event)
    else:
        print(f"{event.alias} now points at {event.release_id[:16]} (move {event.number}, {event.action}: {event.why})")
