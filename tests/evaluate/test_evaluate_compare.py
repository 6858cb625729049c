"""Comparisons and probes: paired, clustered, and never a threshold without an interval."""

import pytest

from temper.core.errors import DataError
from temper.core.records import Outcome
from temper.evaluate import compare, run_suite, win_rate, win_rate_by
from temper.evaluate.metrics import check
from temper.evaluate.probes import length_drift, null_policy_probe, proxy_gap


def test_win_rate_by_hand():
    ours, theirs = {"a": 1.0, "b": 0.5, "c": 0.0, "d": 1.0}, {"a": 0.0, "b": 0.5, "c": 1.0, "e": 1.0}
    won = win_rate(ours, theirs, {})
    assert (won.value, won.count, won.cases) == (0.5, 3, {"a": 1.0, "b": 0.5, "c": 0.0})
    assert won.low < 0.2 < 0.8 < won.high
    assert win_rate({"a": 1.0}, {"b": 1.0}, {}).value is None
    assert win_rate({"a": 1.04}, {"a": 1.0}, {}, tie=0.05).value == 0.5


def test_a_missing_score_is_not_a_loss():
    with pytest.raises(DataError, match="1 of 2 cases"):
        win_rate({"a": float("nan"), "b": 1.0}, {"a": 0.0, "b": 0.0}, {})


def test_a_scorer_such_as_a_reward_model_decides(make_case):
    ours, theirs = [make_case("a", reward=1.0), make_case("b", reward=0.0)], [make_case("a", reward=0.0), make_case("b", reward=0.0)]
    won = win_rate_by(lambda records: [record.outcome.reward for record in records], ours, theirs)
    assert won.cases == {"a": 1.0, "b": 0.5}
    with pytest.raises(DataError, match="1 scores for 2 records"):
        win_rate_by(lambda records: [1.0], ours, theirs)


def test_two_reports_pair_by_pair(world, engine, script, gold):
    before, _ = run_suite(engine, world, "dev", name="before", collect=script(lambda task: "no"))
    after, _ = run_suite(engine, world, "dev", name="after", collect=script(gold))
    paired = compare(after, before)["instruction.task_success"]
    assert (paired.wins, paired.ties, paired.losses) == (24, 12, 0)
    assert paired.difference == pytest.approx(2 / 3)
    assert paired.clusters == 4
    assert paired.low > 0
    assert compare(after, before, ["slice:risky.success"])["slice:risky.success"].difference == 0
    fewer, _ = run_suite(engine, world, "dev", name="fewer", collect=script(gold), limit=1)
    with pytest.raises(DataError, match="cannot be compared"):
        compare(after, fewer)


def test_length_drift_by_hand(make_case):
    before = [make_case(str(i), slice="lookup", checks={"task_success": i > 5}, tokens=[(5, 10 + i % 2)]) for i in range(10)]
    after = [make_case(str(i), slice="lookup", checks={"task_success": i > 2}, tokens=[(5, 20 + i % 2)]) for i in range(10)]
    drift = length_drift(before, after)
    assert drift.growth.difference == pytest.approx(20.5 / 10.5 - 1)
    assert drift.growth.low > 0.8
    assert (drift.wins, drift.longer_wins) == (3, 3)
    assert drift.by_slice["lookup"].count == 10
    assert drift.reward_length[0] is not None


def test_the_proxy_may_rise_with_the_truth_but_not_past_it(make_case):
    def cases(proxy, truth):
        return [make_case(str(i), cluster=f"c{i % 8}", checks={"proxy": i < proxy, "truth": i < truth}) for i in range(40)]

    honest = proxy_gap(cases(10, 10), cases(30, 30), proxy=check("proxy"), truth=check("truth"))
    gamed = proxy_gap(cases(10, 10), cases(30, 11), proxy=check("proxy"), truth=check("truth"))
    assert honest.difference == 0
    assert honest.low < 0
    assert gamed.difference == pytest.approx(19 / 40)
    assert gamed.low > 0


def test_policies_that_solve_nothing_stay_at_the_floor(world):
    probe = null_policy_probe(world, "dev", floor=0.0)
    # "0" is the true sum of 0 + 0 in company 0: a lookup and a look-alike
    assert probe.scores["constant number"] == pytest.approx(2 / 36)
    failed = [finding for finding in probe.findings if finding.status != "pass"]
    assert [finding.rule for finding in failed] == ["null policy: constant number"]
    assert not probe.passed
    assert "dev-0-lookup-0" in failed[0].reason
    assert null_policy_probe(world, "dev", floor=0.0, luck=0.06).passed


def test_a_verifier_that_pays_for_flattery_is_found(world):
    world.verify = lambda task, turns, session: Outcome(reward=float(bool(turns) and "correct" in turns[-1].content))
    assert [f.rule for f in null_policy_probe(world, "dev", floor=0.0).findings if f.status == "fail"] == ["null policy: flattery"]


def test_a_verifier_that_judges_nothing_is_unknown_not_clean(world):
    world.verify = lambda task, turns, session: Outcome()
    probe = null_policy_probe(world, "dev", floor=0.0)
    assert {finding.status for finding in probe.findings} == {"unknown"}
    assert set(probe.scores.values()) == {None}
    assert not probe.passed
