"""Credit and routing: rewards become advantages on sampled tokens, and weights say how tokens share a step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from temper.core.errors import ConfigError
from temper.core.records import Record
from temper.data.batch import Batch
from temper.data.sequence import Sequence as Row
from temper.data.sequence import episode_sequence
from temper.policy.advantages import ADVANTAGES
from temper.policy.kl import k3, kl_penalty
from temper.policy.losses import LossOut, clipped_pg, truncated_importance
from temper.policy.model import Policy
from temper.train.learner import Count, Loss, loss_weight, rows

if TYPE_CHECKING:
    from temper.train.rl import Config

# name -> (weight of each trained token of a row with that many, the denominator of a batch)
AGGREGATIONS: dict[str, tuple[Callable[[int, int], float], Count]] = {
    "token": (lambda tokens, longest: 1.0, loss_weight),  # DAPO (Yu et al. 2025, eq. 8): every token the same
    "sequence": (lambda tokens, longest: 1.0 / tokens, rows),  # GRPO (Shao et al. 2024, eq. 3): every episode the same
    "constant": (lambda tokens, longest: 1.0 / longest, rows),  # Dr. GRPO (Liu et al. 2025, section 3.2): a constant divisor
}


def credited(records_P_G: Sequence[Sequence[Record]], cfg: Config) -> list[Row]:
    """The episodes worth learning from, as rows: advantages and weights on sampled tokens, nothing elsewhere.

    A group whose rewards are all equal teaches nothing and gives no row; nor does an episode without a reward.
    """
    if cfg.advantage not in ADVANTAGES:
        raise ConfigError(f"there is no advantage {cfg.advantage!r}", do=f"set advantage to one of {', '.join(ADVANTAGES)}")
    advantages_P_G = ADVANTAGES[cfg.advantage]([[record.outcome.reward for record in group] for group in records_P_G])
    found = []
    for group, credit in zip(records_P_G, advantages_P_G, strict=True):
        if any(credit):  # not None or 0 for everyone
            pairs = zip(group, credit, strict=True)
            found += [episode_row(record, cfg, advantage) for record, advantage in pairs if advantage is not None and any(turn.token_ids for turn in record.sampled)]
    return found


def episode_row(record: Record, cfg: Config, advantage: float = 1.0) -> Row:
    """An episode as a training row: token in, token out, weighted as the config's aggregation says."""
    row = episode_sequence(record, advantage)
    weight = AGGREGATIONS[cfg.aggregation][0](sum(item != 0 for item in row.weights), cfg.max_tokens)
    return dataclasses.replace(row, weights=[item and weight for item in row.weights], adapter=cfg.trains)


def policy_loss(policy: Policy, reference: Policy | None, cfg: Config) -> Loss:
    """The clipped objective of a batch, with the KL to `reference`, and what differs between sampler and learner."""

    def loss(batch: Batch) -> LossOut:
        mask_B_T, sampled_B_T, weights_B_T = batch.mask_B_T, batch.old_logprobs_B_T, batch.weights_B_T
        assert sampled_B_T is not None
        assert batch.advantages_B_T is not None
        scores = policy.token_logprobs(batch, temperature=cfg.temperature, entropy=True)
        importance_B_T = truncated_importance(scores.logprobs_B_T, sampled_B_T, mask_B_T, cap=cfg.tis_cap) if cfg.tis_cap else None
        old_B_T = scores.logprobs_B_T.detach() if cfg.tis_cap else sampled_B_T
        out = clipped_pg(scores.logprobs_B_T, old_B_T, batch.advantages_B_T, mask_B_T, clip_low=cfg.clip_low, clip_high=cfg.clip_high,
                         weights_B_T=weights_B_T, importance_B_T=importance_B_T)  # fmt: skip
        sums = out.sums | mismatch(scores.logprobs_B_T, sampled_B_T, mask_B_T)
        assert scores.entropy_B_T is not None
        sums["entropy"] = scores.entropy_B_T.detach().where(mask_B_T, 0.0).sum()
        total = out.total
        if reference is not None:
            with torch.no_grad():
                reference_B_T = reference.token_logprobs(batch, temperature=cfg.temperature).logprobs_B_T
            penalty = kl_penalty(scores.logprobs_B_T, reference_B_T, mask_B_T, weights_B_T=weights_B_T)
            total, sums = total + cfg.kl * penalty.total, sums | penalty.sums
        return LossOut(total, out.count, sums)

    return loss


@torch.no_grad()
def mismatch(logprobs_B_T: Tensor, sampled_B_T: Tensor, mask_B_T: Tensor) -> dict[str, Tensor]:
    """Sums of |log π_learner − log π_sampler| and of the k3 estimate of KL(sampler ‖ learner), over the mask."""
    learned_B_T, sampled_B_T = logprobs_B_T.where(mask_B_T, 0.0), sampled_B_T.where(mask_B_T, 0.0)
    return {"mismatch": (learned_B_T - sampled_B_T).abs().sum(), "mismatch_kl": k3(sampled_B_T, learned_B_T).sum()}
