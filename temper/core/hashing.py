"""Content hashes: the identity of records, files, folders and configs."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel


def canonical_json(value: Any) -> str:
    """`value` as JSON with sorted keys and no spaces, so that equal values have equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=_plain)


def ordered_json(value: Any) -> str:
    """`value` as JSON with its keys in their own order: what a chat template renders depends on it."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False, default=_plain)


def _plain(item: Any) -> Any:
    if isinstance(item, BaseModel):
        return item.model_dump(mode="json")
    if isinstance(item, Path):
        return item.as_posix()
    raise TypeError(f"{type(item).__name__} has no canonical JSON form: {item!r}")


def hash_text(text: str) -> str:
    """SHA-256 of `text` in UTF-8, as 64 hex digits."""
    return hashlib.sha256(text.encode()).hexdigest()


def hash_value(value: Any) -> str:
    """SHA-256 of the canonical JSON of `value`."""
    return hash_text(canonical_json(value))


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes. Raises FileNotFoundError."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def hash_folder(path: Path) -> dict[str, str]:
    """Relative POSIX path to SHA-256, for every file below `path`, sorted by path."""
    files = sorted(item for item in path.rglob("*") if item.is_file())
    return {item.relative_to(path).as_posix(): hash_file(item) for item in files}


def stream_seed(seed: int, *names: str | int) -> int:
    """A 63-bit seed for the random stream that `names` names; equal names give equal streams."""
    text = "/".join([str(seed), *map(str, names)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
