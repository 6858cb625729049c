"""`temper data`: look at rows as training sees them, and let files through admission."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from temper.cli.output import Json

if TYPE_CHECKING:
    from rich.text import Text

    from temper.core.records import Record

app = typer.Typer(
    help="Data: inspect rows, admit files, list formats.", no_args_is_help=True, epilog="Example: temper data inspect runs/demo/data/sft"
)

BASE = "temper/environments/finops/base"
TRAINED, CONTEXT = ("black on green", "black on bright_green"), ("dim", "default")  # neighbours differ, so that token ends show


@app.command("inspect", epilog="Example: temper data inspect runs/demo/data/sft --model runs/demo/sft/model --row 3")
def inspect(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A manifest folder, or a data file in any known format.")],
    model: Annotated[str, typer.Option("--model", "--tokenizer", help="The checkpoint whose tokenizer and template are used.")] = BASE,
    row: Annotated[int, typer.Option("--row", min=1, help="The first row to show.")] = 1,
    rows: Annotated[int, typer.Option("--rows", min=1, help="How many rows to show.")] = 1,
    tokens: Annotated[bool, typer.Option("--tokens/--text", help="Token by token, or in stretches of equal mask.")] = True,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=2, help="Longest row, as in training.")] = 1024,
    as_json: Json = False,
) -> None:
    """Show training rows token by token: what is trained stands out, what is only read is dim."""
    from temper.cli.output import print_json
    from temper.cli.template import template_of
    from temper.core.errors import DataError

    records = records_at(path)
    if row > len(records):
        raise DataError(f"{path} has {len(records)} rows, so there is no row {row}", do="give a smaller --row")
    template = template_of(model)
    shown = [
        {"row": number, **found}
        for number, record in enumerate(records[row - 1 : row - 1 + rows], start=row)
        for found in masked_rows(record, template, max_tokens, tokens)
    ]
    if as_json:
        print_json(shown)
        return
    for item in shown:
        print_row(item)


def masked_rows(record: Record, template: Any, max_tokens: int, tokens: bool) -> list[dict[str, Any]]:
    """A record's training rows (one; two of a preference pair), each as pieces of text with their mask."""
    from temper.data.inspect import text_spans, token_spans
    from temper.data.sequence import preference_sequences, to_sequence

    if record.preference is None:
        named = {"": to_sequence(record, template, max_tokens)}
    else:
        named = dict(zip(("chosen", "rejected"), preference_sequences(record, template, max_tokens), strict=True))
    spans = token_spans if tokens else text_spans
    return [
        {
            "record": record.id, "side": name, "shape": record.shape, "tokens": len(row.tokens), "trained": row.supervised,
            "token_ids": list(row.tokens), "pieces": spans(row, template.tokenizer),
        }
        for name, row in named.items()
    ]  # fmt: skip


def print_row(item: dict[str, Any]) -> None:
    """One row with its mask in colour (and in brackets where there is no colour)."""
    from rich.console import Console

    console = Console()
    side = f" · {item['side']}" if item["side"] else ""
    title = f"row {item['row']} · {item['shape']}{side} · {item['record'][:16]} · {item['trained']} of {item['tokens']} tokens trained"
    plain = not console.is_terminal
    console.print(title, style="bold", highlight=False, markup=False, soft_wrap=plain)
    console.print(coloured(item["pieces"], brackets=plain), soft_wrap=plain)
    console.print("")


def coloured(pieces: Sequence[tuple[str, bool]], *, brackets: bool) -> Text:
    """Pieces as one text: trained ones stand out, each other one a little. `brackets` marks the trained ones with ⟦ ⟧ too."""
    from rich.text import Text

    text, inside = Text(), False
    for number, (piece, trained) in enumerate(pieces):
        if brackets and trained != inside:
            text.append("⟦" if trained else "⟧")
            inside = trained
        text.append(piece, style=(TRAINED if trained else CONTEXT)[number % 2])
    if inside:
        text.append("⟧")
    return text


def records_at(path: Path) -> list[Record]:
    """The records of a manifest folder (hashes checked) or of a data file in any known format. Raises DataError."""
    from temper.core.records import Provenance, Record
    from temper.core.storage import read_jsonl
    from temper.traces.importers import import_records

    if path.is_dir():
        from temper.data.sequence import load_manifest

        return load_manifest(path)[1]
    require_file(path)
    if path.name == "records.jsonl":
        return read_jsonl(path, Record)
    looked_at = Provenance(source=path.name, licence="not stated", split="train", privacy="internal", access="inspection", synthetic=False)
    return list(import_records(path, looked_at).records)


