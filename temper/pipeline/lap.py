"""One lap of the ring, from admitted data to a served release, as a pipeline file spells it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from temper.core.config import load_config
from temper.core.reports import Report
from temper.core.storage import write_json
from temper.environments import load_environment
from temper.pipeline.config import Phase, PipelineConfig, StageRef, beside, resolved, stage_module
from temper.pipeline.forecast import plan
from temper.pipeline.judged import Judged, judge_phase, with_judgement
from temper.pipeline.measure import measure_phase
from temper.pipeline.release import exercised, judge, register
from temper.pipeline.summary import compared_with, diagnose_phase, finished, publish

console = Console(stderr=True)
TABLE_WIDTH = 132  # where no terminal says how wide it is
SHOWN = (  # the columns of the closing table
    ("schema", "instruction.schema_validity"), ("tool prec.", "tools.precision"), ("tool recall", "tools.recall"), ("supported", "grounding.supported_claim_rate"),
    ("refusal rec.", "safety.refusal_recall"), ("over-refusal", "safety.over_refusal"), ("discrepancies", "reasoning.discrepancy_solved"), ("task success", "instruction.task_success"),
)  # fmt: skip


def run(path: Path, overrides: list[str] | None = None, *, dry_run: bool = False) -> dict[str, Any]:
    """Run the pipeline file at `path`; return what it found. Work that is done is not done again, and it says so.

    `dry_run` prints the resolved config, the plan and the estimates of tokens, memory and time, and trains nothing.
    """
    path, overrides = Path(path), overrides or []
    cfg = load_config(PipelineConfig, path, overrides)
    if dry_run:
        return plan(cfg, path)
    started, before = time.monotonic(), finished(cfg)
    environment = load_environment(cfg.environment, **cfg.environment_options)
    run_stage(cfg, path, cfg.data)
    reports: dict[str, Report] = {}
    judgements: dict[str, Judged] = {}
    for phase in cfg.phases:
        console.rule(phase.title)
        for reference in phase.stages:
            run_stage(cfg, path, reference)
        previous = reports.get(phase.against or next(reversed(reports), ""))
        reports[phase.name] = measure_phase(cfg, phase, environment, "dev", previous, cfg.limit)
        rewarded = reward_stage(cfg, path, phase)
        if rewarded:
            against = compared_with(phase, reports)
            judgements[phase.name] = judge_phase(cfg, phase, against, rewarded, reports)
            reports = with_judgement(reports, phase.name, judgements[phase.name])
    outcome = conclude(cfg, path, environment, reports, judgements)
    publish(cfg, path, reports, outcome, seconds=time.monotonic() - started)
    made = sorted(name for name, moment in finished(cfg).items() if before.get(name) != moment)
    summary = {"report": cfg.report, "verdict": outcome["verdict"].decision, "seconds": round(time.monotonic() - started, 1), "made": made}
    print_table(cfg, reports, outcome)
    if not made:
        console.print(f"unchanged: all {len(before)} pieces of work in {cfg.run} were done before; nothing was run")
        return summary
    write_json(
        Path(cfg.run) / "summary.json", summary | {key: outcome[key] for key in ("served", "release", "student_verdict") if key in outcome}
    )
    return summary


def reward_stage(cfg: PipelineConfig, path: Path, phase: Phase) -> str | None:
    """Where the phase's own reward model was written; None where it trains none."""
    stages = [resolved(cfg, path, reference) for reference in phase.stages]
    return next((str(values["out"]) for values in stages if values["stage"] == "reward"), None)


def run_stage(cfg: PipelineConfig, path: Path, reference: StageRef) -> dict[str, Any]:
    """Run one stage file as it would run alone, in this pipeline's run folder."""
    module = stage_module(resolved(cfg, path, reference)["stage"])
    config = load_config(module.Config, beside(path, reference), [f"run={cfg.run}", *reference.set])
    return module.run(config)


def conclude(
    cfg: PipelineConfig, path: Path, environment: Any, reports: dict[str, Report], judgements: dict[str, Judged]
) -> dict[str, Any]:
    """Gate on dev, one look at the sealed split, then register, serve and roll back where the gate lets it through."""
    console.rule("Gate, release, serving")
    release, folder = cfg.release, Path(cfg.run)
    phase, baseline = cfg.phase(release.phase), reports[release.baseline]
    gate = path.parent / release.gate
    plain = phase.model_copy(update={"name": f"{phase.name}-base", "adapters": {}})
    first_report = next(
        (report for name, report in reports.items() if cfg.phase(name).model == phase.model and not cfg.phase(name).adapters), None
    )
    if first_report is None:
        first_report = measure_phase(cfg, plain, environment, "dev", None, cfg.limit)
    outcome: dict[str, Any] = {
        "verdict": judge(gate, reports[release.phase], baseline, folder / "verdict.json"),
        "first_verdict": judge(gate, first_report, baseline, folder / "verdict-base.json"),
        "diagnoses": {item.name: diagnose_phase(item, reports, judgements.get(item.name)) for item in cfg.phases if item.targets},
    }
    sealed_phases = [cfg.phase(name) for name in dict.fromkeys((release.baseline, release.phase, release.student)) if name]
    outcome["sealed"] = {item.name: measure_phase(cfg, item, environment, "test", None, cfg.sealed_limit) for item in sealed_phases}
    if release.student and release.student_gate:
        outcome["student_verdict"] = judge(
            path.parent / release.student_gate,
            reports[release.student],
            baseline,
            folder / "verdict-student.json",
            teacher=teacher_report(cfg, reports),
        )
    first = register(cfg, plain, first_report, outcome["first_verdict"])
    second = register(cfg, phase, reports[release.phase], outcome["verdict"], parents=(first.id,))
    outcome["release"] = second.id
    if outcome["verdict"].decision == outcome["first_verdict"].decision == "promote":
        outcome["served"] = exercised(cfg, first, second, environment)
    else:
        console.print(f"the gate says {outcome['verdict'].decision}; nothing is promoted or served")
    return outcome


def teacher_report(cfg: PipelineConfig, reports: dict[str, Report]) -> Report:
    """The report of the phase that taught the student: the one the student phase is compared with."""
    student = cfg.phase(str(cfg.release.student))
    return reports[student.against or cfg.release.phase]


def print_table(cfg: PipelineConfig, reports: dict[str, Report], outcome: dict[str, Any]) -> None:
    """The closing table: a row a phase, and the verdict."""
    table = Table(title=cfg.title)
    table.add_column("phase", no_wrap=True)
    for heading, _ in SHOWN:
        table.add_column(heading, justify="right")
    rows = list(reports.items()) + [(f"{name} (sealed)", report) for name, report in outcome["sealed"].items()]
    for name, report in rows:
        measures = [report.measure(metric) for _, metric in SHOWN]
        table.add_row(name, *("–" if item is None or item.value is None else f"{item.value:.2f}" for item in measures))
    wide = Console(width=None if console.is_terminal else TABLE_WIDTH)
    wide.print(table)
    wide.print(f"gate: {outcome['verdict'].decision}   report: {cfg.report}")
