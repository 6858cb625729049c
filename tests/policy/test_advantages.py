from __future__ import annotations

import doctest
import math

import pytest

from temper.policy import advantages
from temper.policy.advantages import ADVANTAGES, dr_grpo, group_mean, overlong, reinforce_pp, reinforce_pp_baseline, rloo

GROUP_RELATIVE = [name for name in ADVANTAGES if not name.startswith("reinforce_pp")]


def flat(groups: list[list[float | None]]) -> list[float | None]:
    return [value for group in groups for value in group]


def test_the_numbers_in_the_docstrings():
    found = doctest.testmod(advantages)
    assert (found.failed, found.attempted >= 6) == (0, True)


def test_by_hand():
    # rewards 1, 0, 0: mean 1/3; std with n-1: √((4/9 + 1/9 + 1/9)/2) = √(1/3)
    assert group_mean([[1.0, 0.0, 0.0]])[0] == pytest.approx([2 / 3 * math.sqrt(3), -math.sqrt(3) / 3, -math.sqrt(3) / 3])
    assert dr_grpo([[1.0, 0.0, 0.0]])[0] == pytest.approx([2 / 3, -1 / 3, -1 / 3])
    # the others' means are 0, 1/2, 1/2
    assert rloo([[1.0, 0.0, 0.0]])[0] == pytest.approx([1.0, -0.5, -0.5])


@pytest.mark.parametrize("name", GROUP_RELATIVE)
def test_nothing_to_compare_with_teaches_nothing(name):
    assert ADVANTAGES[name]([[0.7], [0.1, 0.1, 0.1], [None, 0.4, None]]) == [[0.0], [0.0, 0.0, 0.0], [None, 0.0, None]]


@pytest.mark.parametrize("name", ADVANTAGES)
def test_an_absent_reward_gets_no_advantage_and_sways_none(name):
    with_gap, without = ADVANTAGES[name]([[1.0, None, 0.0, 0.5], [None, 2.0]]), ADVANTAGES[name]([[1.0, 0.0, 0.5], [2.0]])
    assert with_gap[0][1] is None
    assert with_gap[1][0] is None
    assert [[value for value in group if value is not None] for group in with_gap] == without
    assert ADVANTAGES[name]([[None, None]]) == [[None, None]]


@pytest.mark.parametrize("name", GROUP_RELATIVE)
def test_credit_within_a_group_sums_to_zero_and_ignores_other_groups(name):
    both = ADVANTAGES[name]([[1.0, 0.0, 0.25, 0.5], [5.0, 9.0]])
    assert math.fsum(both[0]) == pytest.approx(0.0, abs=1e-12)
    assert both[1] == ADVANTAGES[name]([[5.0, 9.0]])[0]


def test_rounding_residue_is_not_blown_up_to_unit_spread():
    rewards = [0.1 + 0.2, 0.3, 0.3, 0.3]  # 0.30000000000000004
    assert max(map(abs, group_mean([rewards])[0])) < 1e-10


def test_global_normalisation_by_hand():
    # rewards 1 | 0 | 0, 1: mean 1/2, std √(4·¼/3) = 1/√3
    assert flat(reinforce_pp([[1.0], [0.0], [0.0, 1.0]])) == pytest.approx([0.5 * math.sqrt(3) * sign for sign in (1, -1, -1, 1)])
    # groups 1, 0 and 5, 4: centred ±1/2 four times, whatever the level of the group; std 1/√3
    assert flat(reinforce_pp_baseline([[1.0, 0.0], [5.0, 4.0]])) == pytest.approx([0.5 * math.sqrt(3) * sign for sign in (1, -1, 1, -1)])


@pytest.mark.parametrize("credit", [reinforce_pp, reinforce_pp_baseline])
def test_over_the_batch_equal_rewards_teach_nothing_and_rounding_is_not_blown_up(credit):
    assert credit([[0.3, 0.3], [0.3]]) == [[0.0, 0.0], [0.0]]
    assert credit([[0.7]]) == [[0.0]]
    assert max(abs(value) for group in credit([[0.1 + 0.2, 0.3], [0.3, 0.3]]) for value in group) < 1e-10


def test_a_group_that_agrees_still_teaches_under_global_normalisation():
    """Always right on an easy prompt, always wrong on a hard one: the batch tells them apart, groups do not."""
    assert reinforce_pp([[1.0, 1.0], [0.0, 0.0]])[0][0] > 0.8
    assert reinforce_pp_baseline([[1.0, 1.0], [0.0, 0.0]]) == [[0.0, 0.0], [0.0, 0.0]]


def test_overlong_punishment_by_hand():
    """Limit 16,384 with a buffer of 4,096, as in the paper: nothing at 12,288, half at 14,336, all at 16,384 and beyond."""
    assert [overlong(tokens, limit=16384, buffer=4096) for tokens in (100, 12288, 14336, 16384, 20000)] == [0.0, 0.0, -0.5, -1.0, -1.0]
    assert [overlong(tokens, limit=10, buffer=0) for tokens in (10, 11)] == [0.0, -1.0]  # no buffer: a cliff
