"""One side of the benchmark as a process: it answers commands, one JSON line each, on its own standard output.

`ready` is answered once everything is imported, `check` trains a few steps on a few rows and says their losses, `load`
makes ready for `warm`, one optimizer step, and `pass`, one measured pass over all rows; `memory` says the peak since
`load`. A command that fails is answered with the error; the process goes on.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any, Protocol


class Side(Protocol):
    """What both learners can do; times are in seconds."""

    def check(self) -> list[float]:
        """The losses of a few optimizer steps on the check rows, from fresh weights."""
        ...

    def load(self) -> dict[str, float]:
        """Make ready for `warm` and `measured`; {"reference_s": …} where reference log-probs were computed."""
        ...

    def warm(self) -> dict[str, float]:
        """One optimizer step: its seconds as {"warm_s": …}, and what else it found out."""
        ...

    def measured(self) -> float:
        """One pass over all rows."""
        ...


def serve(make: Any) -> None:
    """Answer commands for the job named on the command line until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints goes to the log, not among the answers
    job = json.loads(Path(sys.argv[1]).read_text())
    side: Side = make(job)
    for line in sys.stdin:
        command = line.strip()
        try:
            answer = {"ok": True, **run(side, command, job)}
        except Exception as error:  # the driver reports it beside the figures it has
            traceback.print_exc()
            answer = {"ok": False, "error": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def run(side: Side, command: str, job: dict[str, Any]) -> dict[str, Any]:
    """One command."""
    if command == "ready":
        return {}
    if command == "check":
        return {"losses": side.check()}
    if command == "load":
        forget_peak(job["device"])
        started = time.perf_counter()
        return {**side.load(), "load_s": time.perf_counter() - started}
    if command == "warm":
        return side.warm()
    if command == "pass":
        gc.collect()
        return {"seconds": side.measured()}
    if command == "memory":
        return {"bytes": peak_memory(job["device"])}
    raise ValueError(f"unknown command {command!r}")


def forget_peak(device: str) -> None:
    """Peak memory counts from here, where the system can forget the one so far."""
    gc.collect()
    if device.startswith("cuda"):
        import torch

        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: str) -> int:
    """Bytes at the peak since `forget_peak`: of the process (resident), or of the GPU."""
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.max_memory_allocated())
    status = Path("/proc/self/status")
    if status.is_file():
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
