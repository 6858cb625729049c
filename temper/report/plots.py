"""The report's plots. Every figure has its interval; what was not measured leaves a gap, never a zero."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from temper.core.reports import Measure, Report
from temper.report.data import Phase, ReportData, Shift, StageLog
from temper.report.glossary import label
from temper.report.svg import ACCENT, BAD, GOOD, INK, MUTED, RULE, SECOND, figure, to_svg

COLUMNS = 4
SHOWN_FIRST = ("reward", "solved", "loss", "accuracy", "margin", "length", "entropy", "kl", "grad_norm")
NOT_DRAWN = ("step", "dev_loss", "lr", "tokens", "supervised", "tokens_per_s", "limit_share", "step_s", "sample_s", "version", "seconds", "rows", "positions")
SMOOTHED_FROM = 24  # points: a longer curve gets its moving average


def progress(data: ReportData) -> str:
    """Small multiples: each headline metric over the phases, with intervals and the rule's limit."""
    metrics = [metric for metric in data.headline if any(known(phase.report.measure(metric)) for phase in data.phases)]
    if not metrics:
        return ""
    rows = math.ceil(len(metrics) / COLUMNS)
    with figure(10.9, 0.45 + 1.95 * rows, rows, min(COLUMNS, len(metrics)), sharex=True) as (drawn, axes):
        flat = [axis for line in axes for axis in line]
        for axis, metric in zip(flat, metrics, strict=False):
            panel(axis, data, metric)
        for axis in flat[len(metrics) :]:
            axis.set_axis_off()
        for column in range(axes.shape[1]):  # a panel above an empty place carries its own names
            below = [row for row in range(rows) if row * axes.shape[1] + column < len(metrics)]
            axes[below[-1], column].tick_params(labelbottom=True)
        return to_svg(drawn, f"Headline metrics over {len(data.phases)} phases with 95% intervals")


def panel(axis: Any, data: ReportData, metric: str) -> None:
    """One metric over the phases."""
    found = [(place, phase, phase.report.measure(metric)) for place, phase in enumerate(data.phases)]
    kept = [(place, phase, item) for place, phase, item in found if known(item)]
    limit = data.limits.get(metric)
    if limit is not None:
        axis.axhline(limit, color=SECOND, linewidth=1, linestyle=(0, (4, 3)))
    line = [(place, item.value) for place, phase, item in kept if phase.name != data.student and item]
    axis.plot(*zip(*line, strict=True), color=RULE, linewidth=1.5, zorder=2)
    for place, phase, item in kept:
        dot(axis, place, item, hollow=phase.name == data.student)
        constrained = phase.constrained.measure(metric) if phase.constrained else None
        if known(constrained):
            dot(axis, place + 0.3, constrained, marker="s", colour=GOOD)
    if all(item is None or item.unit == "rate" for _, _, item in kept):
        axis.set_ylim(-0.04, 1.04)
        axis.set_yticks([0, 0.5, 1], ["0%", "50%", "100%"])
    lower = next((item for _, _, item in kept if item), None)
    axis.set_title(label(metric) + (" (lower is better)" if lower and lower.better == "lower" else ""))
    axis.set_xticks(range(len(data.phases)), [phase.name for phase in data.phases], rotation=38, ha="right", rotation_mode="anchor")
    axis.set_xlim(-0.5, len(data.phases) - 0.5)


def dot(axis: Any, x: float, item: Measure | None, *, hollow: bool = False, marker: str = "o", colour: str = ACCENT) -> None:
    """A figure and its interval at `x`."""
    if item is None or item.value is None:
        return
    if item.low is not None and item.high is not None:
        axis.plot([x, x], [item.low, item.high], color=colour, linewidth=2.4, alpha=0.45, solid_capstyle="round", zorder=3)
    axis.plot([x], [item.value], marker, color=colour, markersize=5, markerfacecolor="none" if hollow else colour, zorder=4)


