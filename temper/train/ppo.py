"""PPO with a value head: sample episodes, judge them, and credit each token with what it changed in what was expected.

A critic, a second model with one number for a head, says what is to be expected before each token; generalised
advantage estimation turns rewards and values into advantages. The KL to the starting policy is taken from the reward
token by token (k1: unbiased as a value), or added to the loss (k3 as value, k2 as gradient): `kl_in`.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from temper.core.progress import track
from temper.core.records import Record
from temper.core.storage import write_jsonl
from temper.data.batch import Batch, collate, plan_units
from temper.data.sequence import Sequence
from temper.policy.kl import adapted, k1
from temper.policy.losses import LossOut, clipped_value
from temper.policy.model import Policy
from temper.policy.returns import gae, token_rewards, whiten
from temper.policy.scalar_head import RewardModel
from temper.rollout.engine import Engine
from temper.train import parallel
from temper.train.credit import AGGREGATIONS, decoupled, episode_row, policy_loss
from temper.train.episodes import EpisodeConfig, inputs, over_parts, parts, sample, steps_of
from temper.train.estimate import Estimate, estimate_rows, megabytes
from temper.train.learner import Learner, Loss, OptimConfig
from temper.train.probes import hacking_probes, summarise
from temper.train.stage import (
    checkpoint_hash,
    keep,
    load_environment,
    load_policy,
    open_run,
    prepare,
    resume,
    rounded,
    same_family,
    save_trained,
    tasks_of,
    training_tasks,
)  # fmt: skip


class Config(EpisodeConfig):
    """PPO (Schulman et al. 2017) on the tasks of an environment, with a critic of its own."""

    group: int = Field(1, gt=0, description="episodes sampled for each task; a critic needs no second one to compare with")
    loss: Literal["clipped"] = Field("clipped", description="PPO is its clip")
    clip_high: float | None = Field(0.2, gt=0, description="how far a ratio may rise; PPO's clip is symmetric")
    gamma: float = Field(1.0, gt=0, le=1, description="discount a token")
    lam: float = Field(0.95, ge=0, le=1, description="GAE: 1 trusts rewards alone, 0 the critic alone")
    whiten: bool = Field(True, description="advantages to mean 0 and spread 1 over the real tokens of a batch of episodes")
    passes: int = Field(1, gt=0, description="passes over one batch of episodes, each in `minibatches` steps")
    at_cut: Literal["bootstrap", "judge"] = Field(
        "bootstrap", description="what a broken-off episode is worth: what the critic still expected, or its reward, where the limit belongs to the task"
    )
    kl_in: Literal["reward", "loss"] = Field("reward", description="where the KL is paid: token by token in the reward, or in the loss")
    critic: str | None = Field(None, description="a reward model to start the critic from; null: the base with a head of zeros")
    critic_optim: OptimConfig = OptimConfig()
    critic_warmup: int = Field(0, ge=0, description="first sampling steps that train the critic alone")
    value_clip: float | None = Field(0.2, gt=0, description="how far a value may move within one batch of episodes; null: freely")

    @property
    def updates(self) -> int:
        """Optimizer steps on one batch of episodes."""
        return self.passes * self.minibatches


@dataclasses.dataclass
class Both:
    """Policy's and critic's learner, stepping together and kept in one checkpoint."""

    actor: Learner
    critic: Learner

    @property
    def step(self) -> int:
        """Optimizer steps of either."""
        return self.actor.step

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.actor.total_steps

    def save(self, folder: Path) -> None:
        """Write both."""
        for name, learner in (("actor", self.actor), ("critic", self.critic)):
            (folder / name).mkdir(exist_ok=True)
            learner.save(folder / name)

    def load(self, folder: Path) -> None:
        """Restore both; torch's generators are as the actor's checkpoint has them, which was written first."""
        self.critic.load(folder / "critic")
        self.actor.load(folder / "actor")


def run(cfg: Config) -> dict[str, Any]:
    """Train on the environment's tasks; return the paths written and the last metrics. Done work returns at once."""
    started = time.monotonic()
    environment = load_environment(cfg.environment, cfg.environment_options)
    folder = open_run(cfg, "ppo", inputs(cfg, environment) | ({"critic": checkpoint_hash(cfg.critic)} if cfg.critic else {}))
    if folder.done:
        return folder.result()
    policy, critic = prepare(cfg), prepare_critic(cfg)
    same_family(f"critic {cfg.critic}", critic, policy)
    policy.model.eval()  # dropout would make the learner another policy than the one that sampled
    reference = policy.clone_reference() if cfg.kl else None
    engine, tasks = Engine(policy, max_rows=cfg.max_rows), training_tasks(environment)
    steps = steps_of(cfg, tasks)
    both = Both(*(Learner(model, optim, steps * cfg.updates, seed=cfg.seed) for model, optim in ((policy, cfg.optim), (critic, cfg.critic_optim))))
    metrics: dict[str, Any] = {}
    for step in track(range(resume(folder, both) // cfg.updates, steps), f"ppo {cfg.out}"):  # type: ignore[arg-type]
        clock, chosen = time.perf_counter(), tasks_of(step, tasks, cfg.tasks_per_step, cfg.seed)
        records_P_G = sample(engine, environment, chosen, cfg, "episodes", step)
        metrics = {"sample_s": time.perf_counter() - clock, **summarise(records_P_G, cfg.procedure_checks, both.actor.memory)}
        if step % cfg.probe_every == 0:
            metrics |= hacking_probes(environment, chosen, records_P_G)
        now = cfg.model_copy(update={"kl": both.actor.memory.get("kl", cfg.kl)})
        rows, found = credited([record for group in records_P_G for record in group], critic, reference, now)
        metrics |= found | update(both, reference if cfg.kl_in == "loss" else None, rows, now, actor=step >= cfg.critic_warmup)
        if cfg.kl_target and rows:
            both.actor.memory["kl"] = adapted(now.kl, found["kl_episode"], cfg.kl_target)
        folder.log(both.step, rounded(metrics))
        if parallel.rank() == 0 and (step % cfg.keep_episodes_every == 0 or step == steps - 1):
            write_jsonl(folder.path / "episodes" / f"step-{step:06d}.jsonl", [record for group in records_P_G for record in group])
        keep(folder, both, cfg, stride=cfg.updates)  # type: ignore[arg-type]
    return folder.finish(save_trained(folder, policy, cfg) | {"tasks": len(tasks), "steps": steps, "metrics": rounded(metrics)}, started)


def prepare_critic(cfg: Config) -> RewardModel:
    """The model that learns what is to be expected: a reward model, or the base with a head of zeros. Dropout is off."""
    where = {"precision": cfg.precision, "device": cfg.device}
    critic = RewardModel.load(cfg.critic, **where) if cfg.critic else RewardModel(load_policy(cfg))  # type: ignore[arg-type]
    critic.policy.recompute = cfg.recompute
    critic.model.eval()
    return critic


@torch.no_grad()
def credited(records: list[Record], critic: RewardModel, reference: Policy | None, cfg: Config) -> tuple[list[Sequence], dict[str, float]]:
    """Judged episodes as rows with advantages, values and returns on their sampled tokens, and what to watch.

    Where an episode was broken off, its outcome is unknown, and what the critic expected after the last token stands in
    for it (Pardo et al. 2018), unless `at_cut` says that it is judged like one that ended. Both at once would pay twice:
    the critic's expectation is of that very outcome, and would feed on itself.
    """
    judged = [record for record in records if record.outcome.reward is not None and any(turn.token_ids for turn in record.sampled)]
    rows = [episode_row(record, cfg) for record in judged]
    if not rows:
        return [], {}
    whole = collate([dataclasses.replace(row, adapter=None) for row in rows], critic.template.pad_id)
    mask_N_T, old_N_T = whole.mask_B_T, whole.old_logprobs_B_T
    assert old_N_T is not None
    cut_N = torch.tensor([was_cut(record) for record in judged])
    open_N = cut_N & (cfg.at_cut == "bootstrap")
    values_N_T, after_N, reference_N_T = torch.zeros_like(old_N_T), torch.zeros(len(rows)), old_N_T.clone()
    kind = critic.kind(cfg.layout)
    for numbers in plan_units([[row] for row in rows], kind, cfg.tokens_per_batch):
        batch = collate([dataclasses.replace(rows[number], adapter=None) for number in numbers], critic.template.pad_id, kind).to(critic.device)
        width = batch.tokens_B_T.shape[1]
        ends_B = torch.tensor([at * width + len(rows[number].tokens) - 1 for at, number in enumerate(numbers)], device=critic.device)
        values_N_T[numbers, :width], after_N[numbers] = critic.values(batch).cpu(), critic.scores(batch, ends_B).cpu()
        if reference is not None:
            own = collate([rows[number] for number in numbers], critic.template.pad_id, kind).to(reference.device)
            reference_N_T[numbers, :width] = reference.token_logprobs(own, temperature=cfg.temperature).logprobs_B_T.cpu()
    kl_N_T = k1(old_N_T, reference_N_T).where(mask_N_T, 0.0)
    rewards_N = torch.tensor([record.outcome.reward for record in judged], dtype=torch.float32).where(~open_N, 0.0)
    rewards_N_T = token_rewards(rewards_N, mask_N_T, penalty_B_T=cfg.kl * kl_N_T if cfg.kl_in == "reward" else None)
    advantages_N_T, returns_N_T = gae(rewards_N_T, values_N_T, mask_N_T, after_N.where(open_N, 0.0), gamma=cfg.gamma, lam=cfg.lam)
    used_N_T = whiten(advantages_N_T, mask_N_T) if cfg.whiten else advantages_N_T
    found = {"value": float(values_N_T[mask_N_T].mean()), "return": float(returns_N_T[mask_N_T].mean()), "cut_episodes": float(cut_N.float().mean()),
             "explained_variance": explained(values_N_T[mask_N_T], returns_N_T[mask_N_T])}  # fmt: skip
    if reference is not None:
        found |= {"kl_episode": float(kl_N_T.sum() / len(rows)), "kl_coefficient": cfg.kl}
    streams = [[item[at, : len(row.tokens)].tolist() for item in (used_N_T, values_N_T, returns_N_T)] for at, row in enumerate(rows)]
    return [dataclasses.replace(row, advantages=a, values=v, targets=r) for row, (a, v, r) in zip(rows, streams, strict=True)], found


def was_cut(record: Record) -> bool:
    """Whether the episode was broken off, by its length or its number of turns, rather than ended by the policy."""
    last = record.messages[-1]
    return record.sampled[-1].finish_reason == "length" or (last.role == "assistant" and bool(last.tool_calls))


def explained(values_N: Tensor, returns_N: Tensor) -> float:
    """The share of the returns' variance that the values foresaw: 1 is perfect, 0 no better than their mean."""
    spread = float(returns_N.var(unbiased=False))
    return 1 - float((returns_N - values_N).var(unbiased=False)) / spread if spread else 0.0


def value_loss(critic: RewardModel, cfg: Config) -> Loss:
    """The clipped squared error of the critic on a batch of rows with values and returns."""

    def loss(batch: Batch) -> LossOut:
        assert batch.values_B_T is not None
        assert batch.targets_B_T is not None
        return clipped_value(critic.values(batch), batch.values_B_T, batch.targets_B_T, batch.mask_B_T, clip=cfg.value_clip, weights_B_T=batch.weights_B_T)

    return loss


def update(both: Both, reference: Policy | None, rows: list[Sequence], cfg: Config, *, actor: bool = True) -> dict[str, Any]:
    """The optimizer steps of policy (unless `actor` is false) and critic on one batch of episodes."""
    clock, count = time.perf_counter(), AGGREGATIONS[cfg.aggregation][1]
    rows, before = decoupled(both.actor.policy, rows, cfg) if cfg.tis_cap and cfg.updates > 1 else (rows, {})
    bare = [dataclasses.replace(row, adapter=None) for row in rows]
    acted: list[dict[str, Any]] = []
    valued: list[dict[str, Any]] = []
    for _ in range(cfg.passes):
        for batches, same in zip(parts(rows, both.actor, cfg), parts(bare, both.actor, cfg), strict=True):
            if batches and actor:
                acted.append(both.actor.forward_backward(batches, policy_loss(both.actor.policy, reference, cfg), count) | both.actor.optim_step())
            else:
                both.actor.skip()
            if same:
                valued.append(both.critic.forward_backward(same, value_loss(both.critic.policy, cfg), count) | both.critic.optim_step())
            else:
                both.critic.skip()
    judged = {f"critic_{name}": value for name, value in over_parts(valued).items() if name in ("loss", "grad_norm", "lr", "value_clipped")}
    return {**over_parts(acted), **judged, **before, "trained_rows": len(rows), "update_s": time.perf_counter() - clock}


def estimate(cfg: Config) -> Estimate:
    """What the run would cost, without training: one step is sampled and timed; the critic costs what the policy does."""
    environment = load_environment(cfg.environment, cfg.environment_options)
    policy, tasks = prepare(cfg), training_tasks(environment)
    steps, started, few = steps_of(cfg, tasks), time.perf_counter(), tasks_of(0, tasks, 2, cfg.seed)
    records_P_G = sample(Engine(policy, max_rows=cfg.max_rows), environment, few, cfg, "estimate")
    sampling = (time.perf_counter() - started) / len(few) * cfg.tasks_per_step
    rows = [episode_row(record, cfg) for group in records_P_G for record in group if any(turn.token_ids for turn in record.sampled)]
    per_step = [list(range(len(rows)))] * -(-cfg.tasks_per_step // len(few))
    loss, forwards = policy_loss(policy, None, cfg), int(cfg.kl > 0) + 1
    found = estimate_rows(policy, rows, [per_step] * steps * cfg.passes, loss, cfg.optim.kind, forwards=forwards, kind=policy.kind(cfg.layout))
    critic_mb = megabytes(cfg.critic_optim.kind, policy.model.parameters())  # as many weights as the base, every one trained
    return found.model_copy(update={
        "rows": len(tasks), "seconds": round(2 * found.seconds + sampling * steps, 1), "weights_mb": 2 * found.weights_mb, "optimizer_mb": round(found.optimizer_mb + critic_mb, 1),
        "seconds_from": f"{len(few)} tasks sampled: {sampling:.1f} s a step; update of policy and critic: twice {found.seconds_from}",
    })  # fmt: skip
