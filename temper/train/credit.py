"""Credit and routing: rewards become advantages on sampled tokens, and weights say how tokens share a step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from temper.core.errors import ConfigError
from temper.core.records import Record
from temper.data.batch import Batch, collate, plan_units
from temper.data.sequence import Sequence as Row
from temper.data.sequence import episode_sequence
from temper.data.template import Template
from temper.policy import losses
from temper.policy.advantages import ACROSS_GROUPS, ADVANTAGES, overlong
from temper.policy.kl import k3, kl_penalty
from temper.policy.losses import LossOut, truncated_importance
from temper.policy.model import Policy
from temper.rollout.environment import Environment, Task, replay
from temper.train.learner import Count, Loss, loss_weight, rows

if TYPE_CHECKING:
    from temper.train.episodes import EpisodeConfig
    from temper.train.rl import Config

UNKNOWN = float("nan")  # the log-prob of a token that nobody sampled

# name -> (weight of each trained token of a row with that many, the denominator of a batch)
AGGREGATIONS: dict[str, tuple[Callable[[int, int], float], Count]] = {
    "token": (lambda tokens, longest: 1.0, loss_weight),  # DAPO (Yu et al. 2025, eq. 8): every token the same
    "sequence": (lambda tokens, longest: 1.0 / tokens, rows),  # GRPO (Shao et al. 2024, eq. 3): every episode the same
    "constant": (lambda tokens, longest: 1.0 / longest, rows),  # Dr. GRPO (Liu et al. 2025, section 3.2): a constant divisor
}


class Tokens(NamedTuple):
    """What a policy-gradient loss is made of, all [rows, positions]; old log-probs are NaN where nobody sampled the token."""

    logprobs_B_T: Tensor
    old_logprobs_B_T: Tensor
    advantages_B_T: Tensor
    mask_B_T: Tensor
    weights_B_T: Tensor
    importance_B_T: Tensor | None


def clipped(on: Tokens, cfg: EpisodeConfig) -> LossOut:
    """`losses.clipped_pg`."""
    low, high = cfg.clips
    return losses.clipped_pg(*on[:4], clip_low=low, clip_high=high, weights_B_T=on.weights_B_T, importance_B_T=on.importance_B_T)


def gspo(on: Tokens, cfg: EpisodeConfig) -> LossOut:
    """`losses.gspo`."""
    low, high = cfg.clips
    return losses.gspo(*on[:4], clip_low=low, clip_high=high, weights_B_T=on.weights_B_T, importance_B_T=on.importance_B_T)


def cispo(on: Tokens, cfg: EpisodeConfig) -> LossOut:
    """`losses.cispo`; the weight's cap is 1 + clip_high."""
    return losses.cispo(*on[:4], cap=1 + cfg.clips[1], weights_B_T=on.weights_B_T, importance_B_T=on.importance_B_T)


def luffy(on: Tokens, cfg: EpisodeConfig) -> LossOut:
    """`losses.luffy`; guided are the tokens that nobody sampled."""
    low, high = cfg.clips
    return losses.luffy(*on[:4], on.old_logprobs_B_T.isnan(), clip_low=low, clip_high=high, weights_B_T=on.weights_B_T, importance_B_T=on.importance_B_T)


LOSSES: dict[str, Callable[[Tokens, EpisodeConfig], LossOut]] = {"clipped": clipped, "gspo": gspo, "cispo": cispo, "luffy": luffy}


class Guide(NamedTuple):
    """A demonstration as a row, and the reward that the verifier gives it."""

    row: Row
    reward: float | None


def credited(records_P_G: Sequence[Sequence[Record]], cfg: Config, guides_P: Sequence[Guide] = ()) -> list[Row]:
    """The episodes worth learning from, as rows: advantages and weights on sampled tokens, nothing elsewhere.

    A guide is judged as one more sample of its group (LUFFY). A group whose rewards are all equal teaches nothing and
    gives no row, unless the advantage compares across groups and some differ; nor does an episode without a reward.
    Under `constant` the divisor counts the rows of such groups all the same: it must not move with how many agree.
    """
    if cfg.advantage not in ADVANTAGES:
        raise ConfigError(f"there is no advantage {cfg.advantage!r}", do=f"set advantage to one of {', '.join(ADVANTAGES)}")
    guides = [[guide] for guide in guides_P] or [[] for _ in records_P_G]
    rewards_P_G = [[*(reward_of(record, cfg) for record in group), *(guide.reward for guide in own)] for group, own in zip(records_P_G, guides, strict=True)]
    credits_P_G = ADVANTAGES[cfg.advantage](rewards_P_G)
    across = cfg.advantage in ACROSS_GROUPS and any(map(any, credits_P_G))
    found, judged = [], 0
    for group, own, credit in zip(records_P_G, guides, credits_P_G, strict=True):
        pairs = zip(group, credit, strict=False)  # what is left over is the guide's
        told = [(record, advantage) for record, advantage in pairs if advantage is not None and any(turn.token_ids for turn in record.sampled)]
        shown = [(guide.row, advantage) for guide, advantage in zip(own, credit[len(group) :], strict=True) if advantage is not None]
        judged += len(told) + len(shown)
        if any(credit) or across:  # else None or 0 for everyone
            found += [episode_row(record, cfg, advantage) for record, advantage in told]
            found += [shared(credit_row(row, advantage), cfg) for row, advantage in shown]
    if cfg.aggregation == "constant":  # the rows left out have no gradient, but stay in the divisor
        found = [dataclasses.replace(row, weights=[weight * len(found) / judged for weight in row.weights]) for row in found]
    return found


