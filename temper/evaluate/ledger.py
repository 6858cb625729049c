"""The ledger of looks at a sealed split: a split that is looked at often is no longer held out."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from temper.core.errors import DataError
from temper.core.storage import disk_errors


def looks(path: Path) -> list[dict[str, Any]]:
    """Every look so far, oldest first. Raises DataError where the ledger was damaged."""
    rows = []
    for number, line in enumerate(path.read_text().splitlines() if path.is_file() else [], start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path}:{number} is not JSON", why="the ledger of sealed looks was damaged", do="restore it; it must never lose a line"
            ) from error
    return rows


def look(path: Path, *, name: str, model_hash: str, suite_hash: str, environment: str, split: str) -> int:
    """Append one look and return how many there were at this environment's split, this one included.

    It is written before anything is sampled: a run that is killed after it saw the tasks has looked as well.
    """
    row = {
        "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "name": name, "model_hash": model_hash,
        "suite_hash": suite_hash, "environment": environment, "split": split,
    }  # fmt: skip
    looks(path)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as handle:
            handle.write(json.dumps(row, sort_keys=True) + "\n")
            handle.flush()
            os.fsync(handle.fileno())
    return sum((item["environment"], item["split"]) == (environment, split) for item in looks(path))
