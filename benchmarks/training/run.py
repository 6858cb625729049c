"""temper against TRL: the same weights, rows, order and objective, in turn, on this machine.

    make bench                              # everything
    make bench WORKLOADS=sft_full,dpo       # some of it
    python benchmarks/training/run.py --peer .venv-peer/bin/python --threads 2 --workloads dpo --out benchmarks/results

For each workload every side is a process of its own. Both sides first train the same rows from the same weights and must
say the same losses; then each is warmed up and measured, on a CPU pass by pass in turn (peer, temper, peer, temper), on a
GPU one after the other, so that each has all its memory. Medians and spread go to a JSON file and a table, written again
after every workload. A side that fails is reported; the rest goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from statistics import median
from threading import Timer
from typing import Any

import report
from workloads import CHECK_ROWS, CHECK_STEPS, Workload, by_name, described, measure

HERE = Path(__file__).resolve().parent
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}  # of a loss, relative to it or to one
TIMEOUT = 400.0  # seconds that one command of one side may take: an hour of compiling is no variant to measure
# what TRL offers, the likely fastest first; the fastest in its first pass is the peer
VARIANTS = {
    "cpu": {"sft": ["grouped", "bfd", "grouped+compile"]},
    "cuda": {"sft": ["bfd+flex+liger", "grouped+liger"], "dpo": ["grouped+flex+liger", "grouped+liger"]},
}


class SideError(RuntimeError):
    """One side could not do what it was asked."""


class Process:
    """One side of one workload: commands in, answers out, its prints into a log."""

    def __init__(self, python: str, script: str, job: dict[str, Any], scratch: Path) -> None:
        self.timeout = job["timeout"]
        name = f"{job['workload']}-{Path(script).stem}-{job['variant']}"
        file, self.log = scratch / f"{name}.json", (scratch / f"{name}.log").open("w")
        file.write_text(json.dumps(job))
        environment = os.environ | {name: str(job["threads"]) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        environment |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(scratch / "cache"), "TQDM_DISABLE": "1"}
        self.child = subprocess.Popen([python, str(HERE / script), str(file)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log,
                                      text=True, env=environment, cwd=HERE)  # fmt: skip

    def ask(self, command: str) -> dict[str, Any]:
        """The answer to one command. Raises SideError where the side fails, dies or takes too long."""
        assert self.child.stdin is not None
        assert self.child.stdout is not None
        try:
            self.child.stdin.write(command + "\n")
            self.child.stdin.flush()
        except BrokenPipeError as error:
            raise SideError(f"the process ended before {command!r}: {self.last_words()}") from error
        line = read_line(self.child, self.timeout)
        if not line:
            raise SideError(f"no answer to {command!r}: {self.last_words()}")
        answer: dict[str, Any] = json.loads(line)
        if not answer.pop("ok"):
            raise SideError(f"{command}: {answer['error']}")
        return answer

    def last_words(self) -> str:
        """The last line the side printed."""
        self.log.flush()
        lines = Path(self.log.name).read_text(errors="replace").split("\n")
        return next((line.strip()[:200] for line in reversed(lines) if line.strip()), "it printed nothing")

    def close(self) -> None:
        """End the process."""
        self.child.kill()
        self.child.wait()
        self.log.close()


def read_line(child: subprocess.Popen[str], timeout: float) -> str:
    """The next line of the child's output; empty where it ended or `timeout` seconds passed (the child is then ended)."""
    assert child.stdout is not None
    timer = Timer(timeout, child.kill)
    timer.start()
    try:
        return child.stdout.readline()
    finally:
        timer.cancel()


def main() -> int:
    """The command line; 1 where a workload has no ratio."""
    told = arguments()
    workloads = by_name([name for name in told.workloads.split(",") if name], told.device, tiny=told.tiny, changed=told.set)
    precision = "bfloat16" if on_gpu(told) else "float32"
    scratch, models = Path(tempfile.mkdtemp(prefix="bench-")), told.work / "models"
    names = sorted({name for workload in workloads for name in (workload.model, workload.teacher) if name} | {"tiny"})
    call([sys.executable, str(HERE / "prepare.py"), str(models.resolve()), *names])
    found = machine(sys.executable, told)
    results: dict[str, Any] = {**found, "peer_versions": peer_versions(told), "limits": [found["limit"]], "passes": told.passes,
                               "device": told.device, "precision": precision, "workloads": {}}  # fmt: skip
    started = time.monotonic()
    for workload in workloads:
        job = {"workload": workload.name, "tiny": told.tiny, "changed": told.set, "models": str(models.resolve()), "device": told.device,
               "threads": told.threads, "precision": precision, "timeout": told.timeout}  # fmt: skip
        print(f"== {workload.name}: {workload.title}", flush=True)
        results["workloads"][workload.name] = described(workload) | compare(workload, job, told, scratch)
        results["limits"] += limits(told, results["workloads"][workload.name])
        results["minutes"] = round((time.monotonic() - started) / 60, 1)
        report.write(results, told.out)
        print(report.lines(results, workload.name), flush=True)
    if not told.workloads or told.extras:
        results |= extras(told, scratch)
        report.write(results, told.out)
    print(report.markdown(results))
    return int(any("ratio" not in one for one in results["workloads"].values()) and not told.no_peer)


def arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", default="", help="names separated by commas; none: all, and the extras")
    parser.add_argument("--peer", type=Path, default=Path(".venv-peer/bin/python"), help="the Python of the environment that TRL is installed in")
    parser.add_argument("--no-peer", action="store_true", help="measure temper alone")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--timeout", type=float, default=TIMEOUT, help="seconds that one step or pass of one side may take")
    parser.add_argument("--passes", type=int, default=2, help="measured passes of each side")
    parser.add_argument("--device", default="cpu", help="cpu or cuda; cuda has workloads of its own")
    parser.add_argument("--variants", default="", help="TRL's variants to try instead of the usual ones: grouped, bfd, each with +liger, +compile, +flex, +onednn")
    parser.add_argument("--set", type=numbers, default={}, help="other sizes: rows=64,step_rows=16,peer_rows=4,tokens_per_batch=8192, or some of them")
    parser.add_argument("--tiny", action="store_true", help="a tiny model under every workload, to try the harness itself")
    parser.add_argument("--extras", action="store_true", help="with named workloads too: cost by tokens, start-up")
    parser.add_argument("--work", type=Path, default=Path("runs/bench"), help="where the models are kept")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    return parser.parse_args()


def numbers(text: str) -> dict[str, int]:
    """`name=number,…` as a dictionary."""
    return {name: int(number) for name, _, number in (part.partition("=") for part in text.split(","))}


def on_gpu(told: argparse.Namespace) -> bool:
    """Whether a GPU is measured."""
    return bool(told.device.startswith("cuda"))


# --- one workload ---


