"""What a phase did: target metrics and guardrails kept apart, and the outcome named."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from temper.core.records import Noun
from temper.core.reports import Report
from temper.core.stats import contrast, merge_clusters

Outcome = Literal["real improvement", "reward gaming or drift", "pointless drift", "regression", "cannot tell"]


class Change(Noun):
    """How one metric moved from baseline to candidate; `gain` is signed so that positive is good.

    `better` and `worse` need the whole interval on that side, `worse` beyond `tolerance`.
    """

    metric: str
    status: Literal["better", "unchanged", "worse", "unknown"]
    gain: float | None = None
    low: float | None = None
    high: float | None = None
    tolerance: float = 0.0
    count: int = 0


def changes(
    candidate: Report, baseline: Report, metrics: Sequence[str], *, alpha: float, tolerance: Mapping[str, float] | None = None
) -> list[Change]:
    """Each metric's paired clustered change, with intervals that hold together at `alpha` (Bonferroni over `metrics`).

    A metric that either report lacks, has no good direction, or was measured on another suite is `unknown`.
    """
    found = []
    for metric in metrics:
        ours, theirs, allowed = candidate.measure(metric), baseline.measure(metric), (tolerance or {}).get(metric, 0.0)
        unlike = (candidate.split, candidate.suite_hash) != (baseline.split, baseline.suite_hash)
        if ours is None or theirs is None or ours.better == "neither" or unlike:
            found.append(Change(metric=metric, status="unknown", tolerance=allowed))
            continue
        first, second = (ours, theirs) if ours.better == "higher" else (theirs, ours)
        paired = contrast(first.cases, second.cases, merge_clusters(first.clusters, second.clusters), level=1 - alpha / len(metrics))
        status = moved(paired.low, paired.high, allowed)
        found.append(
            Change(
                metric=metric,
                status=status,
                gain=paired.difference,
                low=paired.low,
                high=paired.high,
                tolerance=allowed,
                count=paired.count,
            )
        )  # type: ignore[arg-type]
    return found


def moved(low: float | None, high: float | None, allowed: float) -> str:
    """Which way an interval of the gain lies: better, worse beyond what is allowed, unchanged, or unknown."""
    if low is None or high is None:
        return "unknown"
    return "better" if low > 0 else "worse" if high < -allowed else "unchanged"


def diagnose(targets: Sequence[Change], guardrails: Sequence[Change]) -> Outcome:
    """Name what a phase did, from what it aimed at and what it must not harm.

    1. A target is worse: `regression`.
    2. A target is better and a guardrail worse: `reward gaming or drift` (the aim was met at the cost of what it stood for).
    3. A target is better, no guardrail worse, and every guardrail measured: `real improvement`.
    4. No target moved, and every target measured: `pointless drift` (the weights changed and nothing aimed at did).
    5. Otherwise the evidence is incomplete: `cannot tell`.
    """
    aims, limits = {change.status for change in targets}, {change.status for change in guardrails}
    if "worse" in aims:
        return "regression"
    if "better" in aims:
        return "reward gaming or drift" if "worse" in limits else "cannot tell" if "unknown" in limits else "real improvement"
    return "pointless drift" if aims == {"unchanged"} else "cannot tell"
