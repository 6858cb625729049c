"""Statistics that a report and a gate must agree on: intervals, paired differences, multiplicity.

Standard library only, so that the gate stays pure. Cases of one cluster (a company's tasks, repeats of
one task) are never taken for independent: every standard error is summed within clusters first (Miller,
"Adding Error Bars to Evals", 2411.00640, eq. 5), with the small-sample factor G/(G-1) and Student's t on
G-1 degrees of freedom. A zero-width interval is never returned: where nothing varied, a score interval
that knows the number of cases takes its place, or none.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist

from temper.core.errors import DataError

CONFIDENCE = 0.95  # of every interval that a Measure carries


@dataclass(frozen=True)
class Interval:
    """`low` and `high` (None where no interval exists), and the `method` that formed them."""

    low: float | None
    high: float | None
    method: str


@dataclass(frozen=True)
class Paired:
    """A candidate against a baseline on the cases that both measured; `difference` is candidate − baseline.

    `p_value` is two-sided for no difference. `coverage` is the share of all cases that could be paired.
    """

    count: int
    clusters: int
    difference: float | None
    low: float | None
    high: float | None
    p_value: float | None
    wins: int
    ties: int
    losses: int
    coverage: float
    method: str


def t_cdf(t: float, degrees: int) -> float:
    """P(T ≤ t) for Student's t with whole degrees of freedom (Abramowitz & Stegun 26.7.3 and 26.7.4)."""
    theta = math.atan(t / math.sqrt(degrees))
    cosine_squared = math.cos(theta) ** 2
    if degrees % 2:
        term, series = math.cos(theta), 0.0
        for k in range(1, degrees - 1, 2):
            series += term
            term *= cosine_squared * (k + 1) / (k + 2)
        inside = 2 / math.pi * (theta + math.sin(theta) * series)
    else:
        term, series = 1.0, 0.0
        for k in range(0, degrees - 1, 2):
            series += term
            term *= cosine_squared * (k + 1) / (k + 2)
        inside = math.sin(theta) * series
    return (1 + inside) / 2


@cache
def t_quantile(probability: float, degrees: int) -> float:
    """The t with P(T ≤ t) = probability, for probability in (0.5, 1)."""
    if degrees > 2000:
        return NormalDist().inv_cdf(probability)
    low, high = 0.0, 1.0
    while t_cdf(high, degrees) < probability:
        low, high = high, high * 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if t_cdf(middle, degrees) < probability else (low, middle)
    return (low + high) / 2


