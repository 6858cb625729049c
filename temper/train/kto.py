"""KTO: preference optimisation from single answers, each known to be good or bad, against a reference that stands still.

Pairs give two answers each; a judged conversation (`outcome.reward`) gives one. How far an answer must be from the
reference to count is measured on mismatched answers: each prompt with the answer to another one, scored at every step
by the policy as it then is (the reference point z₀ of the paper), over the whole optimizer step.
"""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor

from temper.core.errors import DataError
from temper.core.hashing import stream_seed
from temper.core.progress import track
from temper.core.records import Record
from temper.data.batch import Batch, collate, plan_units
from temper.data.inspect import counts
from temper.data.sequence import Sequence, preference_sequences, to_sequence
from temper.data.template import Template
from temper.policy import losses
from temper.policy.losses import LossOut
from temper.policy.model import Policy
from temper.train.estimate import Estimate, estimate_rows
from temper.train.learner import Learner, rows
from temper.train.preference import inputs, reference_of
from temper.train.reference import with_reference
from temper.train.stage import (
    AdaptableConfig,
    Plan,
    keep,
    load_records,
    micro_of,
    open_run,
    plan_steps,
    prepare,
    resume,
    rounded,
    save_trained,
    say_cut,
)


class Config(AdaptableConfig):
    """KTO (Ethayarajh et al. 2024) of a whole model, or of an adapter on it."""

    data: str = Field(description="manifest folder of pairs, or of conversations with outcome.reward, or of both")
    beta: float = Field(0.1, gt=0, description="how strongly the reference holds")
    good_from: float = Field(0.5, description="the reward from which a judged conversation counts as good")
    weight_good: float = Field(1.0, gt=0, description="λ_D; with n_D good and n_U bad answers the paper keeps λ_D·n_D / λ_U·n_U between 1 and 4/3")
    weight_bad: float = Field(1.0, gt=0, description="λ_U")
    reference: str = Field("start", description="start: the policy as it starts; or the path of a checkpoint")
    reference_cache: str | None = Field(None, description="folder that keeps the reference's log-probs for other runs; null: this run's own")
    answers_per_step: int = Field(32, gt=1, description="answers of one optimizer step")

    @model_validator(mode="after")
    def a_reference(self) -> Config:
        """Refuse to go without one."""
        if self.reference == "none":
            raise ValueError("kto compares every answer with a reference: set reference: start, or the path of a checkpoint")
        return self


def run(cfg: Config) -> dict[str, Any]:
    """Train on the answers of `cfg.data`; return the paths written and the last metrics. Done work returns at once."""
    started = time.monotonic()
    folder = open_run(cfg, "kto", inputs(cfg))
    if folder.done:
        return folder.result()
    policy = prepare(cfg)
    reference, kept = reference_of(policy, cfg), Path(cfg.reference_cache or folder.path)
    answers = answers_of(load_records(cfg.data)[1], policy.template, cfg)
    foils = mismatched(answers, cfg)
    answers, foils = (with_reference(some, reference, kept, lambda asked: score(asked, reference, cfg)) for some in (answers, foils))
    plan = plan_answers(answers, policy, cfg)
    learner = Learner(policy, cfg.optim, len(plan), seed=cfg.seed)
    metrics: dict[str, Any] = {}
    for step in track(range(resume(folder, learner), len(plan)), f"kto {cfg.out}"):
        point = reference_point(policy, [foils[row] for micro in plan[step] for row in micro], cfg)
        batches = [collate([answers[row] for row in micro], policy.template.pad_id, policy.kind(cfg.layout)) for micro in plan[step]]
        metrics = learner.forward_backward(batches, partial(answer_loss, policy, cfg, point), rows) | learner.optim_step()
        folder.log(learner.step, rounded(by_kind(metrics) | {"reference_point": float(point)}))
        keep(folder, learner, cfg)
    facts = {"answers": len(answers), "data": counts(answers).model_dump(), "good": sum(map(is_good, answers)), "steps": len(plan), "metrics": rounded(by_kind(metrics))}
    return folder.finish(save_trained(folder, policy, cfg) | facts, started)


def answers_of(records: list[Record], template: Template, cfg: Config) -> list[Sequence]:
    """Every answer as a row whose advantages say +1 (good) or −1 (bad). Raises DataError for a record that says neither."""
    found = []
    for record in records:
        if record.preference is not None:
            found += [judged(row, sign, cfg) for row, sign in zip(preference_sequences(record, template, cfg.max_tokens), (1.0, -1.0), strict=True)]
        elif record.outcome.reward is not None:
            found.append(judged(to_sequence(record, template, cfg.max_tokens), 1.0 if record.outcome.reward >= cfg.good_from else -1.0, cfg))
        else:
            raise DataError(f"record {record.id[:16]} is neither a pair nor judged", why="kto must know whether an answer is good or bad",
                            do="give it a preference, or an outcome.reward")  # fmt: skip
    say_cut(found, cfg.max_tokens)
    return found


def judged(row: Sequence, sign: float, cfg: Config) -> Sequence:
    """`row` with its verdict on every trained token, through the adapter under training."""
    return dataclasses.replace(row, advantages=[sign if weight else 0.0 for weight in row.weights], adapter=cfg.trains)


