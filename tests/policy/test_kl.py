"""The estimators against the exact KL: an expectation over a tiny vocabulary is a sum over all its tokens."""

from __future__ import annotations

import doctest
import math

import pytest
import torch
from torch import tensor
from torch.autograd import gradcheck

from temper.policy import kl


def setting() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(7, dtype=torch.float64, generator=generator).requires_grad_(), torch.randn(
        7, dtype=torch.float64, generator=generator
    )


def expectation(estimator, logits: torch.Tensor, ref: torch.Tensor) -> torch.Tensor:
    """E over tokens of π. Its weights are constants: a loss sees samples, not the sampling."""
    logp = logits.log_softmax(-1)
    return (logp.detach().exp() * estimator(logp, ref.log_softmax(-1))).sum()


def gradient(value: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(value, logits)[0]


def test_values_by_hand():
    # π = ½, π_ref = ¼: r = ln 2
    logp, ref = tensor(0.5).log(), tensor(0.25).log()
    assert float(kl.k1(logp, ref)) == pytest.approx(math.log(2))
    assert float(kl.k2(logp, ref)) == pytest.approx(math.log(2) ** 2 / 2)
    assert float(kl.k3(logp, ref)) == pytest.approx(0.5 - 1 + math.log(2))


@pytest.mark.parametrize("name", ["k1", "k3", "straight_through"])
def test_values_are_unbiased(name):
    logits, ref = setting()
    torch.testing.assert_close(expectation(kl.ESTIMATORS[name], logits, ref), kl.exact_kl(logits[None], ref[None])[0])


def test_k2_is_biased_and_k1_can_be_negative():
    logits, ref = setting()
    exact = float(kl.exact_kl(logits[None], ref[None])[0].detach())
    assert abs(float(expectation(kl.k2, logits, ref).detach()) - exact) > 0.01
    logp, logq = logits.detach().log_softmax(-1), ref.log_softmax(-1)
    assert (kl.k1(logp, logq) < 0).any()
    assert (kl.k3(logp, logq) >= 0).all()


@pytest.mark.parametrize("name", ["k2", "straight_through"])
def test_these_gradients_are_that_of_the_exact_kl(name):
    logits, ref = setting()
    exact = gradient(kl.exact_kl(logits[None], ref[None])[0], logits)
    torch.testing.assert_close(gradient(expectation(kl.ESTIMATORS[name], logits, ref), logits), exact)


def test_k1_in_a_loss_has_no_gradient_and_k3_descends_the_other_kl():
    logits, ref = setting()
    torch.testing.assert_close(gradient(expectation(kl.k1, logits, ref), logits), torch.zeros(7, dtype=torch.float64), atol=1e-12, rtol=0)
    of_k3 = gradient(expectation(kl.k3, logits, ref), logits)
    torch.testing.assert_close(of_k3, gradient(kl.exact_kl(ref[None], logits[None])[0], logits))
    assert float((of_k3 - gradient(kl.exact_kl(logits[None], ref[None])[0], logits)).abs().max()) > 0.01


def test_samples_of_an_older_policy_need_the_importance_weight():
    logits, ref = setting()
    old = (logits.detach() + torch.linspace(-1, 1, 7)).log_softmax(-1)
    logp, logq = logits.log_softmax(-1), ref.log_softmax(-1)
    ratio_V = (logp.detach() - old).exp()
    out = kl.kl_penalty(
        logp[None], logq[None], torch.ones(1, 7, dtype=torch.bool), weights_B_T=old.exp()[None], importance_B_T=ratio_V[None]
    )
    torch.testing.assert_close(gradient(out.total, logits), gradient(kl.exact_kl(logits[None], ref[None])[0], logits))


def test_the_penalty_sums_over_the_mask_and_nan_outside_is_harmless():
    mask_B_T = tensor([[False, True, True]])
    logp = tensor([[float("nan"), math.log(0.5), math.log(0.25)]], requires_grad=True)
    out = kl.kl_penalty(logp, tensor([[float("nan"), math.log(0.25), math.log(0.25)]]), mask_B_T)
    out.total.backward()
    assert float(out.total.detach()) == pytest.approx(math.log(2) - 0.5, rel=1e-6)
    assert float(out.sums["kl"]) == pytest.approx(math.log(2) - 0.5, rel=1e-6)
    assert int(out.count) == 2
    torch.testing.assert_close(logp.grad, tensor([[0.0, math.log(2), 0.0]]))  # the gradient of k2 is r


def test_a_forgotten_token_leaves_k3_finite():
    assert torch.isfinite(kl.k3(tensor(-900.0), tensor(0.0)))


@pytest.mark.parametrize("name", ["k1", "k2", "k3"])
def test_gradients_agree_with_finite_differences(name):
    logits, ref = setting()
    assert gradcheck(kl.ESTIMATORS[name], (logits.detach().requires_grad_(), ref.requires_grad_()))


def test_the_numbers_in_the_docstrings():
    found = doctest.testmod(kl)
    assert (found.failed, found.attempted >= 1) == (0, True)


def test_the_adaptive_coefficient_settles_where_the_kl_is_the_target():
    """A policy whose KL is 3/β: β must find 0.5 for a target of 6 nats, from either side, and stay."""
    for coefficient in (0.1, 5.0):
        for _ in range(400):
            coefficient = kl.adapted(coefficient, 3 / coefficient, 6.0)
        assert coefficient == pytest.approx(0.5, rel=1e-3)
    assert kl.adapted(0.3, 6.0, 6.0) == 0.3
    assert kl.adapted(0.3, 0.0, 6.0) == pytest.approx(0.3 * 0.98)  # never below a fiftieth less a step
