"""The statistics that reports and gate share: hand-worked numbers, reference libraries, and a simulation."""

import math
import random

import pytest
from scipy import stats as reference
from statsmodels.stats.proportion import proportion_confint

from temper.core.errors import DataError
from temper.core.stats import (
    cases_needed,
    clustered_standard_error,
    contrast,
    growth,
    holm,
    mean_interval,
    merge_clusters,
    rate_interval,
    sign_test,
    t_cdf,
    t_quantile,
    tango,
    wilson,
)


def numbered(values):
    return {str(i): float(v) for i, v in enumerate(values)}


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 7, 30, 101])
def test_students_t_is_scipys(degrees):
    assert t_cdf(-1.3, degrees) == pytest.approx(reference.t.cdf(-1.3, degrees), abs=1e-12)
    assert t_quantile(0.975, degrees) == pytest.approx(reference.t.ppf(0.975, degrees), rel=1e-9)


def test_wilson_by_hand_and_by_statsmodels():
    # 8 of 10, z = 1.96: centre (0.8 + 0.19207)/(1.38415) = 0.71674, half 0.22658 -> [0.4902, 0.9433]
    low, high = wilson(8, 10)
    assert (low, high) == pytest.approx((0.49016, 0.94332), abs=1e-5)
    assert (low, high) == pytest.approx(proportion_confint(8, 10, method="wilson"), abs=1e-9)


def test_wilson_is_never_of_zero_width():
    # 20 of 20: the lower end is n/(n+z^2) = 20/23.8415
    assert wilson(20, 20) == pytest.approx((20 / (20 + 1.959964**2), 1.0), abs=1e-6)
    with pytest.raises(DataError):
        wilson(3, 2)


def test_clustered_error_by_hand():
    # two clusters (1, 1) and (0, 0): mean 1/2, cluster sums of deviations +1 and -1, squares sum to 2
    # error = sqrt(2/1 * 2) / 4 = 1/2; taken for independent it would be sqrt(4/3 * 1)/4 = 0.289
    values, clusters = numbered([1, 1, 0, 0]), {"0": "a", "1": "a", "2": "b", "3": "b"}
    assert clustered_standard_error(values, clusters) == pytest.approx((0.5, 2))
    alone, _ = clustered_standard_error(values, {})
    assert alone == pytest.approx(math.sqrt(4 / 3) / 4)
    assert alone == pytest.approx(reference.sem([1, 1, 0, 0]))


def test_an_empty_cluster_name_is_no_cluster():
    values = numbered([1, 0, 1, 0])
    assert clustered_standard_error(values, dict.fromkeys(values, "")) == clustered_standard_error(values, {})
    assert clustered_standard_error(values, dict.fromkeys(values, "one")) == (None, 1)