def known(item: Measure | None) -> bool:
    """Whether there is a figure."""
    return item is not None and item.value is not None


def forest(phase: Phase) -> str:
    """What a phase aimed at and what it must not harm: each change with its interval, good to the right."""
    if phase.diagnosis is None:
        return ""
    groups = (("Targets", phase.diagnosis.targets, ACCENT), ("Guardrails", phase.diagnosis.guardrails, INK))
    drawn_rows: list[tuple[str, Shift | None, str]] = []
    for name, shifts, colour in groups:
        rates = [shift for shift in shifts if shift.gain is not None and is_rate(phase.report, shift.metric)]
        if rates:
            drawn_rows += [(name, None, colour), *((label(shift.metric), shift, colour) for shift in rates)]
    if not drawn_rows:
        return ""
    with figure(5.6, 0.6 + 0.3 * len(drawn_rows)) as (drawn, axes):
        axis = axes[0, 0]
        axis.axvline(0, color=MUTED, linewidth=0.8)
        for place, (_, shift, colour) in enumerate(drawn_rows):
            if shift is not None and shift.gain is not None:
                shade = {"better": GOOD, "worse": BAD}.get(shift.status, colour)
                ends = [shift.low if shift.low is not None else shift.gain, shift.high if shift.high is not None else shift.gain]
                axis.plot([end * 100 for end in ends], [place, place], color=shade, linewidth=2.4, alpha=0.5, solid_capstyle="round")
                axis.plot([shift.gain * 100], [place], "o" if colour == ACCENT else "D", color=shade, markersize=5)
        axis.set_yticks(range(len(drawn_rows)), [name for name, _, _ in drawn_rows])
        for text, (_, shift, _) in zip(axis.get_yticklabels(), drawn_rows, strict=True):
            text.set_color(INK if shift is None else MUTED)
            text.set_fontweight("bold" if shift is None else "normal")
        axis.set_ylim(len(drawn_rows) - 0.4, -0.6)
        axis.grid(axis="x")
        axis.grid(visible=False, axis="y")
        axis.set_xlabel("← worse · change in points · better →")
        axis.spines["left"].set_visible(False)
        return to_svg(drawn, f"Targets and guardrails of phase {phase.name}: changes with intervals")


def is_rate(report: Report, metric: str) -> bool:
    """Whether a metric is a share of cases."""
    item = report.measure(metric)
    return item is not None and item.unit == "rate"


def slices(reports: Mapping[str, Report], metric: str = "success") -> str:
    """Each kind of task as one line, with a dot and an interval for each report."""
    names = sorted({name for report in reports.values() for name in report.slices}, key=lambda name: (":" in name, name))
    rows = [name for name in names if any(known(report.measure(f"slice:{name}.{metric}")) for report in reports.values())]
    if not rows:
        return ""
    colours, markers = (MUTED, ACCENT, SECOND), ("o", "o", "D")
    with figure(7.4, 0.7 + 0.3 * len(rows)) as (drawn, axes):
        axis = axes[0, 0]
        for number, (name, report) in enumerate(reports.items()):
            colour = colours[number % len(colours)]
            for place, slice_name in enumerate(rows):
                item = report.measure(f"slice:{slice_name}.{metric}")
                if item is None or item.value is None:
                    continue
                y = place + (number - (len(reports) - 1) / 2) * 0.26
                if item.low is not None and item.high is not None:
                    axis.plot([item.low, item.high], [y, y], color=colour, linewidth=2.2, alpha=0.45, solid_capstyle="round")
                axis.plot([item.value], [y], markers[number % len(markers)], color=colour, markersize=4.8)
            axis.plot([], [], markers[number % len(markers)], color=colour, label=name, markersize=5)
        axis.set_yticks(range(len(rows)), [name.replace("_", " ").replace("tenant:", "tenant ") for name in rows])
        axis.set_ylim(len(rows) - 0.4, -0.6)
        axis.set_xlim(-0.03, 1.03)
        axis.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0%", "25%", "50%", "75%", "100%"])
        axis.grid(axis="x")
        axis.spines["left"].set_visible(False)
        axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(reports), labelcolor=INK)
        return to_svg(drawn, f"Success by kind of task: {', '.join(reports)}")


