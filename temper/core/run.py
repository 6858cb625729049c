"""The run directory of one stage: config as given and resolved, one log line a step, checkpoints, result.

runs/demo/sft/
  stage.json      what ran: config, its hash, inputs' hashes, code revision, versions
  metrics.jsonl   one line a step
  checkpoints/    the two newest, each whole or absent
  model/ …        outputs, each a whole folder
  done.json       written last: the stage is finished for this key
runs/demo/unfinished/sft-<key>/   an sft that had checkpoints when one of another key took its place
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

from temper.core.errors import IntegrityError, StorageError
from temper.core.hashing import canonical_json, hash_folder, hash_value
from temper.core.storage import disk_errors, read_json, verify_folder, whole_folder, write_json, write_text

KEEP_CHECKPOINTS = 2
VERSIONS = "versions.json"
CHANGES_TOLD = 4  # of two configs that differ; the rest are counted
SCRATCH = re.compile(r"\..+\.[0-9a-f]{8}")
TRAINING_ROOMS = ("data", "policy", "rollout", "train", "environments")  # the code that can change a weight
PINNED = ("torch", "transformers", "tokenizers", "llguidance", "pydantic")
TRAINED_WITH = ("torch", "transformers")  # what computes a step


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


def flat(config: Any, name: str = "") -> dict[str, Any]:
    """A config's values by dotted name."""
    if not isinstance(config, dict) or not config:
        return {name: config}
    return {inner: value for key, part in config.items() for inner, value in flat(part, f"{name}.{key}" if name else key).items()}


def changes(before: dict[str, Any], now: dict[str, Any]) -> str:
    """What parts two descriptions of work, in one line: the keys with both values, the inputs, or else the code."""
    old, new = flat(before["config"]), flat(json.loads(canonical_json(now["config"])))
    told = [f"{name} {old.get(name, 'unset')} -> {new.get(name, 'unset')}" for name in sorted(old | new) if old.get(name, ...) != new.get(name, ...)]
    inputs = before["inputs"] | now["inputs"]
    told += [f"another {name}" for name in sorted(inputs) if before["inputs"].get(name) != now["inputs"].get(name)]
    if before["stage"] != now["stage"]:
        told = [f"stage {before['stage']} -> {now['stage']}"]
    more = [f"{len(told) - CHANGES_TOLD} more"] if len(told) > CHANGES_TOLD else []
    return ", ".join(told[:CHANGES_TOLD] + more) or "temper's own code"


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

        Work of another key that stands there makes room, for its outputs would be taken for this one's: what is unfinished
        and has checkpoints is kept in `unfinished/` beside it and comes back with its key, anything else is removed.
        Either is said in one line on stderr. Raises StorageError where what is to be kept has no place.
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
        if described.is_file() and (other := read_json(described))["key"] != self.key:
            self._make_room(other)
        kept = self._kept(self.key)
        if kept.is_dir() and not path.exists():
            kept.rename(path)
            print(f"{kept} is back in {path}: unfinished work of this very key", file=sys.stderr)
        with disk_errors(path):
            path.mkdir(parents=True, exist_ok=True)
            sweep(path)
        if not described.is_file():
            write_json(described, self.described | {
                "code": code_revision(), "versions": versions(), "command": sys.argv, "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            })  # fmt: skip

    def _make_room(self, other: dict[str, Any]) -> None:
        """Move the `other` work that stands here away, whole and at once: what a kill left of it would pass for this one's."""
        stage, finished = other["stage"], (self.path / "done.json").is_file()
        named = f"in {self.path} (key {other['key'][:12]})"
        if finished or not self.checkpoints():
            state = f"finished {stage}" if finished else f"unfinished {stage}, without a checkpoint,"
            print(f"removing the {state} {named}: {changes(other, self.described)}", file=sys.stderr)
            self.path.rename(self.path.with_name(f".{self.path.name}.{uuid.uuid4().hex[:8]}"))  # the sweep removes it
            return
        kept = self._kept(other["key"])
        if kept.exists():
            raise StorageError(
                f"the unfinished {stage} {named} has no place to be kept in",
                why=f"{kept} is there already, and this is other work: {changes(other, self.described)}",
                do="remove or move one of the two",
            )
        with disk_errors(kept):
            kept.parent.mkdir(exist_ok=True)
            self.path.rename(kept)
        print(
            f"the unfinished {stage} {named} is kept in {kept}, and another begins: {changes(other, self.described)}. "
            "To go on with it, set that back and run the same command; else remove that folder",
            file=sys.stderr,
        )

    def _kept(self, key: str) -> Path:
        """Where unfinished work of `key` is kept: a level deeper, so that none takes it for a stage of the run."""
        return self.path.parent / "unfinished" / f"{self.path.name}-{key[:12]}"

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
            write_json(scratch / VERSIONS, versions())
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
            self._compare_libraries(path)
            return int(path.name.removeprefix("step-")), path
        return None

    def _compare_libraries(self, checkpoint: Path) -> None:
        """Say so where other libraries wrote a checkpoint; one that names none is of those its run began under."""
        of_run = self.path / "stage.json"
        if (checkpoint / VERSIONS).is_file():
            wrote = read_json(checkpoint / VERSIONS)
        else:
            wrote = read_json(of_run)["versions"] if of_run.is_file() else {}
        now = versions()
        other = [name for name in TRAINED_WITH if wrote.get(name, now[name]) != now[name]]
        if other:
            before, after = (" and ".join(f"{name} {found[name]}" for name in other) for found in (wrote, now))
            print(
                f"warning: {checkpoint} was written under {before}; what follows is computed under {after}, and the result is of both. "
                f"Remove {self.path} to train all of it under one, or go back to {before}",
                file=sys.stderr,
            )