def test_rate_interval_widens_with_clusters_and_says_so():
    # ten companies, each all right or all wrong: the design effect is near the cluster size, four
    values = numbered([1.0] * 4 * 6 + [0.0] * 4 * 4)
    clusters = {case: str(int(case) // 4) for case in values}
    plain, clustered = rate_interval(values, {}), rate_interval(values, clusters)
    assert clustered.high - clustered.low > 1.8 * (plain.high - plain.low)
    assert "design effect" in clustered.method
    assert plain.method == "Wilson"
    # by hand: error^2 = 10/9 * (6*1.6^2 + 4*2.4^2)/40^2 = 10/9*0.024; effect = that * 40/0.24 = 40/9
    effective = 40 / (40 / 9)
    assert (clustered.low, clustered.high) == pytest.approx(wilson(0.6 * effective, effective, t_quantile(0.975, 9)))


def test_a_rate_outside_its_range_is_an_error():
    with pytest.raises(DataError, match=r"outside \[0, 1\]"):
        rate_interval(numbered([0.5, 1.5]), {})


def test_mean_interval_is_the_t_interval_and_never_of_zero_width():
    interval = mean_interval(numbered([1, 2, 3, 4]), {})
    assert (interval.low, interval.high) == pytest.approx(reference.t.interval(0.95, 3, 2.5, reference.sem([1, 2, 3, 4])))
    assert mean_interval(numbered([7, 7, 7]), {}).low is None


def test_tango_solves_its_score_equation():
    # 12 wins, 2 losses of 50 (Newcombe 1998, table I): [0.0611, 0.3447]
    assert tango(12, 2, 50) == pytest.approx((0.0611, 0.3447), abs=1e-4)
    # no discordant pair: +-z^2/(n + z^2)
    assert tango(0, 0, 30) == pytest.approx((-3.8415 / 33.8415, 3.8415 / 33.8415), abs=1e-5)
    low, high = tango(10, 0, 10)
    assert high == 1.0
    assert 0.4 < low < 1
    # mirror image
    assert tango(2, 12, 50) == pytest.approx((-0.3447, -0.0611), abs=1e-4)


def test_sign_test_is_mcnemars_exact():
    # 1 win, 6 losses: 2 * (1 + 7) / 128 = 0.125
    assert sign_test(1, 6) == pytest.approx(0.125)
    assert sign_test(0, 0) == 1.0
    assert sign_test(3, 9) == pytest.approx(reference.binomtest(3, 12).pvalue)


def test_paired_difference_by_hand():
    # gaps 1, 0, 1, 0, one case a cluster: mean 1/2, error sqrt(4/3*1)/4 = 0.2887, t(3) = 3.182
    paired = contrast(numbered([1, 0, 1, 1]), numbered([0, 0, 0, 1]), {})
    assert (paired.difference, paired.wins, paired.ties, paired.losses) == (0.5, 2, 2, 0)
    assert paired.low == pytest.approx(0.5 - 3.18245 * math.sqrt(4 / 3) / 4, abs=1e-4)
    assert paired.p_value == pytest.approx(0.5)  # McNemar's exact, larger than t's 0.18
    assert paired.coverage == 1.0


def test_identical_outcomes_are_not_certainty():
    same = numbered([1, 0] * 15)
    paired = contrast(same, same, {})
    assert paired.difference == 0
    assert paired.low == pytest.approx(-0.11351, abs=1e-4)
    fractions = numbered([0.5, 0.25] * 15)
    bounded = contrast(fractions, fractions, {})
    # at most 1 - 0.025^(1/30) = 0.1157 of cases could differ, each by at most 1
    assert (bounded.low, bounded.high) == pytest.approx((-0.11570, 0.11570), abs=1e-4)
    tokens = numbered([40, 50] * 15)
    assert contrast(tokens, tokens, {}).low is None


def test_cases_that_only_one_side_has_show_in_the_coverage():
    paired = contrast({"a": 1.0, "b": 1.0, "c": 0.0}, {"b": 0.0, "c": 0.0, "d": 1.0}, {})
    assert (paired.count, paired.coverage) == (2, 0.5)
    assert contrast({"a": 1.0}, {"b": 1.0}, {}).difference is None


def test_a_value_that_is_no_number_is_an_error():
    with pytest.raises(DataError, match="not finite"):
        contrast({"a": float("nan"), "b": 1.0}, {"a": 0.0, "b": 0.0}, {})


def test_kept_share_by_hand():
    # student 0.8, teacher 0.9 of ten: 0.8 - 0.95*0.9 = -0.055
    student, teacher = numbered([1] * 8 + [0] * 2), numbered([1] * 9 + [0])
    assert contrast(student, teacher, {}, share=0.95).difference == pytest.approx(-0.055)


def test_growth_by_hand():
    # means 12 against 10: +20%; residuals (c - 1.2 b)/10 are -0.2, 0.2, 0
    paired = growth(numbered([10, 14, 12]), numbered([10, 10, 10]), {})
    assert paired.difference == pytest.approx(0.2)
    error = math.sqrt(1.5 * (0.2**2 + 0.2**2)) / 3
    assert paired.high == pytest.approx(0.2 + t_quantile(0.975, 2) * error)
    assert growth(numbered([1]), numbered([0]), {}).difference is None


def test_holm_by_hand():
    # 0.01*3, then 0.03*2, then the last may not fall below the one before it
    assert holm({"a": 0.03, "b": 0.01, "c": 0.04}) == pytest.approx({"b": 0.03, "a": 0.06, "c": 0.06})


def test_clusters_that_contradict_are_an_error():
    with pytest.raises(DataError, match="cluster 'x' of one report and 'y'"):
        merge_clusters({"a": "x"}, {"a": "y"})


def test_cases_needed_for_a_bound():
    # n/(n + 3.8415) >= 0.95 from n = 72.99
    assert cases_needed(0.95) == 73
    assert wilson(73, 73)[0] >= 0.95 > wilson(72, 72)[0]


@pytest.mark.parametrize("likeness", [0.0, 0.3])
def test_rate_intervals_cover_the_truth_as_often_as_they_say(likeness):
    """12 companies of 5 tasks at a true rate of 0.9, intra-company correlation 0 or 0.3 (beta-binomial)."""
    rng, runs, rate, covered = random.Random(3), 300, 0.9, 0
    clusters = {str(case): str(case // 5) for case in range(60)}
    for _ in range(runs):
        scale = (1 - likeness) / likeness if likeness else None
        company = [rng.betavariate(rate * scale, (1 - rate) * scale) if scale else rate for _ in range(12)]
        interval = rate_interval({case: float(rng.random() < company[int(name)]) for case, name in clusters.items()}, clusters)
        covered += interval.low <= rate <= interval.high
    assert 0.93 <= covered / runs <= 0.99


def simulated(rng, scenarios, repeats):
    """A candidate no better than its baseline, whose gain differs by scenario and by repeat."""
    ours, theirs, clusters = {}, {}, {}
    for scenario in range(scenarios):
        shift = rng.gauss(0, 0.25)
        for repeat in range(repeats):
            case = f"{scenario}/{repeat}"
            ours[case], theirs[case] = 0.5 + shift + rng.gauss(0, 0.3), 0.5
            clusters[case] = str(scenario)
    return ours, theirs, clusters


def test_clustering_keeps_the_false_promotion_rate():
    """20 scenarios of 10 repeats, no true gain, nominal 2.5% one-sided: naive pairs promote far too often."""
    rng, runs, naive, clustered = random.Random(7), 300, 0, 0
    for _ in range(runs):
        ours, theirs, clusters = simulated(rng, 20, 10)
        naive += contrast(ours, theirs, {}).low > 0
        clustered += contrast(ours, theirs, clusters).low > 0
    assert naive / runs > 0.10
    assert clustered / runs < 0.05
