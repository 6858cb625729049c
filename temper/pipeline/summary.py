"""Gathering what the HTML report shows: phases with their stages and diagnoses, verdicts, lineage, serving."""

from __future__ import annotations

import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

from temper.core.config import interpolate, load_config, read_yaml
from temper.core.hashing import hash_file, hash_value
from temper.core.records import Manifest
from temper.core.reports import Report
from temper.core.run import RunDirectory, code_revision, versions
from temper.core.storage import folder_hash, read_json, write_text
from temper.gate.diagnosis import changes, diagnose
from temper.gate.rule import GateRule
from temper.pipeline.config import Phase, PipelineConfig, beside
from temper.pipeline.judged import METRIC, Judged
from temper.pipeline.measure import stage_outputs
from temper.registry import Registry
from temper.report import Diagnosis, Judgement, Manifested, ReportData, Run, Served, Shift, StageLog, build
from temper.report import Phase as ShownPhase

ALPHA = 0.05  # two-sided level of the intervals behind a diagnosis


def compared_with(phase: Phase, reports: dict[str, Report]) -> str:
    """The name of the phase that a phase is compared with: the one it names, or the one before."""
    names = list(reports)
    return phase.against or names[names.index(phase.name) - 1]


def diagnose_phase(phase: Phase, reports: dict[str, Report], judged: Judged | None) -> Diagnosis:
    """What a phase did against the one it is compared with: target metrics and guardrails apart, and the outcome named.

    A reward model's word stands beside the targets; one that is no better than a coin on held-out pairs is no evidence.
    """
    against = compared_with(phase, reports)
    candidate, baseline = reports[phase.name], reports[against]
    targets = changes(candidate, baseline, phase.targets, alpha=ALPHA)
    guardrails = changes(candidate, baseline, phase.guardrails, alpha=ALPHA) if phase.guardrails else []
    proxies = changes(candidate, baseline, [METRIC], alpha=ALPHA) if judged else []
    if judged and not judged.trusted:
        proxies = [change.model_copy(update={"status": "unknown"}) for change in proxies]
    shown = [tuple(Shift.model_validate(change.model_dump()) for change in group) for group in (targets, guardrails, proxies)]
    return Diagnosis(
        against=against, targets=shown[0], guardrails=shown[1], proxies=shown[2], judge=judge_words(judged) if judged else "",
        outcome=diagnose(targets, guardrails, proxies),
    )  # fmt: skip


def judge_words(judged: Judged) -> str:
    """How far the reward model's word goes, and what it said, in two sentences."""
    kinds, found = ", ".join(name.replace("_", " ") for name in judged.slices), judged.accuracy
    if found.value is None:
        told = "It was measured on no held-out pair, so its word is no evidence."
    else:
        low, high = f"{found.low:.0%}", f"{found.high:.0%}"
        told = f"It ranks {found.value:.1%} of {found.count} held-out pairs rightly ({low} to {high})"
        told += "." if judged.trusted else ", which a coin could do: its word is no evidence."
    sides = [f"{side.value:+.2f} (n = {side.count})" if side.value is not None else "not measured" for side in (judged.before, judged.after)]
    return f"{told} Mean reward of the answers ({kinds}): {sides[0]} before, {sides[1]} after."


def publish(cfg: PipelineConfig, path: Path, reports: dict[str, Report], outcome: dict[str, Any], *, seconds: float) -> None:
    """Write the HTML page of the whole lap; one that shows the same already is left as it is."""
    started = time.monotonic()
    data = gather(cfg, path, reports, outcome, seconds=seconds)
    # when and by which command it was made is shown, and is no reason to make it again
    lasting = data.model_copy(update={"run": data.run.model_copy(update={"seconds": None, "command": "", "code": {}})})
    folder = RunDirectory.create(
        Path(cfg.run) / "report", stage="report", config={"report": cfg.report}, inputs={"shown": hash_value(lasting)}, rooms=("report",)
    )
    page = Path(cfg.report)
    if folder.done and page.is_file() and hash_file(page) == folder.result()["sha256"]:
        print(f"unchanged: report in {page} (key {folder.key[:12]})", file=sys.stderr)
        return
    write_text(page, build(data))
    folder.finish({"report": cfg.report, "sha256": hash_file(page)}, started)


