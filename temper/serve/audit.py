"""What is written down about each request: one audit line always, and the conversation itself where capture is on."""

from __future__ import annotations

import json
import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from temper.core.errors import DataError
from temper.core.hashing import canonical_json
from temper.core.records import Message, Provenance, Record, Sampled, ToolSpec
from temper.core.storage import disk_errors
from temper.registry import Release


@dataclass
class AuditLine:
    """One request. `adapter` is the name that the engine stamped on the row it sampled, `adapter_hash` the folder loaded
    under that name, `adapter_numbers` the hash of its numbers in memory: none is taken from the request.
    Conversations are not in here.

    A streamed answer has two lines of one request id: `opened` before its first byte leaves, `closed` at its end.
    """

    request_id: str
    time: str
    status: int
    code: str | None = None
    tenant: str | None = None
    adapter: str | None = None
    adapter_hash: str | None = None
    adapter_numbers: str | None = None
    release: str | None = None
    weights: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    choices: int = 0
    finish_reason: str | None = None
    schema_valid: bool | None = None
    batch_rows: int = 0
    queued_ms: float = 0.0
    latency_ms: float = 0.0
    stream: bool = False
    phase: Literal["whole", "opened", "closed"] = "whole"


class JsonLines:
    """A JSONL file to append to; each line reaches the system in one write, so lines never mix."""

    def __init__(self, path: Path) -> None:
        self.path, self._lock = Path(path), threading.Lock()
        with disk_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def append(self, value: Any) -> None:
        """Add one line. Raises StorageError on a full disk."""
        line = (canonical_json(value) + "\n").encode()
        with self._lock, disk_errors(self.path):
            written = os.write(self._file, line)
            if written != len(line):
                os.write(self._file, b"\n")
                raise DataError(
                    f"{self.path}: a line was written only in part", why=f"{written} of {len(line)} bytes", do="free some space"
                )

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)


def now() -> str:
    """UTC, in milliseconds."""
    seconds = time.time()
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{int(seconds % 1 * 1000):03d}Z"


def served_record(
    release: Release, messages: tuple[Message, ...], answer: tuple[Message, ...], tools: tuple[ToolSpec, ...], sampled: tuple[Sampled, ...],
    *, tenant: str | None, licence: str, request_id: str, environment: str | None = None,
) -> Record:  # fmt: skip
    """A served conversation as a Record: it goes back through the firewall before anything is trained on it."""
    return Record(
        messages=(*messages, *answer), tools=tools, sampled=sampled, shape="served", slice=environment or "",
        provenance=Provenance(
            source=f"serve:{release.model_id}:{request_id}", licence=licence, split="train", privacy="internal", access=tenant or "shared",
            synthetic=True, generation_depth=1, tenant=tenant, generator=release.id,
        ),
    )  # fmt: skip


def served_again(record: Record, release: Release, *, tenant: str | None, licence: str, request_id: str) -> Record:
    """A served episode as a Record of this release; the verifier's outcome stays with it."""
    told = record.provenance.model_copy(
        update={
            "source": f"serve:{release.model_id}:{request_id}", "licence": licence, "split": "train", "privacy": "internal",
            "access": tenant or "shared", "tenant": tenant, "generator": release.id, "synthetic": True,
        }
    )  # fmt: skip
    return record.model_copy(update={"provenance": told})


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Every line of an audit file. Raises DataError naming the line that is not JSON."""
    rows = []
    for number, line in enumerate(Path(path).read_text().splitlines(), start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{number} is not JSON", why=error.msg) from error
    return rows
