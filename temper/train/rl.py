"""Reinforcement learning on verifiable rewards: sample a group of episodes a task, judge them, follow the better ones.

An algorithm is credit plus routing: `advantage` names how rewards become credit, `loss` how far a step follows it,
`aggregation` how tokens share a step. What was sampled is what is trained on: token ids come from the records, never
from text.
"""

from __future__ import annotations

import math
import time
from random import Random
from typing import Any

from pydantic import Field, model_validator

from temper.core.config import Config as CoreConfig
from temper.core.hashing import stream_seed
from temper.core.progress import track
from temper.core.records import Record
from temper.core.storage import write_jsonl
from temper.data.sequence import Sequence
from temper.policy.advantages import ACROSS_GROUPS
from temper.policy.kl import adapted
from temper.policy.model import Policy
from temper.rollout.engine import Engine
from temper.rollout.environment import Environment, Task
from temper.train import parallel
from temper.train.credit import AGGREGATIONS, credited, decoupled, episode_row, guide_of, policy_loss, reward_of
from temper.train.episodes import EpisodeConfig, inputs, over_parts, parts, sample, steps_of
from temper.train.estimate import Estimate, estimate_rows
from temper.train.learner import Learner
from temper.train.probes import hacking_probes, summarise
from temper.train.stage import keep, load_environment, open_run, prepare, resume, rounded, save_trained, tasks_of, training_tasks


class OverlongConfig(CoreConfig):
    """DAPO's soft overlong punishment: what an episode loses for its length."""

    limit: int = Field(gt=0, description="sampled tokens of an episode at which it loses the whole penalty")
    buffer: int = Field(ge=0, description="tokens before the limit over which the loss rises from 0")
    penalty: float = Field(1.0, gt=0, description="the whole penalty, in units of the reward")


class Config(EpisodeConfig):
    """GRPO (Shao et al. 2024) and its relatives on the tasks of an environment."""

    advantage: str = Field("grpo", description="credit: grpo, dr_grpo, rloo, reinforce_pp or reinforce_pp_baseline")
    resample: int = Field(0, ge=0, description="further rounds of sampling to replace groups whose rewards are all equal (DAPO's dynamic sampling)")
    overlong: OverlongConfig | None = Field(None, description="take reward from long episodes; null: length costs nothing")
    guidance: bool = Field(False, description="each task's demonstration joins its group (luffy)")

    @model_validator(mode="after")
    def fitting_parts(self) -> Config:
        """Refuse parts that do not go together."""
        if self.group == 1 and self.advantage not in ACROSS_GROUPS:
            raise ValueError(f"advantage {self.advantage} compares the samples of one task, and group is 1: raise it, or use {ACROSS_GROUPS[0]}")
        if self.resample and self.advantage in ACROSS_GROUPS:
            raise ValueError(f"resample replaces groups whose rewards are equal; {self.advantage} learns from them: set resample: 0")
        if self.resample and self.guidance:
            raise ValueError("resample replaces groups that all fail, which are what the demonstration is for: set resample: 0")
        if self.guidance != (self.loss == "luffy"):
            raise ValueError("guidance and loss: luffy go together: the demonstration's tokens have no old log-prob that another loss could use")
        return self