def wilson(successes: float, count: float, critical: float | None = None) -> tuple[float, float]:
    """Wilson's score interval for `successes` of `count` (Wilson 1927); never of zero width.

    `count` may be an effective sample size; `critical` is the two-sided normal (or t) quantile, 1.96 unless told.
    """
    if not 0 <= successes <= count or count <= 0:
        raise DataError(f"{successes} successes of {count} cases is not a rate")
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2) if critical is None else critical
    rate = successes / count
    centre = rate + z * z / (2 * count)
    half = z * math.sqrt(rate * (1 - rate) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    low = (centre - half) / scale if successes > 0 else 0.0
    high = (centre + half) / scale if successes < count else 1.0
    return max(0.0, low), min(1.0, high)


def in_clusters(values: Mapping[str, float], clusters: Mapping[str, str]) -> dict[str, list[float]]:
    """Values by cluster; a case without one (or with an empty one) is a cluster of its own."""
    grouped: dict[str, list[float]] = {}
    for case, value in values.items():
        named = clusters.get(case)
        grouped.setdefault(f"cluster {named}" if named else f"case {case}", []).append(value)
    return grouped


def mean(values: Iterable[float]) -> float:
    """The arithmetic mean. Raises DataError where a value is not finite or there is none."""
    listed = list(values)
    if not listed:
        raise DataError("no values to take the mean of", why="absent is not zero")
    if not all(math.isfinite(value) for value in listed):
        raise DataError(f"{sum(not math.isfinite(v) for v in listed)} of {len(listed)} values are not finite numbers")
    return math.fsum(listed) / len(listed)


def clustered_standard_error(values: Mapping[str, float], clusters: Mapping[str, str]) -> tuple[float | None, int]:
    """The standard error of the mean with cases summed within clusters, and the number of clusters G.

    √(G/(G-1) · Σ_c (Σ_{i∈c} (x_i − x̄))²) / n. With one case a cluster this is the usual s/√n. None where G < 2.
    """
    centre, grouped = mean(values.values()), in_clusters(values, clusters)
    groups = len(grouped)
    if groups < 2:
        return None, groups
    squared = math.fsum(math.fsum(value - centre for value in group) ** 2 for group in grouped.values())
    error = math.sqrt(groups / (groups - 1) * squared) / len(values)
    return (0.0 if error < 1e-12 else error), groups


def rate_interval(values: Mapping[str, float], clusters: Mapping[str, str]) -> Interval:
    """A 95% interval for the mean of values in [0, 1]: Wilson's, at the effective sample size.

    The design effect is the clustered variance over p(1−p)/n. Where it exceeds 1, Wilson's interval is
    taken at n divided by it, with Student's t for the number of clusters (Korn & Graubard 1998; Dean &
    Pagano 2015); otherwise it is plain Wilson, which for fractions in [0, 1] errs on the wide side.
    """
    count, rate = len(values), min(1.0, max(0.0, mean(values.values())))
    if any(not -1e-9 <= value <= 1 + 1e-9 for value in values.values()):
        raise DataError("a rate has a case outside [0, 1]", why=f"values run from {min(values.values())} to {max(values.values())}")
    error, groups = clustered_standard_error(values, clusters)
    if error and groups < count and 0 < rate < 1 and (effect := error**2 * count / (rate * (1 - rate))) > 1:
        effective = count / effect
        low, high = wilson(rate * effective, effective, t_quantile((1 + CONFIDENCE) / 2, groups - 1))
        return Interval(low, high, f"Wilson at design effect {effect:.2f} over {groups} clusters")
    note = "" if groups == count else f"; design effect over {groups} clusters not above 1"
    return Interval(*wilson(rate * count, count), f"Wilson{note}")


def mean_interval(values: Mapping[str, float], clusters: Mapping[str, str]) -> Interval:
    """A 95% t interval for an unbounded mean with clustered standard error; none where it would have no width."""
    error, groups = clustered_standard_error(values, clusters)
    if not error:
        return Interval(None, None, "none: a single cluster" if error is None else "none: no case differs from another")
    half = t_quantile((1 + CONFIDENCE) / 2, groups - 1) * error
    centre = mean(values.values())
    return Interval(centre - half, centre + half, f"t over {groups} clusters")


def sign_test(wins: int, losses: int) -> float:
    """The exact two-sided p-value of wins against losses; for pass/fail pairs this is McNemar's exact test."""
    trials = wins + losses
    tail = sum(math.comb(trials, k) for k in range(min(wins, losses) + 1))
    return float(min(1.0, 2 * tail / 2**trials))


def tango(wins: int, losses: int, count: int, level: float = CONFIDENCE) -> tuple[float, float]:
    """Tango's score interval (1998) for the paired difference (wins − losses)/count of pass/fail outcomes.

    It has width even where no pair disagrees: (−z²/(n+z²), z²/(n+z²)).
    """
    z = NormalDist().inv_cdf((1 + level) / 2)

    def score(delta: float) -> float:
        slope = 2 * count
        linear = -wins - losses + (2 * count - wins + losses) * delta
        constant = -losses * delta * (1 - delta)
        against = (math.sqrt(max(0.0, linear * linear - 4 * slope * constant)) - linear) / (2 * slope)
        variance = count * (2 * against + delta * (1 - delta))
        gap = wins - losses - count * delta
        return gap / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, gap)

    def crossing(target: float, low: float, high: float) -> float:
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if score(middle) > target else (low, middle)
        return (low + high) / 2

    point = (wins - losses) / count
    return (-1.0 if point <= -1 else crossing(z, -1.0, point)), (1.0 if point >= 1 else crossing(-z, point, 1.0))


