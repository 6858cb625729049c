"""Preference optimisation on admitted pairs: DPO and its relatives, all from the log-probs of two answers.

The reference is the starting policy (not "adapter off", which is the same only from a bare base). Its log-probs
are computed once, in evaluation mode, before any checkpoint is loaded, and kept under the hash of its weights, of the
rows and of what else they depend on.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor

from temper.core.errors import ConfigError
from temper.core.progress import track
from temper.core.records import Record
from temper.core.run import RunDirectory
from temper.data.batch import Batch, collate
from temper.data.inspect import counts
from temper.data.layout import Kind
from temper.data.sequence import Sequence, preference_sequences
from temper.data.template import Template
from temper.policy import losses
from temper.policy.losses import LossOut
from temper.policy.model import Policy
from temper.train.estimate import Estimate, estimate_rows
from temper.train.learner import Learner
from temper.train.reference import with_reference as reference_logprobs
from temper.train.stage import (
    AdaptableConfig,
    Plan,
    StageConfig,
    checkpoint_hash,
    keep,
    load_policy,
    load_records,
    manifest_hash,
    micro_of,
    open_run,
    plan_steps,
    prepare,
    resume,
    rounded,
    same_family,
    save_trained,
    say_cut,
)  # fmt: skip

Pair = tuple[Sequence, Sequence]  # chosen, rejected


class PairsConfig(StageConfig):
    """The key of a stage that trains on pairs."""

    pairs_per_step: int = Field(16, gt=0, description="pairs of one optimizer step")


class Config(AdaptableConfig, PairsConfig):
    """Preference optimisation of a whole model, or of an adapter on it."""

    data: str = Field(description="manifest folder of the pairs")
    loss: str = Field("dpo", description="dpo, ipo, simpo or orpo; kto is a stage of its own")
    beta: float = Field(0.1, gt=0, description="how strongly the reference holds; for simpo and orpo the scale of their margin")
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="share of pairs expected to be labelled the wrong way round (dpo)")
    length_normalised: bool = Field(False, description="compare log-probs per token (dpo, ipo; simpo and orpo always do)")
    gamma: float = Field(0.5, ge=0, description="simpo's target margin, in units of beta")
    sft_mix: float = Field(0.0, ge=0, description="coefficient of the chosen answer's cross-entropy per token (RPO)")
    reference: str = Field("start", description="start: the policy as it starts; none; or the path of a checkpoint; left out: start for dpo and ipo, none for simpo and orpo")
    reference_cache: str | None = Field(None, description="folder that keeps the reference's log-probs for other runs; null: this run's own")

    @model_validator(mode="before")
    @classmethod
    def reference_where_needed(cls, values: Any) -> Any:
        """A loss that compares with nothing pays for no reference, unless one is named to watch the drift from it."""
        if not isinstance(values, dict) or values.get("reference") is not None:
            return values
        return values | {"reference": "start" if str(values.get("loss", "dpo")) in NEED_REFERENCE else "none"}


@dataclasses.dataclass(frozen=True)
class Scored:
    """Log-probs of both answers of each pair, under the policy and (where there is one) the reference.

    Sums over the answer's tokens, and the numbers of tokens: a loss takes sums or means.
    """

    chosen_P: Tensor
    rejected_P: Tensor
    ref_chosen_P: Tensor
    ref_rejected_P: Tensor
    chosen_tokens_P: Tensor
    rejected_tokens_P: Tensor

    def mean(self) -> Scored:
        """The same per token."""
        return dataclasses.replace(
            self, chosen_P=self.chosen_P / self.chosen_tokens_P, rejected_P=self.rejected_P / self.rejected_tokens_P,
            ref_chosen_P=self.ref_chosen_P / self.chosen_tokens_P, ref_rejected_P=self.ref_rejected_P / self.rejected_tokens_P,
        )  # fmt: skip


def dpo(pairs: Scored, cfg: Config) -> LossOut:
    """`losses.dpo` of sums, or of means where the config says so."""
    used = pairs.mean() if cfg.length_normalised else pairs
    return losses.dpo(used.chosen_P, used.rejected_P, used.ref_chosen_P, used.ref_rejected_P, beta=cfg.beta, label_smoothing=cfg.label_smoothing)


def ipo(pairs: Scored, cfg: Config) -> LossOut:
    """`losses.ipo` of sums, or of means where the config says so."""
    used = pairs.mean() if cfg.length_normalised else pairs
    return losses.ipo(used.chosen_P, used.rejected_P, used.ref_chosen_P, used.ref_rejected_P, beta=cfg.beta)


def simpo(pairs: Scored, cfg: Config) -> LossOut:
    """`losses.simpo`; the target margin is gamma·beta."""
    return losses.simpo(pairs.mean().chosen_P, pairs.mean().rejected_P, beta=cfg.beta, gamma=cfg.gamma * cfg.beta)


def orpo(pairs: Scored, cfg: Config) -> LossOut:
    """`losses.orpo`."""
    return losses.orpo(pairs.mean().chosen_P, pairs.mean().rejected_P, beta=cfg.beta)


LOSSES: dict[str, Callable[[Scored, Config], LossOut]] = {"dpo": dpo, "ipo": ipo, "simpo": simpo, "orpo": orpo}
NEED_REFERENCE = {"dpo", "ipo"}


def run(cfg: Config) -> dict[str, Any]:
    """Train on the pairs of `cfg.data`; return the paths written and the last metrics. Done work returns at once."""
    started = time.monotonic()
    check(cfg)
    folder = open_run(cfg, "preference", inputs(cfg))
    if folder.done:
        return folder.result()
    policy = prepare(cfg)
    pairs = with_reference(pairs_of(load_records(cfg.data)[1], policy.template, cfg.max_tokens, cfg.trains), policy, cfg, folder)
    kind = policy.kind(cfg.layout)
    plan = plan_pairs(pairs, cfg, kind)
    learner = Learner(policy, cfg.optim, len(plan), seed=cfg.seed)
    metrics: dict[str, Any] = {}

    def loss(batch: Batch) -> LossOut:
        return pair_loss(policy, batch, cfg)

    for step in track(range(resume(folder, learner), len(plan)), f"{cfg.loss} {cfg.out}"):
        batches = [collate_pairs([pairs[pair] for pair in micro], policy.template, kind) for micro in plan[step]]
        metrics = learner.forward_backward(batches, loss, count_pairs) | learner.optim_step()
        folder.log(learner.step, rounded(metrics))
        keep(folder, learner, cfg)
    return folder.finish(save_trained(folder, policy, cfg) | {"pairs": len(pairs), "data": counts_of(pairs), "steps": len(plan), "metrics": rounded(metrics)}, started)


def check(cfg: Config) -> None:
    """Raise ConfigError for a loss that is not there, a key it does not read, or one without the reference it needs."""
    if cfg.loss == "kto":
        raise ConfigError("kto learns from single answers, good or bad, and this stage from pairs", do="set `stage: kto`; its data may be the same pairs")
    if cfg.loss not in LOSSES:
        raise ConfigError(f"there is no preference loss {cfg.loss!r}", do=f"set loss to one of {', '.join(LOSSES)}")
    if cfg.label_smoothing and cfg.loss != "dpo":
        raise ConfigError(f"label_smoothing is {cfg.label_smoothing}, and loss {cfg.loss!r} has none", why="it would change nothing",
                          do="leave it out, or use dpo")  # fmt: skip
    if cfg.loss in NEED_REFERENCE and cfg.reference == "none":
        free = ", ".join(sorted(LOSSES.keys() - NEED_REFERENCE))
        raise ConfigError(f"loss {cfg.loss!r} needs reference log-probs, and `reference` is none",
                          why="it compares the policy with where it started", do=f"set reference: start, or use {free}, which need none")  # fmt: skip


def inputs(cfg: Any) -> dict[str, str]:
    """The content hashes that, with the config, name this work."""
    named = {"data": manifest_hash(cfg.data), "base": checkpoint_hash(cfg.base)}
    if cfg.initial_adapter:
        named["initial_adapter"] = checkpoint_hash(cfg.initial_adapter)
    if cfg.reference not in ("start", "none"):
        named["reference"] = checkpoint_hash(cfg.reference)
    return named


def pairs_of(records: list[Record], template: Template, max_tokens: int, adapter: str | None = None) -> list[Pair]:
    """Each record's two answers as rows of one context, routed to the adapter under training."""
    found = []
    for record in records:
        chosen, rejected = preference_sequences(record, template, max_tokens)
        found.append((dataclasses.replace(chosen, adapter=adapter), dataclasses.replace(rejected, adapter=adapter)))
    say_cut([row for pair in found for row in pair], max_tokens)
    return found


