"""The gate: one finding a line, missing evidence is unknown, a failing line holds."""

import json
from pathlib import Path

import pytest
import yaml

from temper.core.config import load_config, parse_config
from temper.core.errors import ConfigError
from temper.core.hashing import hash_value
from temper.core.reports import Measure, Report
from temper.core.stats import mean, rate_interval
from temper.gate import Change, GateRule, changes, decide, diagnose

ROOT = Path(__file__).resolve().parents[2]


def of(values, *, better="higher", unit="rate"):
    cases = {f"t{i}": float(v) for i, v in enumerate(values)}
    clusters = {case: f"company {i // 3}" for i, case in enumerate(cases)}
    interval = rate_interval(cases, clusters) if unit == "rate" else None
    return Measure(
        value=mean(cases.values()), count=len(cases), low=interval and interval.low, high=interval and interval.high,
        better=better, unit=unit, cases=cases, clusters=clusters,
    )  # fmt: skip


def report(name="candidate", *, slices=None, suite="suite", split="dev", **dimensions):
    return Report(
        name=name, model=name, model_hash=f"weights of {name}", split=split, suite_hash=suite,
        dimensions=dimensions, slices={key: {"success": value} for key, value in (slices or {}).items()},
    )  # fmt: skip


def rule(**lines):
    return parse_config(GateRule, {"alpha": 0.05, "min_count": 5, "coverage": 1.0, **lines})


def passes(right, count):
    return [1] * right + [0] * (count - right)


def only(verdict):
    (finding,) = verdict.findings
    return finding


# --- targets -------------------------------------------------------------------------------------------------


def test_a_target_on_its_bound_needs_the_interval_not_the_figure():
    line = rule(targets=[{"metric": "tools.precision", "min": 0.9, "by": "bound"}])
    # 20 of 20: Wilson's lower end is 0.839, so 0.9 is not shown; 40 of 40: 0.912
    few = decide(report(tools={"precision": of(passes(20, 20))}), None, line)
    assert few.decision == "cannot_tell"
    assert "at least 35 cases" in only(few).reason
    assert decide(report(tools={"precision": of(passes(40, 40))}), None, line).decision == "promote"
    missed = decide(report(tools={"precision": of(passes(30, 40))}), None, line)
    assert (missed.decision, only(missed).status) == ("hold", "fail")
    assert "misses 0.9 by 0.150" in only(missed).reason


def test_a_target_on_its_point_asks_no_interval():
    line = rule(targets=[{"metric": "safety.over_refusal", "max": 0.05, "by": "point"}])
    assert decide(report(safety={"over_refusal": of(passes(1, 20), better="lower")}), None, line).decision == "promote"
    assert decide(report(safety={"over_refusal": of(passes(2, 20), better="lower")}), None, line).decision == "hold"


@pytest.mark.parametrize(
    ("measure", "reason"),
    [
        (None, "does not hold this metric"),
        (Measure(value=None, count=0), "absent is not zero"),
        (Measure(value=float("nan"), count=9), "not a number"),
        (Measure(value=1.0, count=4, low=0.9, high=1.0), "4 cases are fewer than the 5"),
        (Measure(value=1.0, count=9), "no interval"),
        (Measure(value=1.0, count=9, low=1.0, high=1.0), "zero width"),
    ],
)
def test_what_is_no_evidence_is_unknown_and_never_promotes(measure, reason):
    line = rule(targets=[{"metric": "tools.recall", "min": 0.5, "by": "bound"}])
    verdict = decide(report(tools={"recall": measure} if measure else {}), None, line)
    assert verdict.decision == "cannot_tell"
    assert reason in only(verdict).reason


def test_one_failing_line_holds_even_beside_unknown_ones():
    lines = rule(targets=[{"metric": "tools.recall", "min": 0.5, "by": "point"}, {"metric": "tools.precision", "min": 0.5, "by": "point"}])
    verdict = decide(report(tools={"recall": of(passes(1, 20))}), None, lines)
    assert [finding.status for finding in verdict.findings] == ["fail", "unknown"]
    assert verdict.decision == "hold"


