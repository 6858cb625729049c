"""Sampled tokens with advantages: how far a policy may follow them, and how samples of another policy are weighed.

r = π/π_old is a token's ratio, A its advantage, w its weight in the step (one each: token mean; 1/length: mean over
rows), c its correction for the sampler (`truncated_importance`). Every loss is -Σ w·c·gain over the mask; where
`old_logprobs_B_T` are the log-probs themselves, detached, each of them has the gradient of REINFORCE.
"""

from __future__ import annotations

import torch
from torch import Tensor

from temper.core.errors import ConfigError
from temper.policy.losses.out import LARGEST_LOGRATIO, LossOut, same_shape


def clipped_pg(
    logprobs_B_T: Tensor, old_logprobs_B_T: Tensor, advantages_B_T: Tensor, mask_B_T: Tensor, *,
    clip_low: float = 0.2, clip_high: float = 0.2, weights_B_T: Tensor | None = None, importance_B_T: Tensor | None = None,
) -> LossOut:  # fmt: skip
    """PPO's clipped objective (Schulman et al. 2017, eq. 7): gain = min(r·A, clip(r, 1-low, 1+high)·A).

    `clip_high` above `clip_low` is DAPO's clip-higher (Yu et al. 2025, eq. 10).

    >>> r, A = tensor([[1.5, 0.5, 1.5, 0.5]]), tensor([[2.0, 2.0, -1.0, -1.0]])
    >>> total(clipped_pg(r.log(), 0 * r, A, r > 0))  # -(1.2·2 + 0.5·2 - 1.5 - 0.8)
    -1.1
    >>> total(clipped_pg(r.log(), 0 * r, A, r > 0, clip_high=0.6))  # -(1.5·2 + 0.5·2 - 1.5 - 0.8)
    -1.7
    """
    check(logprobs_B_T, old_logprobs_B_T, advantages_B_T, mask_B_T, weights_B_T, importance_B_T)
    logratio_B_T = log_ratio(logprobs_B_T, old_logprobs_B_T, mask_B_T)
    gain_B_T, stopped_B_T = clipped_gain(logratio_B_T.exp(), advantages_B_T.where(mask_B_T, 0.0), clip_low, clip_high)
    return summed(gain_B_T, logratio_B_T, stopped_B_T, mask_B_T, weights_B_T, importance_B_T)


def gspo(
    logprobs_B_T: Tensor, old_logprobs_B_T: Tensor, advantages_B_T: Tensor, mask_B_T: Tensor, *,
    clip_low: float = 3e-4, clip_high: float = 4e-4, weights_B_T: Tensor | None = None, importance_B_T: Tensor | None = None,
) -> LossOut:  # fmt: skip
    """GSPO (Zheng et al. 2025, eq. 5 and 7): r is the geometric mean of a row's ratios, so a row is clipped as a whole.

    With weights of 1/length each row counts once, as in the paper, whose clips (section 5.1) are the defaults.

    >>> r, A = tensor([[2.0, 0.5, 1.331]]), tensor([[1.0, 1.0, 1.0]])
    >>> total(gspo(r.log(), 0 * r, A, r > 0, clip_high=0.2))  # (2·0.5·1.331)^(1/3) = 1.1, for each of three tokens
    -3.3
    >>> total(gspo(r.log(), 0 * r, A, r > 0, clip_high=0.05))  # all three are clipped
    -3.15
    """
    check(logprobs_B_T, old_logprobs_B_T, advantages_B_T, mask_B_T, weights_B_T, importance_B_T)
    logratio_B_T = log_ratio(logprobs_B_T, old_logprobs_B_T, mask_B_T)
    tokens_B_1 = mask_B_T.sum(-1, keepdim=True).clamp(min=1)
    ratio_B_T = (logratio_B_T.sum(-1, keepdim=True) / tokens_B_1).exp().expand_as(logratio_B_T)
    gain_B_T, stopped_B_T = clipped_gain(ratio_B_T, advantages_B_T.where(mask_B_T, 0.0), clip_low, clip_high)
    return summed(gain_B_T, logratio_B_T, stopped_B_T, mask_B_T, weights_B_T, importance_B_T)


