"""Credit from rewards: P prompts, G samples of each. An absent reward (None) gets no advantage and sways none."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

Rewards = Sequence[Sequence[float | None]]
Advantages = list[list[float | None]]

STD_FLOOR = 1e-3  # a group whose rewards differ by rounding only must not be blown up to unit spread


def group_mean(rewards_P_G: Rewards, *, scale: bool = True, floor: float = STD_FLOOR) -> Advantages:
    """GRPO (Shao et al. 2024, section 4.1.2): (r - mean)/std over the samples of one prompt; std with n-1.

    A group of one, or of equal rewards, teaches nothing: its advantages are 0. Without `scale` see `dr_grpo`.

    >>> group_mean([[1.0, 0.0, 0.5]])  # mean ½, std ½
    [[1.0, -1.0, 0.0]]
    """
    return by_group(rewards_P_G, lambda rewards: scaled(centre(rewards), floor) if scale else centre(rewards))


def dr_grpo(rewards_P_G: Rewards) -> Advantages:
    """Dr. GRPO (Liu et al. 2025, section 3.2): r - mean. Not dividing by the spread leaves easy and hard prompts alone.

    >>> dr_grpo([[1.0, 0.0, 0.5]])
    [[0.5, -0.5, 0.0]]
    """
    return group_mean(rewards_P_G, scale=False)


def rloo(rewards_P_G: Rewards) -> Advantages:
    """RLOO (Ahmadian et al. 2024, eq. 8): r minus the mean of the other samples; 0 where there is no other.

    >>> rloo([[1.0, 0.0, 0.5]])  # the others' means are ¼, ¾, ½
    [[0.75, -0.75, 0.0]]
    """
    return by_group(rewards_P_G, lambda rewards: [value * len(rewards) / max(1, len(rewards) - 1) for value in centre(rewards)])


def reinforce_pp(rewards_P_G: Rewards) -> Advantages:
    """REINFORCE++ (Hu et al. 2025): (r - mean)/std over the whole batch, whoever's prompt; std with n-1.

    A group may be of one sample. A batch of equal rewards teaches nothing.

    >>> reinforce_pp([[1.0], [0.0], [0.5]])
    [[1.0], [-1.0], [0.0]]
    """
    return over_batch(rewards_P_G, lambda rewards: scaled(centre(rewards), STD_FLOOR))


def reinforce_pp_baseline(rewards_P_G: Rewards) -> Advantages:
    """REINFORCE++-baseline (Hu et al. 2025): r minus its group's mean, divided by the std of all of these.

    >>> [round(value, 4) for value in reinforce_pp_baseline([[4.0, 1.0], [1.0, 1.0]])[0]]  # 1.5, -1.5, 0, 0: the spread of the batch is √(4.5/3)
    [1.2247, -1.2247]
    """
    return over_batch(dr_grpo(rewards_P_G), lambda centred: scaled(centred, STD_FLOOR))


def overlong(tokens: int, *, limit: int, buffer: int) -> float:
    """DAPO's soft overlong punishment (Yu et al. 2025, eq. 13), to be added to the reward of an episode of `tokens`.

    0 up to limit - buffer, then falling linearly to -1 at the limit, and -1 beyond it.

    >>> [overlong(tokens, limit=100, buffer=20) for tokens in (80, 85, 100, 120)]
    [0.0, -0.25, -1.0, -1.0]
    """
    over = (tokens - (limit - buffer)) / buffer if buffer else float(tokens > limit)
    return 0.0 - min(1.0, max(0.0, over))


# --- parts ---


def centre(rewards: list[float]) -> list[float]:
    """`rewards` minus their mean; exactly zero where all are equal."""
    if min(rewards) == max(rewards):
        return [0.0] * len(rewards)
    mean = math.fsum(rewards) / len(rewards)
    return [reward - mean for reward in rewards]


def scaled(centred: list[float], floor: float) -> list[float]:
    """`centred` over its spread (n-1), or over `floor` where that is larger; as it is where there is only one."""
    if len(centred) == 1:
        return centred
    std = math.sqrt(math.fsum(value * value for value in centred) / (len(centred) - 1))
    return [value / max(std, floor) for value in centred]


def by_group(rewards_P_G: Rewards, credit: Callable[[list[float]], list[float]]) -> Advantages:
    """`credit` of each group's present rewards, with None where a reward is absent."""
    advantages_P_G: Advantages = []
    for rewards_G in rewards_P_G:
        present = [reward for reward in rewards_G if reward is not None]
        credited = iter(credit(present) if present else [])
        advantages_P_G.append([None if reward is None else next(credited) for reward in rewards_G])
    return advantages_P_G


def over_batch(rewards_P_G: Rewards, credit: Callable[[list[float]], list[float]]) -> Advantages:
    """`credit` of all present rewards as one group, back in their places."""
    (flat,) = by_group([[reward for rewards_G in rewards_P_G for reward in rewards_G]], credit)
    places = iter(flat)
    return [[next(places) for _ in rewards_G] for rewards_G in rewards_P_G]


ADVANTAGES: dict[str, Callable[[Rewards], Advantages]] = {
    "grpo": group_mean, "dr_grpo": dr_grpo, "rloo": rloo, "reinforce_pp": reinforce_pp, "reinforce_pp_baseline": reinforce_pp_baseline,
}  # fmt: skip
ACROSS_GROUPS = ("reinforce_pp",)  # credit that needs no second sample of the same prompt