def is_good(row: Sequence) -> bool:
    """Whether the row's answer is a good one."""
    return row.advantages is not None and max(row.advantages) > 0


def mismatched(answers: list[Sequence], cfg: Config) -> list[Sequence]:
    """Each row's prompt with the answer of a row that has another prompt: every answer once, in random order.

    Raises DataError where one prompt has more than half of the answers: then no such order exists.
    """
    starts = [next(at for at, weight in enumerate(row.weights) if weight) for row in answers]
    prompts = [tuple(row.tokens[:start]) for row, start in zip(answers, starts, strict=True)]
    order = list(range(len(answers)))
    Random(stream_seed(cfg.seed, "mismatched")).shuffle(order)
    order.sort(key=prompts.__getitem__)  # rows of one prompt side by side
    longest = max(Counter(prompts).values())
    if 2 * longest > len(order):
        raise DataError(f"one prompt has {longest} of {len(order)} answers", why="kto's reference point needs answers to other prompts", do="add other prompts")
    found: list[Sequence] = [answers[0]] * len(answers)
    for place, row in enumerate(order):
        other = order[(place + longest) % len(order)]  # beyond the end of any one prompt's stretch
        tokens = [*answers[row].tokens[: starts[row]], *answers[other].tokens[starts[other] :]][: cfg.max_tokens]
        weights = [*answers[row].weights[: starts[row]], *answers[other].weights[starts[other] :]][: cfg.max_tokens]
        found[row] = dataclasses.replace(answers[row], tokens=tokens, weights=weights, advantages=None)
    return found


def plan_answers(answers: list[Sequence], policy: Policy, cfg: Config) -> Plan:
    """Every optimizer step: which answers, in which micro-batches."""
    micro = micro_of([[row] for row in answers], policy.kind(cfg.layout), cfg)
    return plan_steps([len(row.tokens) for row in answers], cfg, micro, rows_of_step=cfg.answers_per_step)


@torch.no_grad()
def score(some: list[Sequence], reference: Policy, cfg: Config) -> list[Tensor]:
    """The log-probs of every row, one tensor a row in order, with dropout off."""
    training, kind = reference.model.training, reference.kind(cfg.layout)
    reference.model.eval()
    found: list[Tensor] = [torch.empty(0)] * len(some)
    for micro in plan_units([[row] for row in some], kind, cfg.tokens_per_batch):
        batch = collate([some[row] for row in micro], reference.template.pad_id, kind).to(reference.device)
        logprobs_B_T = reference.token_logprobs(batch).logprobs_B_T.cpu()
        for at, row in enumerate(micro):
            found[row] = logprobs_B_T[at, : len(some[row].tokens)]
    reference.model.train(training)
    return found


def reference_point(policy: Policy, foils: list[Sequence], cfg: Config) -> Tensor:
    """z₀ of one optimizer step: the mean of log π/π_ref over its mismatched answers, not below zero; without gradient."""
    known = [sum(value for value, weight in zip(foil.ref_logprobs or [], foil.weights, strict=True) if weight) for foil in foils]
    own = [float(logprobs_T.sum()) for logprobs_T in score(foils, policy, cfg)]
    return torch.tensor(sum(own) - sum(known)).div(len(foils)).clamp(min=0)


def answer_loss(policy: Policy, cfg: Config, point: Tensor, batch: Batch) -> LossOut:
    """`losses.kto` of a batch of answers, with what to watch."""
    assert batch.advantages_B_T is not None
    assert batch.ref_logprobs_B_T is not None
    mask_B_T = batch.mask_B_T
    logratios_B = losses.sum_logprobs(policy.token_logprobs(batch).logprobs_B_T - batch.ref_logprobs_B_T, mask_B_T)
    good_B = (batch.advantages_B_T > 0).any(-1)
    out = losses.kto(logratios_B, good_B, point.to(logratios_B.device), beta=cfg.beta, weight_good=cfg.weight_good, weight_bad=cfg.weight_bad)
    drift = logratios_B.detach()
    return LossOut(out.total, out.count, out.sums | {"good": good_B.sum(), "drift_good": drift.where(good_B, 0.0).sum(), "drift_bad": drift.where(~good_B, 0.0).sum()})


def by_kind(metrics: dict[str, Any]) -> dict[str, Any]:
    """Metrics with rewards and drifts per good and per bad answer instead of per answer; None where there was none."""
    share = metrics.get("good", 0.0)
    of = {"good": share, "bad": 1 - share}
    return metrics | {f"{name}_{kind}": metrics[f"{name}_{kind}"] / of[kind] if of[kind] else None for name in ("reward", "drift") for kind in of if f"{name}_{kind}" in metrics}


def estimate(cfg: Config) -> Estimate:
    """What the run would cost, without training: the mismatched answers and the reference are passes without a backward."""
    policy = prepare(cfg)
    answers = [dataclasses.replace(row, ref_logprobs=[0.0] * len(row.tokens)) for row in answers_of(load_records(cfg.data)[1], policy.template, cfg)]
    loss = partial(answer_loss, policy, cfg, torch.tensor(0.0))
    return estimate_rows(policy, answers, plan_answers(answers, policy, cfg), loss, cfg.optim.kind, forwards=2, kind=policy.kind(cfg.layout))
