"""Preferences between answers. The log-prob of an answer is the sum over its tokens, or the mean where the name says so.

w is the chosen answer, l the rejected one, log-ratio the difference of an answer's log-probs under policy and reference.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from temper.core.errors import ShapeError
from temper.policy.losses.out import LossOut, same_shape


def dpo(
    chosen_P: Tensor, rejected_P: Tensor, ref_chosen_P: Tensor, ref_rejected_P: Tensor, *, beta: float, label_smoothing: float = 0.0
) -> LossOut:
    """Direct preference optimisation (Rafailov et al. 2023, eq. 7): -log σ(β·[(log π/π_ref)(w) - (log π/π_ref)(l)]).

    With `label_smoothing` ε it is conservative DPO (Mitchell 2023): (1-ε)·(-log σ(h)) + ε·(-log σ(-h)). Summed
    log-probs give the paper's form, means the length-normalised one of Tulu 3 (Lambert et al. 2024, eq. 6).

    >>> answers = tensor([-4.0]), tensor([-7.0]), tensor([-5.0]), tensor([-6.0])  # log-ratios 1 and -1
    >>> total(dpo(*answers, beta=0.5))  # h = 0.5·2: -ln σ(1)
    0.3133
    >>> total(dpo(*answers, beta=0.5, label_smoothing=0.1))  # -0.9·ln σ(1) - 0.1·ln σ(-1)
    0.4133
    """
    same_shape(chosen_P=chosen_P, rejected_P=rejected_P, ref_chosen_P=ref_chosen_P, ref_rejected_P=ref_rejected_P)
    won_P, lost_P = beta * (chosen_P - ref_chosen_P), beta * (rejected_P - ref_rejected_P)
    margin_P = won_P - lost_P
    loss_P = -(1 - label_smoothing) * F.logsigmoid(margin_P) - label_smoothing * F.logsigmoid(-margin_P)
    return LossOut(loss_P.sum(), torch.tensor(len(margin_P)), pair_metrics(won_P, lost_P))


def ipo(chosen_P: Tensor, rejected_P: Tensor, ref_chosen_P: Tensor, ref_rejected_P: Tensor, *, beta: float) -> LossOut:
    """Identity preference optimisation (Azar et al. 2023, eq. 17): (h - 1/(2β))², h the difference of log-ratios.

    The formula sums log-probs over an answer; given means, which is what its authors used, β has another scale.

    >>> total(ipo(tensor([-4.0]), tensor([-7.0]), tensor([-5.0]), tensor([-6.0]), beta=0.5))  # (2 - 1)²
    1.0
    """
    same_shape(chosen_P=chosen_P, rejected_P=rejected_P, ref_chosen_P=ref_chosen_P, ref_rejected_P=ref_rejected_P)
    won_P, lost_P = chosen_P - ref_chosen_P, rejected_P - ref_rejected_P
    loss_P = (won_P - lost_P - 1 / (2 * beta)).square()
    return LossOut(loss_P.sum(), torch.tensor(len(loss_P)), pair_metrics(beta * won_P, beta * lost_P))


def simpo(chosen_mean_P: Tensor, rejected_mean_P: Tensor, *, beta: float, gamma: float) -> LossOut:
    """SimPO (Meng et al. 2024, eq. 6): -log σ(β·mean log π(w) - β·mean log π(l) - γ). It needs no reference.

    >>> total(simpo(tensor([-0.5]), tensor([-1.5]), beta=2.0, gamma=0.5))  # -ln σ(2·1 - 0.5)
    0.2014
    """
    same_shape(chosen_mean_P=chosen_mean_P, rejected_mean_P=rejected_mean_P)
    won_P, lost_P = beta * chosen_mean_P, beta * rejected_mean_P
    return LossOut(-F.logsigmoid(won_P - lost_P - gamma).sum(), torch.tensor(len(won_P)), pair_metrics(won_P, lost_P))


def orpo(chosen_mean_P: Tensor, rejected_mean_P: Tensor, *, beta: float) -> LossOut:
    """ORPO (Hong et al. 2024, eq. 6-7): -mean log π(w) - β·log σ(log odds(w) - log odds(l)), odds = p/(1-p).

    p is the geometric mean of an answer's token probabilities. It needs no reference.

    >>> total(orpo(tensor([0.5]).log(), tensor([0.25]).log(), beta=0.5))  # odds 1 and 1/3: ln 2 - 0.5·ln ¾
    0.837
    """
    same_shape(chosen_mean_P=chosen_mean_P, rejected_mean_P=rejected_mean_P)
    odds_P = chosen_mean_P - log_one_minus_exp(chosen_mean_P) - rejected_mean_P + log_one_minus_exp(rejected_mean_P)
    loss_P = -chosen_mean_P - beta * F.logsigmoid(odds_P)
    metrics = pair_metrics(beta * chosen_mean_P, beta * rejected_mean_P) | {"log_odds": odds_P.detach().sum()}
    return LossOut(loss_P.sum(), torch.tensor(len(loss_P)), metrics)


def kto(
    logratios_B: Tensor, desirable_B: Tensor, reference_point: Tensor, *, beta: float, weight_good: float = 1.0, weight_bad: float = 1.0
) -> LossOut:
    """KTO on unpaired answers (Ethayarajh et al. 2024, eq. 7): λ_D(1 - σ(β(r - z₀))) or λ_U(1 - σ(β(z₀ - r))).

    r is an answer's log π/π_ref, z₀ = max(0, the mean of r over answers set to other prompts), without gradient.

    >>> total(kto(tensor([3.0, 0.0]), tensor([True, False]), tensor(1.0), beta=0.5))  # (1 - σ(1)) + (1 - σ(0.5))
    0.6465
    """
    same_shape(logratios_B=logratios_B, desirable_B=desirable_B)
    z0 = reference_point.detach().clamp(min=0)
    good_B, bad_B = weight_good * torch.sigmoid(beta * (z0 - logratios_B)), weight_bad * torch.sigmoid(beta * (logratios_B - z0))
    reward_B = beta * logratios_B.detach()
    sums = {"reward_good": reward_B.where(desirable_B, 0.0).sum(), "reward_bad": reward_B.where(~desirable_B, 0.0).sum()}
    return LossOut(torch.where(desirable_B, good_B, bad_B).sum(), torch.tensor(len(logratios_B)), sums)


# --- parts ---


def sum_logprobs(logprobs_B_T: Tensor, mask_B_T: Tensor) -> Tensor:
    """Σ log p over each row's supervised tokens."""
    return logprobs_B_T.where(mask_B_T, 0.0).sum(-1)


