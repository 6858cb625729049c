"""From the import of a stage to its first step, on a tiny model: under six seconds of one core."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

from worlds import conversations, manifest

BUDGET_S = 6.0
SCRIPT = """
import sys
from temper.train import sft
sft.run(sft.Config(base=sys.argv[1], data=sys.argv[2], out=sys.argv[3], steps=1, device="cpu", threads=1))
"""


def test_start_up_stays_under_its_budget(base, tmp_path) -> None:
    """Counted in CPU seconds, which other work on the machine does not stretch; a process of its own imports everything anew."""
    data = manifest(tmp_path / "rows", conversations(8))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", SCRIPT, base, data, str(tmp_path / "out")], check=True, env=environment, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert (tmp_path / "out/done.json").is_file()
    assert seconds < BUDGET_S, f"{seconds:.1f} CPU seconds; `python -X importtime` says which import takes them"
    print(f"start-up: {seconds:.2f} CPU seconds")
