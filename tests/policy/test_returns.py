"""Advantages and returns along rows: against numbers worked by hand and against the sums they stand for."""

from __future__ import annotations

import doctest

import pytest
import torch
from torch import tensor

from temper.core.errors import ShapeError
from temper.policy import returns
from temper.policy.returns import gae, token_rewards, whiten

NAN = float("nan")


def test_the_numbers_in_the_docstrings():
    found = doctest.testmod(returns, extraglobs={"tensor": tensor})
    assert (found.failed, found.attempted >= 5) == (0, True)


def test_the_reward_stands_at_the_last_sampled_token_and_not_one_past_it():
    mask_B_T = tensor([[False, True, False, True, False], [False, True, True, True, True]])
    found = token_rewards(tensor([2.0, 3.0]), mask_B_T)
    assert found.tolist() == [[0, 0, 0, 2, 0], [0, 0, 0, 0, 3]]
    paid = token_rewards(tensor([2.0, 3.0]), mask_B_T, penalty_B_T=tensor([[NAN, 0.5, NAN, 0.25, NAN], [NAN, 1.0, 0.0, 0.0, 1.0]]))
    assert paid.tolist() == [[0, -0.5, 0, 1.75, 0], [0, -1, 0, 0, 2]]


def brute_force(rewards: list[float], values: list[float], bootstrap: float, gamma: float, lam: float) -> list[float]:
    """Eq. 16 as it is written: the discounted sum of all later temporal differences."""
    following = [*values[1:], bootstrap]
    deltas = [reward + gamma * after - value for reward, after, value in zip(rewards, following, values, strict=True)]
    return [sum((gamma * lam) ** step * delta for step, delta in enumerate(deltas[at:])) for at in range(len(deltas))]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (1.0, 0.0)])
def test_gae_is_the_sum_over_sampled_tokens_whatever_stands_between(gamma, lam):
    """Row 0 has a tool result in the middle and was cut off at a value of 0.7; masked places hold NaN."""
    torch.manual_seed(0)
    mask_B_T = tensor([[False, True, True, False, False, True, True], [False, True, False, False, True, False, False]])
    rewards_B_T, values_B_T = (torch.randn(2, 7, dtype=torch.float64).where(mask_B_T, NAN) for _ in range(2))
    bootstrap_B = tensor([0.7, 0.0], dtype=torch.float64)
    advantages_B_T, returns_B_T = gae(rewards_B_T, values_B_T, mask_B_T, bootstrap_B, gamma=gamma, lam=lam)
    for row in range(2):
        own = mask_B_T[row]
        expected = brute_force(rewards_B_T[row][own].tolist(), values_B_T[row][own].tolist(), float(bootstrap_B[row]), gamma, lam)
        assert advantages_B_T[row][own].tolist() == pytest.approx(expected, rel=1e-12)
        torch.testing.assert_close(returns_B_T[row][own], advantages_B_T[row][own] + values_B_T[row][own])
    assert advantages_B_T.where(mask_B_T, 0.0).equal(advantages_B_T)
    assert returns_B_T.where(mask_B_T, 0.0).equal(returns_B_T)


def test_with_lambda_one_the_return_is_the_reward_to_come():
    """γ = λ = 1: rewards 0, 0, 1 give returns of 1 everywhere where the row ended, and 1 + V where it was cut off."""
    one = torch.ones(1, 3, dtype=torch.bool)
    rewards_B_T, values_B_T = tensor([[0.0, 0.0, 1.0]]), tensor([[0.3, -0.4, 0.9]])
    assert gae(rewards_B_T, values_B_T, one, tensor([0.0]), lam=1.0)[1].tolist()[0] == pytest.approx([1.0, 1.0, 1.0])
    assert gae(rewards_B_T, values_B_T, one, tensor([0.5]), lam=1.0)[1].tolist()[0] == pytest.approx([1.5, 1.5, 1.5])


def test_whitening_counts_real_tokens_only():
    """1, 3, 5, 7: mean 4, spread √5, however much padding stands around them and whatever it holds."""
    narrow = whiten(tensor([[1.0, 3.0], [5.0, 7.0]]), torch.ones(2, 2, dtype=torch.bool))
    torch.testing.assert_close(narrow, tensor([[-3.0, -1.0], [1.0, 3.0]]) / 5**0.5)
    wide = whiten(tensor([[1.0, 3.0, NAN, 100.0], [5.0, 7.0, NAN, NAN]]), tensor([[True, True, False, False]] * 2))
    torch.testing.assert_close(wide[:, :2], narrow)
    assert wide[:, 2:].tolist() == [[0, 0], [0, 0]]
    assert whiten(tensor([[2.0, 2.0]]), torch.ones(1, 2, dtype=torch.bool)).tolist() == [[0, 0]]


def test_other_shapes_are_refused():
    with pytest.raises(ShapeError, match="values_B_T"):
        gae(torch.zeros(1, 2), torch.zeros(1, 3), torch.ones(1, 2, dtype=torch.bool), torch.zeros(1))
