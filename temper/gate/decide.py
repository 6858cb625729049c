"""`decide`: a candidate's report against a rule, line by line.

Each line becomes a Finding: `pass` where the evidence meets it, `fail` where the figure itself is on the
wrong side, `unknown` where the evidence is absent, of too few cases, of another suite, or does not decide
(the figure is on the right side and its interval reaches over to the wrong one). Any fail: hold. Else any
unknown: cannot tell. Else promote. Every line must pass, so guardrails and non-inferiority lines need no
correction for their number (an intersection-union test); improvement lines, which are claims, get Holm's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from temper.core.errors import DataError
from temper.core.hashing import hash_value
from temper.core.reports import Finding, Measure, Report, Verdict
from temper.core.stats import Paired, cases_needed, contrast, growth, holm, merge_clusters
from temper.gate.rule import GateRule, Growth, Improvement, NonInferiority, StudentKeep, Target

Status = str


def decide(candidate: Report, baseline: Report | None, rule: GateRule, *, teacher: Report | None = None) -> Verdict:
    """Judge `candidate` by `rule`, against `baseline` where a line compares and `teacher` where the student must keep up.

    `evidence` binds the verdict to what was judged: the hashes of the reports and the rule, and the weights.
    """
    findings = [finding for target in rule.targets for finding in judge_target(target, candidate, rule, "target")]
    findings += [finding for line in rule.noninferiority for finding in judge_margin(line, candidate, baseline, rule, "non-inferiority")]
    findings += judge_improvements(rule.improvement, candidate, baseline, rule)
    for line in rule.guardrails:
        if isinstance(line, Target):
            findings += judge_target(line, candidate, rule, "guardrail")
        elif isinstance(line, Growth):
            findings += judge_growth(line, candidate, baseline, rule)
        else:
            findings += judge_margin(line, candidate, baseline, rule, "guardrail")
    if rule.student_keep:
        findings += judge_student(rule.student_keep, candidate, teacher, rule)
    statuses = {finding.status for finding in findings}
    decision = "hold" if "fail" in statuses else "promote" if statuses == {"pass"} else "cannot_tell"
    evidence = {"rule": hash_value(rule)}
    for role, report in (("candidate", candidate), ("baseline", baseline), ("teacher", teacher)):
        if report is not None:
            evidence |= {role: hash_value(report), f"{role}_model": report.model_hash}
    return Verdict(decision=decision, findings=tuple(findings), evidence=evidence)  # type: ignore[arg-type]


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


def nothing_matches(line: str, metric: str, required: str) -> list[Finding]:
    """The finding of a wildcard that names no slice."""
    return [Finding(rule=f"{line}: {metric}", status="unknown", observed="no slice", required=required, reason="no report has a slice that this matches")]


def judge_target(target: Target, candidate: Report, rule: GateRule, label: str) -> list[Finding]:
    """One finding a metric: the figure (or the whole interval) within `min` and `max`."""
    where = "interval" if target.on == "bound" else "figure"
    limits = [f"at least {target.min:g}" for _ in [0] if target.min is not None] + [f"at most {target.max:g}" for _ in [0] if target.max is not None]
    required = f"{where} {' and '.join(limits)}"
    findings = []
    for metric in expand(target.metric, candidate):
        measure = candidate.measure(metric)
        gap = missing(measure, target.min_count or rule.min_count)
        if gap or measure is None or measure.value is None:
            status, reason = "unknown", gap or ""
        else:
            status, reason = within(target, measure)
        observed = f"{span(measure.value, measure.low, measure.high)}, {measure.count} cases" if measure else "absent"
        findings.append(Finding(rule=f"{label}: {metric}", status=status, observed=observed, required=required, reason=reason))  # type: ignore[arg-type]
    return findings or nothing_matches(label, target.metric, required)


def within(target: Target, measure: Measure) -> tuple[Status, str]:
    """Whether a measured figure, or its interval, lies within a target's limits."""
    value = measure.value if measure.value is not None else math.nan
    low_limit, high_limit = target.min if target.min is not None else -math.inf, target.max if target.max is not None else math.inf
    if not low_limit <= value <= high_limit:
        limit = low_limit if value < low_limit else high_limit
        return "fail", f"{shown(value)} misses {limit:g} by {shown(abs(value - limit))}"
    if target.on == "point":
        return "pass", "the figure is within the limit; its interval was not asked for"
    if measure.low is None or measure.high is None:
        return "unknown", f"the figure has no interval ({measure.method or 'none given'})"
    if measure.low >= measure.high:
        return "unknown", "an interval of zero width is no evidence of certainty"
    if low_limit <= measure.low and measure.high <= high_limit:
        return "pass", "the whole interval is within the limit"
    reason = f"{measure.count} cases do not decide: the interval reaches past the limit"
    rate = low_limit if measure.low < low_limit else 1 - high_limit
    if measure.unit == "rate" and 0 < rate < 1 and (needed := cases_needed(rate)) > measure.count:
        reason += f"; even without a miss at least {needed} cases are needed"
    return "unknown", reason