def gather(cfg: PipelineConfig, path: Path, reports: dict[str, Report], outcome: dict[str, Any], *, seconds: float) -> ReportData:
    """Everything that the page shows."""
    release = cfg.release
    return ReportData(
        title=cfg.title,
        subtitle="Post-training of a base model, phase by phase, to a release",
        phases=tuple(shown_phase(cfg, path, cfg.phase(name), report, outcome["diagnoses"].get(name)) for name, report in reports.items()),
        limits=gate_limits(path.parent / release.gate),
        before=release.baseline,
        after=release.phase,
        student=release.student,
        teacher=cfg.phase(release.student).against if release.student else None,
        gate=Judgement(title="Release", verdict=outcome["verdict"], candidate=release.phase, baseline=release.baseline),
        judgements=other_judgements(cfg, outcome),
        sealed=outcome["sealed"],
        manifests=manifests(cfg),
        lineage=Registry(release.registry).lineage(outcome["release"]),
        release=outcome["release"],
        served=Served(**outcome["served"]) if outcome.get("served") else None,
        environment={"name": cfg.environment, "version": next(iter(reports.values())).settings["environment_version"]},
        run=Run(
            path=cfg.run, command=" ".join(["temper", *sys.argv[1:]]), config=cfg.model_dump(mode="json"), code=code_revision(), versions=versions(),
            machine=f"{platform.machine()}, {os.cpu_count()} CPU cores", seconds=seconds, worked=worked_seconds(cfg),
        ),
    )  # fmt: skip


def finished(cfg: PipelineConfig) -> dict[str, int]:
    """Every finished piece of work in the run folder, by the moment it was finished."""
    run = Path(cfg.run)
    return {str(path.parent.relative_to(run)): path.stat().st_mtime_ns for depth in ("*", "*/*") for path in run.glob(f"{depth}/done.json")}


def worked_seconds(cfg: PipelineConfig) -> float:
    """What all stages and evaluations took together, as each recorded it when it was done."""
    return round(sum(read_json(Path(cfg.run) / name / "done.json")["seconds"] for name in finished(cfg) if name != "report"), 1)


def shown_phase(cfg: PipelineConfig, path: Path, phase: Phase, report: Report, diagnosis: Diagnosis | None) -> ShownPhase:
    """A phase with the logs of its stages."""
    logs = []
    for reference in phase.stages:
        values = interpolate({**read_yaml(beside(path, reference)), "run": cfg.run, **dict(item.split("=", 1) for item in reference.set)})
        found = stage_outputs(values["out"])
        logs.append(
            StageLog(
                name=Path(values["out"]).name, kind=found["stage"], seconds=found["seconds"], config=found["config"], result=found["result"],
                metrics=tuple(found["metrics"]),
            )
        )  # fmt: skip
    return ShownPhase(
        name=phase.name,
        title=phase.title,
        kind=logs[0].kind if logs else "",
        fixes=phase.fixes,
        report=report,
        stages=tuple(logs),
        diagnosis=diagnosis,
    )


def gate_limits(path: Path) -> dict[str, float]:
    """The figures that the gate's targets and guardrails ask for, by metric."""
    rule = load_config(GateRule, path)
    limits: dict[str, float] = {}
    for line in (*rule.targets, *rule.guardrails):
        found = getattr(line, "min", None) if getattr(line, "min", None) is not None else getattr(line, "max", None)
        if found is not None:
            limits[line.metric] = found
    return limits


def other_judgements(cfg: PipelineConfig, outcome: dict[str, Any]) -> tuple[Judgement, ...]:
    """The verdicts beside the release's: the weights without adapters, and the student."""
    release = cfg.release
    found = [
        Judgement(
            title="The same weights without adapters",
            verdict=outcome["first_verdict"],
            candidate=cfg.phase(release.phase).against or "",
            baseline=release.baseline,
        )
    ]
    if "student_verdict" in outcome:
        student = cfg.phase(str(release.student))
        found.append(
            Judgement(
                title="Student",
                verdict=outcome["student_verdict"],
                candidate=student.name,
                baseline=release.baseline,
                teacher=student.against,
            )
        )
    return tuple(found)


def manifests(cfg: PipelineConfig) -> tuple[Manifested, ...]:
    """Every manifest of the run with its counts."""
    found = []
    for path in sorted(Path(cfg.run).glob("data*/*/manifest.json")):
        manifest = Manifest.model_validate(read_json(path))
        found.append(Manifested(name=path.parent.name, hash=folder_hash(path.parent), counts=manifest.counts))
    return tuple(found)
