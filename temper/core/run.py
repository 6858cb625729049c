"""The run directory of one stage: config as given and resolved, one log line a step, checkpoints, result.

runs/demo/sft/
  stage.json      what ran: config, its hash, inputs' hashes, code revision, versions
  metrics.jsonl   one line a step
  checkpoints/    the two newest, each whole or absent
  model/ …        outputs, each a whole folder
  done.json       written last: the stage is finished for this key
"""

from __future__ import annotations

import glob
import json
import platform
import re
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

from temper.core.errors import IntegrityError
from temper.core.hashing import hash_folder, hash_value
from temper.core.storage import disk_errors, read_json, verify_folder, whole_folder, write_json, write_text

KEEP_CHECKPOINTS = 2
SCRATCH = re.compile(r"\..+\.[0-9a-f]{8}")
TRAINING_ROOMS = ("data", "policy", "rollout", "train", "environments")  # the code that can change a weight
PINNED = ("torch", "transformers", "tokenizers", "llguidance", "pydantic")


@cache
def code_revision() -> dict[str, str]:
    """The git commit, with a dirty flag."""
    root = Path(__file__).resolve().parents[1]

    def git(*args: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *args], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    commit = git("rev-parse", "HEAD") or "not a git checkout"
    dirty = "+dirty" if git("status", "--porcelain", "--", str(root)) else ""
    return {"commit": commit + dirty}


@cache
def source_hash(*rooms: str) -> str:
    """The hash of the source files of `rooms`: work is done again when code that could change it did."""
    root = Path(__file__).resolve().parents[1]
    return hash_value(
        {room: {name: digest for name, digest in hash_folder(root / room).items() if not name.endswith(".pyc")} for room in rooms}
    )


def versions() -> dict[str, str]:
    """Python and the libraries that can change a number."""
    found = {"python": platform.python_version()}
    for name in PINNED:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


Metrics = dict[str, float | int | str | None]


class Tracker(Protocol):
    """Where metrics go besides metrics.jsonl."""

    def log(self, step: int, metrics: Metrics) -> None:
        """Take the metrics of one step. Steps rise, but for a resume, which logs its first steps again."""
        ...

    def close(self) -> None:
        """The run is finished: flush."""
        ...


def sweep(path: Path) -> None:
    """Remove what a killed process was writing or removing when it died: scratch files and folders, `.name.<8 hex digits>`."""
    inside = [found for found in path.rglob(".*") if SCRATCH.fullmatch(found.name)]
    beside = [found for found in path.parent.glob(f".{glob.escape(path.name)}.*") if SCRATCH.fullmatch(found.name)]
    for left in inside + beside:
        shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)


class RunDirectory:
    """Where one stage writes. Made by `create`; `key` names the work, so equal work is done once."""

    def __init__(self, path: Path, key: str) -> None:
        self.path, self.key = path, key
        self.described: dict[str, Any] = {}
        self.trackers: tuple[Tracker, ...] = ()

    @classmethod
    def create(
        cls, path: Path, *, stage: str, config: dict[str, Any], inputs: dict[str, str], rooms: tuple[str, ...] = TRAINING_ROOMS
    ) -> RunDirectory:
        """Open `path` for the work that `config` (resolved), `inputs` (name -> content hash) and the code of `rooms` define.

        Work of another key that stands there is removed: its outputs would be taken for this one's.
        """
        run = cls.planned(path, stage=stage, config=config, inputs=inputs, rooms=rooms)
        run.open()
        return run

    @classmethod
    def planned(
        cls, path: Path, *, stage: str, config: dict[str, Any], inputs: dict[str, str], rooms: tuple[str, ...] = TRAINING_ROOMS
    ) -> RunDirectory:
        """The same work without touching the disk: for one that may be refused before it has anything to write."""
        run = cls(path, hash_value({"stage": stage, "config": config, "inputs": inputs, "source": source_hash(*rooms)}))
        run.described = {"key": run.key, "stage": stage, "config": config, "inputs": inputs}
        return run

    def open(self) -> None:
        """Make the folder this work's own; see `create`."""
        path, described = self.path, self.path / "stage.json"
        if described.is_file() and read_json(described)["key"] != self.key:
            # at once, or a kill in the middle would leave checkpoints of that work under this one's name
            path.rename(path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}"))
        with disk_errors(path):
            path.mkdir(parents=True, exist_ok=True)
            sweep(path)
        if not described.is_file():
            write_json(described, self.described | {
                "code": code_revision(), "versions": versions(), "command": sys.argv, "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            })  # fmt: skip

    @property
    def done(self) -> bool:
        """Whether this very work was finished here."""
        marker = self.path / "done.json"
        return marker.is_file() and read_json(marker)["key"] == self.key

    def result(self) -> dict[str, Any]:
        """What `finish` recorded."""
        return read_json(self.path / "done.json")["result"]

    def finish(self, result: dict[str, Any], started: float) -> dict[str, Any]:
        """Mark the work as finished with its `result`; `started` is `time.monotonic()` at its start."""
        seconds = round(time.monotonic() - started, 3)
        write_json(self.path / "done.json", {"key": self.key, "result": result, "seconds": seconds})
        shutil.rmtree(self.path / "checkpoints", ignore_errors=True)
        for tracker in self.trackers:
            tracker.close()
        return result

    def log(self, step: int, metrics: Metrics) -> None:
        """Append one line to metrics.jsonl, and tell the trackers."""
        with disk_errors(self.path), (self.path / "metrics.jsonl").open("a") as handle:
            handle.write(json.dumps({"step": step, **metrics}) + "\n")
        for tracker in self.trackers:
            tracker.log(step, metrics)

    def metrics(self) -> list[dict[str, Any]]:
        """Every whole line of metrics.jsonl; the torn last line of a killed run is passed over."""
        path = self.path / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.is_file() else []
        rows = []
        for line in lines:
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return rows

    def rewind_metrics(self, step: int) -> None:
        """Forget the log lines of steps after `step`: a resumed run writes them again."""
        kept = [row for row in self.metrics() if row["step"] <= step]
        if (self.path / "metrics.jsonl").is_file():
            write_text(self.path / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in kept))

    @contextmanager
    def folder(self, name: str) -> Iterator[Path]:
        """An output folder that is whole or absent."""
        with whole_folder(self.path / name) as scratch:
            yield scratch

    def checkpoint(self, step: int, save: Callable[[Path], None]) -> None:
        """Write checkpoint `step` through `save(folder)`, then forget all but the two newest."""
        with whole_folder(self.path / "checkpoints" / f"step-{step:08d}") as scratch:
            save(scratch)
        for old in self.checkpoints()[:-KEEP_CHECKPOINTS]:
            shutil.rmtree(old)

    def checkpoints(self) -> list[Path]:
        """Checkpoint folders, oldest first, whether whole or torn."""
        return sorted((self.path / "checkpoints").glob("step-*"))

    def latest(self) -> tuple[int, Path] | None:
        """The newest whole checkpoint and its step; torn ones are passed over with a word on stderr."""
        for path in reversed(self.checkpoints()):
            try:
                verify_folder(path)
            except (IntegrityError, ValueError) as error:  # the listing of the hashes may be torn as well
                print(f"passing over a torn checkpoint: {error}", file=sys.stderr)
                continue
            return int(path.name.removeprefix("step-")), path
        return None
