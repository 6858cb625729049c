"""KL(π ‖ π_ref) from samples of π: estimators of its value, and the one whose gradient is right too.

With r = log π(x) - log π_ref(x) at tokens x sampled from π (Schulman 2020, 'Approximating KL divergence'):

    k1 = r           unbiased, may be negative      gradient 0 in expectation: useless in a loss
    k2 = r²/2        biased, never negative         gradient E[r ∇log π] = ∇KL(π ‖ π_ref): right
    k3 = e⁻ʳ - 1 + r unbiased, never negative       gradient that of KL(π_ref ‖ π): the wrong direction

So a loss takes the value of k3 and the gradient of k2 (`straight_through`). Samples of an older policy need the
detached importance weight π/π_old on top.
"""

from __future__ import annotations

import torch
from torch import Tensor

from temper.policy.losses import LARGEST_LOGRATIO, LossOut, same_shape


def k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """log π - log π_ref."""
    return logprobs - ref_logprobs


def k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """(log π - log π_ref)²/2."""
    return 0.5 * (logprobs - ref_logprobs).square()


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """π_ref/π - 1 - log(π_ref/π)."""
    inverse = ref_logprobs - logprobs
    return inverse.clamp(max=LARGEST_LOGRATIO).exp() - 1 - inverse


def straight_through(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """The value of k3 with the gradient of k2."""
    squared = k2(logprobs, ref_logprobs)
    return k3(logprobs, ref_logprobs).detach() + squared - squared.detach()


ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3, "straight_through": straight_through}


def kl_penalty(
    logprobs_B_T: Tensor,
    ref_logprobs_B_T: Tensor,
    mask_B_T: Tensor,
    *,
    weights_B_T: Tensor | None = None,
    importance_B_T: Tensor | None = None,
) -> LossOut:
    """Σ straight-through KL over the mask, to be added to a loss with a coefficient. The reference takes no gradient."""
    same_shape(
        logprobs_B_T=logprobs_B_T,
        ref_logprobs_B_T=ref_logprobs_B_T,
        mask_B_T=mask_B_T,
        weights_B_T=weights_B_T,
        importance_B_T=importance_B_T,
    )
    kl_B_T = straight_through(logprobs_B_T.where(mask_B_T, 0.0), ref_logprobs_B_T.detach().where(mask_B_T, 0.0))
    value = kl_B_T.detach().sum()
    for factor_B_T in (weights_B_T, importance_B_T):
        if factor_B_T is not None:
            kl_B_T = kl_B_T * factor_B_T.detach().where(mask_B_T, 0.0)
    return LossOut(kl_B_T.sum(), mask_B_T.sum(), {"kl": value})


def exact_kl(logits_N_V: Tensor, ref_logits_N_V: Tensor) -> Tensor:
    """KL(π ‖ π_ref) of each row from whole rows of logits: what the estimators estimate."""
    logp_N_V, logq_N_V = torch.log_softmax(logits_N_V, -1), torch.log_softmax(ref_logits_N_V, -1)
    return (logp_N_V.exp() * (logp_N_V - logq_N_V)).sum(-1)


def adapted(coefficient: float, kl: float, target: float, *, gain: float = 0.1, bound: float = 0.2) -> float:
    """The coefficient of the next step, so that the KL of an episode comes to `target` (Ziegler et al. 2019, section 2.2).

    β ← β·(1 + gain·e) with e = clip(kl/target - 1, ±bound). `kl` is in nats an episode, summed over its tokens.

    >>> adapted(0.2, 12.0, 6.0), adapted(0.2, 5.4, 6.0)  # e = 0.2 (clipped from 1); e = -0.1
    (0.20400000000000001, 0.198)
    """
    return coefficient * (1 + gain * max(-bound, min(bound, kl / target - 1)))