def test_a_wildcard_is_every_slice_and_no_tenant():
    line = rule(targets=[{"metric": "slice:*.success", "min": 0.5, "by": "point"}])
    slices = {"lookup": of(passes(9, 10)), "risky": of(passes(2, 10)), "tenant:bank_a": of(passes(0, 10))}
    verdict = decide(report(slices=slices), None, line)
    assert {finding.rule: finding.status for finding in verdict.findings} == {
        "target: slice:lookup.success": "pass",
        "target: slice:risky.success": "fail",
    }
    assert decide(report(), None, line).decision == "cannot_tell"
    tenants = rule(targets=[{"metric": "slice:tenant:*.success", "min": 0.5, "by": "point"}])
    assert [item.rule for item in decide(report(slices=slices), None, tenants).findings] == ["target: slice:tenant:bank_a.success"]


# --- comparisons ---------------------------------------------------------------------------------------------


def test_non_inferiority_needs_enough_pairs():
    line = rule(noninferiority=[{"metric": "instruction.task_success", "margin": 0.1}])

    def judged(count):
        same = report(instruction={"task_success": of(passes(count // 2, count))})
        return decide(same, same, line)

    # identical outcomes: Tango's lower end is -z^2/(n+z^2): -0.161 at 20, -0.0602 at 60
    assert judged(20).decision == "cannot_tell"
    assert judged(60).decision == "promote"


def test_non_inferiority_turns_round_where_lower_is_better():
    line = rule(noninferiority=[{"metric": "safety.violation_rate", "margin": 0.1}])
    good, bad = (report(safety={"violation_rate": of(passes(k, 60), better="lower")}) for k in (0, 30))
    assert decide(good, bad, line).decision == "promote"
    assert decide(bad, good, line).decision == "hold"


def test_a_comparison_without_a_fair_baseline_is_unknown():
    line = rule(noninferiority=[{"metric": "instruction.task_success", "margin": 0.5}])
    ours = report(instruction={"task_success": of(passes(30, 60))})
    assert "no baseline was given" in only(decide(ours, None, line)).reason
    other = report(suite="another", instruction={"task_success": of(passes(30, 60))})
    assert "different suites" in only(decide(ours, other, line)).reason
    fewer = report(instruction={"task_success": of(passes(30, 50))})
    assert "only 83% of the cases" in only(decide(ours, fewer, line)).reason
    assert (
        decide(ours, fewer, rule(noninferiority=[{"metric": "instruction.task_success", "margin": 0.5, "coverage": 0.8}])).decision
        == "promote"
    )
    assert "does not hold" in only(decide(ours, report(), line)).reason


def test_improvement_is_corrected_for_the_number_of_claims():
    # 6 wins of 30 and no loss: McNemar's exact p = 2/2^6 = 0.03125: enough for one claim, not for two
    before, after = of([0] * 30), of([1] * 6 + [0] * 24)
    spread_out = {case: case for case in before.cases}
    before, after = (m.model_copy(update={"clusters": spread_out}) for m in (before, after))
    one = rule(improvement=[{"metric": "instruction.task_success"}])
    two = rule(improvement=[{"metric": "instruction.task_success"}, {"metric": "tools.recall"}])
    ours = report(instruction={"task_success": after}, tools={"recall": after})
    theirs = report(instruction={"task_success": before}, tools={"recall": before})
    assert decide(ours, theirs, one).decision == "promote"
    verdict = decide(ours, theirs, two)
    assert verdict.decision == "cannot_tell"
    assert "Holm 0.062 of 2 claims" in verdict.findings[0].observed
    # a claim that cannot be tested still counts among the claims
    assert decide(report(instruction={"task_success": after}), theirs, two).findings[0].status == "unknown"
    assert decide(theirs, ours, one).decision == "hold"


def test_growth_guardrail():
    line = rule(guardrails=[{"metric": "runtime.sampled_length", "max_growth": 0.2, "by": "bound"}])

    def length(values):
        return report(runtime={"sampled_length": of(values, better="lower", unit="tokens")})

    base = length([40, 50, 60] * 6)
    # companies of three cases grow by the same share, so the ratio is 1.1 within a narrow interval
    assert decide(length([44, 55, 66] * 5 + [44, 55, 67]), base, line).decision == "promote"
    assert decide(length([60, 75, 90] * 6), base, line).decision == "hold"
    noisy = length([30, 50, 90] * 3 + [70, 80, 40] * 3)
    assert decide(noisy, base, line).decision == "cannot_tell"


def test_guardrails_of_each_kind_are_read():
    lines = rule(
        guardrails=[
            {"metric": "safety.over_refusal", "max": 0.05, "by": "point"},
            {"metric": "tools.recall", "margin": 0.9},
            {"metric": "runtime.cost", "max_growth": 1, "by": "point"},
        ]
    )
    kinds = [type(line).__name__ for line in lines.guardrails]
    assert kinds == ["Target", "NonInferiority", "Growth"]


def test_the_student_must_keep_its_share_in_every_slice_and_the_gate_names_which_failed():
    line = rule(student_keep={"share": 0.95, "metric": "success", "by": "point"})
    teacher = report("teacher", slices={"lookup": of(passes(20, 20)), "discrepancy": of(passes(20, 20))})
    student = report("student", slices={"lookup": of(passes(19, 20)), "discrepancy": of(passes(18, 20))})
    verdict = decide(student, None, line, teacher=teacher)
    found = {finding.rule: finding for finding in verdict.findings}
    assert verdict.decision == "hold"
    # 19/20 is 95% of 20/20; 18/20 falls short by 0.95 - 0.90
    assert found["student: slice:lookup.success"].status == "pass"
    assert found["student: slice:discrepancy.success"].status == "fail"
    assert "falls short by 0.050" in found["student: slice:discrepancy.success"].reason
    assert decide(student, None, line).decision == "cannot_tell"
    lost = report("student", slices={"lookup": of(passes(20, 20))})
    assert decide(lost, None, line, teacher=teacher).decision == "cannot_tell"


def test_the_verdict_is_bound_to_what_was_judged():
    ours, theirs, lines = (
        report(tools={"recall": of(passes(9, 10))}),
        report("old"),
        rule(targets=[{"metric": "tools.recall", "min": 0.5, "by": "point"}]),
    )
    verdict = decide(ours, theirs, lines)
    assert verdict.evidence == {
        "candidate": hash_value(ours), "candidate_model": "weights of candidate",
        "baseline": hash_value(theirs), "baseline_model": "weights of old", "rule": hash_value(lines),
    }  # fmt: skip
    assert decide(ours, theirs, lines) == verdict
    assert json.loads(verdict.model_dump_json())["decision"] == "promote"


# --- the rule's own form -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"targets": []}, "would promote anything"),
        ({"targets": [{"metric": "tool.recall", "min": 1, "by": "point"}]}, "did you mean 'tools'"),
        ({"targets": [{"metric": "recall", "min": 1, "by": "point"}]}, "dimension.metric"),
        ({"targets": [{"metric": "tools.recall", "by": "point"}]}, "needs `min`, `max`"),
        ({"targets": [{"metric": "tools.recall", "min": 0.9, "max": 0.1, "by": "point"}]}, "in that order"),
        ({"targets": [{"metric": "tools.recall", "min": float("nan"), "by": "point"}]}, "needs `min`"),
        ({"targets": [{"metric": "tools.recall", "min": 0.9}]}, "by"),
        ({"targets": [{"metric": "tools.recall", "min": 0.9, True: "point"}]}, "reads a bare `on` as true"),
        ({"noninferiority": [{"metric": "tools.recall"}]}, "margin"),
        ({"noninferiority": [{"metric": "tools.recall", "margin": float("nan")}]}, "margin"),
        ({"guardrails": [{"metric": "tools.recall", "margin": -1}]}, "margin"),
    ],
)
def test_a_rule_that_says_too_little_or_nonsense_is_refused(change, says):
    with pytest.raises(ConfigError) as error:
        rule(**change)
    assert says in str(error.value)


@pytest.mark.parametrize("key", ["alpha", "min_count", "coverage"])
def test_no_threshold_has_a_default(key):
    values = {"alpha": 0.05, "min_count": 5, "coverage": 1.0, "targets": [{"metric": "tools.recall", "min": 0.5, "by": "point"}]}
    with pytest.raises(ConfigError, match=key):
        parse_config(GateRule, {name: value for name, value in values.items() if name != key})


def test_the_shipped_rule_loads(tmp_path):
    path = ROOT / "configs" / "gate.yaml"
    assert load_config(GateRule, path).targets
    wrong = tmp_path / "gate.yaml"
    wrong.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), "targts": []}))
    with pytest.raises(ConfigError, match="targets"):
        load_config(GateRule, wrong)


