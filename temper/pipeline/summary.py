"""Gathering what the HTML report shows: phases with their stages and diagnoses, verdicts, lineage, serving."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path
from typing import Any

from temper.core.config import interpolate, load_config, read_yaml
from temper.core.records import Manifest
from temper.core.reports import Report
from temper.core.run import code_revision, versions
from temper.core.storage import folder_hash, read_json
from temper.gate.diagnosis import changes, diagnose
from temper.gate.rule import GateRule
from temper.pipeline.config import Phase, PipelineConfig, beside
from temper.pipeline.measure import stage_outputs
from temper.registry import Registry
from temper.report import Diagnosis, Judgement, Manifested, ReportData, Run, Served, Shift, StageLog, build
from temper.report import Phase as ShownPhase

ALPHA = 0.05  # two-sided level of the intervals behind a diagnosis


def diagnose_phase(phase: Phase, reports: dict[str, Report], cfg: PipelineConfig) -> Diagnosis:
    """What a phase did against the one it is compared with: target metrics and guardrails apart, and the outcome named."""
    names = list(reports)
    against = phase.against or names[names.index(phase.name) - 1]
    candidate, baseline = reports[phase.name], reports[against]
    targets = changes(candidate, baseline, phase.targets, alpha=ALPHA)
    guardrails = changes(candidate, baseline, phase.guardrails, alpha=ALPHA) if phase.guardrails else []
    shown = [tuple(Shift.model_validate(change.model_dump()) for change in group) for group in (targets, guardrails)]
    return Diagnosis(against=against, targets=shown[0], guardrails=shown[1], outcome=diagnose(targets, guardrails))


def build_report(cfg: PipelineConfig, path: Path, reports: dict[str, Report], outcome: dict[str, Any], *, seconds: float) -> str:
    """The HTML page of the whole lap."""
    release = cfg.release
    data = ReportData(
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
            machine=f"{platform.machine()}, {os.cpu_count()} CPU cores", seconds=seconds,
        ),
    )  # fmt: skip
    return build(data)


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