def contrast(
    candidate: Mapping[str, float],
    baseline: Mapping[str, float],
    clusters: Mapping[str, str],
    *,
    share: float = 1.0,
    level: float = CONFIDENCE,
) -> Paired:
    """The mean of candidate − share·baseline over the cases both hold, clustered, with its interval and tests.

    share=1 is the paired difference (Miller 2411.00640, eq. 8). For pass/fail values at share=1 the interval
    is the wider of the clustered t and Tango's, and the p-value the larger of t and McNemar's exact. Where
    nothing varies, bounded values get the exact bound on the share of cases that could differ, others none.
    """
    shared = [case for case in candidate if case in baseline]
    union = len(set(candidate) | set(baseline))
    if not shared:
        return Paired(0, 0, None, None, None, None, 0, 0, 0, 0.0, "none: no case in common")
    gaps = {case: candidate[case] - share * baseline[case] for case in shared}
    centre, count = mean(gaps.values()), len(gaps)
    wins, losses = sum(gap > 1e-12 for gap in gaps.values()), sum(gap < -1e-12 for gap in gaps.values())
    error, groups = clustered_standard_error(gaps, clusters)
    values = [candidate[case] for case in shared] + [baseline[case] for case in shared]
    passfail = share == 1 and all(value in (0, 1) for value in values)
    low = high = p_value = None
    method = "none: a single cluster"
    if error:
        half = t_quantile((1 + level) / 2, groups - 1) * error
        low, high, method = centre - half, centre + half, f"clustered t over {groups} clusters"
        p_value = 2 * (1 - t_cdf(abs(centre) / error, groups - 1))
    if passfail and error is not None:
        bounds = tango(wins, losses, count, level)
        low = bounds[0] if low is None else min(low, bounds[0])
        high = bounds[1] if high is None else max(high, bounds[1])
        p_value = max(p_value or 0.0, sign_test(wins, losses))
        method = f"wider of clustered t over {groups} clusters and Tango's score interval" if error else "Tango's score interval"
    elif error == 0 and all(0 <= value <= 1 for value in values):
        unseen = 1 - ((1 - level) / 2) ** (1 / count)
        low, high = centre - unseen * (centre + share), centre + unseen * (1 - centre)
        p_value, method = sign_test(wins, losses), f"exact bound: no case of {count} differs from another"
    elif error == 0:
        method = "none: no case differs from another"
    return Paired(count, groups, centre, low, high, p_value, wins, count - wins - losses, losses, len(shared) / union, method)


def growth(candidate: Mapping[str, float], baseline: Mapping[str, float], clusters: Mapping[str, str], level: float = CONFIDENCE) -> Paired:
    """The ratio of means candidate/baseline on shared cases, less one, with a clustered interval by linearisation.

    The residuals (c_i − r·b_i)/b̄ take the place of the values (the delta method for a paired ratio).
    """
    shared = [case for case in candidate if case in baseline]
    if not shared or (below := mean(baseline[case] for case in shared)) <= 0:
        return Paired(len(shared), 0, None, None, None, None, 0, 0, 0, 0.0, "none: no shared case, or a baseline of zero")
    ratio = mean(candidate[case] for case in shared) / below
    error, groups = clustered_standard_error({case: (candidate[case] - ratio * baseline[case]) / below for case in shared}, clusters)
    wins, losses = sum(candidate[case] > baseline[case] for case in shared), sum(candidate[case] < baseline[case] for case in shared)
    half = t_quantile((1 + level) / 2, groups - 1) * error if error else None
    low, high = (ratio - 1 - half, ratio - 1 + half) if half else (None, None)
    coverage = len(shared) / len(set(candidate) | set(baseline))
    method = f"linearised ratio, clustered t over {groups} clusters" if half else "none: nothing varies, or a single cluster"
    return Paired(len(shared), groups, ratio - 1, low, high, None, wins, len(shared) - wins - losses, losses, coverage, method)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's adjusted p-values (1979): sorted upwards, the k-th of m times m−k+1, never falling, at most 1."""
    adjusted: dict[str, float] = {}
    running = 0.0
    for rank, (name, p_value) in enumerate(sorted(p_values.items(), key=lambda item: (item[1], item[0]))):
        running = max(running, min(1.0, (len(p_values) - rank) * p_value))
        adjusted[name] = running
    return adjusted


def merge_clusters(first: Mapping[str, str], second: Mapping[str, str]) -> dict[str, str]:
    """Both maps in one. Raises DataError where they put one case in two clusters."""
    for case in first.keys() & second.keys():
        if first[case] != second[case]:
            where = f"{first[case]!r} of one report and {second[case]!r} of the other"
            raise DataError(f"case {case!r} is in cluster {where}", do="compare reports of one suite")
    return {**first, **second}


def cases_needed(rate: float) -> int:
    """How many cases without a miss put Wilson's lower bound at `rate` or above: n ≥ z²·rate/(1−rate)."""
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    return math.ceil(z * z * rate / (1 - rate)) if 0 <= rate < 1 else 0


def names(items: Sequence[str], most: int = 5) -> str:
    """The first few of `items` in words, with the number of the rest."""
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")
