"""The run directory of a stage that several ranks work on: rank 0 writes, all of them checkpoint."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from temper.core.run import Metrics, RunDirectory
from temper.train import parallel


class SharedRun(RunDirectory):
    """A RunDirectory of every rank. Checkpoints are written by all, each its shards, and everything else by rank 0."""

    def log(self, step: int, metrics: Metrics) -> None:
        """Rank 0 appends one line; the metrics are already those of all ranks."""
        if parallel.rank() == 0:
            super().log(step, metrics)

    def rewind_metrics(self, step: int) -> None:
        """Rank 0 forgets the log lines after `step`."""
        if parallel.rank() == 0:
            super().rewind_metrics(step)

    def finish(self, result: dict[str, Any], started: float) -> dict[str, Any]:
        """Rank 0 marks the work as finished, when every rank has come here."""
        parallel.wait()
        if parallel.rank() == 0:
            super().finish(result, started)
        parallel.wait()
        return result

    def checkpoint(self, step: int, save: Callable[[Path], None]) -> None:
        """Every rank writes into one scratch folder; rank 0 makes it, and names it a checkpoint when all are done."""

        def all_save(scratch: Path | None) -> None:
            save(Path(parallel.tell(str(scratch))))
            parallel.wait()

        with parallel.together(f"the checkpoint of step {step}"):
            super().checkpoint(step, all_save) if parallel.rank() == 0 else all_save(None)

    def latest(self) -> tuple[int, Path] | None:
        """The newest whole checkpoint, as rank 0 finds it."""
        found = super().latest() if parallel.rank() == 0 else None
        with parallel.together("the search for a checkpoint"):
            return parallel.tell(found)  # type: ignore[no-any-return]


def write_output(run: RunDirectory, name: str, model: Any, save: Callable[[Path], None]) -> Path:
    """Write the run's folder `name`, whole or absent, through `save(folder)`; of several ranks rank 0 writes, with all shards.

    `model` is the module that may be sharded. Returns the folder, which every rank sees when this returns.
    """
    with parallel.together(f"the gathering of {name}"), parallel.on_rank_zero(model) as writes:
        if writes:
            with run.folder(name) as scratch:
                save(scratch)
    parallel.wait()
    return run.path / name


def say(text: str) -> None:
    """One line on stderr, of rank 0."""
    if parallel.rank() == 0:
        print(text, file=sys.stderr, flush=True)
