"""Every objective against numbers worked by hand, in float64 by finite differences, and with NaN where the mask is false."""

from __future__ import annotations

import doctest
import importlib
import math

import pytest
import torch
from torch import tensor
from torch.autograd import gradcheck

from temper.core.errors import ConfigError, ShapeError
from temper.policy import losses

NAN = float("nan")


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def doubles(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()


MASK = tensor([[False, True, True], [False, True, False]])


@pytest.mark.parametrize("name", ["tokens", "policy_gradient", "pairs", "rewards", "distillation"])
def test_the_numbers_in_the_docstrings(name):
    """Each public loss shows a hand-worked number where its formula stands."""
    module = importlib.import_module(f"temper.policy.losses.{name}")
    names = {"tensor": tensor, "number": lambda value: round(float(value), 4), "total": lambda out: round(float(out.total), 4)}
    found = doctest.testmod(module, extraglobs=names)
    assert found.failed == 0
    shown = [function.__name__ for function in vars(module).values() if callable(function) and ">>>" in (function.__doc__ or "")]
    assert found.attempted >= len(shown) >= 1


def test_every_loss_shows_a_number():
    parts = {"LossOut", "add_tail", "kl_rows", "log_one_minus_exp", "mean_logprobs", "pair_metrics", "same_shape", "sum_logprobs", "with_tail"}
    without = [name for name in losses.__all__ if callable(getattr(losses, name)) and ">>>" not in (getattr(losses, name).__doc__ or "")]
    assert set(without) == parts


def test_cross_entropy_by_hand():
    # probabilities 1/2, 1/4 | 1/8, weights 1, 2 | 3: 1·ln 2 + 2·ln 4 + 3·ln 8 = (1 + 4 + 9) ln 2
    logprobs_B_T = tensor([[NAN, 0.5, 0.25], [NAN, 0.125, NAN]]).log()
    weights_B_T = tensor([[NAN, 1.0, 2.0], [NAN, 3.0, NAN]])
    out = losses.sft_cross_entropy(logprobs_B_T, weights_B_T, MASK)
    assert float(out.total) == pytest.approx(14 * math.log(2), rel=1e-6)
    assert int(out.count) == 3
    assert float(out.sums["nll"]) == pytest.approx(6 * math.log(2), rel=1e-6)  # unweighted


def test_z_loss_by_hand():
    # logZ 2 and 3 | 1 with weights 1, 2 | 3 and coefficient 0.1: 0.1·(1·4 + 2·9 + 3·1) = 2.5
    logz_B_T = tensor([[NAN, 2.0, 3.0], [NAN, 1.0, NAN]])
    weights_B_T = tensor([[NAN, 1.0, 2.0], [NAN, 3.0, NAN]])
    out = losses.sft_cross_entropy(torch.zeros(2, 3), weights_B_T, MASK, logz_B_T=logz_B_T, z_loss=0.1)
    assert float(out.total) == pytest.approx(2.5)
    with pytest.raises(ShapeError, match="needs logz_B_T"):
        losses.sft_cross_entropy(torch.zeros(2, 3), weights_B_T, MASK, z_loss=0.1)


def test_clipped_pg_by_hand():
    # A=2:  ratio 1.5 is clipped to 1.2 → 2.4 (stopped); ratio 0.5 → 1.0 (outside the band, and still learning)
    # A=-1: ratio 1.5 → min(-1.5, -1.2) = -1.5;          ratio 0.5 is clipped to 0.8 → min(-0.5, -0.8) = -0.8 (stopped)
    mask_B_T = tensor([[True, True, True, True, False]])
    logprobs_B_T = tensor([[1.5, 0.5, 1.5, 0.5, NAN]]).log()
    advantages_B_T = tensor([[2.0, 2.0, -1.0, -1.0, NAN]])
    old_B_T = tensor([[0.0, 0.0, 0.0, 0.0, NAN]])
    out = losses.clipped_pg(logprobs_B_T, old_B_T, advantages_B_T, mask_B_T, clip_low=0.2, clip_high=0.2)
    assert float(out.total) == pytest.approx(-(2.4 + 1.0 - 1.5 - 0.8), rel=1e-6)
    assert int(out.sums["clipped"]) == 2
    assert float(out.sums["ratio"]) == pytest.approx(4.0)
    # k3 of the old policy: Σ r - 1 - ln r = (0.5 - ln 1.5)·2 + (-0.5 - ln 0.5)·2
    assert float(out.sums["kl_old"]) == pytest.approx(2 * (0.5 - math.log(1.5)) + 2 * (-0.5 - math.log(0.5)), rel=1e-5)
    # clip-higher: with 0.6 above, ratio 1.5 is kept
    higher = losses.clipped_pg(logprobs_B_T, old_B_T, advantages_B_T, mask_B_T, clip_low=0.2, clip_high=0.6)
    assert float(higher.total) == pytest.approx(-(3.0 + 1.0 - 1.5 - 0.8), rel=1e-6)
    # weights and the sampler's correction multiply each token's gain
    weighted = losses.clipped_pg(
        logprobs_B_T,
        old_B_T,
        advantages_B_T,
        mask_B_T,
        weights_B_T=tensor([[1.0, 0.5, 1.0, 0.0, NAN]]),
        importance_B_T=tensor([[0.5, 1.0, 2.0, 1.0, NAN]]),
    )
    assert float(weighted.total) == pytest.approx(-(1.2 + 0.5 - 3.0), rel=1e-6)


def test_at_ratio_one_clipped_pg_is_reinforce():
    logprobs_B_T, advantages_B_T = doubles(2, 3), doubles(2, 3, seed=1).detach()
    losses.clipped_pg(logprobs_B_T, logprobs_B_T.detach(), advantages_B_T, MASK).total.backward()
    torch.testing.assert_close(logprobs_B_T.grad, -advantages_B_T.where(MASK, 0.0))


def test_a_ratio_beyond_all_bounds_leaves_the_gradient_finite():
    logprobs_B_T = tensor([[0.0, -800.0]], requires_grad=True)
    out = losses.clipped_pg(logprobs_B_T, tensor([[-900.0, 0.0]]), tensor([[1.0, -1.0]]), tensor([[True, True]]))
    out.total.backward()
    assert logprobs_B_T.grad.isfinite().all()
    assert out.total.isfinite()


def test_gspo_clips_whole_rows():
    """Row 0: ratios 2 and 1/2, geometric mean 1. Row 1: 1.44 and 1, mean 1.2; masked places hold NaN."""
    logprobs_B_T = tensor([[NAN, 2.0, 0.5], [NAN, 1.44, 1.0]]).log()
    advantages_B_T = tensor([[NAN, 1.0, 1.0], [NAN, 1.0, 1.0]])
    mask_B_T = tensor([[False, True, True], [False, True, True]])
    half_B_T = torch.full((2, 3), 0.5)
    out = losses.gspo(logprobs_B_T, tensor([[NAN, 0.0, 0.0]] * 2), advantages_B_T, mask_B_T, clip_low=0.1, clip_high=0.1, weights_B_T=half_B_T)
    assert float(out.total) == pytest.approx(-(1.0 + 1.1), rel=1e-5)  # each row once; the second at the edge of the band
    assert int(out.sums["clipped"]) == 2  # both tokens of the second row
    # a token's own ratio decides nothing: the gradient of a row's tokens is the same, s·A/|y|
    logprobs_B_T = tensor([[0.0, math.log(2), math.log(0.5)]], requires_grad=True)
    losses.gspo(logprobs_B_T, torch.zeros(1, 3), torch.ones(1, 3), mask_B_T[:1]).total.backward()
    torch.testing.assert_close(logprobs_B_T.grad, tensor([[0.0, -1.0, -1.0]]))  # two gains of exp(mean), each giving ½ to each


def test_cispo_clips_the_weight_and_never_the_token():
    logprobs_B_T, old_B_T = tensor([[0.8, 0.2]]).log().requires_grad_(), tensor([[0.1, 0.4]]).log()  # ratios 8 and 1/2
    out = losses.cispo(logprobs_B_T, old_B_T, tensor([[1.0, -1.0]]), tensor([[True, True]]), cap=3.0)
    out.total.backward()
    assert float(out.total.detach()) == pytest.approx(-(3.0 * math.log(0.8) - 0.5 * math.log(0.2)), rel=1e-5)
    torch.testing.assert_close(logprobs_B_T.grad, tensor([[-3.0, 0.5]]))  # the clipped one still learns
    assert int(out.sums["clipped"]) == 1


def test_luffy_by_hand():
    """Guided: p = 0.1 and γ = 0.1, gain ½·A, slope p·γ/(p+γ)² = 1/4. Own: ratio 1.5 clipped at 1.2. The old log-prob is NaN where guided."""
    logprobs_B_T = tensor([[math.log(0.1), math.log(1.5), NAN]], requires_grad=True)
    guided_B_T, mask_B_T = tensor([[True, False, True]]), tensor([[True, True, False]])
    out = losses.luffy(logprobs_B_T, tensor([[NAN, 0.0, NAN]]), tensor([[2.0, 1.0, NAN]]), mask_B_T, guided_B_T)
    out.total.backward()
    assert float(out.total.detach()) == pytest.approx(-(0.5 * 2 + 1.2), rel=1e-5)
    torch.testing.assert_close(logprobs_B_T.grad, tensor([[-0.25 * 2, 0.0, 0.0]]))
    assert (int(out.sums["guided"]), int(out.sums["clipped"])) == (1, 1)
    assert float(out.sums["ratio"]) == pytest.approx(1.5)  # of own tokens only
    assert float(out.sums["guided_probability"]) == pytest.approx(0.1)


@pytest.mark.parametrize("name", ["clipped_pg", "gspo", "cispo", "luffy"])
def test_on_policy_every_one_has_the_gradient_of_reinforce(name):
    """Weights of 1/length and one advantage a row: then GSPO's shared ratio gives each token its row's mean as well."""
    logprobs_B_T, advantages_B_T = doubles(2, 3), tensor([[0.7] * 3, [-1.2] * 3]).double()
    weights_B_T = tensor([[0.0, 0.5, 0.5], [0.0, 1.0, 0.0]]).double()
    more = (torch.zeros(2, 3, dtype=torch.bool),) if name == "luffy" else ()
    getattr(losses, name)(logprobs_B_T, logprobs_B_T.detach(), advantages_B_T, MASK, *more, weights_B_T=weights_B_T).total.backward()
    torch.testing.assert_close(logprobs_B_T.grad, (-advantages_B_T * weights_B_T).where(MASK, 0.0))


def test_process_reward_by_hand():
    """Scores 0 and 2 for labels 1 and ¼; the third step is not judged."""
    scores_B_T, labels_B_T, mask_B_T = tensor([[0.0, 2.0, NAN]]), tensor([[1.0, 0.25, NAN]]), tensor([[True, True, False]])
    out = losses.process_reward(scores_B_T, labels_B_T, mask_B_T)
    by_hand = [-math.log(0.5), -0.25 * math.log(sigmoid(2)) - 0.75 * math.log(sigmoid(-2))]
    assert float(out.total) == pytest.approx(sum(by_hand), rel=1e-6)
    assert int(out.count) == 2
    assert int(out.sums["accuracy"]) == 0  # 0 is not above 0, and 2 is although the label says wrong
    weighted = losses.process_reward(scores_B_T, labels_B_T, mask_B_T, weights_B_T=tensor([[0.5, 1.0, NAN]]))
    assert float(weighted.total) == pytest.approx(0.5 * by_hand[0] + by_hand[1], rel=1e-6)


def test_clipped_value_by_hand():
    """v_old 0, ε 0.2, R 2: v = 1 has gone far enough (no gradient, error (0.2-2)²); v = 0.1 goes on; v = -1 is called back."""
    values_B_T = tensor([[1.0, 0.1, -1.0, NAN]], requires_grad=True)
    mask_B_T = tensor([[True, True, True, False]])
    out = losses.clipped_value(values_B_T, tensor([[0.0, 0.0, 0.0, NAN]]), tensor([[2.0, 2.0, 2.0, NAN]]), mask_B_T, clip=0.2)
    out.total.backward()
    assert float(out.total.detach()) == pytest.approx(0.5 * (1.8**2 + 1.9**2 + 3.0**2), rel=1e-6)
    torch.testing.assert_close(values_B_T.grad, tensor([[0.0, -1.9, -3.0, 0.0]]))
    assert int(out.sums["value_clipped"]) == 1
    plain = losses.clipped_value(values_B_T.detach(), torch.zeros(1, 4), torch.full((1, 4), 2.0), mask_B_T, clip=None)
    assert float(plain.total) == pytest.approx(0.5 * (1.0 + 1.9**2 + 3.0**2), rel=1e-6)


def test_the_grid_of_importance_weights_by_hand():
    """Row 0: ratios ½ and 4, product 2. Row 1: ¼, and one whose sampler is unknown. Cap 2.5, floor 0.3."""
    learner_B_T, sampler_B_T = tensor([[0.25, 0.8, NAN], [0.2, 0.5, NAN]]).log(), tensor([[0.5, 0.2, 1.0], [0.8, NAN, 1.0]]).log()
    mask_B_T = tensor([[True, True, False], [True, True, False]])
    grid = {
        ("token", "clip"): [[0.5, 2.5, 1.0], [0.3, 1.0, 1.0]],
        ("token", "mask"): [[0.5, 0.0, 1.0], [0.0, 1.0, 1.0]],
        ("sequence", "clip"): [[2.0, 2.0, 1.0], [0.3, 1.0, 1.0]],
        ("sequence", "mask"): [[2.0, 2.0, 1.0], [0.0, 1.0, 1.0]],
    }
    for (level, treatment), expected in grid.items():
        found = losses.truncated_importance(learner_B_T, sampler_B_T, mask_B_T, cap=2.5, floor=0.3, level=level, treatment=treatment)
        torch.testing.assert_close(found, tensor(expected), msg=f"{level} {treatment}")
    for wrong in ({"level": "row"}, {"treatment": "drop"}, {"floor": 1.5}):
        with pytest.raises(ConfigError, match="importance weights"):
            losses.truncated_importance(learner_B_T, sampler_B_T, mask_B_T, cap=2.5, **wrong)
    huge = losses.truncated_importance(tensor([[0.0] * 90]), tensor([[-90.0] * 90]), torch.ones(1, 90, dtype=torch.bool), cap=1e9, level="sequence")
    assert huge.isfinite().all()


def test_truncated_importance_by_hand():
    # learner/sampler 1/2, 4 → capped at 2, masked → 1
    weights = losses.truncated_importance(
        tensor([[0.25, 0.8, NAN]]).log(), tensor([[0.5, 0.2, 1.0]]).log(), tensor([[True, True, False]]), cap=2.0
    )
    torch.testing.assert_close(weights, tensor([[0.5, 2.0, 1.0]]))
    assert not weights.requires_grad


def test_answer_logprobs_are_sums_or_means_over_the_mask():
    logprobs_B_T = tensor([[NAN, -1.0, -2.0], [NAN, -4.0, NAN]])
    assert losses.sum_logprobs(logprobs_B_T, MASK).tolist() == [-3.0, -4.0]
    assert losses.mean_logprobs(logprobs_B_T, MASK).tolist() == [-1.5, -4.0]
    with pytest.raises(ShapeError, match="row 1 has no supervised token"):
        losses.mean_logprobs(logprobs_B_T, MASK & tensor([[True], [False]]))


CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED = (tensor(values) for values in ([-4.0, -6.0], [-7.0, -5.0], [-5.0, -6.0], [-6.0, -6.0]))


def test_dpo_by_hand():
    # log-ratios: chosen 1, 0; rejected -1, 1; margins at β=0.5: 0.5·2 = 1, 0.5·(-1) = -0.5
    out = losses.dpo(CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED, beta=0.5)
    assert float(out.total) == pytest.approx(-math.log(sigmoid(1.0)) - math.log(sigmoid(-0.5)), rel=1e-6)
    assert int(out.count) == 2
    assert {name: float(value) for name, value in out.sums.items()} == pytest.approx(
        {"reward_chosen": 0.5, "reward_rejected": 0.0, "margin": 0.5, "accuracy": 1.0}
    )
    smooth = losses.dpo(CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED, beta=0.5, label_smoothing=0.1)
    by_hand = sum(-0.9 * math.log(sigmoid(m)) - 0.1 * math.log(sigmoid(-m)) for m in (1.0, -0.5))
    assert float(smooth.total) == pytest.approx(by_hand, rel=1e-6)


def test_dpo_starts_at_log_two_with_half_the_pairs_right():
    out = losses.dpo(CHOSEN, REJECTED, CHOSEN, REJECTED, beta=0.1)
    assert float(out.total) == pytest.approx(2 * math.log(2))
    assert float(out.sums["accuracy"]) == 1.0  # two ties


def test_ipo_by_hand():
    # h = 2, -1 and 1/(2·0.5) = 1: (2-1)² + (-1-1)² = 5
    assert float(losses.ipo(CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED, beta=0.5).total) == pytest.approx(5.0)


def test_simpo_by_hand():
    # 2·(-0.5 - (-1.5)) - 0.5 = 1.5
    assert float(losses.simpo(tensor([-0.5]), tensor([-1.5]), beta=2.0, gamma=0.5).total) == pytest.approx(
        -math.log(sigmoid(1.5)), rel=1e-6
    )


def test_orpo_by_hand():
    # p = 1/2 and 1/4: odds 1 and 1/3, log odds ratio ln 3, σ(ln 3) = 3/4; -ln(1/2) - 0.5·ln(3/4)
    out = losses.orpo(tensor([0.5]).log(), tensor([0.25]).log(), beta=0.5)
    assert float(out.total) == pytest.approx(math.log(2) - 0.5 * math.log(0.75), rel=1e-6)
    assert float(out.sums["log_odds"]) == pytest.approx(math.log(3), rel=1e-6)
    certain = tensor([0.0], requires_grad=True)  # an answer of forced tokens only has log-prob 0
    losses.orpo(certain, tensor([-1.0]), beta=0.5).total.backward()
    assert certain.grad.isfinite().all()


def test_kto_by_hand():
    # z₀ = 1, β = 0.5: good with r = 3: 1 - σ(1); bad with r = 0: 2·(1 - σ(0.5))
    out = losses.kto(tensor([3.0, 0.0]), tensor([True, False]), tensor(1.0), beta=0.5, weight_bad=2.0)
    assert float(out.total) == pytest.approx((1 - sigmoid(1.0)) + 2 * (1 - sigmoid(0.5)), rel=1e-6)
    # a negative reference point counts as zero: 1 - σ(0.5·3)
    assert float(losses.kto(tensor([3.0]), tensor([True]), tensor(-5.0), beta=0.5).total) == pytest.approx(1 - sigmoid(1.5), rel=1e-6)


def test_bradley_terry_by_hand():
    # differences 2 and -1, margins 0.5 and 0: -ln σ(1.5) - ln σ(-1); centring 0.1·(4² + 1²)
    out = losses.bradley_terry(tensor([3.0, 0.0]), tensor([1.0, 1.0]), margin_P=tensor([0.5, 0.0]), centre=0.1)
    assert float(out.total) == pytest.approx(-math.log(sigmoid(1.5)) - math.log(sigmoid(-1.0)) + 1.7, rel=1e-6)
    assert float(out.sums["accuracy"]) == 1.0


P, Q = tensor([[0.5, 0.25, 0.25]]), tensor([[0.25, 0.25, 0.5]])


def test_divergences_by_hand():
    # teacher P, student Q; KL(P‖Q) = 0.5 ln 2 + 0 + 0.25 ln ½ = 0.25 ln 2, and the same the other way by symmetry
    for divergence in (losses.forward_kl, losses.reverse_kl):
        assert float(divergence(Q.log(), P.log())) == pytest.approx(0.25 * math.log(2), rel=1e-5)
    # teacher (1, 0), student (½, ½): forward ln 2, reverse infinite (the student does what the teacher never does)
    sure, even = tensor([[1.0, 0.0]]).log(), tensor([[0.5, 0.5]]).log()
    assert float(losses.forward_kl(even, sure)) == pytest.approx(math.log(2))
    assert float(losses.reverse_kl(even, sure)) == math.inf
    assert float(losses.reverse_kl(sure, even)) == pytest.approx(math.log(2))


def test_jsd_by_hand_and_the_teacher_has_share_beta():
    # teacher (1, 0), student (½, ½), β = ¼: M = ¼·teacher + ¾·student = (5/8, 3/8)
    # ¼·ln(8/5) + ¾·(½ ln(4/5) + ½ ln(4/3))
    sure, even = tensor([[1.0, 0.0]]).log(), tensor([[0.5, 0.5]]).log()
    by_hand = 0.25 * math.log(8 / 5) + 0.75 * (0.5 * math.log(4 / 5) + 0.5 * math.log(4 / 3))
    assert float(losses.jsd(even, sure, beta=0.25)) == pytest.approx(by_hand, rel=1e-5)
    # at ½ it is symmetric
    assert float(losses.jsd(Q.log(), P.log(), beta=0.5)) == pytest.approx(float(losses.jsd(P.log(), Q.log(), beta=0.5)), rel=1e-5)


def test_the_ends_of_jsd_are_the_two_kls_and_not_zero():
    student, teacher = doubles(1, 5).log_softmax(-1), doubles(1, 5, seed=1).log_softmax(-1)
    assert torch.equal(losses.jsd(student, teacher, beta=0.0), losses.forward_kl(student, teacher))
    assert torch.equal(losses.jsd(student, teacher, beta=1.0), losses.reverse_kl(student, teacher))
    assert float(losses.jsd(student, teacher, beta=1.0).detach()) > 0.1
    for beta, end in ((1e-5, losses.forward_kl), (1 - 1e-5, losses.reverse_kl)):
        scaled = losses.jsd(student, teacher, beta=beta) / (beta * (1 - beta))
        torch.testing.assert_close(scaled, end(student, teacher), rtol=1e-3, atol=1e-5)
    with pytest.raises(ConfigError, match=r"beta is 1\.5"):
        losses.jsd(student, teacher, beta=1.5)


def test_forward_kl_has_the_gradient_of_soft_cross_entropy_and_both_vanish_at_the_teacher():
    logits, teacher = doubles(2, 4), doubles(2, 4, seed=1).detach().log_softmax(-1)
    losses.forward_kl(logits.log_softmax(-1), teacher).sum().backward()
    torch.testing.assert_close(logits.grad, logits.detach().softmax(-1) - teacher.exp())
    for divergence in (losses.forward_kl, losses.reverse_kl):
        same = doubles(2, 4, seed=1)
        divergence(same.log_softmax(-1), teacher).sum().backward()
        torch.testing.assert_close(same.grad, torch.zeros_like(same), atol=1e-12, rtol=0)


def test_the_tail_of_a_top_k_by_hand():
    # P = (½, ¼, ¼), top 1 is token 0: (½, ½); Q there: (¼, ¾). KL = ½ ln 2 + ½ ln(2/3)
    ids = tensor([[0]])
    torch.testing.assert_close(losses.with_tail(P.log(), ids).exp(), tensor([[0.5, 0.5]]))
    found = losses.forward_kl(losses.with_tail(Q.log(), ids), losses.with_tail(P.log(), ids))
    assert float(found) == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3), rel=1e-4)
    student, teacher = doubles(6, 20).log_softmax(-1), doubles(6, 20, seed=1).log_softmax(-1)
    whole = losses.forward_kl(student, teacher)
    before = torch.zeros(6, dtype=torch.float64)
    for k in (1, 5, 19):
        ids = teacher.topk(k).indices
        part = losses.forward_kl(losses.with_tail(student, ids), losses.with_tail(teacher, ids))
        assert (part >= before - 1e-9).all()
        before = part
    torch.testing.assert_close(before, whole)  # 19 of 20 and the rest are everything