def mean_logprobs(logprobs_B_T: Tensor, mask_B_T: Tensor) -> Tensor:
    """The mean log p over each row's supervised tokens. A row without any has no mean: ShapeError."""
    tokens_B = mask_B_T.sum(-1)
    if bool((tokens_B == 0).any()):
        raise ShapeError(f"row {int((tokens_B == 0).nonzero()[0])} has no supervised token", do="drop rows that train nothing")
    return sum_logprobs(logprobs_B_T, mask_B_T) / tokens_B


def pair_metrics(won_P: Tensor, lost_P: Tensor) -> dict[str, Tensor]:
    """Sums of both rewards, of their margin, and of pairs in the right order (a tie is half of one)."""
    won_P, lost_P = won_P.detach(), lost_P.detach()
    right_P = (won_P > lost_P).float() + 0.5 * (won_P == lost_P).float()
    return {"reward_chosen": won_P.sum(), "reward_rejected": lost_P.sum(), "margin": (won_P - lost_P).sum(), "accuracy": right_P.sum()}


def log_one_minus_exp(x: Tensor) -> Tensor:
    """log(1 - eˣ) for x < 0, exact at both ends (Mächler 2012, eq. 7); x is kept off zero, where it is infinite."""
    x = x.clamp(max=-torch.finfo(x.dtype).eps)
    near = x > -math.log(2)
    return torch.where(near, torch.log(-torch.expm1(x.where(near, -1.0))), torch.log1p(-torch.exp(x.where(~near, -1.0))))
