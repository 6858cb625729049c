"""White-box distillation: a student of at most half the parameters learns the teacher's distribution, token by token.

The student starts as some of the teacher's layers between its embeddings and its head. It is taught on admitted
text, or (`on_policy`) on its own answers to an environment's tasks, which the teacher corrects where they stand.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from pydantic import Field, model_validator

from temper.core.config import Config as CoreConfig
from temper.core.errors import ConfigError, DataError
from temper.core.hashing import stream_seed
from temper.core.progress import track
from temper.data.batch import Batch, collate, plan_units
from temper.data.inspect import counts
from temper.data.sequence import Sequence, episode_sequence
from temper.policy.losses import LossOut, forward_kl, jsd, reverse_kl, top_k
from temper.policy.model import Policy
from temper.rollout.engine import Engine
from temper.rollout.environment import Environment, Task
from temper.rollout.episodes import collect
from temper.train import parallel
from temper.train.estimate import PROBE_BELOW, Estimate, estimate_rows
from temper.train.learner import Learner
from temper.train.shared_run import write_output
from temper.train.stage import (
    StageConfig,
    checkpoint_hash,
    keep,
    load_environment,
    load_policy,
    load_records,
    manifest_hash,
    micro_of,
    open_run,
    plan_steps,
    resume,
    rounded,
    rows_of,
    tasks_of,
    training_tasks,
)  # fmt: skip
from temper.train.student import count_parameters, make_student

LARGEST_SHARE = 0.5  # of the teacher's parameters
DIVERGENCES: dict[str, Callable[..., torch.Tensor]] = {"forward_kl": forward_kl, "reverse_kl": reverse_kl, "jsd": jsd}


class StudentConfig(CoreConfig):
    """How the student is made: layers picked from the teacher, or a checkpoint of its own."""

    layers: int | None = Field(None, gt=0, description="layers kept, picked evenly from the first to the last")
    take: tuple[int, ...] | None = Field(None, description="the very layers to keep, from 0; overrides the even choice")
    intermediate: int | None = Field(None, gt=0, description="MLP neurons kept a layer, those with the largest weights; null keeps all")
    checkpoint: str | None = Field(None, description="a smaller checkpoint of the same tokenizer to start from instead")

    @model_validator(mode="after")
    def one_start(self) -> StudentConfig:
        """Refuse a student that is made in two ways, or in none."""
        if (self.checkpoint is None) == (self.layers is None and self.take is None):
            raise ValueError("give either `layers` (or `take`), or `checkpoint`")
        return self


class Config(StageConfig):
    """Distillation of `base`, the teacher, into a smaller student."""

    student: StudentConfig
    data: str | None = Field(None, description="manifest folder of the text to teach on")
    dev: str | None = Field(None, description="manifest folder on which the divergence is measured at the end")
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
    mix: float = Field(0.5, gt=0, lt=1, description="jsd: the teacher's share of the mixture")
    temperature: float = Field(1.0, gt=0, description="of both distributions; gradients shrink with its square, so raise optim.lr with it")
    top_k: int | None = Field(None, gt=0, description="compare only the teacher's K likeliest tokens and 'any other'; null: the whole vocabulary")
    on_policy: bool = Field(False, description="teach on the student's own answers instead of text")
    environment: str | None = Field(None, description="whose tasks the student answers, where on_policy")
    environment_options: dict[str, Any] = Field({}, description="keywords for the environment's factory")
    tasks_per_step: int = Field(32, gt=0, description="tasks answered a step, where on_policy")
    sampling_temperature: float = Field(1.0, gt=0)

    @model_validator(mode="after")
    def one_source(self) -> Config:
        """Refuse a config without anything to teach on."""
        if self.on_policy and not self.environment:
            raise ValueError("on_policy needs an `environment` whose tasks the student answers")
        if not self.on_policy and not self.data:
            raise ValueError("give `data`, or set on_policy and an `environment`")
        return self


def run(cfg: Config) -> dict[str, Any]:
    """Teach a student; return the path written and the last metrics. Done work returns at once."""
    started = time.monotonic()
    environment = load_environment(cfg.environment, cfg.environment_options) if cfg.on_policy and cfg.environment else None
    folder = open_run(cfg, "distill", inputs(cfg, environment))
    if folder.done:
        return folder.result()
    teacher, student = prepare(cfg)
    rows = [] if environment else rows_of(load_records(str(cfg.data))[1], student.template, cfg.max_tokens)
    steps, batches_of = source(cfg, student, environment, rows)
    learner = Learner(student, cfg.optim, steps, seed=cfg.seed)
    metrics: dict[str, Any] = {}

    def loss(batch: Batch) -> LossOut:
        return student.divergence(batch, teacher, measure_of(cfg), temperature=cfg.temperature)

    for step in track(range(resume(folder, learner), steps), f"distill {cfg.out}"):
        batches = batches_of(step)
        if batches:
            metrics = learner.forward_backward(batches, loss) | learner.optim_step()
        else:  # on policy: no answer of this step has a token
            learner.skip()
            metrics = {}
        if cfg.dev and learner.step == steps:
            metrics["dev_divergence"] = mean_divergence(student, teacher, cfg)
        folder.log(learner.step, rounded(metrics))
        keep(folder, learner, cfg)
    path, sizes = str(write_output(folder, "model", student.model, student.save)), [count_parameters(student.model), count_parameters(teacher.model)]
    facts = {"student_parameters": sizes[0], "teacher_parameters": sizes[1], "data": counts(rows).model_dump() if rows else None, "steps": steps, "metrics": rounded(metrics)}
    return folder.finish({"model": path, "hash": checkpoint_hash(path), **facts}, started)


def inputs(cfg: Config, environment: Environment | None) -> dict[str, str]:
    """The content hashes that, with the config, name this work."""
    named = {"base": checkpoint_hash(cfg.base)}
    if cfg.student.checkpoint:
        named["student"] = checkpoint_hash(cfg.student.checkpoint)
    if environment is not None:
        named["environment"] = environment.version
    return named | {name: manifest_hash(path) for name, path in (("data", cfg.data), ("dev", cfg.dev)) if path}


def prepare(cfg: Config) -> tuple[Policy, Policy]:
    """Teacher, frozen and in evaluation mode, and student. Raises ConfigError where the student is too large, DataError across tokenizers."""
    teacher = load_policy(cfg)
    teacher.template.require()
    teacher.model.requires_grad_(False).eval()
    if cfg.student.checkpoint:
        student = load_policy(cfg, cfg.student.checkpoint)
    else:
        student = make_student(teacher, layers=cfg.student.layers, take=cfg.student.take, intermediate=cfg.student.intermediate)
    if student.tokenizer.get_vocab() != teacher.tokenizer.get_vocab():
        raise DataError(
            f"teacher {cfg.base} and student {student.path} have different tokenizers",
            why="white-box distillation compares distributions over the same tokens, and no exact map exists between two vocabularies",
            do="use a student with the teacher's tokenizer, or train it by sft on text that the teacher wrote",
        )
    small, large = count_parameters(student.model), count_parameters(teacher.model)
    if small > LARGEST_SHARE * large:
        raise ConfigError(f"the student has {small:,} parameters, the teacher {large:,}", why=f"that is {small / large:.0%}; at most {LARGEST_SHARE:.0%} is a student",
                          do="lower student.layers or student.intermediate")  # fmt: skip
    teacher.freeze_base()  # once the student is made of it: its matrices may be held in half from here on
    student.model.train()
    student.recompute = cfg.recompute
    return teacher, student


def measure_of(cfg: Config) -> Callable[..., torch.Tensor]:
    """The divergence of two rows of log-probabilities that the config names."""
    measure = partial(jsd, beta=cfg.mix) if cfg.divergence == "jsd" else DIVERGENCES[cfg.divergence]
    return measure if cfg.top_k is None else partial(top_k, k=cfg.top_k, measure=measure)


def source(cfg: Config, student: Policy, environment: Environment | None, rows: list[Sequence]) -> tuple[int, Callable[[int], list[Batch]]]:
    """How many steps there are, and what gives the batches of each: `rows` of admitted text, or the student's own answers."""
    if environment is None:
        kind = student.kind(cfg.layout)
        plan = plan_steps([len(row.tokens) for row in rows], cfg, micro_of([[row] for row in rows], kind, cfg))
        return len(plan), lambda step: [collate([rows[row] for row in micro], student.template.pad_id, kind) for micro in plan[step]]
    engine, tasks = Engine(student), training_tasks(environment)
    steps = cfg.steps or max(1, round(cfg.epochs * len(tasks) / cfg.tasks_per_step))

    def answers(step: int) -> list[Batch]:
        return batched(sampled(engine, environment, tasks_of(step, tasks, cfg.tasks_per_step, cfg.seed), cfg, step), student, cfg)

    return steps, answers


