"""Rows of a data file, whatever container holds them: JSONL, one JSON array, or Parquet.

Every row knows its file and its number, so that whatever is wrong with it is said with its place.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from temper.core.errors import DataError

PARQUET_MAGIC = b"PAR1"
COMPRESSED = {b"\x1f\x8b": "gzip", b"PK\x03\x04": "zip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstandard"}


@dataclass
class Row:
    """One row: its object, where it stands, and the names of fields that no record carries on.

    `broken` is set on a line that could not be read at all; whoever meets it raises or collects it.
    """

    value: dict[str, Any]
    where: str
    parquet: bool = False
    broken: DataError | None = None
    unused: set[str] = field(default_factory=set)

    def fault(self, what: str, *, why: str = "", do: str = "") -> DataError:
        """A DataError that starts with the row's place."""
        return DataError(f"{self.where}: {what}", why=why, do=do)

    def known(self, keys: Iterable[str]) -> None:
        """Note every filled field outside `keys` as not carried on."""
        self.unused |= {key for key in self.value.keys() - set(keys) if self.value[key] not in (None, "", [], {})}

    def require(self, *keys: str, shape: str) -> None:
        """Raise DataError where a key of `shape` is missing or null."""
        missing = [key for key in keys if self.value.get(key) is None]
        if missing:
            raise self.fault(
                f"no {' and no '.join(map(repr, missing))}",
                why=f"a {shape} row needs {', '.join(map(repr, keys))}; this one has {sorted(self.value)}",
                do="rename the fields, or name the right format",
            )

    def text(self, key: str, *, default: str | None = None) -> str:
        """The text at `key`; `default` where it is absent or null. Raises DataError on another type."""
        value = self.value.get(key)
        if value is None and default is not None:
            return default
        return check_text(self, value, key)


def check_text(row: Row, value: Any, name: str) -> str:
    """`value`, which must be text. Raises DataError where it is not."""
    if not isinstance(value, str):
        raise row.fault(f"{name!r} holds {describe(value)}", why="text is needed there", do=f"make {name!r} a string")
    return value


def describe(value: Any) -> str:
    """A value's type and, cut short, the value: what an error message shows."""
    shown = repr(value)
    return f"{type(value).__name__} {shown if len(shown) <= 80 else shown[:77] + '...'}"


def read_rows(path: Path) -> Iterator[Row]:
    """Every row of a JSONL, JSON or Parquet file, told apart by content rather than by name.

    Raises DataError where the file is missing, empty, compressed, or holds something other than rows.
    """
    if path.is_dir() or not path.exists():
        state = "is a folder" if path.is_dir() else "does not exist"
        raise DataError(f"{path} {state}", do="give the path of one .jsonl, .json or .parquet file")
    with path.open("rb") as handle:
        head = handle.read(4096)
    packed = next((name for magic, name in COMPRESSED.items() if head.startswith(magic)), None)
    if packed:
        raise DataError(f"{path} is {packed}-compressed", why="rows are read as JSONL, JSON or Parquet", do="unpack it first")
    if head.startswith(PARQUET_MAGIC):
        yield from _parquet_rows(path)
    elif head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"[":
        yield from _array_rows(path)
    else:
        yield from _line_rows(path)


def strict_json(text: str) -> Any:
    """JSON text as a value. Raises ValueError on bad JSON, and on what Python reads and no file should hold:
    NaN, Infinity, half of a surrogate pair, and nesting too deep to walk."""

    def refuse(name: str) -> Any:
        raise ValueError(f"holds {name}, and JSON has no such number")

    try:
        value = json.loads(text, parse_constant=refuse)
        if "\\ud" in text.lower():
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"holds a lone surrogate (U+{ord(error.object[error.start]):04X}), which is no character") from error
    except RecursionError as error:
        raise ValueError("nested too deeply to read") from error
    return value


def _parse(text: str, where: str) -> Any:
    try:
        return strict_json(text)
    except json.JSONDecodeError as error:
        why = f"{error.msg} at column {error.colno}: {text[:60]!r}"
        raise DataError(f"{where}: not JSON", why=why, do="write one JSON object a line") from error
    except ValueError as error:
        raise DataError(f"{where}: not JSON that can be kept", why=str(error), do="repair the row, or leave the field out") from error


def _decode(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: not UTF-8", why=f"byte {content[error.start]:#04x} at offset {error.start}", do="convert the file to UTF-8"
        ) from error


def _read_line(line: bytes, where: str) -> Any:
    return _parse(_decode(line, where), where)


def _same(item: Any) -> Any:
    return item


def _row(read: Callable[[], Any], where: str) -> Row:
    """The row that `read` gives, or a broken one that holds its error."""
    try:
        value = read()
        if isinstance(value, dict):
            return Row(value, where)
        why = "a row is an object with named fields"
        raise DataError(f"{where}: holds {describe(value)}", why=why, do="write one JSON object a row")
    except DataError as error:
        return Row({}, where, broken=error)


def _line_rows(path: Path) -> Iterator[Row]:
    """JSONL, read line by line; a line ends at a newline byte only, since JSON text may hold U+2028."""
    found = 0
    with path.open("rb") as handle:
        for number, line in enumerate(handle, start=1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            if number == 1 and line.strip() == b"{":
                _refuse_lone_object(path)
            found += 1
            yield _row(partial(_read_line, line, where), where)
    if not found:
        raise DataError(f"{path} holds no rows", why="the file is empty", do="check the path, or how the file was written")


def _refuse_lone_object(path: Path) -> None:
    value = _parse(_decode(path.read_bytes(), str(path)), str(path))
    lists = sorted(key for key, item in value.items() if isinstance(item, list))
    hint = f"write the list at {lists[0]!r} alone" if lists else "write one object a line"
    raise DataError(f"{path} is one JSON object", why=f"it has the keys {sorted(value)}, rather than being a list of rows", do=hint)


def _array_rows(path: Path) -> Iterator[Row]:
    content = _decode(path.read_bytes(), str(path))
    if _is_jsonl_of_arrays(content):
        raise DataError(f"{path}:1: holds a list", why="a row is an object with named fields", do="write one JSON object a line")
    items = _parse(content, str(path))
    if not items:
        raise DataError(f"{path} holds no rows", why="its list is empty", do="check how the file was written")
    for number, item in enumerate(items, start=1):
        where = f"{path} item {number}"
        yield _row(partial(_same, item), where)


def _is_jsonl_of_arrays(content: str) -> bool:
    first, newline, rest = content.strip().partition("\n")
    if not newline or not rest.lstrip().startswith("["):
        return False
    try:
        json.loads(first)
    except json.JSONDecodeError:
        return False
    return True


def _parquet_rows(path: Path) -> Iterator[Row]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        with ParquetFile(path) as table:
            for batch in table.iter_batches(batch_size=1024):
                for value in batch.to_pylist():
                    number += 1
                    yield Row(value, f"{path} row {number}", parquet=True)
    except (ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as Parquet after row {number}", why=str(error), do="write the file again") from error
    if not number:
        raise DataError(f"{path} holds no rows", why="its table is empty", do="check how the file was written")
