"""Importers: a file in a format that people have becomes `Record`s, and nothing of it is dropped in silence.

    imported = import_records(Path("chats.jsonl"), provenance)        # the format is detected
    imported.records, imported.rows, imported.refusals, imported.unused

`IMPORTERS` maps a format's name to a generator for those who want only the records.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from temper.core.errors import DataError
from temper.core.progress import track
from temper.core.records import Provenance, Record, Refusal
from temper.traces.formats import FORMATS, Format
from temper.traces.rows import Row, read_rows

Importer = Callable[[Path, Provenance], Iterator[Record]]


@dataclass(frozen=True)
class Imported:
    """What an import gave: records, the place each came from, rows that were refused, and fields not carried on.

    `unused` counts the rows that held each field no record carries; `refusals` is empty unless bad rows were
    to be collected.
    """

    format: str
    records: tuple[Record, ...]
    rows: tuple[str, ...]
    refusals: tuple[Refusal, ...]
    unused: dict[str, int]


def import_records(
    path: Path, provenance: Provenance, *, format: str | None = None, bad_rows: Literal["raise", "collect"] = "raise"
) -> Imported:
    """Read every row of `path`, in `format` (None: it is detected).

    `provenance` is given to each record, save for what the row itself states (in its field `temper.provenance`).
    With `bad_rows="collect"` a bad row becomes a Refusal of the rule "import", to be handed to `admit`; a file
    that cannot be read at all raises either way. Raises DataError with the file and row at the first bad row.
    """
    name = sniff(path) if format in (None, "auto", "parquet") else format
    records, rows, refusals, unused = [], [], [], Counter[str]()
    for row, parsed in _parse_rows(path, _format(name), provenance):
        unused.update(row.unused)
        if isinstance(parsed, Record):
            records.append(parsed)
            rows.append(row.where)
        elif bad_rows == "raise":
            raise parsed
        else:
            reason = " ".join(str(parsed).removeprefix(f"{row.where}: ").split())
            refusals.append(Refusal(record="", rule="import", reason=reason, row=row.where))
    return Imported(name, tuple(records), tuple(rows), tuple(refusals), dict(unused))


def _parse_rows(path: Path, format: Format, provenance: Provenance) -> Iterator[tuple[Row, Record | DataError]]:
    for whole in track(read_rows(path), f"reading {path.name}", total=_rows_in(path)):
        try:
            if whole.broken is not None:
                raise whole.broken
            for row in format.split(whole):
                yield row, _parse_row(row, format, provenance)
        except DataError as error:
            yield whole, error


def _parse_row(row: Row, format: Format, provenance: Provenance) -> Record | DataError:
    try:
        return format.parse(row, provenance)
    except DataError as error:
        return error


def _rows_in(path: Path) -> int:
    """About how many rows there are, for the progress bar only: newlines, which a JSON array may have more of."""
    if not path.is_file():
        return 0
    with path.open("rb") as handle:
        return sum(block.count(b"\n") for block in iter(partial(handle.read, 1 << 20), b""))


def _format(name: str) -> Format:
    if name not in FORMATS:
        raise DataError(
            f"unknown data format {name!r}", why=f"known formats are {', '.join(FORMATS)}, parquet and auto", do="name one of them"
        )
    return FORMATS[name]


def import_format(name: str, path: Path, provenance: Provenance) -> Iterator[Record]:
    """The records of a file in the format `name` ("parquet": whatever format its rows have). Raises DataError."""
    for _, parsed in _parse_rows(path, _format(sniff(path) if name == "parquet" else name), provenance):
        if isinstance(parsed, DataError):
            raise parsed
        yield parsed


IMPORTERS: dict[str, Importer] = {name: partial(import_format, name) for name in (*FORMATS, "parquet")}


def sniff(path: Path) -> str:
    """The format of a file's rows, by the keys of its first one.

    Raises DataError that says which keys were seen where no known format has them.
    """
    first = next(read_rows(path))
    if first.broken is not None:
        raise first.broken
    keys = {key for key, value in first.value.items() if value is not None}
    for name, format in FORMATS.items():
        if keys.issuperset(format.marks):
            return name
    known = "; ".join(f"{name} {format.example}" for name, format in FORMATS.items())
    raise DataError(
        f"{path}: its format is not known",
        why=f"the first row has the keys {sorted(first.value)}, and no known format has those: {known}",
        do="rename the fields to one of these formats, or write an importer (temper/traces/formats.py shows how)",
    )
