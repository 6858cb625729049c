"""What counts as evidence for a line of a rule: which metrics it names, which measures suffice, which pairs compare."""

from __future__ import annotations

import math
from collections.abc import Callable

from temper.core.errors import DataError
from temper.core.reports import Measure, Report
from temper.core.stats import Paired, contrast, growth, merge_clusters
from temper.gate.rule import GateRule, Growth, Improvement, NonInferiority

Statistic = Callable[[Measure, Measure, dict[str, str]], Paired | str]


def expand(metric: str, *reports: Report | None) -> list[str]:
    """The metrics that a path stands for: `slice:*.m` is every slice (not tenant) that any report has, `slice:tenant:*.m` every tenant."""
    group, _, name = metric.rpartition(".")
    if not group.startswith("slice:") or not group.endswith("*"):
        return [metric]
    prefix = group.removeprefix("slice:").removesuffix("*")
    known = sorted({slice_name for report in reports if report for slice_name in report.slices})
    matching = [item for item in known if item.startswith(prefix) and ":" not in item.removeprefix(prefix)]
    return [f"slice:{item}.{name}" for item in matching]


def shown(value: float) -> str:
    """A figure with as many digits as a reader needs."""
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.1f}"


def span(value: float | None, low: float | None, high: float | None) -> str:
    """A figure with its interval in words."""
    if value is None:
        return "not measured"
    return shown(value) + (f" [{shown(low)}, {shown(high)}]" if low is not None and high is not None else " (no interval)")


def described_measure(measure: Measure | None) -> str:
    """A measure with its interval and count in words."""
    return f"{span(measure.value, measure.low, measure.high)}, {measure.count} cases" if measure else "absent"


def missing(measure: Measure | None, fewest: int) -> str | None:
    """Why a measure is no evidence, or None where it is."""
    if measure is None:
        return "the report does not hold this metric"
    if measure.value is None:
        return "nothing could be measured, and absent is not zero"
    if not math.isfinite(measure.value):
        return f"the figure is {measure.value}, not a number"
    if measure.count < fewest:
        return f"{measure.count} cases are fewer than the {fewest} that the rule asks for"
    return None


def described(paired: Paired, what: str) -> str:
    """A paired comparison in words."""
    return f"{what} {span(paired.difference, paired.low, paired.high)}, {paired.count} pairs in {paired.clusters} clusters"


def gain(level: float) -> Statistic:
    """The paired difference, signed so that positive is good."""

    def statistic(ours: Measure, theirs: Measure, clusters: dict[str, str]) -> Paired | str:
        if ours.better == "neither":
            return "the metric has no good direction; use max_growth, or a target"
        first, second = (ours, theirs) if ours.better == "higher" else (theirs, ours)
        return contrast(first.cases, second.cases, clusters, level=level)

    return statistic


def kept(level: float, share: float) -> Statistic:
    """The mean of student − share·teacher, which is not negative where the share is kept."""

    def statistic(ours: Measure, theirs: Measure, clusters: dict[str, str]) -> Paired | str:
        if ours.better != "higher":
            return "a share can be kept only of a metric where higher is better"
        return contrast(ours.cases, theirs.cases, clusters, share=share, level=level)

    return statistic


def grown(level: float) -> Statistic:
    """The ratio of means less one."""
    return lambda ours, theirs, clusters: growth(ours.cases, theirs.cases, clusters, level)


def pair(
    metric: str, candidate: Report, other: Report | None, statistic: Statistic, *, role: str, fewest: int, coverage: float
) -> Paired | str:
    """The paired comparison of one metric with the report of `role`, or the reason why there is none."""
    if other is None:
        return f"no {role} was given"
    if (candidate.split, candidate.suite_hash) != (other.split, other.suite_hash):
        suites = f"{candidate.split} {candidate.suite_hash[:12]}, {other.split} {other.suite_hash[:12]}"
        return f"the reports are of different suites ({suites})"
    ours, theirs = candidate.measure(metric), other.measure(metric)
    if ours is None or theirs is None:
        return f"the {'candidate' if ours is None else role} does not hold this metric"
    if (ours.unit, ours.better) != (theirs.unit, theirs.better):
        return f"the reports disagree on what the metric is ({ours.unit}, {ours.better}; {theirs.unit}, {theirs.better})"
    if not all(math.isfinite(value) for value in (*ours.cases.values(), *theirs.cases.values())):
        return "a case is not a finite number"
    try:
        paired = statistic(ours, theirs, merge_clusters(ours.clusters, theirs.clusters))
    except DataError as error:
        return error.what
    if isinstance(paired, str):
        return paired
    if paired.count < fewest:
        return f"{paired.count} paired cases are fewer than the {fewest} that the rule asks for"
    if paired.coverage < coverage:
        return f"only {paired.coverage:.0%} of the cases could be paired, the rule asks for {coverage:.0%}"
    return paired if paired.difference is not None else paired.method


def against(
    line: NonInferiority | Growth | Improvement,
    metric: str,
    candidate: Report,
    baseline: Report | None,
    rule: GateRule,
    statistic: Statistic,
) -> Paired | str:
    """`pair` with the baseline, under a line's own minimum count and coverage or the rule's."""
    fewest, coverage = line.min_count or rule.min_count, line.coverage or rule.coverage
    return pair(metric, candidate, baseline, statistic, role="baseline", fewest=fewest, coverage=coverage)