def reward_of(record: Record, cfg: Config) -> float | None:
    """The episode's reward, less what `overlong` takes for its length; None where nothing was judged."""
    reward = record.outcome.reward
    if reward is None or cfg.overlong is None:
        return reward
    tokens = sum(len(turn.token_ids) for turn in record.sampled)
    return reward + cfg.overlong.penalty * overlong(tokens, limit=cfg.overlong.limit, buffer=cfg.overlong.buffer)


def episode_row(record: Record, cfg: EpisodeConfig, advantage: float = 1.0) -> Row:
    """An episode as a training row: token in, token out, weighted as the config's aggregation says."""
    return shared(episode_sequence(record, advantage), cfg)


def shared(row: Row, cfg: EpisodeConfig) -> Row:
    """`row` with the weights of the config's aggregation, through the adapter under training."""
    weight = AGGREGATIONS[cfg.aggregation][0](row.supervised, cfg.max_tokens)
    return dataclasses.replace(row, weights=[item and weight for item in row.weights], adapter=cfg.trains)


def credit_row(row: Row, advantage: float) -> Row:
    """`row` with `advantage` on its trained tokens."""
    return dataclasses.replace(row, advantages=[advantage if weight else 0.0 for weight in row.weights])


def guide_of(environment: Environment, task: Task, template: Template, max_tokens: int) -> Guide:
    """The task's demonstration, played and judged by the environment: nobody sampled it, so its log-probs are unknown."""
    if not task.demonstration:
        raise ConfigError(f"task {task.id} has no demonstration", why="guidance learns from one beside the policy's own episodes",
                          do="set guidance: false, or use an environment whose tasks have demonstrations")  # fmt: skip
    context = [message.model_copy(update={"train": False}) for message in task.messages]
    found = template.supervise([*context, *task.demonstration], task.tools)
    weights = [float(trained) for trained in found.mask[:max_tokens]]
    outcome, _ = replay(environment, task, task.demonstration)
    old = [UNKNOWN if weight else 0.0 for weight in weights]
    row = Row(tokens=found.tokens[:max_tokens], weights=weights, old_logprobs=old, group=task.id, cut=max(0, len(found.tokens) - max_tokens))
    return Guide(row, outcome.reward if any(weights) else None)


