"""Two reports, or two sets of episodes over the same tasks, against each other: pair by pair, clustered."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from temper.core.errors import DataError
from temper.core.records import Record
from temper.core.reports import Dimension, Measure, Report
from temper.core.stats import Paired, contrast, mean, merge_clusters, rate_interval
from temper.evaluate.cases import Case, clusters_of

Scorer = Callable[[Sequence[Record]], Sequence[float]]
SCORE = "preference.score"  # the verifier's reward, which every report carries case by case


def compare(candidate: Report, baseline: Report, metrics: Sequence[str] | None = None) -> dict[str, Paired]:
    """The paired clustered difference (candidate − baseline) of each metric that both measured, with wins, ties and losses.

    Raises DataError where the reports are of different suites.
    """
    require_same_suite(candidate, baseline)
    paths = metrics or [f"{group}.{name}" for group, measures in candidate.dimensions.items() for name in measures]
    found = {}
    for path in paths:
        ours, theirs = candidate.measure(path), baseline.measure(path)
        if ours and theirs and ours.cases and theirs.cases:
            found[path] = contrast(ours.cases, theirs.cases, merge_clusters(ours.clusters, theirs.clusters))
    return found


def require_same_suite(candidate: Report, baseline: Report) -> None:
    """Raise DataError where two reports did not answer the same tasks under the same settings."""
    for name in ("split", "suite_hash"):
        ours, theirs = getattr(candidate, name), getattr(baseline, name)
        if ours != theirs:
            raise DataError(
                f"report {candidate.name!r} cannot be compared with {baseline.name!r}", why=f"{name}: {ours[:16]} and {theirs[:16]}",
                do="evaluate both on the same split, tasks, seed and temperature",
            )  # fmt: skip


def win_rate(ours: Mapping[str, float], theirs: Mapping[str, float], clusters: Mapping[str, str], *, tie: float = 0.0) -> Measure:
    """How often the first scores above the second on the same case; a tie (within `tie`) counts half to each.

    Cases that only one side has are left out and show in the count. A score that is not finite is an error.
    """
    shared = [case for case in ours if case in theirs]
    if not shared:
        return Measure(value=None, count=0)
    bad = [case for case in shared if not (math.isfinite(ours[case]) and math.isfinite(theirs[case]))]
    if bad:
        raise DataError(
            f"{len(bad)} of {len(shared)} cases have a score that is not a number",
            why=f"the first is {bad[0]}",
            do="correct the scorer; a missing score is not a loss",
        )
    won = {case: 0.5 if abs(ours[case] - theirs[case]) <= tie else float(ours[case] > theirs[case]) for case in shared}
    within = {case: clusters[case] for case in shared if case in clusters}
    interval = rate_interval(won, within)
    return Measure(
        value=mean(won.values()), count=len(won), low=interval.low, high=interval.high, cases=won, clusters=within, method=interval.method
    )


def win_rate_by(scorer: Scorer, ours: Sequence[Case], theirs: Sequence[Case], *, tie: float = 0.0) -> Measure:
    """`win_rate` by an outside scorer, such as a reward model; each side's records are scored in one call."""
    sides = []
    for cases in (ours, theirs):
        scores = list(scorer([case.record for case in cases]))
        if len(scores) != len(cases):
            raise DataError(f"the scorer gave {len(scores)} scores for {len(cases)} records", do="return one score a record, in order")
        sides.append({case.id: float(score) for case, score in zip(cases, scores, strict=True)})
    return win_rate(sides[0], sides[1], merge_clusters(clusters_of(ours), clusters_of(theirs)), tie=tie)


def with_win_rate(report: Report, previous: Report) -> Report:
    """`report` with `preference.win_rate` against `previous`, by the verifier's score."""
    require_same_suite(report, previous)
    ours, theirs = report.measure(SCORE), previous.measure(SCORE)
    if ours is None or theirs is None:
        raise DataError(f"report {(report if ours is None else previous).name!r} has no {SCORE}", do="make it with run_suite")
    won = win_rate(ours.cases, theirs.cases, merge_clusters(ours.clusters, theirs.clusters))
    return with_measure(report, "preference", "win_rate", won, {"win_rate_against": previous.name})


def with_measure(report: Report, dimension: Dimension, name: str, measure: Measure, settings: Mapping[str, object] | None = None) -> Report:
    """A copy of `report` with one more measure."""
    dimensions = {**report.dimensions, dimension: {**report.dimensions.get(dimension, {}), name: measure}}
    return report.model_copy(update={"dimensions": dimensions, "settings": {**report.settings, **(settings or {})}})