def cispo(
    logprobs_B_T: Tensor, old_logprobs_B_T: Tensor, advantages_B_T: Tensor, mask_B_T: Tensor, *,
    cap: float = 5.0, weights_B_T: Tensor | None = None, importance_B_T: Tensor | None = None,
) -> LossOut:  # fmt: skip
    """CISPO (MiniMax-M1, Chen et al. 2025, eq. 4-5): gain = min(r, cap)·A·log π with the weight min(r, cap) detached.

    The weight is clipped, never the token: rare tokens that PPO would drop go on learning. Like the paper's runs it
    has no lower bound.

    >>> p, old, A = tensor([[0.5, 0.25]]), tensor([[0.25, 0.25]]), tensor([[1.0, -1.0]])
    >>> total(cispo(p.log(), old.log(), A, p > 0, cap=1.5))  # -(1.5·ln ½ - ln ¼): the ratio 2 counts as 1.5
    -0.3466
    """
    check(logprobs_B_T, old_logprobs_B_T, advantages_B_T, mask_B_T, weights_B_T, importance_B_T)
    logratio_B_T = log_ratio(logprobs_B_T, old_logprobs_B_T, mask_B_T)
    ratio_B_T = logratio_B_T.detach().exp()
    gain_B_T = ratio_B_T.clamp(max=cap) * advantages_B_T.where(mask_B_T, 0.0) * logprobs_B_T.where(mask_B_T, 0.0)
    return summed(gain_B_T, logratio_B_T, ratio_B_T > cap, mask_B_T, weights_B_T, importance_B_T)


def luffy(
    logprobs_B_T: Tensor, old_logprobs_B_T: Tensor, advantages_B_T: Tensor, mask_B_T: Tensor, guided_B_T: Tensor, *, gamma: float = 0.1,
    clip_low: float = 0.2, clip_high: float = 0.2, weights_B_T: Tensor | None = None, importance_B_T: Tensor | None = None,
) -> LossOut:  # fmt: skip
    """LUFFY (Yan et al. 2025, mixed-policy GRPO with policy shaping): π/(π+γ)·A where `guided_B_T`, `clipped_pg`'s gain elsewhere.

    Guided tokens were written by someone else, whose probabilities are taken as 1; their old log-probs are not read.
    The slope γ/(π+γ)² of the shaping is steepest at 0: tokens that the policy would hardly say itself are learnt most.

    >>> p, A = tensor([[0.1, 0.5]]), tensor([[1.0, 2.0]])
    >>> total(luffy(p.log(), p.log(), A, p > 0, tensor([[True, False]])))  # -(0.1/0.2·1 + 1·2)
    -2.5
    """
    check(logprobs_B_T, old_logprobs_B_T, advantages_B_T, mask_B_T, weights_B_T, importance_B_T)
    same_shape(logprobs_B_T=logprobs_B_T, guided_B_T=guided_B_T)
    own_B_T, advantages_B_T = mask_B_T & ~guided_B_T, advantages_B_T.where(mask_B_T, 0.0)
    logratio_B_T = log_ratio(logprobs_B_T, old_logprobs_B_T, own_B_T)
    clipped_B_T, stopped_B_T = clipped_gain(logratio_B_T.exp(), advantages_B_T, clip_low, clip_high)
    p_B_T = logprobs_B_T.where(mask_B_T & guided_B_T, 0.0).exp()
    gain_B_T = torch.where(guided_B_T, p_B_T / (p_B_T + gamma) * advantages_B_T, clipped_B_T)
    out = summed(gain_B_T, logratio_B_T, stopped_B_T & own_B_T, mask_B_T, weights_B_T, importance_B_T)
    with torch.no_grad():
        guided = (mask_B_T & guided_B_T).sum()
        sums = {"guided": guided, "guided_probability": p_B_T.where(mask_B_T & guided_B_T, 0.0).sum(), "ratio": out.sums["ratio"] - guided}
    return LossOut(out.total, out.count, out.sums | sums)


# --- the sampler is not quite the learner ---

LEVELS = ("token", "sequence")
TREATMENTS = ("clip", "mask")


