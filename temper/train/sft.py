"""Supervised fine-tuning: the next token of what an assistant said, on admitted records.

With `lora` an adapter is trained and `out/adapter` written in PEFT's format; otherwise `out/model`. The loss is
the cross-entropy of supervised tokens over the sum of their weights in the whole optimizer batch: with
`weighting: token` every trained token counts the same, with `sequence` every row does.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any, Literal

import torch
from pydantic import Field

from temper.core.progress import track
from temper.core.records import Record
from temper.data.batch import Batch, collate
from temper.data.inspect import counts
from temper.data.layout import Kind
from temper.data.sequence import Sequence
from temper.policy.losses import LossOut
from temper.policy.model import Policy
from temper.policy.noise import neftune
from temper.train.estimate import Estimate, estimate_rows
from temper.train.learner import Learner
from temper.train.stage import (
    AdaptableConfig,
    Plan,
    checkpoint_hash,
    hold_unseen,
    keep,
    load_records,
    manifest_hash,
    micro_of,
    open_run,
    plan_steps,
    prepare,
    resume,
    rounded,
    rows_of,
    save_trained,
)


class Config(AdaptableConfig):
    """Supervised fine-tuning of a whole model, or of an adapter on it."""

    data: str = Field(description="manifest folder of the rows to train on")
    dev: str | None = Field(None, description="manifest folder whose loss is measured at the end of each epoch's worth of steps")
    dev_every: int | None = Field(None, gt=0, description="optimizer steps between dev measurements; null: only at the end")
    weighting: Literal["token", "sequence"] = Field("token", description="what counts the same: every trained token, or every row")
    z_loss: float = Field(0.0, ge=0, description="coefficient of logZ², which keeps logits from drifting (PaLM: 1e-4); 0: off")
    neftune: float = Field(0.0, ge=0, description="noise on the embeddings in training (NEFTune's alpha, 5 to 15); 0: off")
    hold_unseen: bool = Field(False, description="keep the embeddings of tokens that no row holds, so that such words can still be said")


def run(cfg: Config) -> dict[str, Any]:
    """Train on `cfg.data`; return the paths written and the last metrics. Done work returns at once."""
    started = time.monotonic()
    folder = open_run(cfg, "sft", inputs(cfg))
    if folder.done:
        return folder.result()
    policy = prepare(cfg)
    rows = sequences(load_records(cfg.data)[1], policy, cfg)
    dev = sequences(load_records(cfg.dev)[1], policy, cfg) if cfg.dev else []
    kind = policy.kind(cfg.layout)
    plan = plan_rows(rows, cfg, kind)
    learner = Learner(policy, cfg.optim, len(plan), seed=cfg.seed)
    if cfg.hold_unseen:
        hold_unseen(learner, rows)
    metrics: dict[str, Any] = {}

    def loss(batch: Batch) -> LossOut:
        with neftune(policy, batch, cfg.neftune):
            return policy.cross_entropy(batch, z_loss=cfg.z_loss)

    for step in track(range(resume(folder, learner), len(plan)), f"sft {cfg.out}"):
        batches = [collate([rows[row] for row in micro], policy.template.pad_id, kind) for micro in plan[step]]
        metrics = learner.forward_backward(batches, loss) | learner.optim_step()
        if dev and (learner.step == len(plan) or (cfg.dev_every and learner.step % cfg.dev_every == 0)):
            metrics["dev_loss"] = mean_loss(policy, dev, cfg)
        folder.log(learner.step, rounded(metrics))
        keep(folder, learner, cfg)
    return folder.finish(save_trained(folder, policy, cfg) | {"rows": len(rows), "data": counts(rows).model_dump(), "steps": len(plan), "metrics": rounded(metrics)}, started)


def inputs(cfg: Config) -> dict[str, str]:
    """The content hashes that, with the config, name this work."""
    named = {"data": manifest_hash(cfg.data), "base": checkpoint_hash(cfg.base)}
    if cfg.dev:
        named["dev"] = manifest_hash(cfg.dev)
    if cfg.initial_adapter:
        named["initial_adapter"] = checkpoint_hash(cfg.initial_adapter)
    return named


def sequences(records: list[Record], policy: Policy, cfg: Config) -> list[Sequence]:
    """Each record as a training row, weighted as the config says and routed to the adapter under training."""
    rows = []
    for row in rows_of(records, policy.template, cfg.max_tokens):
        share = 1.0 if cfg.weighting == "token" else 1.0 / sum(row.weights)
        rows.append(dataclasses.replace(row, weights=[weight * share for weight in row.weights], adapter=cfg.trains))
    return rows


def plan_rows(rows: list[Sequence], cfg: Config, kind: Kind) -> Plan:
    """Every optimizer step: which rows, in which micro-batches."""
    return plan_steps([len(row.tokens) for row in rows], cfg, micro_of([[row] for row in rows], kind, cfg))


@torch.no_grad()
def mean_loss(policy: Policy, rows: list[Sequence], cfg: Config) -> float:
    """The mean loss of `rows`, weighted as in training, with dropout off."""
    total = weight = 0.0
    policy.model.eval()
    kind = policy.kind(cfg.layout)
    for micro in plan_rows(rows, cfg.model_copy(update={"steps": None, "epochs": 1.0}), kind):
        for numbers in micro:
            batch = collate([rows[row] for row in numbers], policy.template.pad_id, kind).to(policy.device)
            total += float(policy.cross_entropy(batch).total)
            weight += float(batch.weights_B_T.sum())
    policy.model.train()
    return total / weight


def estimate(cfg: Config) -> Estimate:
    """What the run would cost, without training."""
    policy = prepare(cfg)
    rows = sequences(load_records(cfg.data)[1], policy, cfg)
    kind = policy.kind(cfg.layout)
    return estimate_rows(policy, rows, plan_rows(rows, cfg, kind), policy.cross_entropy, cfg.optim.kind, kind=kind)
