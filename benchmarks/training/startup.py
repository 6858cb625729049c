"""How long from the start of a process to the end of a stage's first step, with a tiny model?

    python benchmarks/training/startup.py MODELS THREADS DEVICE

A process of its own runs the SFT stage on admitted records; the clock stops when the first line of metrics is there.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from temper.core.hashing import hash_file
from temper.core.records import Manifest, Message, Provenance, Record
from temper.core.storage import write_json, write_jsonl

TRIES, LONGEST = 3, 120.0


def main() -> None:
    """Print the medians as JSON."""
    models, threads, device = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    with tempfile.TemporaryDirectory() as scratch:
        data = manifest(Path(scratch) / "data")
        found = [first_step(models / "tiny", data, Path(scratch) / f"try-{number}", threads, device) for number in range(TRIES)]
    imports = [seconds("import temper.train.sft") for _ in range(TRIES)]
    print(json.dumps({"seconds": median(found), "tries": found, "imports_s": median(imports)}))


def manifest(folder: Path) -> Path:
    """Sixteen conversations, admitted."""
    provenance = Provenance(source="benchmark", licence="Apache-2.0", split="train", privacy="synthetic", access="all", synthetic=True)
    records = [
        Record(messages=(Message(role="user", content=f"w{number + 10} w11 w12"), Message(role="assistant", content="w13 w14")), provenance=provenance)
        for number in range(16)
    ]
    write_jsonl(folder / "records.jsonl", records)
    write_json(folder / "manifest.json", Manifest(
        name="startup", records_file="records.jsonl", records_sha256=hash_file(folder / "records.jsonl"),
        admitted=tuple(record.id for record in records), rules={}, heldout={}, refusals=(), counts={"admitted": len(records)},
    ))  # fmt: skip
    return folder


def first_step(model: Path, data: Path, out: Path, threads: int, device: str) -> float:
    """Seconds until the stage has written its first metrics. Raises RuntimeError with its last line where it fails."""
    program = (
        "from temper.train import sft; "
        f"sft.run(sft.Config(stage='sft', base={str(model)!r}, data={str(data)!r}, out={str(out)!r}, steps=1, threads={threads}, device={device!r}))"
    )
    started = time.perf_counter()
    child = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    metrics = out / "metrics.jsonl"
    try:
        while time.perf_counter() - started < LONGEST:
            if metrics.is_file() and metrics.stat().st_size:
                return time.perf_counter() - started
            if child.poll():
                assert child.stderr is not None
                raise RuntimeError(f"the stage failed: {child.stderr.read().strip().splitlines()[-1]}")
            time.sleep(0.005)
        raise RuntimeError(f"no first step within {LONGEST:.0f} s")
    finally:
        child.communicate()


def seconds(statement: str) -> float:
    """From the start of a Python process to the end of `statement`; the end of the process is not waited for."""
    started = time.perf_counter()
    child = subprocess.Popen([sys.executable, "-c", f"{statement}; print(flush=True)"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert child.stdout is not None
    child.stdout.readline()
    took = time.perf_counter() - started
    if child.wait():
        raise RuntimeError(f"{statement!r} failed with exit code {child.returncode}")
    return took


if __name__ == "__main__":
    main()