def truncated_importance(
    logprobs_B_T: Tensor, sampled_logprobs_B_T: Tensor, mask_B_T: Tensor, *, cap: float, floor: float = 0.0, level: str = "token", treatment: str = "clip"
) -> Tensor:
    """Truncated importance weights for a sampler that computes a little differently from the learner, detached.

    The ratio π_learner/π_sampler is a token's (`level` token) or the product over a row's tokens (sequence). `clip`
    brings it into [floor, cap] (Yao et al. 2025, TIS); `mask` sets what lies outside to 0 (Zhao et al. 2025, IcePop,
    for tokens; Liu et al. 2025, MIS, for sequences). 1 where masked, and where the sampler's log-prob is NaN: unknown.
    Raises ConfigError for another level or treatment.

    >>> learner, sampler = tensor([[0.25, 0.8]]), tensor([[0.5, 0.2]])  # ratios ½ and 4, product 2
    >>> weigh = lambda **how: truncated_importance(learner.log(), sampler.log(), learner > 0, cap=1.5, **how).tolist()
    >>> weigh(), weigh(treatment="mask")
    ([[0.5, 1.5]], [[0.5, 0.0]])
    >>> weigh(level="sequence"), weigh(level="sequence", treatment="mask")
    ([[1.5, 1.5]], [[0.0, 0.0]])
    """
    same_shape(logprobs_B_T=logprobs_B_T, sampled_logprobs_B_T=sampled_logprobs_B_T, mask_B_T=mask_B_T)
    if level not in LEVELS or treatment not in TREATMENTS or not 0 <= floor <= 1 <= cap:
        raise ConfigError(f"importance weights of level {level!r}, treatment {treatment!r}, from {floor} to {cap}",
                          do=f"choose a level of {LEVELS}, a treatment of {TREATMENTS}, and floor ≤ 1 ≤ cap")  # fmt: skip
    known_B_T = mask_B_T & ~sampled_logprobs_B_T.isnan()
    logratio_B_T = (logprobs_B_T - sampled_logprobs_B_T).detach().where(known_B_T, 0.0)
    if level == "sequence":
        logratio_B_T = logratio_B_T.sum(-1, keepdim=True).expand_as(logratio_B_T).where(known_B_T, 0.0)
    ratio_B_T = logratio_B_T.clamp(-LARGEST_LOGRATIO, LARGEST_LOGRATIO).exp()
    kept_B_T = ratio_B_T.clamp(floor, cap)
    return kept_B_T if treatment == "clip" else ratio_B_T.where(ratio_B_T == kept_B_T, 0.0)


# --- parts ---


def check(logprobs_B_T: Tensor, old_B_T: Tensor, advantages_B_T: Tensor, mask_B_T: Tensor, weights_B_T: Tensor | None, importance_B_T: Tensor | None) -> None:
    """Raise ShapeError where the tensors of a policy-gradient loss differ in shape."""
    same_shape(logprobs_B_T=logprobs_B_T, old_logprobs_B_T=old_B_T, advantages_B_T=advantages_B_T, mask_B_T=mask_B_T,
               weights_B_T=weights_B_T, importance_B_T=importance_B_T)  # fmt: skip


def log_ratio(logprobs_B_T: Tensor, old_logprobs_B_T: Tensor, mask_B_T: Tensor) -> Tensor:
    """log π/π_old, 0 where masked, kept where its exponential is finite."""
    return (logprobs_B_T - old_logprobs_B_T).where(mask_B_T, 0.0).clamp(-LARGEST_LOGRATIO, LARGEST_LOGRATIO)


def clipped_gain(ratio_B_T: Tensor, advantages_B_T: Tensor, clip_low: float, clip_high: float) -> tuple[Tensor, Tensor]:
    """min(r·A, clip(r)·A), and where it stopped the gradient (not where r is merely outside the band)."""
    plain_B_T, clipped_B_T = ratio_B_T * advantages_B_T, ratio_B_T.clamp(1 - clip_low, 1 + clip_high) * advantages_B_T
    return torch.minimum(plain_B_T, clipped_B_T), clipped_B_T < plain_B_T


def summed(gain_B_T: Tensor, logratio_B_T: Tensor, stopped_B_T: Tensor, mask_B_T: Tensor, *factors_B_T: Tensor | None) -> LossOut:
    """-Σ gain times its factors over the mask; how many tokens were stopped, Σ r, and the k3 of KL(π_old ‖ π)."""
    gain_B_T = gain_B_T.where(mask_B_T, 0.0)
    for factor_B_T in factors_B_T:
        if factor_B_T is not None:
            gain_B_T = gain_B_T * factor_B_T.detach().where(mask_B_T, 0.0)
    with torch.no_grad():
        ratio_B_T = logratio_B_T.exp()
        sums = {"clipped": (stopped_B_T & mask_B_T).sum(), "ratio": ratio_B_T.where(mask_B_T, 0.0).sum(), "kl_old": (ratio_B_T - 1 - logratio_B_T).sum()}
    return LossOut(-gain_B_T.sum(), mask_B_T.sum(), sums)
