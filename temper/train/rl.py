"""Reinforcement learning on verifiable rewards: sample a group of episodes a task, judge them, follow the better ones.

An algorithm is credit plus routing: `advantage` names how rewards of a group become credit, `aggregation` how
tokens share a step. What was sampled is what is trained on: token ids come from the records, never from text.
"""

from __future__ import annotations

import time
from random import Random
from typing import Any, Literal

from pydantic import Field

from temper.core.hashing import stream_seed
from temper.core.progress import track
from temper.core.storage import write_jsonl
from temper.data.batch import collate, plan_batches
from temper.data.sequence import Sequence
from temper.policy.model import Policy
from temper.rollout.engine import Engine
from temper.rollout.environment import Environment
from temper.rollout.episodes import collect
from temper.train.credit import AGGREGATIONS, credited, episode_row, policy_loss
from temper.train.estimate import Estimate, estimate_rows
from temper.train.learner import Learner
from temper.train.probes import hacking_probes, summarise
from temper.train.stage import (
    AdaptableConfig,
    checkpoint_hash,
    keep,
    load_environment,
    open_run,
    prepare,
    resume,
    rounded,
    save_trained,
    tasks_of,
    training_tasks,
)  # fmt: skip


class Config(AdaptableConfig):
    """GRPO (Shao et al. 2024) and its relatives on the tasks of an environment."""

    environment: str = Field(description="finops, gsm8k, tatqa, package.module:factory, or path/file.py:factory")
    environment_options: dict[str, Any] = Field({}, description="keywords for the environment's factory")
    tasks_per_step: int = Field(16, gt=0, description="P: tasks sampled a step")
    group: int = Field(8, gt=1, description="G: episodes sampled for each task")
    temperature: float = Field(1.0, gt=0, description="of sampling, and of the log-probs that are trained")
    constrained: bool = Field(False, description="sample under the grammar of tools and schema; log-probs are renormalised over it")
    max_rows: int = Field(64, gt=0, description="rows the engine decodes at once")
    advantage: str = Field("grpo", description="credit: grpo, dr_grpo or rloo")
    aggregation: Literal["token", "sequence", "constant"] = Field("token", description="what shares a step: tokens, rows, or a constant length")
    clip_low: float = Field(0.2, gt=0, lt=1)
    clip_high: float = Field(0.28, gt=0, description="higher than clip_low leaves rare tokens room to grow (DAPO)")
    minibatches: int = Field(1, gt=0, description="optimizer steps on one batch of episodes")
    tis_cap: float | None = Field(None, gt=0, description="cap of the importance weight for sampler against learner; null: not applied, still logged")
    kl: float = Field(0.0, ge=0, description="coefficient of the KL to the starting policy")
    probe_every: int = Field(10, gt=0, description="sampling steps between reward-hacking probes")
    procedure_checks: tuple[str, ...] = Field(("procedure_followed",), description="verifier findings that say how, not what")
    keep_episodes_every: int = Field(20, gt=0, description="sampling steps between files of whole episodes")


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
    steps = cfg.steps or max(1, round(cfg.epochs * len(tasks) / cfg.tasks_per_step))
    learner = Learner(policy, cfg.optim, steps * cfg.minibatches, seed=cfg.seed)
    metrics: dict[str, Any] = {}
    for step in track(range(resume(folder, learner) // cfg.minibatches, steps), f"rl {cfg.out}"):
        clock, chosen = time.perf_counter(), tasks_of(step, tasks, cfg.tasks_per_step, cfg.seed)
        records_P_G = collect(engine, environment, chosen, group=cfg.group, temperature=cfg.temperature, constrained=cfg.constrained,
                              seed=stream_seed(cfg.seed, "episodes", step), adapter_of=lambda task: cfg.trains)  # fmt: skip
        metrics = {"sample_s": time.perf_counter() - clock, **summarise(records_P_G, cfg.procedure_checks, learner.memory)}
        if step % cfg.probe_every == 0:
            metrics |= hacking_probes(environment, chosen, records_P_G)
        metrics |= update(learner, reference, credited(records_P_G, cfg), cfg)
        folder.log(learner.step, rounded(metrics))
        if step % cfg.keep_episodes_every == 0 or step == steps - 1:
            write_jsonl(folder.path / "episodes" / f"step-{step:06d}.jsonl", [record for group in records_P_G for record in group])
        keep(folder, learner, cfg, stride=cfg.minibatches)
    return folder.finish(save_trained(folder, policy, cfg) | {"tasks": len(tasks), "steps": steps, "metrics": rounded(metrics)}, started)


def inputs(cfg: Config, environment: Environment) -> dict[str, str]:
    """The content hashes that, with the config, name this work."""
    named = {"base": checkpoint_hash(cfg.base), "environment": environment.version}
    return named | {"initial_adapter": checkpoint_hash(cfg.initial_adapter)} if cfg.initial_adapter else named


def update(learner: Learner, reference: Policy | None, rows: list[Sequence], cfg: Config) -> dict[str, Any]:
    """The optimizer steps on one batch of episodes; a part without rows is counted and changes nothing."""
    clock, policy = time.perf_counter(), learner.policy
    order = list(range(len(rows)))
    Random(stream_seed(cfg.seed, "rows", learner.step)).shuffle(order)
    metrics: dict[str, Any] = {}
    for part in range(cfg.minibatches):
        chosen = [rows[row] for row in order[part :: cfg.minibatches]]
        if not chosen:
            learner.skip()
            continue
        planned = plan_batches([len(row.tokens) for row in chosen], cfg.tokens_per_batch, Random(stream_seed(cfg.seed, "batches", learner.step)))
        batches = [collate([chosen[row] for row in batch], policy.template.pad_id) for batch in planned]
        found = learner.forward_backward(batches, policy_loss(policy, reference, cfg), AGGREGATIONS[cfg.aggregation][1]) | learner.optim_step()
        # sampler and learner are compared before the first update moves the learner away
        metrics |= {name: value for name, value in found.items() if part == 0 or not name.startswith("mismatch")}
    return {**metrics, "trained_rows": len(rows), "update_s": time.perf_counter() - clock}


def estimate(cfg: Config) -> Estimate:
    """What the run would cost, without training: one step is sampled and timed, its rows are all taken as trained."""
    environment = load_environment(cfg.environment, cfg.environment_options)
    policy = prepare(cfg)
    tasks = training_tasks(environment)
    steps = cfg.steps or max(1, round(cfg.epochs * len(tasks) / cfg.tasks_per_step))
    started = time.perf_counter()
    few = tasks_of(0, tasks, 2, cfg.seed)
    records_P_G = collect(Engine(policy, max_rows=cfg.max_rows), environment, few, group=cfg.group, temperature=cfg.temperature,
                          constrained=cfg.constrained, seed=stream_seed(cfg.seed, "estimate"), adapter_of=lambda task: cfg.trains)  # fmt: skip
    sampling = (time.perf_counter() - started) / len(few) * cfg.tasks_per_step
    rows = [episode_row(record, cfg) for group in records_P_G for record in group]
    per_step = [list(range(len(rows)))] * -(-cfg.tasks_per_step // len(few))
    found = estimate_rows(policy, rows, [per_step] * steps, policy_loss(policy, None, cfg), forwards=int(cfg.kl > 0))
    return found.model_copy(update={
        "rows": len(tasks), "seconds": round(found.seconds + sampling * steps, 1),
        "seconds_from": f"{len(few)} tasks sampled: {sampling:.1f} s a step; update: {found.seconds_from}",
    })  # fmt: skip