def counts_of(pairs: list[Pair]) -> dict[str, Any]:
    """Rows, tokens and supervised tokens of both answers of all pairs."""
    return counts(row for pair in pairs for row in pair).model_dump()


def lengths(pairs: list[Pair]) -> list[int]:
    """Tokens of each pair as it is padded: twice its longer row."""
    return [2 * max(len(chosen.tokens), len(rejected.tokens)) for chosen, rejected in pairs]


def plan_pairs(pairs: list[Pair], cfg: PairsConfig, kind: Kind) -> Plan:
    """Every optimizer step: which pairs, in which micro-batches."""
    return plan_steps(lengths(pairs), cfg, micro_of(pairs, kind, cfg), rows_of_step=cfg.pairs_per_step)


def collate_pairs(pairs: list[Pair], template: Template, kind: Kind = "padded") -> Batch:
    """Rows chosen, rejected, chosen, rejected, … in one batch."""
    return collate([row for pair in pairs for row in pair], template.pad_id, kind)


def count_pairs(batch: Batch) -> float:
    """The denominator: pairs."""
    return batch.tokens_B_T.shape[0] / 2


def with_reference(pairs: list[Pair], policy: Policy, cfg: Config, run: RunDirectory) -> list[Pair]:
    """`pairs` with the reference's log-prob of every trained token, computed once and kept."""
    if cfg.reference == "none":
        return pairs
    reference = reference_of(policy, cfg)
    kept = Path(cfg.reference_cache or run.path)
    rows = reference_logprobs([row for pair in pairs for row in pair], reference, kept, lambda asked: score(list(zip(asked[0::2], asked[1::2], strict=True)), reference, cfg))
    return list(zip(rows[0::2], rows[1::2], strict=True))


