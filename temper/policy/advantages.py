"""Credit within groups: P prompts, G samples of each. An absent reward (None) gets no advantage and sways none."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

Rewards = Sequence[Sequence[float | None]]
Advantages = list[list[float | None]]

STD_FLOOR = 1e-3  # a group whose rewards differ by rounding only must not be blown up to unit spread


def group_mean(rewards_P_G: Rewards, *, scale: bool = True, floor: float = STD_FLOOR) -> Advantages:
    """GRPO (Shao et al. 2024, section 4.1.2): (r - mean)/std over the samples of one prompt; std with n-1.

    A group of one, or of equal rewards, teaches nothing: its advantages are 0. Without `scale` see `dr_grpo`.
    """

    def credit(rewards: list[float]) -> list[float]:
        centred = centre(rewards)
        if not scale or len(rewards) == 1:
            return centred
        std = math.sqrt(math.fsum(value * value for value in centred) / (len(rewards) - 1))
        return [value / max(std, floor) for value in centred]

    return by_group(rewards_P_G, credit)


def dr_grpo(rewards_P_G: Rewards) -> Advantages:
    """Dr. GRPO (Liu et al. 2025, section 3.2): r - mean. Not dividing by the spread leaves easy and hard prompts alone."""
    return group_mean(rewards_P_G, scale=False)


def rloo(rewards_P_G: Rewards) -> Advantages:
    """RLOO (Ahmadian et al. 2024, eq. 8): r minus the mean of the other samples; 0 where there is no other."""
    return by_group(rewards_P_G, lambda rewards: [value * len(rewards) / max(1, len(rewards) - 1) for value in centre(rewards)])


def centre(rewards: list[float]) -> list[float]:
    """`rewards` minus their mean; exactly zero where all are equal."""
    if min(rewards) == max(rewards):
        return [0.0] * len(rewards)
    mean = math.fsum(rewards) / len(rewards)
    return [reward - mean for reward in rewards]


def by_group(rewards_P_G: Rewards, credit: Callable[[list[float]], list[float]]) -> Advantages:
    """`credit` of each group's present rewards, with None where a reward is absent."""
    advantages_P_G: Advantages = []
    for rewards_G in rewards_P_G:
        present = [reward for reward in rewards_G if reward is not None]
        credited = iter(credit(present) if present else [])
        advantages_P_G.append([None if reward is None else next(credited) for reward in rewards_G])
    return advantages_P_G


ADVANTAGES: dict[str, Callable[[Rewards], Advantages]] = {"grpo": group_mean, "dr_grpo": dr_grpo, "rloo": rloo}
