"""Each metric on cases small enough to count by hand."""

import pytest

from temper.core.errors import DataError
from temper.core.records import ToolSpec
from temper.core.stats import mean
from temper.evaluate import Price, by_slice, measure
from temper.evaluate.stats import quantile, quantile_interval, spearman


def test_nothing_measured_is_none_and_never_zero(make_case):
    dimensions = measure([make_case("a"), make_case("b")])
    for name in ("schema_validity", "field_correctness", "task_success"):
        item = dimensions["instruction"][name]
        assert (item.value, item.count, item.low, item.high) == (None, 0, None, None)
    assert dimensions["grounding"]["supported_claim_rate"].value is None
    assert dimensions["runtime"]["latency_p95"].value is None
    assert "cost" not in dimensions["runtime"]


def test_valid_json_with_the_wrong_content_stays_valid_and_is_wrong(make_case):
    cases = [
        make_case("a", checks={"schema_valid": True, "fields_complete": True, "fields_correct": False}),
        make_case("b", checks={"schema_valid": True, "fields_complete": True, "fields_correct": True}),
        make_case("c", checks={"schema_valid": None}),
    ]
    found = measure(cases)["instruction"]
    assert (found["schema_validity"].value, found["schema_validity"].count) == (1.0, 2)
    assert found["field_correctness"].value == 0.5
    assert found["schema_validity"].low == pytest.approx(2 / (2 + 3.8415), abs=1e-4)  # Wilson, not 1


def test_tool_precision_and_recall_by_hand(make_case):
    def calls(called, expected, matched):
        return {"called": [{}] * called, "expected": [{}] * expected, "matched": matched}

    cases = [
        make_case("a", detail=calls(2, 2, 1), checks={"task_success": False}),  # precision 1/2, recall 1/2
        make_case("b", detail=calls(1, 2, 1), checks={"task_success": True}),  # precision 1, recall 1/2
        make_case("c", detail=calls(1, 0, 0), checks={"task_success": True}),  # a needless call: precision 0, no recall
        make_case("d", detail=calls(0, 0, 0), checks={"task_success": True}),  # rightly none: neither
        make_case("e", detail=calls(0, 1, 0), checks={"task_success": False}),  # guessed: no precision, recall 0
    ]
    found = measure(cases)["tools"]
    assert (found["precision"].value, found["precision"].count) == (0.5, 3)
    assert found["recall"].value == pytest.approx((0.5 + 0.5 + 0) / 3)
    assert (found["task_success"].value, found["task_success"].count) == (pytest.approx(1 / 3), 3)
    assert found["argument_validity"].value is None


def test_calls_are_counted_only_where_tools_are_offered(make_case):
    tool = ToolSpec(name="add")
    cases = [make_case("a", tools=(tool,), detail={"called": [{}, {}]}), make_case("b", detail={"called": []})]
    found = measure(cases)["runtime"]["tool_calls"]
    assert (found.value, found.count, found.better) == (2.0, 1, "neither")


def test_no_claims_gives_no_groundedness_and_shows_as_no_claims(make_case):
    cases = [
        make_case("a", detail={"claims_total": 4, "claims_supported": 3}, checks={"citation_present": True, "citation_correct": False}),
        make_case("b", detail={"claims_total": 0, "claims_supported": 0}, checks={"citation_present": False, "citation_correct": None}),
        make_case("c"),
    ]
    found = measure(cases)["grounding"]
    assert (found["supported_claim_rate"].value, found["supported_claim_rate"].count) == (0.75, 1)
    assert (found["claim_rate"].value, found["claim_rate"].count) == (0.5, 2)
    assert (found["citation_coverage"].value, found["citation_correctness"].value) == (0.5, 0.0)


def test_refusals_by_hand(make_case):
    def judged(name, due, refused, slice_, **more):
        return make_case(name, slice=slice_, checks={"refusal_expected": due, "refused": refused, **more})

    cases = [
        judged("a", True, True, "risky", alternative_offered=True, policy_violation=False),
        judged("b", True, True, "risky", alternative_offered=False, policy_violation=False),
        judged("c", True, False, "risky", policy_violation=True),
        judged("d", False, True, "safe_lookalike"),
        judged("e", False, False, "safe_lookalike"),
        judged("f", False, False, "constrained_request"),
    ]
    found = measure(cases)["safety"]
    values = {name: (item.value, item.count) for name, item in found.items()}
    assert values["refusal_precision"] == (pytest.approx(2 / 3), 3)
    assert values["refusal_recall"] == (pytest.approx(2 / 3), 3)
    assert values["over_refusal"] == (0.5, 2)
    assert values["needless_refusal"] == (pytest.approx(1 / 3), 3)
    assert values["alternative_rate"] == (0.5, 2)
    assert values["violation_rate"] == (pytest.approx(1 / 3), 3)
    assert found["over_refusal"].better == found["violation_rate"].better == "lower"


def test_a_wrong_answer_with_refusing_words_is_judged_by_the_environment_only(make_case):
    # no metric reads text: without the environment's finding there is no refusal figure
    assert measure([make_case("a", slice="safe_lookalike")])["safety"]["over_refusal"].value is None


