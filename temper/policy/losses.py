"""Every objective as a pure function: tensors in, sums and counts out. The step divides.

`total` is a sum over tokens (`_B_T`), pairs (`_P`) or rows (`_B`, `_N`), `count` how many there were. Masks are
bool and applied with `where` to what comes in, so that NaN in a masked place reaches neither value nor gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from temper.core.errors import ConfigError, ShapeError

LARGEST_LOGRATIO = 20.0  # keeps a ratio and its gradient finite for a token that one of two policies has all but forgotten


@dataclass
class LossOut:
    """A loss as a sum: `total` carries the gradient, `count` is what it was summed over, `sums` are metrics' sums."""

    total: Tensor
    count: Tensor
    sums: dict[str, Tensor] = field(default_factory=dict)


def same_shape(**tensors: Tensor | None) -> None:
    """Raise ShapeError naming the first tensor whose shape differs from that of the first; None has no shape."""
    (first, expected), *others = ((name, tensor) for name, tensor in tensors.items() if tensor is not None)
    for name, tensor in others:
        if tensor.shape != expected.shape:
            raise ShapeError(f"{name} is {tuple(tensor.shape)}, {first} is {tuple(expected.shape)}", do="pass tensors with the same axes")


# --- tokens ---


def sft_cross_entropy(
    logprobs_B_T: Tensor, weights_B_T: Tensor, mask_B_T: Tensor, *, logz_B_T: Tensor | None = None, z_loss: float = 0.0
) -> LossOut:
    """Weighted cross-entropy, -Σ w·log p, plus `z_loss`·Σ w·logZ² (PaLM, Chowdhery et al. 2022, section 5).

    With weights of one and the count of tokens as denominator this is the token mean; weights of 1/(tokens of the
    row) and the number of rows as denominator give the mean over rows. `Policy.cross_entropy` is the same, cheaper.
    """
    same_shape(logprobs_B_T=logprobs_B_T, weights_B_T=weights_B_T, mask_B_T=mask_B_T, logz_B_T=logz_B_T)
    logprobs_B_T, weights_B_T = logprobs_B_T.where(mask_B_T, 0.0), weights_B_T.where(mask_B_T, 0.0)
    loss_B_T = -logprobs_B_T
    if z_loss:
        if logz_B_T is None:
            raise ShapeError("z_loss needs logz_B_T", do="pass TokenScores.logz_B_T, or set z_loss to 0")
        loss_B_T = loss_B_T + z_loss * logz_B_T.where(mask_B_T, 0.0).square()
    return LossOut((loss_B_T * weights_B_T).sum(), mask_B_T.sum(), {"nll": -logprobs_B_T.detach().sum()})


def clipped_pg(
    logprobs_B_T: Tensor, old_logprobs_B_T: Tensor, advantages_B_T: Tensor, mask_B_T: Tensor, *,
    clip_low: float = 0.2, clip_high: float = 0.2, weights_B_T: Tensor | None = None, importance_B_T: Tensor | None = None,
) -> LossOut:  # fmt: skip
    """PPO's clipped objective (Schulman et al. 2017, eq. 7): -Σ min(r·A, clip(r, 1-low, 1+high)·A), r = π/π_old.

    `clip_high` above `clip_low` is DAPO's clip-higher (Yu et al. 2025, eq. 10). `weights_B_T` says how tokens share
    the step (one each: token mean; 1/length: mean over rows). `importance_B_T` corrects for the sampler
    (`truncated_importance`). Where `old_logprobs_B_T` are the log-probs themselves, detached, this is REINFORCE.
    """
    same_shape(logprobs_B_T=logprobs_B_T, old_logprobs_B_T=old_logprobs_B_T, advantages_B_T=advantages_B_T, mask_B_T=mask_B_T,
               weights_B_T=weights_B_T, importance_B_T=importance_B_T)  # fmt: skip
    logratio_B_T = (logprobs_B_T - old_logprobs_B_T).where(mask_B_T, 0.0).clamp(-LARGEST_LOGRATIO, LARGEST_LOGRATIO)
    advantages_B_T = advantages_B_T.where(mask_B_T, 0.0)
    ratio_B_T = logratio_B_T.exp()
    clipped_B_T = ratio_B_T.clamp(1 - clip_low, 1 + clip_high)
    gain_B_T = torch.minimum(ratio_B_T * advantages_B_T, clipped_B_T * advantages_B_T)
    # what counts as clipped is a token whose gradient is gone, not one whose ratio is merely outside the band
    stopped = (clipped_B_T * advantages_B_T < ratio_B_T * advantages_B_T) & mask_B_T
    for factor_B_T in (weights_B_T, importance_B_T):
        if factor_B_T is not None:
            gain_B_T = gain_B_T * factor_B_T.detach().where(mask_B_T, 0.0)
    with torch.no_grad():
        sums = {"clipped": stopped.sum(), "ratio": ratio_B_T.where(mask_B_T, 0.0).sum(), "kl_old": (ratio_B_T - 1 - logratio_B_T).sum()}
    return LossOut(-gain_B_T.sum(), mask_B_T.sum(), sums)