PAIRS = tuple(doubles(4, seed=seed) for seed in range(4))
NEGATIVE = tuple((-doubles(4, seed=seed).detach().abs() - 0.05).requires_grad_() for seed in (1, 2))
ROWS = tuple(doubles(3, 5, seed=seed) for seed in (5, 6))
GRADIENTS = {
    "sft": (
        lambda lp, z: losses.sft_cross_entropy(lp, torch.ones(2, 3).double(), MASK, logz_B_T=z, z_loss=0.3).total,
        (doubles(2, 3), doubles(2, 3, seed=1)),
    ),
    "clipped_pg": (
        lambda lp: losses.clipped_pg(lp, doubles(2, 3).detach() - 0.1, doubles(2, 3, seed=4).detach(), MASK).total,
        (doubles(2, 3),),
    ),
    "gspo": (
        lambda lp: losses.gspo(lp, doubles(2, 3).detach() - 0.1, doubles(2, 3, seed=4).detach(), MASK, clip_low=0.3, clip_high=0.3).total,
        (doubles(2, 3),),
    ),
    "luffy": (
        lambda lp: losses.luffy(lp, doubles(2, 3).detach() - 0.1, doubles(2, 3, seed=4).detach(), MASK, tensor([[True, True, False]] * 2)).total,
        ((-doubles(2, 3).detach().abs()).requires_grad_(),),
    ),
    "process_reward": (
        lambda s: losses.process_reward(s, doubles(2, 3, seed=4).detach().sigmoid(), MASK, weights_B_T=doubles(2, 3, seed=5).detach()).total,
        (doubles(2, 3),),
    ),
    "clipped_value": (
        lambda v: losses.clipped_value(v, doubles(2, 3, seed=4).detach(), doubles(2, 3, seed=5).detach(), MASK, clip=0.4).total,
        (doubles(2, 3),),
    ),
    "top_k": (
        lambda s, t: losses.top_k(s.log_softmax(-1), t.log_softmax(-1), k=2, measure=lambda a, b: losses.jsd(a, b, beta=0.3)),
        ROWS,
    ),
    "dpo": (lambda *a: losses.dpo(*a, beta=0.3, label_smoothing=0.1).total, PAIRS),
    "ipo": (lambda *a: losses.ipo(*a, beta=0.3).total, PAIRS),
    "simpo": (lambda *a: losses.simpo(*a, beta=2.0, gamma=0.3).total, PAIRS[:2]),
    "orpo": (lambda *a: losses.orpo(*a, beta=0.7).total, NEGATIVE),
    "kto": (lambda a: losses.kto(a, tensor([True, False, True, False]), tensor(0.2).double(), beta=0.5).total, PAIRS[:1]),
    "bradley_terry": (lambda *a: losses.bradley_terry(*a, centre=0.1).total, PAIRS[:2]),
    "forward_kl": (lambda s, t: losses.forward_kl(s.log_softmax(-1), t.log_softmax(-1)), ROWS),
    "reverse_kl": (lambda s, t: losses.reverse_kl(s.log_softmax(-1), t.log_softmax(-1)), ROWS),
    "jsd": (lambda s, t: losses.jsd(s.log_softmax(-1), t.log_softmax(-1), beta=0.3), ROWS),
    "with_tail": (
        lambda s, t: losses.forward_kl(
            losses.with_tail(s.log_softmax(-1), tensor([[0, 3]] * 3)), losses.with_tail(t.log_softmax(-1), tensor([[0, 3]] * 3))
        ),
        ROWS,
    ),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_agree_with_finite_differences(name):
    function, inputs = GRADIENTS[name]
    assert gradcheck(function, inputs)


@pytest.mark.parametrize("stream", [0, 1, 2])
def test_nan_where_the_mask_is_false_reaches_neither_value_nor_gradient(stream):
    clean = [doubles(2, 3, seed=seed).detach() for seed in range(3)]
    dirty = [item.where(MASK, NAN) if at == stream else item for at, item in enumerate(clean)]
    for made in (
        lambda lp, other, more: losses.sft_cross_entropy(lp, other, MASK, logz_B_T=more, z_loss=0.1).total,
        lambda lp, other, more: losses.clipped_pg(lp, other, more, MASK, weights_B_T=more, importance_B_T=other).total,
        lambda lp, other, more: losses.gspo(lp, other, more, MASK, weights_B_T=more, importance_B_T=other).total,
        lambda lp, other, more: losses.cispo(lp, other, more, MASK, weights_B_T=more, importance_B_T=other).total,
        lambda lp, other, more: losses.luffy(lp, other, more, MASK, MASK & (lp > 0), weights_B_T=more, importance_B_T=other).total,
        lambda lp, other, more: losses.process_reward(lp, other, MASK, weights_B_T=more).total,
        lambda lp, other, more: losses.clipped_value(lp, other, more, MASK, weights_B_T=more).total,
        lambda lp, other, more: (lp.where(MASK, 0.0) * losses.truncated_importance(lp, other, MASK, cap=2.0, level="sequence")).sum() + more.where(MASK, 0.0).sum(),
        lambda lp, other, more: losses.sum_logprobs(lp, MASK).sum() + losses.mean_logprobs(lp, MASK).sum(),
    ):
        found = []
        for streams in (clean, dirty):
            logprobs_B_T = streams[0].clone().requires_grad_()
            total = made(logprobs_B_T, *streams[1:])
            total.backward()
            found.append((total.detach(), logprobs_B_T.grad.where(MASK, 0.0)))
            assert logprobs_B_T.grad.isfinite().all()
        assert torch.equal(found[0][0], found[1][0])
        assert torch.equal(found[0][1], found[1][1])


def test_tensors_of_other_shapes_are_refused_by_name():
    with pytest.raises(ShapeError, match=r"advantages_B_T is \(2, 1\), logprobs_B_T is \(2, 3\)"):
        losses.clipped_pg(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 1), MASK)
    with pytest.raises(ShapeError, match="ref_rejected_P"):
        losses.dpo(CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED[:1], beta=0.1)