def sampled(engine: Engine, environment: Environment, tasks: list[Task], cfg: Config, step: int) -> list[Sequence]:
    """The student's own answers as rows: every sampled token is taught, whatever became of the episode."""
    with parallel.whole(engine.policy.model):
        mine = collect(engine, environment, parallel.share(tasks), temperature=cfg.sampling_temperature, seed=stream_seed(cfg.seed, "answers", step))
    groups = parallel.gathered(mine)
    return [episode_sequence(record, 0.0) for group in groups for record in group if any(turn.token_ids for turn in record.sampled)]


def batched(rows: list[Sequence], student: Policy, cfg: Config) -> list[Batch]:
    """Rows in micro-batches."""
    if not rows:
        return []
    kind = student.kind(cfg.layout)
    planned = parallel.spread(plan_units([[row] for row in rows], kind, cfg.tokens_per_batch))
    return [collate([rows[row] for row in micro], student.template.pad_id, kind) for micro in planned]


@torch.no_grad()
def mean_divergence(student: Policy, teacher: Policy, cfg: Config) -> float:
    """The mean divergence of a token of `cfg.dev`, with dropout off."""
    student.model.eval()
    total = weight = 0.0
    for batch in batched(rows_of(load_records(str(cfg.dev))[1], student.template, cfg.max_tokens), student, cfg):
        total += float(student.divergence(batch.to(student.device), teacher, measure_of(cfg), temperature=cfg.temperature).total)
        weight += float(batch.weights_B_T.sum())
    student.model.train()
    return total / weight


