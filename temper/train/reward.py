"""A Bradley-Terry reward model of admitted pairs: a judge to compare with, never the number that releases a model."""

from __future__ import annotations

import time
from typing import Any

import torch
from pydantic import Field

from temper.core.errors import DataError
from temper.core.progress import track
from temper.core.records import Record
from temper.data.batch import Batch
from temper.policy.losses import LossOut, bradley_terry
from temper.policy.scalar_head import RewardModel
from temper.train.estimate import Estimate, estimate_rows
from temper.train.learner import Learner
from temper.train.preference import Pair, PairsConfig, collate_pairs, count_pairs, counts_of, pairs_of, plan_pairs
from temper.train.shared_run import write_output
from temper.train.stage import (
    checkpoint_hash,
    keep,
    load_policy,
    load_records,
    manifest_hash,
    open_run,
    resume,
    rounded,
)


class Config(PairsConfig):
    """A scalar head on the base, trained on pairs."""

    data: str = Field(description="manifest folder of the pairs")
    heldout: str | None = Field(None, description="manifest folder of pairs that are only measured")
    margins: bool = Field(False, description="by how much a pair's answers must differ: outcome.detail.margin of its record (Llama 2)")
    centring: float = Field(0.01, ge=0, description="coefficient of (r_chosen + r_rejected)², which keeps rewards around zero")


def run(cfg: Config) -> dict[str, Any]:
    """Train on the pairs of `cfg.data`; return the path written and the held-out accuracy. Done work returns at once."""
    started = time.monotonic()
    folder = open_run(cfg, "reward", inputs(cfg))
    if folder.done:
        return folder.result()
    judge, records = prepare(cfg), load_records(cfg.data)[1]
    pairs, margins = pairs_of(records, judge.template, cfg.max_tokens), margins_of(records) if cfg.margins else {}
    heldout = pairs_of(load_records(cfg.heldout)[1], judge.template, cfg.max_tokens) if cfg.heldout else []
    kind = judge.kind(cfg.layout)
    plan = plan_pairs(pairs, cfg, kind)
    learner = Learner(judge, cfg.optim, len(plan), seed=cfg.seed)
    metrics: dict[str, Any] = {}

    def loss(batch: Batch) -> LossOut:
        return reward_loss(judge, batch, cfg, margins)

    for step in track(range(resume(folder, learner), len(plan)), f"reward {cfg.out}"):
        batches = [collate_pairs([pairs[pair] for pair in micro], judge.template, kind) for micro in plan[step]]
        metrics = learner.forward_backward(batches, loss, count_pairs) | learner.optim_step()
        if heldout and learner.step == len(plan):
            metrics |= measure(judge, heldout, cfg)
        folder.log(learner.step, rounded(metrics))
        keep(folder, learner, cfg)
    path = str(write_output(folder, "reward_model", judge.model, judge.save))
    return folder.finish({"reward_model": path, "hash": checkpoint_hash(path), "pairs": len(pairs), "data": counts_of(pairs), "steps": len(plan), "metrics": rounded(metrics)}, started)


def inputs(cfg: Config) -> dict[str, str]:
    """The content hashes that, with the config, name this work."""
    named = {"data": manifest_hash(cfg.data), "base": checkpoint_hash(cfg.base)}
    return named | {"heldout": manifest_hash(cfg.heldout)} if cfg.heldout else named


def prepare(cfg: Config) -> RewardModel:
    """The base with a fresh scalar head."""
    policy = load_policy(cfg)
    policy.template.require()
    judge = RewardModel(policy)
    judge.model.train()
    return judge


def margins_of(records: list[Record]) -> dict[str, float]:
    """By how much each record's answers must differ. Raises DataError for one that does not say."""
    found = {}
    for record in records:
        margin = record.outcome.detail.get("margin")
        if not isinstance(margin, int | float) or isinstance(margin, bool):
            raise DataError(f"record {record.id[:16]} has no margin", why="`margins` is on, and outcome.detail.margin is not a number",
                            do="give every pair one, or set margins: false")  # fmt: skip
        found[record.id] = float(margin)
    return found


def reward_loss(judge: RewardModel, batch: Batch, cfg: Config, margins: dict[str, float] | None = None) -> LossOut:
    """Bradley-Terry of a batch of pairs, with the margins of their records where there are any."""
    rewards_B = judge.rewards(batch)
    margin_P = torch.tensor([margins[record] for record in batch.records[0::2]], device=rewards_B.device) if margins else None
    return bradley_terry(rewards_B[0::2], rewards_B[1::2], margin_P=margin_P, centre=cfg.centring)


@torch.no_grad()
def measure(judge: RewardModel, pairs: list[Pair], cfg: Config) -> dict[str, float]:
    """Accuracy, margin and count on pairs that were not trained on, with dropout off."""
    judge.model.eval()
    right = margin = 0.0
    whole = cfg.model_copy(update={"steps": None, "epochs": 1.0})
    kind = judge.kind(cfg.layout)
    for step in plan_pairs(pairs, whole, kind):
        for micro in step:
            sums = reward_loss(judge, collate_pairs([pairs[pair] for pair in micro], judge.template, kind).to(judge.device), cfg).sums
            right, margin = right + float(sums["accuracy"]), margin + float(sums["margin"])
    judge.model.train()
    return {"heldout_accuracy": right / len(pairs), "heldout_margin": margin / len(pairs), "heldout_pairs": len(pairs)}


def estimate(cfg: Config) -> Estimate:
    """What the run would cost, without training."""
    judge = prepare(cfg)
    pairs = pairs_of(load_records(cfg.data)[1], judge.template, cfg.max_tokens)
    rows, kind = [row for pair in pairs for row in pair], judge.kind(cfg.layout)
    plan = [[[2 * pair + side for pair in micro for side in (0, 1)] for micro in step] for step in plan_pairs(pairs, cfg, kind)]
    return estimate_rows(judge, rows, plan, lambda batch: reward_loss(judge, batch, cfg), cfg.optim.kind, kind=kind)