def policy_loss(policy: Policy, reference: Policy | None, cfg: EpisodeConfig) -> Loss:
    """The named loss of a batch, the KL to `reference` and the entropy bonus, and what differs between sampler and learner.

    With `tis_cap` and one optimizer step a batch of episodes the learner's own log-probs are the old ones, and the
    importance weight stands for the sampler; for several steps see `decoupled`.
    """
    correcting = cfg.tis_cap is not None and cfg.updates == 1

    def loss(batch: Batch) -> LossOut:
        mask_B_T, sampled_B_T, weights_B_T = batch.mask_B_T, batch.old_logprobs_B_T, batch.weights_B_T
        assert sampled_B_T is not None
        assert batch.advantages_B_T is not None
        scores = policy.token_logprobs(batch, temperature=cfg.temperature, entropy=True)
        logprobs_B_T, entropy_B_T, known_B_T = scores.logprobs_B_T, scores.entropy_B_T, mask_B_T & ~sampled_B_T.isnan()
        assert entropy_B_T is not None
        importance_B_T = importance(logprobs_B_T, sampled_B_T, mask_B_T, cfg) if correcting else None
        old_B_T = logprobs_B_T.detach().where(known_B_T, sampled_B_T) if correcting else sampled_B_T
        out = LOSSES[cfg.loss](Tokens(logprobs_B_T, old_B_T, batch.advantages_B_T, mask_B_T, weights_B_T, importance_B_T), cfg)
        total, sums = out.total, out.sums | mismatch(logprobs_B_T, sampled_B_T, known_B_T)
        entropy_B_T = entropy_B_T.where(mask_B_T, 0.0)
        sums["entropy"] = entropy_B_T.detach().sum()
        if importance_B_T is not None:
            sums["tis_weight"] = importance_B_T.where(mask_B_T, 0.0).sum()
        if cfg.entropy_bonus:
            total = total - cfg.entropy_bonus * (entropy_B_T * weights_B_T).sum()
        if reference is not None:
            with torch.no_grad():
                reference_B_T = reference.token_logprobs(batch, temperature=cfg.temperature).logprobs_B_T
                # samples of an older policy: without their ratio the gradient would be of another KL
                ratio_B_T = (logprobs_B_T - old_B_T).where(known_B_T, 0.0).clamp(max=losses.LARGEST_LOGRATIO).exp()
            penalty = kl_penalty(logprobs_B_T, reference_B_T, known_B_T, weights_B_T=weights_B_T, importance_B_T=ratio_B_T)
            total, sums = total + cfg.kl * penalty.total, sums | penalty.sums
        return LossOut(total, out.count, sums)

    return loss


def importance(logprobs_B_T: Tensor, sampled_B_T: Tensor, mask_B_T: Tensor, cfg: EpisodeConfig) -> Tensor:
    """`losses.truncated_importance` as the config has it."""
    assert cfg.tis_cap is not None
    return truncated_importance(logprobs_B_T, sampled_B_T, mask_B_T, cap=cfg.tis_cap, floor=cfg.tis_floor, level=cfg.tis_level, treatment=cfg.tis_treatment)


@torch.no_grad()
def decoupled(policy: Policy, found: Sequence[Row], cfg: EpisodeConfig) -> tuple[list[Row], dict[str, float]]:
    """Rows whose old log-probs are the learner's, with the sampler's importance weight multiplied into the advantages.

    For several optimizer steps on one batch of episodes: the clip then holds the learner to where it started, and the
    weight corrects for the sampler, once. It costs one forward pass. Also gives the mismatch per token.
    """
    made, sums, tokens, sampled = list(found), {"mismatch": 0.0, "mismatch_kl": 0.0, "tis_weight": 0.0}, 0, 0
    kind = policy.kind(cfg.layout)
    for numbers in plan_units([[row] for row in found], kind, cfg.tokens_per_batch):
        batch = collate([found[number] for number in numbers], policy.template.pad_id, kind).to(policy.device)
        mask_B_T, sampled_B_T, advantages_B_T = batch.mask_B_T, batch.old_logprobs_B_T, batch.advantages_B_T
        assert sampled_B_T is not None
        assert advantages_B_T is not None
        learner_B_T = policy.token_logprobs(batch, temperature=cfg.temperature).logprobs_B_T
        weight_B_T, known_B_T = importance(learner_B_T, sampled_B_T, mask_B_T, cfg), mask_B_T & ~sampled_B_T.isnan()
        for name, value in (mismatch(learner_B_T, sampled_B_T, known_B_T) | {"tis_weight": weight_B_T.where(mask_B_T, 0.0).sum()}).items():
            sums[name] += float(value)
        tokens, sampled = tokens + int(mask_B_T.sum()), sampled + int(known_B_T.sum())
        old_B_T, advantages_B_T = learner_B_T.where(known_B_T, sampled_B_T).cpu(), (advantages_B_T * weight_B_T).cpu()
        for at, number in enumerate(numbers):
            width = len(found[number].tokens)
            made[number] = dataclasses.replace(found[number], old_logprobs=old_B_T[at, :width].tolist(), advantages=advantages_B_T[at, :width].tolist())
    return made, {name: value / max(1, tokens if name == "tis_weight" else sampled) for name, value in sums.items()}


@torch.no_grad()
def mismatch(logprobs_B_T: Tensor, sampled_B_T: Tensor, mask_B_T: Tensor) -> dict[str, Tensor]:
    """Sums of |log π_learner − log π_sampler| and of the k3 estimate of KL(sampler ‖ learner), over the mask."""
    learned_B_T, sampled_B_T = logprobs_B_T.where(mask_B_T, 0.0), sampled_B_T.where(mask_B_T, 0.0)
    return {"mismatch": (learned_B_T - sampled_B_T).abs().sum(), "mismatch_kl": k3(sampled_B_T, learned_B_T).sum()}