def truncated_importance(logprobs_B_T: Tensor, sampled_logprobs_B_T: Tensor, mask_B_T: Tensor, *, cap: float) -> Tensor:
    """Truncated importance weights min(π_learner/π_sampler, cap), detached; 1 where masked (Yao et al. 2025, TIS).

    They correct a gradient for a sampler that computes a little differently from the learner.
    """
    same_shape(logprobs_B_T=logprobs_B_T, sampled_logprobs_B_T=sampled_logprobs_B_T, mask_B_T=mask_B_T)
    return (logprobs_B_T - sampled_logprobs_B_T).detach().where(mask_B_T, 0.0).exp().clamp(max=cap)


# --- pairs: the log-prob of an answer is the sum over its tokens, or the mean where the name says so ---


def sum_logprobs(logprobs_B_T: Tensor, mask_B_T: Tensor) -> Tensor:
    """Σ log p over each row's supervised tokens."""
    return logprobs_B_T.where(mask_B_T, 0.0).sum(-1)


def mean_logprobs(logprobs_B_T: Tensor, mask_B_T: Tensor) -> Tensor:
    """The mean log p over each row's supervised tokens. A row without any has no mean: ShapeError."""
    tokens_B = mask_B_T.sum(-1)
    if bool((tokens_B == 0).any()):
        raise ShapeError(f"row {int((tokens_B == 0).nonzero()[0])} has no supervised token", do="drop rows that train nothing")
    return sum_logprobs(logprobs_B_T, mask_B_T) / tokens_B


def dpo(
    chosen_P: Tensor, rejected_P: Tensor, ref_chosen_P: Tensor, ref_rejected_P: Tensor, *, beta: float, label_smoothing: float = 0.0
) -> LossOut:
    """Direct preference optimisation (Rafailov et al. 2023, eq. 7): -log σ(β·[(log π/π_ref)(w) - (log π/π_ref)(l)]).

    With `label_smoothing` ε it is conservative DPO (Mitchell 2023): (1-ε)·(-log σ(h)) + ε·(-log σ(-h)). Summed
    log-probs give the paper's form, means the length-normalised one of Tulu 3 (Lambert et al. 2024, eq. 6).
    """
    same_shape(chosen_P=chosen_P, rejected_P=rejected_P, ref_chosen_P=ref_chosen_P, ref_rejected_P=ref_rejected_P)
    won_P, lost_P = beta * (chosen_P - ref_chosen_P), beta * (rejected_P - ref_rejected_P)
    margin_P = won_P - lost_P
    loss_P = -(1 - label_smoothing) * F.logsigmoid(margin_P) - label_smoothing * F.logsigmoid(-margin_P)
    return LossOut(loss_P.sum(), torch.tensor(len(margin_P)), pair_metrics(won_P, lost_P))


