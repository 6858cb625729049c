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

from temper.core.hashing import hash_value
from temper.core.reports import Finding, Measure, Report, Verdict
from temper.core.stats import Paired, cases_needed, holm
from temper.gate.evidence import against, described, described_measure, expand, gain, grown, kept, missing, pair, shown
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


def nothing_matches(line: str, metric: str, required: str) -> list[Finding]:
    """The finding of a wildcard that names no slice."""
    return [
        Finding(
            rule=f"{line}: {metric}",
            status="unknown",
            observed="no slice",
            required=required,
            reason="no report has a slice that this matches",
        )
    ]


def judge_target(target: Target, candidate: Report, rule: GateRule, label: str) -> list[Finding]:
    """One finding a metric: the figure (or the whole interval) within `min` and `max`."""
    where = "interval" if target.by == "bound" else "figure"
    limits = [f"{word} {limit:g}" for word, limit in (("at least", target.min), ("at most", target.max)) if limit is not None]
    required = f"{where} {' and '.join(limits)}"
    findings = []
    for metric in expand(target.metric, candidate):
        measure = candidate.measure(metric)
        gap = missing(measure, target.min_count or rule.min_count)
        if gap or measure is None or measure.value is None:
            status, reason = "unknown", gap or ""
        else:
            status, reason = within(target, measure)
        observed = described_measure(measure)
        findings.append(Finding(rule=f"{label}: {metric}", status=status, observed=observed, required=required, reason=reason))  # type: ignore[arg-type]
    return findings or nothing_matches(label, target.metric, required)


def within(target: Target, measure: Measure) -> tuple[Status, str]:
    """Whether a measured figure, or its interval, lies within a target's limits."""
    value = measure.value if measure.value is not None else math.nan
    low_limit, high_limit = target.min if target.min is not None else -math.inf, target.max if target.max is not None else math.inf
    if not low_limit <= value <= high_limit:
        limit = low_limit if value < low_limit else high_limit
        return "fail", f"{shown(value)} misses {limit:g} by {shown(abs(value - limit))}"
    if target.by == "point":
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


def judge_margin(line: NonInferiority, candidate: Report, baseline: Report | None, rule: GateRule, label: str) -> list[Finding]:
    """One finding a metric: the whole paired interval of the gain lies above −margin."""
    required, findings = f"gain above -{line.margin:g}", []
    for metric in expand(line.metric, candidate, baseline):
        paired = against(line, metric, candidate, baseline, rule, gain(1 - rule.alpha))
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
    required, findings = f"growth at most {line.max_growth:.0%} ({line.by})", []
    for metric in expand(line.metric, candidate, baseline):
        paired = against(line, metric, candidate, baseline, rule, grown(1 - rule.alpha))
        if isinstance(paired, str):
            status, observed, reason = "unknown", "not compared", paired
        else:
            observed = described(paired, "growth")
            ratio = paired.difference if paired.difference is not None else math.inf
            if ratio > line.max_growth:
                status, reason = "fail", f"it grew by {ratio:.0%}"
            elif line.by == "point":
                status, reason = "pass", "the figure is within the limit; its interval was not asked for"
            elif paired.high is None:
                status, reason = "unknown", f"the growth has no interval ({paired.method})"
            else:
                status = "pass" if paired.high <= line.max_growth else "unknown"
                reason = (
                    paired.method if status == "pass" else f"the cases do not decide: the interval reaches past the limit ({paired.method})"
                )
        findings.append(Finding(rule=f"guardrail: {metric}", status=status, observed=observed, required=required, reason=reason))  # type: ignore[arg-type]
    return findings or nothing_matches("guardrail", line.metric, required)


def judge_improvements(lines: Iterable[Improvement], candidate: Report, baseline: Report | None, rule: GateRule) -> list[Finding]:
    """One finding a claim: the gain is positive and its p-value, adjusted over all claims by Holm, is at most alpha.

    A claim that cannot be tested stays in the family with p = 1, so leaving one out gains nothing.
    """
    claims: dict[str, Paired | str] = {}
    for line in lines:
        named = expand(line.metric, candidate, baseline)
        claims |= {m: against(line, m, candidate, baseline, rule, gain(1 - rule.alpha)) for m in named}
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
        findings.append(
            Finding(
                rule=f"improvement: {metric}",
                status=status,
                observed=observed,
                required=f"gain above 0, adjusted p at most {rule.alpha:g}",
                reason=reason,
            )
        )  # type: ignore[arg-type]
    return findings


def judge_student(line: StudentKeep, student: Report, teacher: Report | None, rule: GateRule) -> list[Finding]:
    """One finding a slice: the mean of student − share·teacher, paired by case, is not below zero."""
    required, findings = f"student keeps {line.share:.0%} of the teacher ({line.by})", []
    fewest = line.min_count or rule.min_count
    for metric in expand(f"slice:*.{line.metric}", student, teacher):
        paired = pair(metric, student, teacher, kept(1 - rule.alpha, line.share), role="teacher", fewest=fewest, coverage=rule.coverage)
        ours, theirs = student.measure(metric), teacher.measure(metric) if teacher else None
        scores = f"student {described_measure(ours)}, teacher {described_measure(theirs)}"
        if isinstance(paired, str):
            status, reason = "unknown", paired
        elif line.by == "point" and paired.difference is not None and paired.difference >= -1e-12:
            status, reason = "pass", "the figure suffices; its interval was not asked for"
        else:
            status, reason = above(paired.difference, paired.low, -1e-12, paired.method)
            reason = f"falls short by {shown(-(paired.difference or 0))}" if status == "fail" else reason
        findings.append(Finding(rule=f"student: {metric}", status=status, observed=scores, required=required, reason=reason))  # type: ignore[arg-type]
    return findings or nothing_matches("student", f"slice:*.{line.metric}", required)
