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


def diagnose(targets: Sequence[Change], guardrails: Sequence[Change], proxies: Sequence[Change] = ()) -> Outcome:
    """Name what a phase did, from what it aimed at, what it must not harm, and what a learned judge says of it.

    `proxies` are figures that stand for the aim without being it (a reward model's score). They count on the side of
    the targets, and never suffice: a proxy that rises alone is the definition of gaming.

    1. A target is worse: `regression`.
    2. A target or proxy is better and a guardrail worse, or a proxy better and no target: `reward gaming or drift`.
    3. A target is better, and no guardrail and no proxy is worse or unmeasured: `real improvement`.
    4. Nothing aimed at moved, all of it measured: `regression` where a proxy fell, else `pointless drift`.
    5. Otherwise the evidence is incomplete, or target and proxy contradict each other: `cannot tell`.
    """
    aims, limits, judged = ({change.status for change in group} for group in (targets, guardrails, proxies))
    if "worse" in aims:
        return "regression"
    if "better" in aims | judged and "worse" in limits:
        return "reward gaming or drift"
    if "better" in aims:
        return "cannot tell" if "unknown" in limits | judged or "worse" in judged else "real improvement"
    if "better" in judged and aims == {"unchanged"}:
        return "reward gaming or drift"
    if aims != {"unchanged"} or "unknown" in judged:
        return "cannot tell"
    return "regression" if "worse" in judged else "pointless drift"
