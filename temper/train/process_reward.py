"""A step-level (process) reward model: a scalar head that says at the end of each step whether it was right.

A record's labels stand in `outcome.detail.steps`, one for each step, in order: 1 right, 0 wrong, a share between, or
null for a step that nobody judged. A step is an assistant turn, which ends with its end token, or (`step: paragraph`) a
paragraph of the answer, which ends where a blank line closes in the turn's own text. Where labels and steps differ in
number the record is refused, so a blank line that nobody meant is seen.
"""

from __future__ import annotations

import re
import time
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from temper.core.errors import DataError
from temper.core.progress import track
from temper.core.records import Record
from temper.data.batch import Batch, collate
from temper.data.inspect import counts
from temper.data.sequence import Sequence, check_turns
from temper.data.template import Template
from temper.policy.inputs import scatter
from temper.policy.losses import LossOut, process_reward
from temper.policy.scalar_head import RewardModel
from temper.train.estimate import Estimate, estimate_rows
from temper.train.learner import Learner
from temper.train.reward import prepare
from temper.train.shared_run import say, write_output
from temper.train.stage import (
    StageConfig,
    checkpoint_hash,
    keep,
    load_records,
    manifest_hash,
    micro_of,
    open_run,
    plan_steps,
    resume,
    rounded,
    say_cut,
)

BLANK = re.compile(r"\n\n+")  # what closes a paragraph


class Config(StageConfig):
    """A scalar head on the base, trained on judged steps."""

    data: str = Field(description="manifest folder of records with outcome.detail.steps")
    heldout: str | None = Field(None, description="manifest folder of records that are only measured")
    step: Literal["turn", "paragraph"] = Field("turn", description="what a step is: an assistant turn, or a paragraph of one")


def run(cfg: Config) -> dict[str, Any]:
    """Train on the steps of `cfg.data`; return the path written and the held-out accuracy. Done work returns at once."""
    started = time.monotonic()
    folder = open_run(cfg, "process_reward", {"base": checkpoint_hash(cfg.base)} | {name: manifest_hash(path) for name, path in (("data", cfg.data), ("heldout", cfg.heldout)) if path})
    if folder.done:
        return folder.result()
    judge = prepare(cfg)  # type: ignore[arg-type]
    rows, lost = step_rows(load_records(cfg.data)[1], judge.template, cfg)
    heldout = step_rows(load_records(cfg.heldout)[1], judge.template, cfg)[0] if cfg.heldout else []
    plan, kind = planned(rows, judge, cfg), judge.kind(cfg.layout)
    learner = Learner(judge, cfg.optim, len(plan), seed=cfg.seed)
    metrics: dict[str, Any] = {}
    for step in track(range(resume(folder, learner), len(plan)), f"process reward {cfg.out}"):
        batches = [collate([rows[row] for row in micro], judge.template.pad_id, kind) for micro in plan[step]]
        metrics = learner.forward_backward(batches, lambda batch: step_loss(judge, batch)) | learner.optim_step()
        if heldout and learner.step == len(plan):
            metrics |= measure(judge, heldout, cfg)
        folder.log(learner.step, rounded(metrics))
        keep(folder, learner, cfg)
    path = str(write_output(folder, "reward_model", judge.model, judge.save))
    facts = {"rows": len(rows), "data": counts(rows).model_dump(), "judged_steps": sum(row.supervised for row in rows), "judged_steps_cut": lost, "steps": len(plan), "metrics": rounded(metrics)}
    return folder.finish({"reward_model": path, "hash": checkpoint_hash(path), **facts}, started)


def planned(rows: list[Sequence], judge: RewardModel, cfg: Config) -> list[list[list[int]]]:
    """Every optimizer step: which rows, in which micro-batches."""
    return plan_steps([len(row.tokens) for row in rows], cfg, micro_of([[row] for row in rows], judge.kind(cfg.layout), cfg))


def step_rows(records: list[Record], template: Template, cfg: Config) -> tuple[list[Sequence], int]:
    """Each record's `step_row`, and how many judged steps stand behind the longest row allowed; what is cut is said."""
    rows = [step_row(record, template, cfg) for record in records]
    lost = sum(label is not None for record in records for label in record.outcome.detail["steps"]) - sum(row.supervised for row in rows)
    say_cut(rows, cfg.max_tokens)
    if lost:
        say(f"{lost} judged steps end behind max_tokens={cfg.max_tokens}: they are not trained on")
    return rows, lost