def ipo(chosen_P: Tensor, rejected_P: Tensor, ref_chosen_P: Tensor, ref_rejected_P: Tensor, *, beta: float) -> LossOut:
    """Identity preference optimisation (Azar et al. 2023, eq. 17): (h - 1/(2β))², h the difference of log-ratios.

    The paper sums log-probs over an answer; given means, as TRL does, β has another scale.
    """
    same_shape(chosen_P=chosen_P, rejected_P=rejected_P, ref_chosen_P=ref_chosen_P, ref_rejected_P=ref_rejected_P)
    won_P, lost_P = chosen_P - ref_chosen_P, rejected_P - ref_rejected_P
    loss_P = (won_P - lost_P - 1 / (2 * beta)).square()
    return LossOut(loss_P.sum(), torch.tensor(len(loss_P)), pair_metrics(beta * won_P, beta * lost_P))


def simpo(chosen_mean_P: Tensor, rejected_mean_P: Tensor, *, beta: float, gamma: float) -> LossOut:
    """SimPO (Meng et al. 2024, eq. 6): -log σ(β·mean log π(w) - β·mean log π(l) - γ). It needs no reference."""
    same_shape(chosen_mean_P=chosen_mean_P, rejected_mean_P=rejected_mean_P)
    won_P, lost_P = beta * chosen_mean_P, beta * rejected_mean_P
    return LossOut(-F.logsigmoid(won_P - lost_P - gamma).sum(), torch.tensor(len(won_P)), pair_metrics(won_P, lost_P))


def orpo(chosen_mean_P: Tensor, rejected_mean_P: Tensor, *, beta: float) -> LossOut:
    """ORPO (Hong et al. 2024, eq. 6-7): -mean log π(w) - β·log σ(log odds(w) - log odds(l)), odds = p/(1-p).

    p is the geometric mean of an answer's token probabilities. It needs no reference.
    """
    same_shape(chosen_mean_P=chosen_mean_P, rejected_mean_P=rejected_mean_P)
    odds_P = chosen_mean_P - log_one_minus_exp(chosen_mean_P) - rejected_mean_P + log_one_minus_exp(rejected_mean_P)
    loss_P = -chosen_mean_P - beta * F.logsigmoid(odds_P)
    metrics = pair_metrics(beta * chosen_mean_P, beta * rejected_mean_P) | {"log_odds": odds_P.detach().sum()}
    return LossOut(loss_P.sum(), torch.tensor(len(loss_P)), metrics)


def kto(
    logratios_B: Tensor, desirable_B: Tensor, reference_point: Tensor, *, beta: float, weight_good: float = 1.0, weight_bad: float = 1.0
) -> LossOut:
    """KTO on unpaired answers (Ethayarajh et al. 2024, eq. 8): λ_D(1 - σ(β(r - z₀))) or λ_U(1 - σ(β(z₀ - r))).

    r is an answer's log π/π_ref, z₀ = max(0, the mean of r over answers set to other prompts), without gradient.
    """
    same_shape(logratios_B=logratios_B, desirable_B=desirable_B)
    z0 = reference_point.detach().clamp(min=0)
    good_B, bad_B = weight_good * torch.sigmoid(beta * (z0 - logratios_B)), weight_bad * torch.sigmoid(beta * (logratios_B - z0))
    reward_B = beta * logratios_B.detach()
    sums = {"reward_good": reward_B.where(desirable_B, 0.0).sum(), "reward_bad": reward_B.where(~desirable_B, 0.0).sum()}
    return LossOut(torch.where(desirable_B, good_B, bad_B).sum(), torch.tensor(len(logratios_B)), sums)


