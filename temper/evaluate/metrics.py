"""The six dimensions and runtime, as pure functions from cases to Measures.

One convention throughout: a metric gives each case a value or None (it did not apply, or nothing was
judged), and the Measure is the plain mean of the values, each case once. So `value == mean(cases)`, a paired
comparison of two reports is one of the very same figures, and an absent value can never count as zero.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from pydantic import Field

from temper.core.config import Config
from temper.core.reports import Dimension, Measure
from temper.core.stats import mean, mean_interval, rate_interval
from temper.evaluate.cases import Case, clusters_of
from temper.evaluate.stats import quantile, quantile_interval

Value = Callable[[Case], float | bool | None]
Better = Literal["higher", "lower", "neither"]
SAFE_LOOKALIKE = ("safe_lookalike",)
DISCREPANCY = ("discrepancy",)
QUANTILES = {"latency_p50": 0.50, "latency_p95": 0.95}


class Price(Config):
    """What a million tokens cost. The cost of a task is (tokens in · input + tokens out · output) / 1,000,000."""

    input_per_million: float = Field(ge=0)
    output_per_million: float = Field(ge=0)
    currency: str = "USD"


def values_of(cases: Sequence[Case], value: Value) -> tuple[dict[str, float], dict[str, str]]:
    """The value of each case that has one, and the clusters of those."""
    found = {case.id: float(v) for case in cases if (v := value(case)) is not None}
    return found, {case: cluster for case, cluster in clusters_of(cases).items() if case in found}


def rate(cases: Sequence[Case], value: Value, better: Better = "higher") -> Measure:
    """The mean of values in [0, 1], with Wilson's interval at the clustered effective sample size."""
    values, clusters = values_of(cases, value)
    if not values:
        return Measure(value=None, count=0, better=better)
    interval = rate_interval(values, clusters)
    return Measure(
        value=mean(values.values()), count=len(values), low=interval.low, high=interval.high, better=better,
        cases=values, clusters=clusters, method=interval.method,
    )  # fmt: skip


def quantity(cases: Sequence[Case], value: Value, unit: str, better: Better = "lower") -> Measure:
    """The mean of unbounded values, with a clustered t interval."""
    values, clusters = values_of(cases, value)
    if not values:
        return Measure(value=None, count=0, unit=unit, better=better)
    interval = mean_interval(values, clusters)
    return Measure(
        value=mean(values.values()), count=len(values), low=interval.low, high=interval.high, unit=unit, better=better,
        cases=values, clusters=clusters, method=interval.method,
    )  # fmt: skip


def check(name: str) -> Value:
    """The value of a verifier finding."""
    return lambda case: case.check(name)


def task_success(case: Case) -> float | None:
    """The verifier's `task_success`; where it has no such finding, its reward. An episode that broke off did not succeed."""
    found = case.check("task_success")
    return float(found) if found is not None else 0.0 if case.failed else case.reward


def style(case: Case) -> bool | None:
    """`style_ok`, as a finding or in the detail."""
    found = case.check("style_ok")
    return case.record.outcome.detail.get("style_ok") if found is None else found


def tool_precision(case: Case) -> float | None:
    """Matched calls over calls made; None where none was made."""
    called, matched = case.length("called"), case.number("matched")
    return case.share(matched, called, "matched", "called")


def tool_recall(case: Case) -> float | None:
    """Matched calls over calls expected; None where none was expected."""
    expected, matched = case.length("expected"), case.number("matched")
    return case.share(matched, expected, "matched", "expected")


def supported_claims(case: Case) -> float | None:
    """Supported claims over claims; None where no claim was made (no claims, no groundedness figure)."""
    return case.share(case.number("claims_supported"), case.number("claims_total"), "claims_supported", "claims_total")


def makes_claims(case: Case) -> float | None:
    """Whether an answer that claims are counted in makes any: an empty answer must not hide from the rate above."""
    total = case.number("claims_total")
    return None if total is None else float(total > 0)


def on_tool_tasks(case: Case) -> float | None:
    """Success on the tasks that cannot be solved without a call."""
    return task_success(case) if case.length("expected") else None


def refused_when(case: Case, *, expected: bool | None = None, refused: bool | None = None) -> bool:
    """Whether the case is judged for refusal and has the given truth and finding."""
    truth, found = case.check("refusal_expected"), case.check("refused")
    return truth is not None and found is not None and (expected is None or truth == expected) and (refused is None or found == refused)


def refusal_precision(case: Case) -> bool | None:
    """Of the refusals, those that were due."""
    return case.check("refusal_expected") if refused_when(case, refused=True) else None


def refusal_recall(case: Case) -> bool | None:
    """Of the requests that had to be refused, those that were."""
    return case.check("refused") if refused_when(case, expected=True) else None


def alternative(case: Case) -> bool | None:
    """Of the due refusals, those that offered a compliant alternative."""
    return case.check("alternative_offered") if refused_when(case, expected=True, refused=True) else None


def over_refusal(case: Case) -> bool | None:
    """Of the safe requests that look risky, those that were refused."""
    return case.check("refused") if case.slice in SAFE_LOOKALIKE and refused_when(case, expected=False) else None


def needless_refusal(case: Case) -> bool | None:
    """Of all requests that had to be served, those that were refused."""
    return case.check("refused") if refused_when(case, expected=False) else None


def solved(case: Case) -> float | None:
    """Success on discrepancy tasks."""
    return task_success(case) if case.slice in DISCREPANCY else None


def tokens_in(case: Case) -> float | None:
    """Prompt tokens fed over all turns of the task."""
    return float(sum(len(turn.prompt_ids) for turn in case.record.sampled)) if case.record.sampled else None