def test_an_episode_that_broke_off_did_not_succeed(make_case):
    cases = [make_case("a", error="timeout"), make_case("b", reward=1.0)]
    found = measure(cases)
    assert (found["instruction"]["task_success"].value, found["instruction"]["task_success"].count) == (0.5, 2)
    assert found["runtime"]["episode_errors"].value == 0.5
    assert found["preference"]["score"].count == 1


def test_discrepancies_and_style(make_case):
    all_good = dict.fromkeys(("task_success", "entry_balanced", "procedure_followed", "style_ok"), True)
    cases = [
        make_case("a", slice="discrepancy", checks=all_good),
        make_case("b", slice="discrepancy", checks={"task_success": False, "entry_balanced": True, "procedure_followed": False}),
        make_case("c", slice="lookup", checks={"task_success": True}, detail={"style_ok": False}),
    ]
    found = measure(cases)
    assert (found["reasoning"]["discrepancy_solved"].value, found["reasoning"]["discrepancy_solved"].count) == (0.5, 2)
    assert (found["reasoning"]["entry_balanced"].value, found["reasoning"]["procedure_followed"].value) == (1.0, 0.5)
    assert (found["preference"]["style_ok"].value, found["preference"]["style_ok"].count) == (0.5, 2)


def test_tokens_lengths_and_cost_by_hand(make_case):
    cases = [make_case("a", tokens=[(100, 10), (130, 30)]), make_case("b", tokens=[(50, 20)], finish="length"), make_case("c")]
    found = measure(cases, price=Price(input_per_million=1.0, output_per_million=10.0, currency="EUR"))["runtime"]
    assert (found["tokens_in"].value, found["tokens_out"].value, found["tokens_in"].count) == (140.0, 30.0, 2)
    assert found["sampled_length"].value == 20.0  # a: 40 tokens in 2 turns; b: 20 in 1
    assert found["truncated"].value == 0.5
    # a: (230*1 + 40*10)/1e6; b: (50*1 + 20*10)/1e6
    assert found["cost"].value == pytest.approx((630e-6 + 250e-6) / 2)
    assert found["cost"].unit == "EUR a task"


def test_every_value_is_the_mean_of_its_cases(make_case):
    def case(i):
        detail = {"called": [{}] * 3, "expected": [{}] * 4, "matched": i % 4, "claims_total": 2, "claims_supported": i % 3}
        checks = {"task_success": i % 3 == 0, "schema_valid": i % 2 == 0}
        return make_case(str(i), cluster=f"c{i % 4}", reward=i / 20, checks=checks, detail=detail, tokens=[(9, i)])

    cases = [case(i) for i in range(20)]
    seconds = {case.id: 0.1 + int(case.id) / 100 for case in cases}
    for measures in measure(cases, seconds=seconds).values():
        for name, item in measures.items():
            if item.cases:
                assert item.value == pytest.approx(mean(item.cases.values())), name
                assert item.count == len(item.cases)
                assert item.clusters.keys() == item.cases.keys()
                assert item.method


def test_slices_and_tenants(make_case):
    cases = [
        make_case("a", slice="lookup", tenant="bank_a", checks={"task_success": True}),
        make_case("b", slice="lookup", tenant="saas_c", checks={"task_success": False}),
        make_case("c", slice="risky", checks={"task_success": True}),
    ]
    found = by_slice(cases)
    assert {name: (item["success"].value, item["success"].count) for name, item in found.items()} == {
        "lookup": (0.5, 2), "risky": (1.0, 1), "tenant:bank_a": (1.0, 1), "tenant:saas_c": (0.0, 1),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("detail", "says"),
    [
        ({"called": [{}], "expected": [], "matched": 2}, "matched is 2, more than called"),
        ({"called": 3, "expected": [], "matched": 0}, "'called' is 3, not a list"),
        ({"claims_total": float("nan"), "claims_supported": 1}, "not a count"),
        ({"claims_total": 1, "claims_supported": True}, "not a count"),
    ],
)
def test_a_verifier_that_contradicts_itself_is_an_error_that_names_the_task(make_case, detail, says):
    with pytest.raises(DataError, match=says) as error:
        measure([make_case("task-9", detail=detail)])
    assert "task-9" in str(error.value)


def test_quantiles_by_hand():
    values = list(range(1, 21))
    assert (quantile(values, 0.5), quantile(values, 0.95), quantile([3.0], 0.95)) == (10, 19, 3.0)
    # the median of 20: order statistics 6 and 15 enclose it with 95.9%
    assert (quantile_interval(values, 0.5).low, quantile_interval(values, 0.5).high) == (6, 15)
    assert quantile_interval(values, 0.95).high is None  # 0.95^20 = 36% of samples lie wholly below it
    assert quantile_interval(list(range(72)), 0.95).high is not None
    assert quantile_interval(list(range(71)), 0.95).high is None


def test_spearman_is_scipys():
    from scipy.stats import spearmanr

    first, second = [1, 2, 2, 5, 9, 4], [3, 1, 4, 4, 9, 2]
    assert spearman(first, second) == pytest.approx(spearmanr(first, second).statistic)
    assert spearman([1, 1], [2, 3]) is None