def pair(metric: str, candidate: Report, baseline: Report | None, rule: GateRule, *, fewest: int | None, coverage: float | None, kind: str, role: str = "baseline", share: float = 1.0) -> Paired | str:  # fmt: skip
    """The paired comparison of one metric, or the reason why there is none."""
    if baseline is None:
        return f"no {role} was given"
    if (candidate.split, candidate.suite_hash) != (baseline.split, baseline.suite_hash):
        return f"the reports are of different suites ({candidate.split} {candidate.suite_hash[:12]}, {baseline.split} {baseline.suite_hash[:12]})"
    ours, theirs = candidate.measure(metric), baseline.measure(metric)
    if ours is None or theirs is None:
        return f"the {'candidate' if ours is None else role} does not hold this metric"
    if (ours.unit, ours.better) != (theirs.unit, theirs.better):
        return f"the reports disagree on what the metric is ({ours.unit}, {ours.better}; {theirs.unit}, {theirs.better})"
    if not all(math.isfinite(value) for value in (*ours.cases.values(), *theirs.cases.values())):
        return "a case is not a finite number"
    try:
        clusters = merge_clusters(ours.clusters, theirs.clusters)
    except DataError as error:
        return error.what
    if kind == "growth":
        paired = growth(ours.cases, theirs.cases, clusters, 1 - rule.alpha)
    elif ours.better == "neither":
        return "the metric has no good direction; use max_growth, or a target"
    elif ours.better == "higher":
        paired = contrast(ours.cases, theirs.cases, clusters, share=share, level=1 - rule.alpha)
    else:
        paired = contrast(theirs.cases, ours.cases, clusters, level=1 - rule.alpha)
    if paired.count < (least := fewest or rule.min_count):
        return f"{paired.count} paired cases are fewer than the {least} that the rule asks for"
    if paired.coverage < (enough := coverage or rule.coverage):
        return f"only {paired.coverage:.0%} of the cases could be paired, the rule asks for {enough:.0%}"
    return paired if paired.difference is not None else paired.method


def described(paired: Paired, what: str) -> str:
    """A paired comparison in words."""
    return f"{what} {span(paired.difference, paired.low, paired.high)}, {paired.count} pairs in {paired.clusters} clusters"


def judge_margin(line: NonInferiority, candidate: Report, baseline: Report | None, rule: GateRule, label: str) -> list[Finding]:
    """One finding a metric: the whole paired interval of the gain lies above −margin."""
    required, findings = f"gain above -{line.margin:g}", []
    for metric in expand(line.metric, candidate, baseline):
        paired = pair(metric, candidate, baseline, rule, fewest=line.min_count, coverage=line.coverage, kind="gain")
        if isinstance(paired, str):
            status, observed, reason = "unknown", "not compared", paired
        else:
            observed = described(paired, "gain")
            status, reason = above(paired.difference, paired.low, -line.margin, paired.method)
        findings.append(Finding(rule=f"{label}: {metric}", status=status, observed=observed, required=required, reason=reason))  # type: ignore[arg-type]
    return findings or nothing_matches(label, line.metric, required)


def above(value: float | None, low: float | None, limit: float, method: str) -> tuple[Status, str]:
    """Whether a gain is shown to lie at or above `limit` by the low end of its interval."""
    if value is None or value < limit:
        return "fail", f"the candidate is worse by more than the margin ({method})"
    if low is None:
        return "unknown", f"the gain has no interval ({method})"
    return ("pass", method) if low >= limit else ("unknown", f"the cases do not decide: the interval reaches below the limit ({method})")