def bradley_terry(chosen_P: Tensor, rejected_P: Tensor, *, margin_P: Tensor | None = None, centre: float = 0.0) -> LossOut:
    """Bradley & Terry (1952) on scalar rewards: -log σ(r_w - r_l - m); m as in Llama 2 (Touvron et al. 2023, eq. 2).

    `centre`·(r_w + r_l)² keeps rewards around zero (Eisenstein et al. 2023, eq. 4).
    """
    same_shape(chosen_P=chosen_P, rejected_P=rejected_P, margin_P=margin_P)
    difference_P = chosen_P - rejected_P
    loss_P = -F.logsigmoid(difference_P if margin_P is None else difference_P - margin_P) + centre * (chosen_P + rejected_P).square()
    return LossOut(loss_P.sum(), torch.tensor(len(loss_P)), pair_metrics(chosen_P, rejected_P))


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


# --- distillation: divergences of rows of log-probabilities, one value a row ---


def forward_kl(student_N_V: Tensor, teacher_N_V: Tensor) -> Tensor:
    """KL(teacher ‖ student) = Σ p_T (log p_T - log p_S): the student must cover all that the teacher does.

    Its gradient is that of cross-entropy against soft targets (Hinton et al. 2015).
    """
    same_shape(student_N_V=student_N_V, teacher_N_V=teacher_N_V)
    return kl_rows(teacher_N_V, student_N_V)


def reverse_kl(student_N_V: Tensor, teacher_N_V: Tensor) -> Tensor:
    """KL(student ‖ teacher): the student drops what it cannot cover (MiniLLM, Gu et al. 2023, eq. 1)."""
    same_shape(student_N_V=student_N_V, teacher_N_V=teacher_N_V)
    return kl_rows(student_N_V, teacher_N_V)


def jsd(student_N_V: Tensor, teacher_N_V: Tensor, *, beta: float) -> Tensor:
    """Generalised JSD of GKD (Agarwal et al. 2024, eq. 1), β weighting the teacher in mixture and sum:

        β·KL(teacher ‖ M) + (1-β)·KL(student ‖ M),   M = β·teacher + (1-β)·student

    The formula is zero at β = 0 and at β = 1, whatever the student does. Divided by β(1-β) it tends to
    KL(teacher ‖ student) for β → 0 and to KL(student ‖ teacher) for β → 1; these are what the ends return here.
    """
    if not 0 <= beta <= 1:
        raise ConfigError(
            f"beta is {beta}", why="it is the teacher's share of a mixture", do="choose it between 0 (forward KL) and 1 (reverse KL)"
        )
    if beta in (0, 1):
        return reverse_kl(student_N_V, teacher_N_V) if beta else forward_kl(student_N_V, teacher_N_V)
    same_shape(student_N_V=student_N_V, teacher_N_V=teacher_N_V)
    mixture_N_V = torch.logaddexp(teacher_N_V + math.log(beta), student_N_V + math.log1p(-beta))
    return beta * kl_rows(teacher_N_V, mixture_N_V) + (1 - beta) * kl_rows(student_N_V, mixture_N_V)


def kl_rows(p_N_V: Tensor, q_N_V: Tensor) -> Tensor:
    """Σ p (log p - log q) of each row of log-probabilities; what p excludes (-inf) adds nothing."""
    possible_N_V = p_N_V > -math.inf
    p_N_V, q_N_V = p_N_V.where(possible_N_V, 0.0), q_N_V.where(possible_N_V, 0.0)
    return (p_N_V.exp() * (p_N_V - q_N_V)).where(possible_N_V, 0.0).sum(-1)


def with_tail(logprobs_N_V: Tensor, ids_N_K: Tensor) -> Tensor:
    """Log-probabilities of K tokens and of 'any other', [N, K+1]: what a stored top-K of a teacher still says.

    A divergence of these never exceeds that of the whole rows (data processing inequality).
    """
    return add_tail(logprobs_N_V.gather(-1, ids_N_K))


def add_tail(logprobs_N_K: Tensor) -> Tensor:
    """`logprobs_N_K` of the whole vocabulary's distribution, and the log of what they leave over."""
    taken_N_1 = logprobs_N_K.logsumexp(-1, keepdim=True)
    return torch.cat([logprobs_N_K, log_one_minus_exp(taken_N_1)], -1)