# --- diagnosis -----------------------------------------------------------------------------------------------


def change(status):
    return Change(metric="tools.recall", status=status)


@pytest.mark.parametrize(
    ("targets", "guardrails", "named"),
    [
        (["better"], ["unchanged"], "real improvement"),
        (["better", "unchanged"], ["better"], "real improvement"),
        (["better"], ["unchanged", "worse"], "reward gaming or drift"),
        (["unchanged"], ["unchanged"], "pointless drift"),
        (["unchanged"], ["worse"], "pointless drift"),
        (["worse", "better"], ["unchanged"], "regression"),
        (["better"], ["unknown"], "cannot tell"),
        (["unknown"], ["unchanged"], "cannot tell"),
        ([], ["unchanged"], "cannot tell"),
    ],
)
def test_each_outcome_is_named(targets, guardrails, named):
    assert diagnose([change(s) for s in targets], [change(s) for s in guardrails]) == named


@pytest.mark.parametrize(
    ("target", "guardrail", "proxy", "named"),
    [
        ("better", "unchanged", "better", "real improvement"),
        ("better", "unchanged", "unchanged", "real improvement"),
        ("unchanged", "unchanged", "better", "reward gaming or drift"),  # only the judge saw it better
        ("unchanged", "worse", "better", "reward gaming or drift"),
        ("unknown", "worse", "better", "reward gaming or drift"),
        ("unknown", "unchanged", "better", "cannot tell"),
        ("better", "unchanged", "worse", "cannot tell"),  # verifier and judge contradict each other
        ("better", "unchanged", "unknown", "cannot tell"),
        ("unchanged", "unchanged", "unchanged", "pointless drift"),
        ("unchanged", "unchanged", "worse", "regression"),
        ("worse", "unchanged", "better", "regression"),
        ("unchanged", "unchanged", "unknown", "cannot tell"),
    ],
)
def test_a_reward_model_stands_beside_the_targets_and_never_suffices(target, guardrail, proxy, named):
    assert diagnose([change(target)], [change(guardrail)], [change(proxy)]) == named


def test_changes_need_the_whole_interval_and_allow_a_tolerance():
    before = report(instruction={"task_success": of(passes(15, 60))}, safety={"over_refusal": of(passes(0, 60), better="lower")})
    after = report(instruction={"task_success": of(passes(45, 60))}, safety={"over_refusal": of(passes(20, 60), better="lower")})
    up, harm = changes(after, before, ["instruction.task_success", "safety.over_refusal"], alpha=0.05)
    assert (up.status, harm.status) == ("better", "worse")
    assert up.gain == pytest.approx(0.5)
    assert harm.gain == pytest.approx(-1 / 3)
    (allowed,) = changes(after, before, ["safety.over_refusal"], alpha=0.05, tolerance={"safety.over_refusal": 0.3})
    assert allowed.status == "unchanged"
    (absent,) = changes(after, before, ["tools.recall"], alpha=0.05)
    assert absent.status == "unknown"
    assert diagnose([up], [harm]) == "reward gaming or drift"