def judge_growth(line: Growth, candidate: Report, baseline: Report | None, rule: GateRule) -> list[Finding]:
    """One finding a metric: its growth over the baseline stays within `max_growth`."""
    required, findings = f"growth at most {line.max_growth:.0%} ({line.on})", []
    for metric in expand(line.metric, candidate, baseline):
        paired = pair(metric, candidate, baseline, rule, fewest=line.min_count, coverage=line.coverage, kind="growth")
        if isinstance(paired, str):
            status, observed, reason = "unknown", "not compared", paired
        else:
            observed = described(paired, "growth")
            ratio = paired.difference if paired.difference is not None else math.inf
            if ratio > line.max_growth:
                status, reason = "fail", f"it grew by {ratio:.0%}"
            elif line.on == "point":
                status, reason = "pass", "the figure is within the limit; its interval was not asked for"
            elif paired.high is None:
                status, reason = "unknown", f"the growth has no interval ({paired.method})"
            else:
                status = "pass" if paired.high <= line.max_growth else "unknown"
                reason = paired.method if status == "pass" else f"the cases do not decide: the interval reaches past the limit ({paired.method})"
        findings.append(Finding(rule=f"guardrail: {metric}", status=status, observed=observed, required=required, reason=reason))  # type: ignore[arg-type]
    return findings or nothing_matches("guardrail", line.metric, required)


def judge_improvements(lines: Iterable[Improvement], candidate: Report, baseline: Report | None, rule: GateRule) -> list[Finding]:
    """One finding a claim: the gain is positive and its p-value, adjusted over all claims by Holm, is at most alpha.

    A claim that cannot be tested stays in the family with p = 1, so leaving one out gains nothing.
    """
    claims: dict[str, Paired | str] = {}
    for line in lines:
        named = expand(line.metric, candidate, baseline)
        claims |= {m: pair(m, candidate, baseline, rule, fewest=line.min_count, coverage=line.coverage, kind="gain") for m in named}
        if not named:
            claims[line.metric] = "no report has a slice that this matches"
    p_values = {metric: 1.0 if isinstance(paired, str) or paired.p_value is None else paired.p_value for metric, paired in claims.items()}
    adjusted = holm(p_values)
    findings = []
    for metric, paired in claims.items():
        if isinstance(paired, str):
            status, observed, reason = "unknown", "not compared", paired
        elif paired.difference is None or paired.difference <= 0:
            status, observed, reason = "fail", described(paired, "gain"), "the candidate does not beat the baseline"
        elif paired.p_value is None:
            status, observed, reason = "unknown", described(paired, "gain"), f"no test of the gain ({paired.method})"
        else:
            status = "pass" if adjusted[metric] <= rule.alpha else "unknown"
            observed = f"{described(paired, 'gain')}, p {paired.p_value:.2g}, Holm {adjusted[metric]:.2g} of {len(claims)} claims"
            reason = paired.method if status == "pass" else "the gain may be chance"
        findings.append(Finding(rule=f"improvement: {metric}", status=status, observed=observed, required=f"gain above 0, adjusted p at most {rule.alpha:g}", reason=reason))  # type: ignore[arg-type]  # fmt: skip
    return findings


def judge_student(line: StudentKeep, student: Report, teacher: Report | None, rule: GateRule) -> list[Finding]:
    """One finding a slice: the mean of student − share·teacher, paired by case, is not below zero."""
    required, findings = f"student keeps {line.share:.0%} of the teacher ({line.on})", []
    for metric in expand(f"slice:*.{line.metric}", student, teacher):
        paired = pair(metric, student, teacher, rule, fewest=line.min_count, coverage=None, kind="keep", role="teacher", share=line.share)
        ours, theirs = student.measure(metric), teacher.measure(metric) if teacher else None
        scores = f"student {span(ours.value, ours.low, ours.high) if ours else 'absent'}, teacher {span(theirs.value, theirs.low, theirs.high) if theirs else 'absent'}"
        if isinstance(paired, str):
            status, reason = "unknown", paired
        elif line.on == "point" and paired.difference is not None and paired.difference >= -1e-12:
            status, reason = "pass", "the figure suffices; its interval was not asked for"
        else:
            status, reason = above(paired.difference, paired.low, -1e-12, paired.method)
            reason = f"falls short by {shown(-(paired.difference or 0))}" if status == "fail" else reason
        findings.append(Finding(rule=f"student: {metric}", status=status, observed=scores, required=required, reason=reason))  # type: ignore[arg-type]
    return findings or nothing_matches("student", f"slice:*.{line.metric}", required)
