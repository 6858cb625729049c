"""Figures in words: values with their unit, intervals, counts, and what changed. What is absent is said to be."""

from __future__ import annotations

from typing import Literal

from temper.core.reports import Measure, Report
from temper.core.stats import contrast, merge_clusters

ABSENT = "not measured"
Direction = Literal["better", "worse", "unclear", "moved", "none"]


def value_text(measure: Measure | None) -> str:
    """The figure alone: a rate in percent, a price for a thousand tasks, a quantity in its unit."""
    if measure is None or measure.value is None:
        return ABSENT
    return number(measure.value, measure.unit)


def number(value: float, unit: str) -> str:
    """One number of a unit."""
    if unit == "rate":
        return f"{value:.1%}".replace(".0%", "%") if value in (0.0, 1.0) else f"{value:.1%}"
    if unit == "seconds":
        return f"{value * 1000:.0f} ms" if abs(value) < 1 else f"{value:.2f} s"
    if unit.endswith(" a task"):
        return f"{value * 1000:.3f} {unit.removesuffix(' a task')}"
    if unit in ("score", "reward", ""):
        return f"{value:.2f}"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.1f}"


def interval_text(measure: Measure | None) -> str:
    """The 95% interval, or why there is none."""
    if measure is None or measure.value is None:
        return ""
    if measure.low is None or measure.high is None:
        return "no interval"
    if measure.unit == "rate":
        return f"{measure.low * 100:.0f}–{measure.high * 100:.0f}%"
    low, high = number(measure.low, measure.unit), number(measure.high, measure.unit)
    if measure.unit.endswith(" a task"):
        return f"{low.partition(' ')[0]}–{high.partition(' ')[0]}"
    head, _, unit = low.partition(" ")
    return f"{head}–{high}" if unit and high.endswith(f" {unit}") else f"{low}–{high}"


def count_text(measure: Measure | None) -> str:
    """How many cases stand behind a figure."""
    return "" if measure is None else f"n = {measure.count}"


def whole_text(measure: Measure | None) -> str:
    """Figure, interval and count in one line."""
    if measure is None or measure.value is None:
        return ABSENT
    return f"{value_text(measure)} ({interval_text(measure)}; {count_text(measure)})"


def gain_text(gain: float | None, low: float | None, high: float | None, unit: str = "rate") -> str:
    """A signed change with its interval; rates in percentage points."""
    if gain is None:
        return ABSENT
    scale, suffix, digits = (100, " points", 1) if unit == "rate" else (1, "", 2)
    text = f"{gain * scale:+.{digits}f}{suffix}".replace("-", "−")
    if low is None or high is None:
        return f"{text} (no interval)"
    return f"{text} ({low * scale:+.{digits}f} to {high * scale:+.{digits}f})".replace("-", "−")


class Step:
    """What became of one metric from one report to the next: `direction`, and the same in words."""

    def __init__(self, direction: Direction, words: str) -> None:
        self.direction, self.words = direction, words

    @property
    def mark(self) -> str:
        """A sign that does not depend on colour."""
        return {"better": "▲", "worse": "▼", "unclear": "≈", "moved": "·", "none": ""}[self.direction]


def step_of(now: Report, before: Report | None, metric: str) -> Step:
    """How `metric` moved from `before` to `now`: by the paired interval where both asked the same cases.

    Better or worse needs the whole 95% interval of the difference on that side. Without pairs the two intervals
    are compared: apart, or overlapping.
    """
    ours, theirs = now.measure(metric), before.measure(metric) if before else None
    if before is None or ours is None or theirs is None or ours.value is None or theirs.value is None:
        return Step("none", "")
    sign = -1 if ours.better == "lower" else 1
    if now.suite_hash == before.suite_hash and set(ours.cases) & set(theirs.cases):
        paired = contrast(ours.cases, theirs.cases, merge_clusters(ours.clusters, theirs.clusters))
        low, high = paired.low, paired.high
        told = gain_text(paired.difference, low, high, ours.unit)
        apart = 0 if low is None or high is None or low <= 0 <= high else 1 if low > 0 else -1
        suffix = f"paired change {told} over {paired.count} cases"
    else:
        apart, suffix = separated(ours, theirs), "intervals of the two compared"
    if ours.better == "neither":
        return Step("moved" if apart else "unclear", f"{'moved' if apart else 'unclear'}: {suffix}")
    if apart * sign > 0:
        return Step("better", f"better: {suffix}")
    if apart * sign < 0:
        return Step("worse", f"worse: {suffix}")
    return Step("unclear", f"unclear: {suffix}")


def separated(ours: Measure, theirs: Measure) -> int:
    """1 where our interval lies wholly above theirs, -1 below, 0 where they overlap or one is missing."""
    if ours.low is None or ours.high is None or theirs.low is None or theirs.high is None:
        return 0
    return 1 if ours.low > theirs.high else -1 if ours.high < theirs.low else 0


def duration(seconds: float | None) -> str:
    """Seconds as a person says them."""
    if seconds is None:
        return ABSENT
    if seconds < 60:
        return f"{seconds:.1f}\u00a0s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}\u00a0min\u00a0{rest:02d}\u00a0s" if minutes < 60 else f"{minutes // 60}\u00a0h\u00a0{minutes % 60:02d}\u00a0min"
