"""Measuring a phase: open the model with its adapters, run the suite, keep report and records; done work is done once."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from temper.core.errors import DataError
from temper.core.records import Record, Split
from temper.core.reports import Report
from temper.core.run import TRAINING_ROOMS, RunDirectory
from temper.core.storage import read_json, read_jsonl, write_json, write_jsonl
from temper.evaluate.run import read_report
from temper.evaluate.suite import run_suite
from temper.pipeline.config import Phase, PipelineConfig
from temper.policy.model import Policy
from temper.registry.release import artifact_hash
from temper.rollout.engine import Engine
from temper.train.stage import checkpoint_hash


def phase_hash(phase: Phase) -> str:
    """The hash of what the phase serves: its weights and every adapter."""
    return artifact_hash(checkpoint_hash(phase.model), {tenant: checkpoint_hash(path) for tenant, path in phase.adapters.items()})


def open_engine(phase: Phase) -> Engine:
    """The phase's model in float32, with its adapters loaded under their tenants' names."""
    policy = Policy.load(phase.model, precision="float32")
    for tenant, path in phase.adapters.items():
        policy.load_adapter(tenant, path)
    return Engine(policy)


def measure_phase(cfg: PipelineConfig, phase: Phase, environment: Any, split: Split, previous: Report | None, limit: int | None) -> Report:
    """The report of one phase on one split; read back where the same work was done before."""
    started = time.monotonic()
    digest = phase_hash(phase)
    out = evaluation_folder(cfg, phase.name, split)
    settings = {
        "split": split,
        "limit": limit,
        "constrained": phase.constrained,
        "options": cfg.options.model_dump(mode="json"),
        "name": phase.name,
    }
    inputs = {
        "model": digest,
        "environment": environment.version,
        "previous": previous.suite_hash + previous.model_hash if previous else "",
    }
    folder = RunDirectory.create(out, stage="evaluate", config=settings, inputs=inputs, rooms=(*TRAINING_ROOMS, "evaluate"))
    if folder.done:
        print(f"unchanged: evaluation of {phase.name} on {split} in {out} (key {folder.key[:12]})", file=sys.stderr)
        return read_report(out / "report.json")
    report, records = run_suite(
        open_engine(phase), environment, split, name=phase.name, constrained=phase.constrained, limit=limit, options=cfg.options, previous=previous,
        adapter_of=(lambda task: task.tenant if task.tenant in phase.adapters else None) if phase.adapters else None,
        ledger=Path(cfg.ledger), model_hash=digest,
    )  # fmt: skip
    write_json(out / "report.json", report)
    write_jsonl(out / "records.jsonl", records)
    folder.finish({"report": str(out / "report.json")}, started)
    return report


def evaluation_folder(cfg: PipelineConfig, phase: str, split: Split = "dev") -> Path:
    """Where the report and the records of a phase on a split stand."""
    return Path(cfg.run) / "evaluate" / (phase if split == "dev" else f"{phase}-{split}")


def records_of(cfg: PipelineConfig, phase: str, split: Split = "dev") -> list[Record]:
    """The records behind a phase's report."""
    return read_jsonl(evaluation_folder(cfg, phase, split) / "records.jsonl", Record)


def stage_outputs(out: str) -> dict[str, Any]:
    """What a finished stage recorded: result, seconds, and its log. Raises DataError where it did not finish."""
    folder = Path(out)
    if not (folder / "done.json").is_file():
        raise DataError(f"{folder} holds no finished stage", do="run the pipeline, or the stage that writes it")
    done, described = read_json(folder / "done.json"), read_json(folder / "stage.json")
    metrics = RunDirectory(folder, done["key"]).metrics()
    return {
        "result": done["result"],
        "seconds": done["seconds"],
        "config": described["config"],
        "stage": described["stage"],
        "metrics": metrics,
        "inputs": described["inputs"],
    }