def curves(stages: Sequence[StageLog]) -> str:
    """The learning curves of stages of one kind, at most four panels side by side; the dev loss lies over the loss."""
    names = drawn_series([row for stage in stages for row in stage.metrics])
    if not names:
        return ""
    with figure(10.9, 1.95 if len(stages) > 1 else 1.75, 1, COLUMNS) as (drawn, axes):
        for axis, name in zip(axes[0], names, strict=False):
            for stage, colour in zip(stages, (ACCENT, SECOND, GOOD, MUTED) * len(stages), strict=False):
                curve(axis, *series(stage, name), colour=colour, named=stage.name)
                if name == "loss" and has_dev(stages):
                    axis.plot(*series(stage, "dev_loss"), "D", color=colour, markersize=4.5, markerfacecolor="none")
            axis.locator_params(axis="x", integer=True)
            axis.set_title(name.replace("_", " ") + (" (◇ on dev)" if name == "loss" and has_dev(stages) else ""))
        for axis in axes[0][len(names) :]:
            axis.set_axis_off()
        axes[0][0].set_xlabel("step", loc="right")
        if len(stages) > 1:
            handles, labels = axes[0][0].get_legend_handles_labels()
            drawn.legend(handles, labels, loc="outside upper left", ncols=len(stages), labelcolor=INK)
        return to_svg(drawn, f"Learning curves of {', '.join(stage.name for stage in stages)}: {', '.join(names)}")


def has_dev(stages: Sequence[StageLog]) -> bool:
    """Whether any of the stages measured a loss on dev."""
    return any(is_number(row.get("dev_loss")) for stage in stages for row in stage.metrics)


def series(stage: StageLog, name: str) -> tuple[list[float], list[float]]:
    """Steps and values of one key of a stage's log, where it has one."""
    rows = [row for row in stage.metrics if is_number(row.get(name))]
    return [row["step"] for row in rows], [float(row[name]) for row in rows]


def curve(axis: Any, steps: Sequence[float], values: Sequence[float], *, colour: str, named: str) -> None:
    """One series; a long one also as its moving average."""
    if len(steps) < SMOOTHED_FROM:
        axis.plot(steps, values, "o-" if len(steps) < 4 else "-", color=colour, linewidth=1.4, markersize=4, label=named)
        return
    axis.plot(steps, values, color=colour, linewidth=0.7, alpha=0.35)
    half = max(1, len(values) // 24)
    smooth = [math.fsum(part) / len(part) for at in range(len(values)) if (part := values[max(0, at - half) : at + half + 1])]
    axis.plot(steps, smooth, color=colour, linewidth=1.6, label=named)


def drawn_series(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Which keys of the log are drawn: numbers that vary or stand alone, the telling ones first, at most four."""
    names = dict.fromkeys(name for row in rows for name, value in row.items() if is_number(value) and name not in NOT_DRAWN)

    def rank(name: str) -> tuple[int, str]:
        near = [place for place, telling in enumerate(SHOWN_FIRST) if telling in name]
        return (SHOWN_FIRST.index(name) if name in SHOWN_FIRST else min(near, default=len(SHOWN_FIRST)), name)

    columns = {name: tuple(row[name] for row in rows if is_number(row.get(name))) for name in names}
    moving = [name for name, values in columns.items() if len(set(values)) > 1 or len(rows) == 1]
    told: dict[tuple[float, ...], str] = {}
    for name in sorted(moving, key=rank):
        told.setdefault(columns[name], name)  # what equals a series that is drawn already (nll, where it is the loss) is drawn once
    return list(told.values())[:COLUMNS]


def is_number(value: Any) -> bool:
    """Whether a log value can be drawn."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
