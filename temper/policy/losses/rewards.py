"""What a scalar head learns: which answer is better, which step is right, what is still to come."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from temper.policy.losses.out import LossOut, same_shape
from temper.policy.losses.pairs import pair_metrics


def bradley_terry(chosen_P: Tensor, rejected_P: Tensor, *, margin_P: Tensor | None = None, centre: float = 0.0) -> LossOut:
    """Bradley & Terry (1952) on scalar rewards: -log σ(r_w - r_l - m); m as in Llama 2 (Touvron et al. 2023, eq. 2).

    `centre`·(r_w + r_l)² keeps rewards around zero (Eisenstein et al. 2023, eq. 4).

    >>> total(bradley_terry(tensor([3.0]), tensor([1.0]), margin_P=tensor([0.5])))  # -ln σ(1.5)
    0.2014
    >>> total(bradley_terry(tensor([3.0]), tensor([1.0]), centre=0.1))  # -ln σ(2) + 0.1·4²
    1.7269
    """
    same_shape(chosen_P=chosen_P, rejected_P=rejected_P, margin_P=margin_P)
    difference_P = chosen_P - rejected_P
    loss_P = -F.logsigmoid(difference_P if margin_P is None else difference_P - margin_P) + centre * (chosen_P + rejected_P).square()
    return LossOut(loss_P.sum(), torch.tensor(len(loss_P)), pair_metrics(chosen_P, rejected_P))


def process_reward(scores_B_T: Tensor, labels_B_T: Tensor, mask_B_T: Tensor, *, weights_B_T: Tensor | None = None) -> LossOut:
    """Step-level process reward (Lightman et al. 2023, section 2.6): binary cross-entropy of σ(score) at step ends.

    `mask_B_T` is true at the last token of each judged step; labels lie in [0, 1]: right or wrong, or the share of
    continuations that came out right (Math-Shepherd, Wang et al. 2024, eq. 3).

    >>> s, y = tensor([[0.0, 2.0]]), tensor([[1.0, 0.25]])
    >>> total(process_reward(s, y, y > 0))  # ln 2 - ¼·ln σ(2) - ¾·ln σ(-2)
    2.3201
    """
    same_shape(scores_B_T=scores_B_T, labels_B_T=labels_B_T, mask_B_T=mask_B_T, weights_B_T=weights_B_T)
    scores_B_T, labels_B_T = scores_B_T.where(mask_B_T, 0.0), labels_B_T.where(mask_B_T, 0.0)
    loss_B_T = F.binary_cross_entropy_with_logits(scores_B_T, labels_B_T, reduction="none").where(mask_B_T, 0.0)
    if weights_B_T is not None:
        loss_B_T = loss_B_T * weights_B_T.where(mask_B_T, 0.0)
    right_B_T = ((scores_B_T > 0) == (labels_B_T > 0.5)) & mask_B_T
    return LossOut(loss_B_T.sum(), mask_B_T.sum(), {"accuracy": right_B_T.sum(), "score": scores_B_T.detach().sum(), "label": labels_B_T.sum()})


def clipped_value(
    values_B_T: Tensor, old_values_B_T: Tensor, returns_B_T: Tensor, mask_B_T: Tensor, *, clip: float | None = 0.2, weights_B_T: Tensor | None = None
) -> LossOut:
    """½·max((v - R)², (clip(v, v_old ± ε) - R)²): PPO's squared error (Schulman et al. 2017, eq. 9), clipped as in its first code.

    A value that has already gone further than `clip` towards its return gets no gradient for going on; one that moved
    the other way is called back. `clip` None is the plain squared error.

    >>> v, R = tensor([[1.0, 0.1]]), tensor([[2.0, 2.0]])
    >>> total(clipped_value(v, 0 * v, R, R > 0))  # ½·max((1-2)², (0.2-2)²) + ½·(0.1-2)²
    3.425
    """
    same_shape(values_B_T=values_B_T, old_values_B_T=old_values_B_T, returns_B_T=returns_B_T, mask_B_T=mask_B_T, weights_B_T=weights_B_T)
    values_B_T, old_B_T, returns_B_T = (item.where(mask_B_T, 0.0) for item in (values_B_T, old_values_B_T.detach(), returns_B_T.detach()))
    error_B_T = (values_B_T - returns_B_T).square()
    stopped_B_T = torch.zeros_like(mask_B_T)
    if clip is not None:
        clipped_B_T = (old_B_T + (values_B_T - old_B_T).clamp(-clip, clip) - returns_B_T).square()
        stopped_B_T, error_B_T = clipped_B_T > error_B_T, torch.maximum(error_B_T, clipped_B_T)
    loss_B_T = 0.5 * error_B_T
    if weights_B_T is not None:
        loss_B_T = loss_B_T * weights_B_T.where(mask_B_T, 0.0)
    sums = {"value": values_B_T.detach().sum(), "return": returns_B_T.sum(), "value_clipped": stopped_B_T.sum()}
    return LossOut(loss_B_T.sum(), mask_B_T.sum(), sums)
