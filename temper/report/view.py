"""What the page's template shows, worked out of `ReportData`: the key figures, the table of phases, the verdicts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from temper.core.reports import Measure, Report
from temper.report.data import Judgement, Phase, ReportData, StageLog
from temper.report.glossary import DIMENSIONS, METRICS, label, meaning
from temper.report.words import ABSENT, Step, count_text, interval_text, step_of, value_text, whole_text

DECISIONS = {
    "promote": ("Promoted", "every line of the rule is met"),
    "hold": ("Held back", "at least one line of the rule is not met"),
    "cannot_tell": ("Cannot tell", "no line fails, but the evidence does not decide every one"),
}
STATUS = {"pass": ("✓", "met"), "fail": ("✗", "not met"), "unknown": ("?", "unknown")}
KNOWN = {metric: place for place, metric in enumerate(METRICS)}
MOST_NAMED = 4


@dataclass(frozen=True)
class Column:
    """One column of the table: a report, and the one it is compared with."""

    heading: str
    note: str
    report: Report
    before: Report | None


@dataclass(frozen=True)
class Cell:
    """One figure as shown."""

    value: str
    interval: str
    count: str
    step: Step
    best: bool
    absent: bool


@dataclass(frozen=True)
class Row:
    """One metric over all columns."""

    metric: str
    name: str
    meaning: str
    better: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Group:
    """The metrics of one dimension."""

    name: str
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Card:
    """One key figure: what it was, what it is."""

    name: str
    meaning: str
    value: str
    interval: str
    count: str
    split: str
    before: str
    absent: bool


def cards(data: ReportData) -> list[Card]:
    """The headline: each figure on the sealed split where it was looked at, else on dev; and where it came from."""
    found = []
    for metric in data.headline:
        sealed = data.sealed.get(data.last.name)
        now, split = (sealed, sealed.split) if sealed else (data.last.report, data.last.report.split)
        then = data.sealed.get(data.first.name) if sealed else data.first.report
        item, old = now.measure(metric), (then or data.first.report).measure(metric)
        from_split = "" if then else f", {data.first.report.split}"
        before = f"{data.first.name}{from_split}: {whole_text(old)}"
        found.append(
            Card(label(metric), meaning(metric), value_text(item), interval_text(item), count_text(item), split, before, value_text(item) == ABSENT)
        )
    return found


def columns(data: ReportData) -> list[Column]:
    """Every phase, and its constrained twin; each compared with the phase that its diagnosis names, or the one before."""
    made: list[Column] = []
    before: Phase | None = None
    for phase in data.phases:
        against = data.phase(phase.diagnosis.against) if phase.diagnosis else None
        if phase.name == data.student:
            against = data.phase(data.teacher) or against
        against = against or before
        note = f"against {against.name}" if against else "where it starts"
        made.append(Column(phase.name, note, phase.report, against.report if against else None))
        if phase.constrained:
            made.append(Column(f"{phase.name}, constrained", f"against {phase.name}", phase.constrained, phase.report))
        before = phase
    return made


def table(made: Sequence[Column]) -> tuple[list[Group], list[str]]:
    """The metrics of every dimension over the columns, and the names of those that no column measured."""
    groups, nowhere = [], []
    for dimension, heading in DIMENSIONS.items():
        names = dict.fromkeys(name for column in made for name in column.report.dimensions.get(dimension, {}))  # type: ignore[call-overload]
        ordered = sorted((f"{dimension}.{name}" for name in names), key=lambda metric: KNOWN.get(metric, len(KNOWN)))
        rows = [row(metric, made) for metric in ordered]
        nowhere += [item.name for item in rows if all(cell.absent for cell in item.cells)]
        shown = tuple(item for item in rows if not all(cell.absent for cell in item.cells))
        if shown:
            groups.append(Group(heading, shown))
    return groups, nowhere


def row(metric: str, made: Sequence[Column]) -> Row:
    """One metric over the columns, the best figure marked."""
    items = [column.report.measure(metric) for column in made]
    better = next((item.better for item in items if item is not None), "higher")
    values = [item.value for item in items if item is not None and item.value is not None]
    best = {"higher": max, "lower": min}.get(better, lambda _: None)(values) if values else None
    if best is None or 2 * sum(value == best for value in values) > len(values):
        best = None  # what most columns reach marks none of them
    cells = tuple(
        Cell(
            value_text(item), interval_text(item), count_text(item), step_of(column.report, column.before, metric),
            best is not None and item is not None and item.value == best, item is None or item.value is None,
        )
        for item, column in zip(items, made, strict=True)
    )  # fmt: skip
    words = "lower is better" if better == "lower" else ""
    return Row(metric, label(metric), meaning(metric), words, cells)


def account(phase: Phase, column: Column) -> str:
    """What a phase changed, in a sentence: the metrics whose paired interval lies wholly on one side."""
    if column.before is None:
        return "This is where the run starts."
    steps = {
        f"{dimension}.{name}": step_of(column.report, column.before, f"{dimension}.{name}")
        for dimension in DIMENSIONS
        if dimension != "runtime"
        for name in column.report.dimensions.get(dimension, {})  # type: ignore[call-overload]
    }
    up, down = ([label(metric).lower() for metric, step in steps.items() if step.direction == way] for way in ("better", "worse"))
    parts = [f"{word} on {listed(names)}" for word, names in (("better", up), ("worse", down)) if names]
    return (" and ".join(parts).capitalize() if parts else "No quality metric changed clearly") + f" ({column.note})."


def listed(names: Sequence[str]) -> str:
    """The first few names, and the number of the rest."""
    shown, rest = list(names[:MOST_NAMED]), len(names) - MOST_NAMED
    return ", ".join(shown) + (f" and {rest} more" if rest > 0 else "")


def seconds(phase: Phase) -> float | None:
    """What the phase's stages took together; None where no stage says."""
    known = [stage.seconds for stage in phase.stages if stage.seconds is not None]
    return sum(known) if known else None


