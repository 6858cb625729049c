"""Credit token by token from a learned value: rewards along a row, advantages, returns. All tensors are [rows, positions].

`mask_B_T` is true at sampled tokens; a row's steps are these tokens in order, whatever stands between them (a tool's
result is read, not chosen). `values_B_T` is what was expected before the token was sampled.
"""

from __future__ import annotations

import torch
from torch import Tensor

from temper.policy.losses.out import same_shape

SPREAD_FLOOR = 1e-8  # added to a variance, as in PPO's implementations


def token_rewards(rewards_B: Tensor, mask_B_T: Tensor, *, penalty_B_T: Tensor | None = None) -> Tensor:
    """A row's reward at its last sampled token, minus `penalty_B_T` (for example β·k1) at every sampled one.

    >>> token_rewards(tensor([1.0]), tensor([[False, True, True, False]]), penalty_B_T=tensor([[0.5, 0.25, 0.5, 0.5]]))
    tensor([[ 0.0000, -0.2500,  0.5000,  0.0000]])
    """
    same_shape(mask_B_T=mask_B_T, penalty_B_T=penalty_B_T)
    last_B_T = mask_B_T & (mask_B_T.flip(-1).cumsum(-1).flip(-1) == 1)
    found_B_T = rewards_B[:, None].expand(mask_B_T.shape).where(last_B_T, 0.0)
    return found_B_T if penalty_B_T is None else found_B_T - penalty_B_T.where(mask_B_T, 0.0)


def gae(
    rewards_B_T: Tensor, values_B_T: Tensor, mask_B_T: Tensor, bootstrap_B: Tensor, *, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16) and returns A + V, both 0 where masked.

    A_t = δ_t + γλ·A_t+1 with δ_t = r_t + γ·V_t+1 - V_t over a row's sampled tokens. After the last one comes
    `bootstrap_B`: the value of where a row was cut off, and 0 where it ended.

    >>> one = tensor([[True, True]])
    >>> gae(tensor([[0.0, 1.0]]), tensor([[0.5, 0.25]]), one, tensor([0.0]), lam=0.5)[0]  # δ = -¼, ¾; A = -¼ + ½·¾, ¾
    tensor([[0.1250, 0.7500]])
    >>> gae(tensor([[0.0, 1.0]]), tensor([[0.5, 0.25]]), one, tensor([2.0]), lam=0.5)[0]  # cut off: δ = -¼, 2¾
    tensor([[1.1250, 2.7500]])
    """
    same_shape(rewards_B_T=rewards_B_T, values_B_T=values_B_T, mask_B_T=mask_B_T)
    rewards_B_T, values_B_T = rewards_B_T.where(mask_B_T, 0.0), values_B_T.where(mask_B_T, 0.0)
    following_B, running_B = bootstrap_B.clone(), torch.zeros_like(bootstrap_B)
    advantages_B_T = torch.zeros_like(values_B_T)
    for at in reversed(range(mask_B_T.shape[1])):
        here_B = mask_B_T[:, at]
        step_B = rewards_B_T[:, at] + gamma * following_B - values_B_T[:, at] + gamma * lam * running_B
        running_B, following_B = torch.where(here_B, step_B, running_B), torch.where(here_B, values_B_T[:, at], following_B)
        advantages_B_T[:, at] = step_B.where(here_B, 0.0)
    return advantages_B_T, advantages_B_T + values_B_T


def whiten(values_B_T: Tensor, mask_B_T: Tensor) -> Tensor:
    """Mean 0 and spread 1 over the real tokens of the whole batch; 0 where masked. Padding counts for nothing.

    >>> whiten(tensor([[1.0, 3.0, 9.0]]), tensor([[True, True, False]]))
    tensor([[-1.,  1.,  0.]])
    """
    same_shape(values_B_T=values_B_T, mask_B_T=mask_B_T)
    count = mask_B_T.sum().clamp(min=1)
    centred_B_T = (values_B_T.where(mask_B_T, 0.0) - values_B_T.where(mask_B_T, 0.0).sum() / count).where(mask_B_T, 0.0)
    return centred_B_T * (centred_B_T.square().sum() / count + SPREAD_FLOOR).rsqrt()