def reference_of(policy: Policy, cfg: Any) -> Policy:
    """The policy itself as it starts, or the checkpoint that the config names. Raises ConfigError across tokenizers."""
    reference = policy if cfg.reference == "start" else load_policy(cfg, cfg.reference, frozen=True)
    same_family(f"reference {cfg.reference}", reference, policy)
    return reference


@torch.no_grad()
def score(pairs: list[Pair], reference: Policy, cfg: Config) -> list[Tensor]:
    """The reference's log-probs of every row, one tensor a row in order, with dropout off."""
    training = reference.model.training
    reference.model.eval()
    found: dict[tuple[int, int], Tensor] = {}
    whole = cfg.model_copy(update={"steps": None, "epochs": 1.0})
    kind = reference.kind(cfg.layout)
    for step in track(plan_pairs(pairs, whole, kind), "reference log-probs"):
        for micro in step:
            batch = collate_pairs([pairs[pair] for pair in micro], reference.template, kind).to(reference.device)
            logprobs_B_T = reference.token_logprobs(batch).logprobs_B_T.cpu()
            for at, pair in enumerate(micro):
                for side in (0, 1):
                    found[pair, side] = logprobs_B_T[2 * at + side, : len(pairs[pair][side].tokens)]
    reference.model.train(training)
    return [found[pair, side] for pair in range(len(pairs)) for side in (0, 1)]


def pair_loss(policy: Policy, batch: Batch, cfg: Config) -> LossOut:
    """The named loss of a batch of pairs, plus `sft_mix` of the chosen answers' cross-entropy, with what to watch."""
    mask_B_T, reference_B_T = batch.mask_B_T, batch.ref_logprobs_B_T
    logprobs_B_T = policy.token_logprobs(batch).logprobs_B_T
    sums_B, tokens_B = losses.sum_logprobs(logprobs_B_T, mask_B_T), mask_B_T.sum(-1)
    known_B = torch.zeros_like(sums_B) if reference_B_T is None else losses.sum_logprobs(reference_B_T, mask_B_T)
    pairs = Scored(sums_B[0::2], sums_B[1::2], known_B[0::2], known_B[1::2], tokens_B[0::2], tokens_B[1::2])
    out = LOSSES[cfg.loss](pairs, cfg)
    imitation_P = -pairs.chosen_P / pairs.chosen_tokens_P
    total = out.total + cfg.sft_mix * imitation_P.sum() if cfg.sft_mix else out.total
    with torch.no_grad():
        watched = {"chosen_nll": imitation_P.sum(), "chosen_length": pairs.chosen_tokens_P.sum(), "rejected_length": pairs.rejected_tokens_P.sum()}
        if reference_B_T is not None:
            away_B_T = (logprobs_B_T - reference_B_T).where(mask_B_T, 0.0)
            # the answers are not samples of the policy, so this is k2's size of the move, not an unbiased KL
            watched |= {
                "chosen_drift": (pairs.chosen_P - pairs.ref_chosen_P).sum(), "rejected_drift": (pairs.rejected_P - pairs.ref_rejected_P).sum(),
                "kl": (0.5 * away_B_T.square().sum(-1) / tokens_B).sum() / 2,
            }  # fmt: skip
    return LossOut(total, out.count, out.sums | watched)


def estimate(cfg: Config) -> Estimate:
    """What the run would cost, without training."""
    check(cfg)
    policy = prepare(cfg)
    pairs = pairs_of(load_records(cfg.data)[1], policy.template, cfg.max_tokens, cfg.trains)
    if cfg.reference != "none":
        pairs = [(zeroed(chosen), zeroed(rejected)) for chosen, rejected in pairs]
    rows, kind = [row for pair in pairs for row in pair], policy.kind(cfg.layout)
    plan = [[[2 * pair + side for pair in micro for side in (0, 1)] for micro in step] for step in plan_pairs(pairs, cfg, kind)]
    return estimate_rows(policy, rows, plan, lambda batch: pair_loss(policy, batch, cfg), cfg.optim.kind, forwards=int(cfg.reference != "none"), kind=kind)


def zeroed(row: Sequence) -> Sequence:
    """A row with a reference of zeros: the same work as with a real one."""
    return dataclasses.replace(row, ref_logprobs=[0.0] * len(row.tokens))
