"""`temper template`: does a model's chat template keep its contract between training and serving, and what sets two apart?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from temper.cli.output import Json

if TYPE_CHECKING:
    from rich.text import Text

    from temper.data.golden import Conversation
    from temper.data.inspect import TokenLine
    from temper.data.template import Template

app = typer.Typer(help="Chat templates.", no_args_is_help=True, epilog="Example: temper template check temper/environments/finops/base")

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A checkpoint folder or hub name.")]
STYLES = {"=": "dim", "-": "red", "+": "green"}


@app.command("check", epilog="Example: temper template check temper/environments/finops/base")
def check(model: Model, as_json: Json = False) -> None:
    """Check that turns only append, tool calls and results survive, and the end of a turn is trained.

    Exit code 1 where the template breaks the contract, or no longer does what was pinned beside the weights.
    """
    from temper.cli.output import print_json, print_table
    from temper.data.golden import card_findings

    template = template_of(model)
    findings = [*template.check(), card_findings(template, Path(model))]
    if as_json:
        print_json({"fingerprint": template.fingerprint, "findings": findings})
    else:
        rows = [(line.status, line.rule, line.observed, line.reason) for line in findings]
        print_table(f"template of {model} · {template.fingerprint[:16]}", ("", "check", "observed", "why"), rows)
    raise typer.Exit(1 if any(line.status == "fail" for line in findings) else 0)


@app.command("diff", epilog="Example: temper template diff runs/demo/sft/model Qwen/Qwen3-0.6B --conversation chats.jsonl")
def diff(
    first: Annotated[str, typer.Argument(metavar="A", help="A checkpoint folder or hub name.")],
    second: Annotated[str, typer.Argument(metavar="B", help="The one to compare it with.")],
    conversation: Annotated[
        Path | None, typer.Option("--conversation", help="A data file or manifest folder; by default the golden conversations.")
    ] = None,
    limit: Annotated[int, typer.Option("--limit", min=1, help="How many conversations of the file are compared.")] = 10,
    as_json: Json = False,
) -> None:
    """Show where two templates differ, token by token: tokens of A alone are red, of B alone green.

    A token that both have but only one trains differs too. Exit code 1 where anything differs, as diff has it.
    """
    from temper.cli.output import print_json
    from temper.data.golden import GOLDEN

    one, other = template_of(first), template_of(second)
    compared = conversations_of(conversation, limit) if conversation else GOLDEN
    found = {name: compared_rows(one, other, each) for name, each in compared.items()}
    facts = differing_facts(one, other)
    if as_json:
        lines = {name: item | {"lines": [line.__dict__ for line in item["lines"]]} for name, item in found.items()}
        print_json({"a": one.fingerprint, "b": other.fingerprint, "facts": facts, "conversations": lines})
    else:
        print_diff(first, second, facts, found)
    same = one.fingerprint == other.fingerprint and all(item["same"] for item in found.values())
    raise typer.Exit(0 if same else 1)


def conversations_of(path: Path, limit: int) -> dict[str, Conversation]:
    """The first conversations of a data file or manifest folder, by their row. Raises DataError."""
    from temper.cli.data import records_at

    return {f"row {number}": (record.messages, record.tools) for number, record in enumerate(records_at(path)[:limit], start=1)}


def differing_facts(one: Template, other: Template) -> dict[str, list[Any]]:
    """What differs of the templates themselves, as [A's, B's]."""
    facts: dict[str, tuple[Any, Any]] = {
        "template text": (one.text, other.text),
        "tokenizer": (one.tokenizer_fingerprint[:16], other.tokenizer_fingerprint[:16]),
        "special tokens": (one.special_roles, other.special_roles),
        "system text folded": (one.fold_system, other.fold_system),
    }
    lines = {line.rule: [line.status, line.observed] for line in other.check()}
    facts |= {line.rule: ([line.status, line.observed], lines.get(line.rule)) for line in one.check()}
    return {name: [*pair] for name, pair in facts.items() if pair[0] != pair[1]}


def compared_rows(one: Template, other: Template, conversation: Conversation) -> dict[str, Any]:
    """One conversation under both templates: counts, refusals, and the lines where they part."""
    from temper.data.golden import pinned
    from temper.data.inspect import diff_lines, token_lines

    rows = [pinned(template, conversation) for template in (one, other)]
    sides = [
        token_lines(row.ids, template.tokenizer, list(map(bool, row.trained))) for row, template in zip(rows, (one, other), strict=True)
    ]
    lines = diff_lines(*sides, by_id=one.tokenizer_fingerprint == other.tokenizer_fingerprint)
    return {
        "same": not lines and (rows[0].refused is None) == (rows[1].refused is None),
        "tokens": [len(row.ids) for row in rows],
        "trained": [sum(row.trained) for row in rows],
        "refused": [row.refused for row in rows],
        "lines": lines,
    }


def print_diff(first: str, second: str, facts: dict[str, list[Any]], found: dict[str, dict[str, Any]]) -> None:
    """The comparison for a person: what differs of the templates, then each conversation."""
    from rich.console import Console
    from rich.text import Text

    console = Console()

    def say(text: str, style: str = "") -> None:
        console.print(Text(text, style=style), soft_wrap=True)

    say(f"- {first}", STYLES["-"])
    say(f"+ {second}", STYLES["+"])
    for name, pair in facts.items():
        told = f"{len(pair[0])} and {len(pair[1])} letters" if name == "template text" else f"{pair[0]} and {pair[1]}"
        say(f"{name}: {told}")
    if "tokenizer" in facts:
        say("two tokenizers: tokens are compared by their text, not by their ids")
    for name, item in found.items():
        counts = [f"{trained} of {tokens} trained" for tokens, trained in zip(item["tokens"], item["trained"], strict=True)]
        sides = ["refused: " + refused if refused else count for count, refused in zip(counts, item["refused"], strict=True)]
        both = f"both {'refuse it' if item['refused'][0] else counts[0]}"
        say(f"\n{name} · " + (f"the same; {both}" if item["same"] else f"A: {sides[0]} · B: {sides[1]}"), "bold")
        for line in item["lines"]:
            console.print(shown(line), soft_wrap=True)


def shown(line: TokenLine) -> Text:
    """One token of a comparison, in its side's colour; trained ones stand out."""
    from rich.text import Text

    return Text(line.shown(), style=STYLES[line.kind] + (" bold" if line.trained else ""))


def template_of(model: str) -> Template:
    """The template of a checkpoint's tokenizer. Raises DataError where there is none."""
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