def estimate(cfg: Config) -> Estimate:
    """What the run would cost, without training; where on_policy, one step of answers is sampled and timed."""
    teacher, student = prepare(cfg)
    environment = load_environment(cfg.environment, cfg.environment_options) if cfg.on_policy and cfg.environment else None
    started, kind = time.perf_counter(), student.kind(cfg.layout)
    if environment is None:
        rows = rows_of(load_records(str(cfg.data))[1], student.template, cfg.max_tokens)
        plan, sampling = plan_steps([len(row.tokens) for row in rows], cfg, micro_of([[row] for row in rows], kind, cfg)), 0.0
    else:
        tasks = training_tasks(environment)
        rows = sampled(Engine(student), environment, tasks_of(0, tasks, cfg.tasks_per_step, cfg.seed), cfg, 0)
        sampling = time.perf_counter() - started
        plan = [[list(range(len(rows)))]] * (cfg.steps or max(1, round(cfg.epochs * len(tasks) / cfg.tasks_per_step)))
    large = count_parameters(student.model) >= PROBE_BELOW
    forwards = round(count_parameters(teacher.model) / count_parameters(student.model)) if large else 0

    def loss(batch: Batch) -> LossOut:
        return student.divergence(batch, teacher, measure_of(cfg), temperature=cfg.temperature)

    found = estimate_rows(student, rows, plan, loss, cfg.optim.kind, forwards=forwards, kind=kind)
    return found.model_copy(update={"seconds": round(found.seconds + sampling * len(plan), 1)})
