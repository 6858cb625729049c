"""Intervals for figures that the gate never forms itself; the shared ones live in `temper.core.stats`."""

from __future__ import annotations

import math
from collections.abc import Sequence

from temper.core.errors import DataError
from temper.core.stats import (
    CONFIDENCE,
    Interval,
    Paired,
    clustered_standard_error,
    contrast,
    growth,
    holm,
    mean,
    mean_interval,
    rate_interval,
    sign_test,
    tango,
    wilson,
)

__all__ = [
    "CONFIDENCE", "Interval", "Paired", "clustered_standard_error", "contrast", "growth", "holm", "mean", "mean_interval",
    "quantile", "quantile_interval", "rate_interval", "sign_test", "spearman", "tango", "wilson",
]  # fmt: skip


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of all values do not exceed: one that was really observed."""
    if not values or not 0 < share <= 1:
        raise DataError(f"no {share} quantile of {len(values)} values")
    return sorted(values)[max(1, math.ceil(share * len(values) - 1e-9)) - 1]


def quantile_interval(values: Sequence[float], share: float) -> Interval:
    """A distribution-free interval: the order statistics that enclose the quantile with at least 95%.

    The number of values below the quantile is binomial; each end leaves out at most 2.5%. An end that the
    number of values cannot reach is None (the 95th percentile has no upper end below 72 values).
    """
    ordered, count, tail = sorted(values), len(values), (1 - CONFIDENCE) / 2
    cumulative, below = 0.0, []
    for k in range(count + 1):
        cumulative += math.comb(count, k) * share**k * (1 - share) ** (count - k)
        below.append(cumulative)  # P(at most k values lie below the quantile)
    low = max((k for k in range(1, count + 1) if below[k - 1] <= tail), default=None)
    high = min((k for k in range(1, count + 1) if below[k - 1] >= 1 - tail), default=None)
    return Interval(ordered[low - 1] if low else None, ordered[high - 1] if high else None, "order statistics")


def spearman(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Spearman's rank correlation, ties at their mean rank; None where either side does not vary."""

    def ranks(values: Sequence[float]) -> list[float]:
        places: dict[float, list[int]] = {}
        for place, value in enumerate(sorted(values)):
            places.setdefault(value, []).append(place)
        return [math.fsum(places[value]) / len(places[value]) for value in values]

    if len(first) != len(second):
        raise DataError(f"{len(first)} values cannot be ranked against {len(second)}")
    if len(set(first)) < 2 or len(set(second)) < 2:
        return None
    a, b = ranks(first), ranks(second)
    centre_a, centre_b = mean(a), mean(b)
    shared = math.fsum((x - centre_a) * (y - centre_b) for x, y in zip(a, b, strict=True))
    return shared / math.sqrt(math.fsum((x - centre_a) ** 2 for x in a) * math.fsum((y - centre_b) ** 2 for y in b))