def alike(stages: Sequence[StageLog]) -> list[list[StageLog]]:
    """Stages of one kind together, so that their curves can be drawn over each other."""
    kinds = dict.fromkeys(stage.kind for stage in stages)
    return [[stage for stage in stages if stage.kind == kind] for kind in kinds]


def facts(stages: Sequence[StageLog]) -> list[str]:
    """What the stages read and did, from what they recorded; equal accounts are said once, with their number."""
    said: dict[str, int] = {}
    for stage in stages:
        text = ", ".join(f"{stage.result[name]:,} {name}" for name in ("rows", "pairs", "tasks", "steps") if isinstance(stage.result.get(name), int))
        if text:
            said[text] = said.get(text, 0) + 1
    return [f"{count} × {text}" if count > 1 else text for text, count in said.items()]


def judged(judgement: Judgement) -> dict[str, Any]:
    """A verdict for the page: the decision in words, and its lines with readable names."""
    verdict = judgement.verdict
    headline, because = DECISIONS[verdict.decision]
    counts = {status: sum(line.status == status for line in verdict.findings) for status in STATUS}
    told = [f"{count} {STATUS[status][1]}" for status, count in counts.items() if count]
    lines = [
        {"mark": STATUS[line.status][0], "word": STATUS[line.status][1], "status": line.status, "name": rule_name(line.rule), "line": line}
        for line in verdict.findings
    ]
    return {"judgement": judgement, "decision": verdict.decision, "headline": headline, "because": because, "counts": ", ".join(told), "lines": lines}


def rule_name(rule: str) -> str:
    """`target: tools.precision` as `Target · Tool precision`."""
    kind, colon, metric = rule.partition(": ")
    if not colon:
        return rule.replace("_", " ").capitalize()
    if metric.startswith("slice:"):
        name, _, figure = metric.removeprefix("slice:").rpartition(".")
        return f"{kind.capitalize()} · {name.replace('_', ' ')}, {figure}"
    return f"{kind.capitalize()} · {label(metric)}"


def student_rows(data: ReportData) -> list[dict[str, Any]]:
    """Teacher and student slice by slice, with the share that was kept; empty where there is no student."""
    student, teacher = data.phase(data.student), data.phase(data.teacher)
    if student is None or teacher is None:
        return []
    rows = []
    for name in sorted(teacher.report.slices, key=lambda item: (":" in item, item)):
        metric = f"slice:{name}.success"
        ours, theirs = student.report.measure(metric), teacher.report.measure(metric)
        rows.append({
            "name": name.replace("_", " ").replace("tenant:", "tenant "), "teacher": whole_text(theirs), "student": whole_text(ours),
            "kept": kept(ours, theirs), "step": step_of(student.report, teacher.report, metric),
        })  # fmt: skip
    return rows


def kept(ours: Measure | None, theirs: Measure | None) -> str:
    """The student's figure as a share of the teacher's."""
    if ours is None or theirs is None or ours.value is None or not theirs.value:
        return ABSENT
    return f"{ours.value / theirs.value:.0%}"