@app.command(
    "admit",
    epilog="Example: temper data admit chats.jsonl --out runs/data/chats --licence CC-BY-4.0 --privacy internal --access support",
)
def admit(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Data files, in any format that `temper data formats` lists.")],
    out: Annotated[Path, typer.Option("--out", help="Where the manifest goes: OUT/train, or the split's name.")],
    licence: Annotated[str, typer.Option("--licence", help="The rows' licence, by its SPDX name.")],
    privacy: Annotated[str, typer.Option("--privacy", help="public, synthetic, internal, personal or secret.")],
    access: Annotated[str, typer.Option("--access", help="Who may use the rows.")],
    source: Annotated[str | None, typer.Option("--source", help="Where the rows come from; by default the file's path.")] = None,
    format: Annotated[str, typer.Option("--format", help="The rows' format; by default it is detected.")] = "auto",
    split: Annotated[str, typer.Option("--split", help="train, dev or test.")] = "train",
    generator: Annotated[str | None, typer.Option("--generator", help="What made the rows, where they are synthetic.")] = None,
    environment: Annotated[
        str | None, typer.Option("--heldout", help="An environment whose dev and test tasks no row may give away.")
    ] = None,
    rules: Annotated[Path | None, typer.Option("--rules", help="A YAML file of admission rules.")] = None,
    as_json: Json = False,
) -> None:
    """Import files, judge every record, and write the manifest of what may be trained on.

    The same as a `stage: data` file under `temper run`.
    """
    from temper.cli.output import print_facts, print_json, print_table, stdout_to_stderr
    from temper.core.config import parse_config, read_yaml
    from temper.core.storage import read_json
    from temper.pipeline import data as stage

    stated: dict[str, Any] = {
        "licence": licence,
        "privacy": privacy,
        "access": access,
        "synthetic": bool(generator) or privacy == "synthetic",
    }
    stated |= {name: value for name, value in (("source", source), ("generator", generator)) if value}
    sources = [{"path": str(file), "format": format, "provenance": stated} for file in files]
    one = {"sources": sources, "split": split, "rules": read_yaml(rules) if rules else {}}
    values = {"out": str(out), "environment": environment, "sets": {split: one}}
    for file in files:
        require_file(file)
    with stdout_to_stderr():
        result = stage.run(parse_config(stage.Config, values))
    if as_json:
        print_json(result)
        return
    print_facts(f"admitted into {out / split}", result)
    refused = read_json(out / split / "manifest.json")["refusals"]
    if refused:
        lines = [(item["row"], item["rule"], item["reason"]) for item in refused[:10]]
        print_table(f"refused: {len(refused)}; the first {len(lines)}", ("row", "rule", "why"), lines)


def require_file(path: Path) -> None:
    """Raise DataError where `path` is no file."""
    from temper.core.errors import DataError

    if not path.is_file():
        raise DataError(f"{path} does not exist", do="give a data file; `temper data formats` lists what it may hold")


@app.command("formats", epilog="Example: temper data formats")
def formats(as_json: Json = False) -> None:
    """The formats that files may have, and how each is recognised."""
    from temper.cli.output import print_json, print_table
    from temper.traces.formats import FORMATS

    if as_json:
        print_json({name: {"marks": list(item.marks), "form": item.example} for name, item in FORMATS.items()})
        return
    rows = [(name, item.example, item.marks) for name, item in FORMATS.items()]
    print_table("JSON, JSONL or Parquet files of rows", ("format", "a row", "recognised by"), rows)


@app.command("hash", epilog="Example: temper data hash checkpoints/my-model")
def hash_folder(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A checkpoint or data folder that temper did not write.")],
    as_json: Json = False,
) -> None:
    """Record a folder's file hashes in FILES.json, so that any later change is noticed.

    A folder that has them already is verified instead.
    """
    from temper.cli.output import print_json
    from temper.core import hashing
    from temper.core.errors import DataError
    from temper.core.storage import FILES, verify_folder, write_json

    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder", do="give a folder")
    if not (folder / FILES).is_file():
        write_json(folder / FILES, hashing.hash_folder(folder))
    digest = verify_folder(folder)
    if as_json:
        print_json({"folder": str(folder), "hash": digest})
    else:
        print(f"{folder}: {digest}")