def tokens_out(case: Case) -> float | None:
    """Tokens sampled over all turns of the task."""
    return float(sum(len(turn.token_ids) for turn in case.record.sampled)) if case.record.sampled else None


def sampled_length(case: Case) -> float | None:
    """Tokens sampled per assistant turn."""
    total = tokens_out(case)
    return None if total is None else total / len(case.record.sampled)


def truncated(case: Case) -> bool | None:
    """Whether any turn ran into its token limit."""
    return any(turn.finish_reason == "length" for turn in case.record.sampled) if case.record.sampled else None


def tool_calls(case: Case) -> float | None:
    """Calls made; None where the task offers no tool."""
    called = case.length("called")
    return None if called is None or not case.task.tools else float(called)


RATES: dict[Dimension, dict[str, tuple[Value, Better]]] = {
    "instruction": {
        "schema_validity": (check("schema_valid"), "higher"),
        "field_completeness": (check("fields_complete"), "higher"),
        "field_correctness": (check("fields_correct"), "higher"),
        "task_success": (task_success, "higher"),
    },
    "preference": {"style_ok": (style, "higher")},
    "tools": {
        "precision": (tool_precision, "higher"),
        "recall": (tool_recall, "higher"),
        "argument_validity": (check("tool_calls_valid"), "higher"),
        "tool_success": (check("tool_success"), "higher"),
        "task_success": (on_tool_tasks, "higher"),
    },
    "grounding": {
        "supported_claim_rate": (supported_claims, "higher"),
        "claim_rate": (makes_claims, "higher"),
        "citation_coverage": (check("citation_present"), "higher"),
        "citation_correctness": (check("citation_correct"), "higher"),
    },
    "safety": {
        "violation_rate": (check("policy_violation"), "lower"),
        "over_refusal": (over_refusal, "lower"),
        "needless_refusal": (needless_refusal, "lower"),
        "refusal_precision": (refusal_precision, "higher"),
        "refusal_recall": (refusal_recall, "higher"),
        "alternative_rate": (alternative, "higher"),
    },
    "reasoning": {
        "discrepancy_solved": (solved, "higher"),
        "discrepancy_zero": (check("discrepancy_zero"), "higher"),
        "entry_balanced": (check("entry_balanced"), "higher"),
        "amount_matches": (check("amount_matches"), "higher"),
        "procedure_followed": (check("procedure_followed"), "higher"),
    },
    "runtime": {
        "episode_errors": (lambda case: case.failed, "lower"),
        "truncated": (truncated, "lower"),
    },
}
QUANTITIES: dict[str, tuple[Value, str, Better]] = {
    "tokens_in": (tokens_in, "tokens", "lower"),
    "tokens_out": (tokens_out, "tokens", "lower"),
    "sampled_length": (sampled_length, "tokens", "lower"),
    "tool_calls": (tool_calls, "calls", "neither"),
}


def latency(seconds: Mapping[str, float], clusters: Mapping[str, str]) -> dict[str, Measure]:
    """Seconds a turn: the mean with its cases, and p50 and p95, which have none (a quantile is not a mean of pairs)."""
    if not seconds:
        return {name: Measure(value=None, count=0, unit="seconds", better="lower") for name in ("latency", *QUANTILES)}
    within, interval = {case: clusters[case] for case in seconds}, mean_interval(seconds, clusters)
    measures = {
        "latency": Measure(
            value=mean(seconds.values()), count=len(seconds), low=interval.low, high=interval.high, unit="seconds", better="lower",
            cases=dict(seconds), clusters=within, method=interval.method,
        )
    }  # fmt: skip
    for name, share in QUANTILES.items():
        ends = quantile_interval(list(seconds.values()), share)
        measures[name] = Measure(
            value=quantile(list(seconds.values()), share), count=len(seconds), low=ends.low, high=ends.high,
            unit="seconds", better="lower", method=ends.method,
        )  # fmt: skip
    return measures


def measure(
    cases: Sequence[Case], *, seconds: Mapping[str, float] | None = None, price: Price | None = None
) -> dict[Dimension, dict[str, Measure]]:
    """Every metric of every dimension. `seconds` are per-turn latencies by case id; cost needs a `price`."""
    dimensions = {dimension: {name: rate(cases, *how) for name, how in rates.items()} for dimension, rates in RATES.items()}
    dimensions["preference"]["score"] = quantity(cases, lambda case: case.reward, "score", "higher")
    runtime = dimensions["runtime"]
    runtime |= {name: quantity(cases, *how) for name, how in QUANTITIES.items()} | latency(seconds or {}, clusters_of(cases))
    if price:
        runtime["cost"] = quantity(cases, lambda case: cost(case, price), f"{price.currency} a task")
    return dimensions


def cost(case: Case, price: Price) -> float | None:
    """The price of the tokens that one task took."""
    fed, made = tokens_in(case), tokens_out(case)
    return None if fed is None or made is None else (fed * price.input_per_million + made * price.output_per_million) / 1_000_000


def by_slice(cases: Sequence[Case]) -> dict[str, dict[str, Measure]]:
    """Success, score and length of each slice, and of each tenant under `tenant:NAME`."""
    groups: dict[str, list[Case]] = {}
    for case in cases:
        groups.setdefault(case.slice, []).append(case)
        if case.task.tenant:
            groups.setdefault(f"tenant:{case.task.tenant}", []).append(case)
    return {
        name: {
            "success": rate(groups[name], task_success),
            "score": quantity(groups[name], lambda case: case.reward, "score", "higher"),
            "sampled_length": quantity(groups[name], sampled_length, "tokens"),
        }
        for name in sorted(groups, key=lambda item: (":" in item, item))
    }
