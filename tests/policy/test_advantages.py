from __future__ import annotations

import math

import pytest

from temper.policy.advantages import ADVANTAGES, dr_grpo, group_mean, rloo


def test_by_hand():
    # rewards 1, 0, 0: mean 1/3; std with n-1: √((4/9 + 1/9 + 1/9)/2) = √(1/3)
    assert group_mean([[1.0, 0.0, 0.0]])[0] == pytest.approx([2 / 3 * math.sqrt(3), -math.sqrt(3) / 3, -math.sqrt(3) / 3])
    assert dr_grpo([[1.0, 0.0, 0.0]])[0] == pytest.approx([2 / 3, -1 / 3, -1 / 3])
    # the others' means are 0, 1/2, 1/2
    assert rloo([[1.0, 0.0, 0.0]])[0] == pytest.approx([1.0, -0.5, -0.5])


@pytest.mark.parametrize("name", ADVANTAGES)
def test_nothing_to_compare_with_teaches_nothing(name):
    assert ADVANTAGES[name]([[0.7], [0.1, 0.1, 0.1], [None, 0.4, None]]) == [[0.0], [0.0, 0.0, 0.0], [None, 0.0, None]]


@pytest.mark.parametrize("name", ADVANTAGES)
def test_an_absent_reward_gets_no_advantage_and_sways_none(name):
    with_gap, without = ADVANTAGES[name]([[1.0, None, 0.0, 0.5]])[0], ADVANTAGES[name]([[1.0, 0.0, 0.5]])[0]
    assert with_gap[1] is None
    assert [value for value in with_gap if value is not None] == without
    assert ADVANTAGES[name]([[None, None]]) == [[None, None]]


@pytest.mark.parametrize("name", ADVANTAGES)
def test_credit_within_a_group_sums_to_zero_and_ignores_other_groups(name):
    both = ADVANTAGES[name]([[1.0, 0.0, 0.25, 0.5], [5.0, 9.0]])
    assert math.fsum(both[0]) == pytest.approx(0.0, abs=1e-12)
    assert both[1] == ADVANTAGES[name]([[5.0, 9.0]])[0]


def test_rounding_residue_is_not_blown_up_to_unit_spread():
    rewards = [0.1 + 0.2, 0.3, 0.3, 0.3]  # 0.30000000000000004
    assert max(map(abs, group_mean([rewards])[0])) < 1e-10