def run(cfg: Config) -> dict[str, Any]:
    """Train on the environment's tasks; return the paths written and the last metrics. Done work returns at once."""
    started = time.monotonic()
    environment = load_environment(cfg.environment, cfg.environment_options)
    folder = open_run(cfg, "rl", inputs(cfg, environment))
    if folder.done:
        return folder.result()
    policy = prepare(cfg)
    policy.model.eval()  # dropout would make the learner another policy than the one that sampled
    reference = policy.clone_reference() if cfg.kl else None
    engine, tasks = Engine(policy, max_rows=cfg.max_rows), training_tasks(environment)
    steps = steps_of(cfg, tasks)
    learner = Learner(policy, cfg.optim, steps * cfg.minibatches, seed=cfg.seed)
    metrics: dict[str, Any] = {}
    for step in track(range(resume(folder, learner) // cfg.minibatches, steps), f"rl {cfg.out}"):
        clock, chosen = time.perf_counter(), tasks_of(step, tasks, cfg.tasks_per_step, cfg.seed)
        records_P_G = sample(engine, environment, chosen, cfg, "episodes", step)
        metrics = {"sample_s": time.perf_counter() - clock, **summarise(records_P_G, cfg.procedure_checks, learner.memory)}
        if step % cfg.probe_every == 0:
            metrics |= hacking_probes(environment, chosen, records_P_G)
        if cfg.resample:
            chosen, records_P_G, found = resampled(engine, environment, chosen, records_P_G, tasks, cfg, step)
            metrics |= found
        guides_P = [guide_of(environment, task, policy.template, cfg.max_tokens) for task in chosen] if cfg.guidance else []
        metrics |= {"cut_guides": sum(guide.row.cut > 0 for guide in guides_P)} if cfg.guidance else {}
        metrics |= update(learner, reference, credited(records_P_G, cfg, guides_P), cfg)
        folder.log(learner.step, rounded(metrics))
        if parallel.rank() == 0 and (step % cfg.keep_episodes_every == 0 or step == steps - 1):
            write_jsonl(folder.path / "episodes" / f"step-{step:06d}.jsonl", [record for group in records_P_G for record in group])
        keep(folder, learner, cfg, stride=cfg.minibatches)
    return folder.finish(save_trained(folder, policy, cfg) | {"tasks": len(tasks), "steps": steps, "metrics": rounded(metrics)}, started)


def resampled(
    engine: Engine, environment: Environment, chosen: list[Task], records_P_G: list[list[Record]], tasks: list[Task], cfg: Config, step: int
) -> tuple[list[Task], list[list[Record]], dict[str, int]]:
    """DAPO's dynamic sampling (Yu et al. 2025, eq. 11): groups without signal are replaced, for at most `resample` rounds.

    What was measured before stays the measure of the policy: the groups that are left were chosen for their spread.
    """
    kept = [(task, group) for task, group in zip(chosen, records_P_G, strict=True) if has_signal(group, cfg)]
    tried = 0
    for turn in range(cfg.resample):
        missing = cfg.tasks_per_step - len(kept)
        if missing == 0:
            break
        fresh = Random(stream_seed(cfg.seed, "resample", step, turn)).sample(tasks, min(missing, len(tasks)))
        groups = sample(engine, environment, fresh, cfg, "episodes", step, turn)
        kept += [(task, group) for task, group in zip(fresh, groups, strict=True) if has_signal(group, cfg)]
        tried += len(fresh)
    found = {"resampled_tasks": tried, "groups_missing": cfg.tasks_per_step - len(kept)}
    return [task for task, _ in kept], [group for _, group in kept], found


def has_signal(group: list[Record], cfg: Config) -> bool:
    """Whether the group's rewards differ, as they are credited."""
    return len({reward for record in group if (reward := reward_of(record, cfg)) is not None}) > 1


def update(learner: Learner, reference: Policy | None, rows: list[Sequence], cfg: Config) -> dict[str, Any]:
    """The optimizer steps on one batch of episodes; a part without rows is counted and changes nothing."""
    clock, policy = time.perf_counter(), learner.policy
    cfg = cfg.model_copy(update={"kl": learner.memory.get("kl", cfg.kl)})
    rows, before = decoupled(policy, rows, cfg) if cfg.tis_cap and cfg.updates > 1 else (rows, {})
    found: list[dict[str, Any]] = []
    for batches in parts(rows, learner, cfg):
        if not batches:
            learner.skip()
            continue
        found.append(learner.forward_backward(batches, policy_loss(policy, reference, cfg), AGGREGATIONS[cfg.aggregation][1]) | learner.optim_step())
    metrics = over_parts(found)
    if cfg.kl_target and metrics.get("kl") is not None:
        own = [row.supervised for row in rows if not any(map(math.isnan, row.old_logprobs or []))]
        tokens = sum(own) / len(own)
        metrics["kl_coefficient"], learner.memory["kl"] = cfg.kl, adapted(cfg.kl, metrics["kl"] * tokens, cfg.kl_target)
    return {**metrics, **before, "trained_rows": len(rows), "update_s": time.perf_counter() - clock}


def estimate(cfg: Config) -> Estimate:
    """What the run would cost, without training: one step is sampled and timed, its rows are all taken as trained."""
    environment = load_environment(cfg.environment, cfg.environment_options)
    policy = prepare(cfg)
    tasks = training_tasks(environment)
    steps = steps_of(cfg, tasks)
    started = time.perf_counter()
    few = tasks_of(0, tasks, 2, cfg.seed)
    records_P_G = sample(Engine(policy, max_rows=cfg.max_rows), environment, few, cfg, "estimate")
    sampling = (time.perf_counter() - started) / len(few) * cfg.tasks_per_step
    rows = [episode_row(record, cfg) for group in records_P_G for record in group if any(turn.token_ids for turn in record.sampled)]
    per_step = [list(range(len(rows)))] * -(-cfg.tasks_per_step // len(few))
    found = estimate_rows(policy, rows, [per_step] * steps, policy_loss(policy, None, cfg), cfg.optim.kind, forwards=int(cfg.kl > 0), kind=policy.kind(cfg.layout))
    return found.model_copy(update={
        "rows": len(tasks), "seconds": round(found.seconds + sampling * steps, 1),
        "seconds_from": f"{len(few)} tasks sampled: {sampling:.1f} s a step; update: {found.seconds_from}",
    })  # fmt: skip
