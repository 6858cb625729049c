"""Writing that is whole or absent: write beside, then rename; every folder carries its own hashes."""

from __future__ import annotations

import errno
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from temper.core.errors import DataError, IntegrityError, StorageError
from temper.core.hashing import canonical_json, hash_folder, hash_value, ordered_json

FILES = "FILES.json"  # the last file written into a folder: the hash of every other one

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the disk is full, a quota reached, a file's size limit reached
FULL = tuple(os.strerror(number) for number in NO_ROOM)  # how libraries with exceptions of their own (safetensors) put them

M = TypeVar("M", bound=BaseModel)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a full or read-only disk into a StorageError that says what to do."""
    try:
        yield
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else None
        if number in NO_ROOM or (number is None and any(words in str(error) for words in FULL)):
            free = shutil.disk_usage(path.parent if path.parent.exists() else Path("/")).free
            raise StorageError(
                f"no space left while writing {path}",
                why=f"{error}; {free} bytes are free",
                do="free some space and run the same command again; it goes on from the last checkpoint",
            ) from error
        if number in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise StorageError(f"cannot write {path}", why=str(error), do="choose a folder that you may write to") from error
        raise


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all. Raises StorageError on a full or read-only disk."""
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
        try:
            with beside.open("wb") as handle:
                handle.write(content)
                handle.flush()
                os.fsync(handle.fileno())
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """`write_bytes` for text in UTF-8."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write a value (or pydantic model) as indented JSON, whole or not at all."""
    write_text(path, json.dumps(json.loads(canonical_json(value)), indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """The JSON a file holds. Raises DataError where it is missing or not JSON."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist", do="check the path, or run the stage that writes it") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno} is not JSON", why=error.msg) from error


def write_jsonl(path: Path, rows: Iterable[BaseModel | dict[str, Any]]) -> None:
    """Write one JSON object a line, whole or not at all, keys in their own order.

    Sorted keys would turn the order of a tool's parameters between what is trained on and what is served.
    """
    write_text(path, "".join(ordered_json(row) + "\n" for row in rows))


def read_jsonl(path: Path, model: type[M]) -> list[M]:
    """Every line of a JSONL file as a `model`. Raises DataError naming file, line and fault."""
    if not path.is_file():
        raise DataError(f"{path} does not exist", do="check the path, or run the stage that writes it")
    rows = []
    # Not splitlines(): JSON text may hold U+2028 and its like unescaped, and only a newline ends a row.
    lines = path.read_text().split("\n")
    for number, line in enumerate(lines if lines[-1] else lines[:-1], start=1):
        try:
            rows.append(model.model_validate_json(line))
        except ValidationError as error:
            fault = error.errors()[0]
            raise DataError(
                f"{path}:{number} is not a {model.__name__}", why=f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}"
            ) from error
    return rows


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A scratch folder beside `path` that becomes `path` when the block ends, with its hashes in FILES.json.

    Where the block raises, nothing is left. An existing `path` is replaced only after the new one is whole.
    """
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
        scratch.mkdir()
        try:
            yield scratch
            write_json(scratch / FILES, hash_folder(scratch))
            if path.exists():
                old = path.with_name(f".{path.name}.old.{uuid.uuid4().hex[:8]}")
                path.rename(old)
                scratch.rename(path)
                shutil.rmtree(old)
            else:
                scratch.rename(path)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def verify_folder(path: Path) -> str:
    """Check every file of a folder against its FILES.json and return the folder's hash.

    Raises IntegrityError naming the first file that is missing, new or different.
    """
    listing = path / FILES
    if not listing.is_file():
        raise IntegrityError(
            f"{path} has no {FILES}",
            why="it was not written whole by temper",
            do="make it again, or record its hashes with `temper data hash`",
        )
    recorded, found = read_json(listing), hash_folder(path)
    found.pop(FILES, None)
    for name in sorted(recorded.keys() | found.keys()):
        if recorded.get(name) != found.get(name):
            raise IntegrityError(
                f"{path / name} differs from its manifest",
                why=f"recorded {str(recorded.get(name))[:16]}, found {str(found.get(name))[:16]}",
                do="restore the file, or run again the stage that wrote the folder",
            )
    return hash_value(recorded)


def folder_hash(path: Path) -> str:
    """The hash of a folder's recorded hashes, without reading its files; IntegrityError where none are recorded."""
    listing = path / FILES
    if not listing.is_file():
        raise IntegrityError(f"{path} has no {FILES}", why="it was not written whole by temper")
    return hash_value(read_json(listing))
