"""`Report` and `Verdict`: what was measured, and what may be concluded from it."""

from __future__ import annotations

from typing import Any, Literal

from temper.core.records import Noun

Dimension = Literal["instruction", "preference", "tools", "grounding", "safety", "reasoning", "runtime"]


class Measure(Noun):
    """One figure with its evidence. `value` is None where nothing could be measured: absent is not zero.

    `count` is the number of cases behind it, `low`/`high` a 95% interval (None where none exists).
    `better` says which direction is good. `cases` holds the per-case values by case id, so that two
    reports can be compared pair by pair; `clusters` the cluster (company) of each case. `method` says how
    the interval was formed.
    """

    value: float | None
    count: int
    low: float | None = None
    high: float | None = None
    unit: str = "rate"
    better: Literal["higher", "lower", "neither"] = "higher"
    cases: dict[str, float] = {}
    clusters: dict[str, str] = {}
    method: str = ""


class Report(Noun):
    """What was measured for one model on one split: dimension -> metric -> Measure, and the same per slice."""

    name: str
    model: str
    model_hash: str
    split: str
    suite_hash: str
    dimensions: dict[Dimension, dict[str, Measure]]
    slices: dict[str, dict[str, Measure]] = {}
    conversations: tuple[dict[str, Any], ...] = ()
    settings: dict[str, Any] = {}

    def measure(self, path: str) -> Measure | None:
        """The measure at `dimension.metric` or `slice:name.metric`; None where it was not measured."""
        group, _, metric = path.rpartition(".")
        if group.startswith("slice:"):
            return self.slices.get(group.removeprefix("slice:"), {}).get(metric)
        return self.dimensions.get(group, {}).get(metric)  # type: ignore[call-overload]


class Finding(Noun):
    """One line of a verdict: what the rule asked, what was observed, and whether that suffices."""

    rule: str
    status: Literal["pass", "fail", "unknown"]
    observed: str
    required: str
    reason: str


class Verdict(Noun):
    """Promote, hold, or cannot tell; never more than its evidence.

    `evidence` maps a role (candidate, baseline, rule …) to the hash of what was judged.
    """

    decision: Literal["promote", "hold", "cannot_tell"]
    findings: tuple[Finding, ...]
    evidence: dict[str, str]