def step_row(record: Record, template: Template, cfg: Config) -> Sequence:
    """A record as a row that is trained at the ends of its judged steps. Raises DataError naming the record."""
    labels = record.outcome.detail.get("steps")
    if not isinstance(labels, list) or not all(label is None or (isinstance(label, int | float) and 0 <= label <= 1) for label in labels):
        raise fault(record, "has no step labels", "outcome.detail.steps must be a list of numbers in [0, 1] or null", "label its steps, or remove it")
    tokens, ends = step_ends(record, template, cfg.step)
    if len(labels) != len(ends):
        raise fault(record, f"has {len(labels)} labels and {len(ends)} steps", f"a step is a {cfg.step} here", "label each step; null where nobody judged")
    judged = {end: float(label) for end, label in zip(ends, labels, strict=True) if label is not None and end < cfg.max_tokens}
    if not judged:
        raise fault(record, f"has no judged step within max_tokens={cfg.max_tokens}", "it would train nothing", "raise max_tokens, or remove it")
    cut, tokens = max(0, len(tokens) - cfg.max_tokens), tokens[: cfg.max_tokens]
    weights, targets = ([judged.get(at, 0.0) if of_label else float(at in judged) for at in range(len(tokens))] for of_label in (False, True))
    return Sequence(tokens=tokens, weights=weights, targets=targets, group=record.id, record=record.id, cut=cut)


def fault(record: Record, what: str, why: str, do: str) -> DataError:
    """A DataError that names the record."""
    return DataError(f"record {record.id[:16]} {what}", why=why, do=do)


def step_ends(record: Record, template: Template, step: str) -> tuple[list[int], list[int]]:
    """The record's tokens, and the place of the last token of each step.

    A turn ends with its end token. A paragraph ends with the token that closes the blank line after it, the last one
    with the turn's end token.
    """
    check_turns(record, record.messages)
    found = template.supervise(record.messages, record.tools)
    ends = []
    for number in sorted({number for number, trained in zip(found.message_of, found.mask, strict=True) if trained}):
        places = [at for at, owner in enumerate(found.message_of) if owner == number]
        if step == "paragraph":
            ends += paragraph_ends([found.tokens[at] for at in places], places, template)
        ends.append(places[-1])
    return found.tokens, ends


def paragraph_ends(tokens: list[int], places: list[int], template: Template) -> list[int]:
    """The places of the tokens that close a blank line inside a turn."""
    closed, ends = 0, []
    for count in range(1, len(tokens)):
        blank = len(BLANK.findall(template.tokenizer.decode(tokens[:count])))
        if blank > closed:
            closed = blank
            ends.append(places[count - 1])
    return ends


def step_loss(judge: RewardModel, batch: Batch) -> LossOut:
    """`losses.process_reward` of a batch: the head is read at the last token of each judged step."""
    assert batch.targets_B_T is not None
    at_N = batch.mask_B_T.flatten().nonzero().squeeze(1)
    scores_B_T = scatter(judge.scores(batch, at_N), at_N, batch.tokens_B_T.shape)
    return process_reward(scores_B_T, batch.targets_B_T, batch.mask_B_T, weights_B_T=batch.weights_B_T)


@torch.no_grad()
def measure(judge: RewardModel, rows: list[Sequence], cfg: Config) -> dict[str, float]:
    """Accuracy and cross-entropy a step on records that were not trained on, with dropout off."""
    judge.model.eval()
    right = total = count = 0.0
    kind = judge.kind(cfg.layout)
    for step in planned(rows, judge, cfg.model_copy(update={"steps": None, "epochs": 1.0})):
        for micro in step:
            out = step_loss(judge, collate([rows[row] for row in micro], judge.template.pad_id, kind).to(judge.device))
            right, total, count = right + float(out.sums["accuracy"]), total + float(out.total), count + float(out.count)
    judge.model.train()
    return {"heldout_accuracy": right / count, "heldout_loss": total / count, "heldout_steps": count}


@torch.no_grad()
def score_steps(judge: RewardModel, record: Record, step: Literal["turn", "paragraph"] = "turn") -> list[float]:
    """The probability that each step of a record is right; a solution is as good as its product, or its smallest one."""
    tokens, ends = step_ends(record, judge.template, step)
    batch = collate([Sequence(tokens=tokens, weights=[0.0] * len(tokens))], judge.template.pad_id).to(judge.device)
    training = judge.model.training
    judge.model.eval()
    scores_N: Tensor = judge.scores(batch, torch.tensor(ends, device=judge.device))
    judge.model.train(training)
    return [float(score) for score in scores_N.sigmoid()]


def estimate(cfg: Config) -> Estimate:
    """What the run would cost, without training."""
    judge = prepare(cfg)  # type: ignore[arg-type]
    rows, _ = step_rows(load_records(cfg.data)[1], judge.template, cfg)
    return estimate_rows(judge, rows, planned(rows, judge, cfg), lambda batch: step_loss(judge, batch), cfg.optim.kind, kind=judge.kind(cfg.layout))