def compare(workload: Workload, job: dict[str, Any], told: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Losses and passes of both sides; what failed is said under `errors`. Every process imports what it needs before one works."""
    made: dict[str, Any] = {"size": vars(measure(workload)), "errors": [], "ours": {}, "check": f"{CHECK_STEPS} steps on up to {CHECK_ROWS} rows"}
    named = told.variants.split(",") if told.variants else VARIANTS["cuda" if on_gpu(told) else "cpu"].get(workload.kind, ["grouped"])
    ours = Process(sys.executable, "ours.py", job | {"variant": "-"}, scratch)
    peers = {variant: Process(str(told.peer.absolute()), "peer.py", job | {"variant": variant}, scratch) for variant in ([] if told.no_peer else named)}
    try:
        for side in (ours, *peers.values()):
            with suppress(SideError):  # it will say so again when it is asked to work
                side.ask("ready")
        made["losses"] = {"ours": ours.ask("check")["losses"]}
        if on_gpu(told):
            get_ready(ours, made["ours"])
            measure_on([(ours, made["ours"])], told.passes)
        chosen = choose_variant(peers, told, made) if peers else None
        if not on_gpu(told):
            get_ready(ours, made["ours"])
            measure_on([*([(chosen, made["peer"])] if chosen else []), (ours, made["ours"])], told.passes)
    except SideError as error:
        made["errors"].append(str(error))
    finally:
        for side in (ours, *peers.values()):
            side.close()
    return conclude(made, job["precision"])


def choose_variant(peers: dict[str, Process], told: argparse.Namespace, made: dict[str, Any]) -> Process:
    """The peer's fastest variant of those that say our losses, on a GPU measured to the end; its first pass, which chose it, counts."""
    tried: dict[str, dict[str, Any]] = {variant: {} for variant in peers}
    made["variants"], best = tried, ""
    for variant, side in peers.items():
        figures = tried[variant]
        try:
            figures["losses"] = side.ask("check")["losses"]
            figures["losses_apart"] = apart(made["losses"]["ours"], figures["losses"])
            get_ready(side, figures)
            figures["passes_s"] = [side.ask("pass")["seconds"]]
            if best and rank(figures, told) >= rank(tried[best], told):
                side.close()
                continue
            if on_gpu(told):
                measure_on([(side, figures)], told.passes)
        except SideError as error:
            figures["error"] = str(error)
            side.close()
            continue
        if best:
            peers[best].close()
        best = variant
    if not best:
        raise SideError(f"no variant of the peer ran: {next(iter(tried.values()))['error']}")
    made["peer"] = {"variant": best, **tried[best]}
    made["losses"]["peer"], made["losses_apart"] = tried[best]["losses"], tried[best]["losses_apart"]
    return peers[best]


def apart(ours: list[float], theirs: list[float]) -> float:
    """How far the losses are apart, relative to ours or to one."""
    return max(abs(one - other) / max(1.0, abs(one)) for one, other in zip(ours, theirs, strict=True))


def rank(figures: dict[str, Any], told: argparse.Namespace) -> tuple[bool, float]:
    """Least where a variant is to be preferred."""
    return figures["losses_apart"] > TOLERANCE["bfloat16" if on_gpu(told) else "float32"], figures.get("reference_s", 0.0) + figures["passes_s"][0]


def get_ready(side: Process, figures: dict[str, Any]) -> None:
    """Load and warm up; what that took is noted in `figures`."""
    loaded = side.ask("load")
    figures |= {name: value for name, value in loaded.items() if name == "reference_s" and value}
    figures |= side.ask("warm")


def measure_on(sides: list[tuple[Process, dict[str, Any]]], passes: int) -> None:
    """Passes in turn until each side has as many, then its memory; they are closed."""
    for turn in range(passes):
        for side, figures in sides:
            if len(figures.setdefault("passes_s", [])) <= turn:
                figures["passes_s"].append(side.ask("pass")["seconds"])
    for side, figures in sides:
        figures["peak_bytes"] = side.ask("memory")["bytes"]
        side.close()


def conclude(made: dict[str, Any], precision: str) -> dict[str, Any]:
    """Medians, spread, speeds; and the ratio, if the losses agree. DPO's reference counts once, as a part of one pass."""
    for name in ("peer", "ours"):
        side = made.get(name, {})
        if not side.get("passes_s"):
            continue
        passes = [seconds + side.get("reference_s", 0.0) for seconds in side["passes_s"]]
        side["seconds"], side["spread"] = median(passes), (max(passes) - min(passes)) / median(passes)
        side["units_per_s"], side["tokens_per_s"] = made["size"]["units"] / side["seconds"], made["size"]["tokens"] / side["seconds"]
        operations = made["size"]["operations"] + made["size"]["reference_operations"]
        side["operations_per_s"] = operations / side["seconds"]
    if "seconds" in made.get("peer", {}) and "seconds" in made.get("ours", {}):
        made["losses_agree"] = made["losses_apart"] <= TOLERANCE[precision]
        if made["losses_agree"]:
            made["ratio"] = made["peer"]["seconds"] / made["ours"]["seconds"]
            made["training_ratio"] = median(made["peer"]["passes_s"]) / median(made["ours"]["passes_s"])
        else:
            made["errors"].append(f"no ratio: the losses are {made['losses_apart']:.1e} apart")
    return made


# --- the rest ---


def call(command: list[str], *, timeout: float = 3 * TIMEOUT, environment: dict[str, str] | None = None) -> str:
    """What a command prints. Raises SideError with its last line where it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=os.environ | (environment or {}), check=False)
    except subprocess.TimeoutExpired as error:
        raise SideError(f"{Path(command[1]).name} took more than {timeout:.0f} s") from error
    if done.returncode:
        raise SideError(f"{Path(command[1]).name} failed: {(done.stderr.strip().splitlines() or ['it printed nothing'])[-1]}")
    return done.stdout


def machine(python: str, told: argparse.Namespace) -> dict[str, Any]:
    """Description and limit, measured now, in a process of their own."""
    threads = {"OMP_NUM_THREADS": str(told.threads), "MKL_NUM_THREADS": str(told.threads)}
    found: dict[str, Any] = json.loads(call([python, str(HERE / "machine.py"), told.device, str(told.threads)], environment=threads))
    return found


def limits(told: argparse.Namespace, made: dict[str, Any]) -> list[dict[str, float]]:
    """The limit as it is now; where it cannot be measured, that is one of the workload's errors."""
    try:
        return [machine(sys.executable, told)["limit"]]
    except SideError as error:
        made["errors"].append(f"the limit was not measured again: {error}")
        return []


def peer_versions(told: argparse.Namespace) -> dict[str, str]:
    """The versions in the peer's environment. Raises SystemExit where it is not there."""
    if told.no_peer:
        return {}
    if not told.peer.is_file():
        raise SystemExit(f"error: there is no {told.peer}\n  do:  make .venv-peer/.installed, or measure temper alone with --no-peer")
    found: dict[str, str] = json.loads(call([str(told.peer), "-c", f"import sys, json; sys.path.insert(0, {str(HERE)!r}); import machine; print(json.dumps(machine.versions()))"]))
    return found


def extras(told: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Cost by tokens and start-up; an error is a result too."""
    made: dict[str, Any] = {}
    for name in ("linear", "startup"):
        print(f"== {name}", flush=True)
        try:
            threads = {"OMP_NUM_THREADS": str(told.threads), "MKL_NUM_THREADS": str(told.threads)}
            made[name] = json.loads(call([sys.executable, str(HERE / f"{name}.py"), str((told.work / "models").resolve()), str(told.threads), told.device], environment=threads).splitlines()[-1])
        except (SideError, ValueError) as error:
            made[name] = {"error": str(error)}
    return made


if __name__ == "__main__":
    try:
        sys.exit(main())
    except SideError as error:
        sys.exit(f"error: {error}")
