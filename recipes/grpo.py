"""GRPO with an environment of its own, in one loop: teach a model to answer in exactly as many words as it is asked for.

    python recipes/grpo.py --base runs/demo/sft/model --out runs/brief

Copy it and change the environment: prompts, and a `verify` that cannot be fooled.
"""

from __future__ import annotations

import argparse
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any

from temper.core.progress import track
from temper.core.records import Message, Outcome, Split
from temper.data.batch import Batch, collate
from temper.data.sequence import episode_sequence
from temper.policy.advantages import group_mean
from temper.policy.losses import LossOut, clipped_pg
from temper.policy.model import Policy
from temper.rollout.engine import Engine
from temper.rollout.environment import PlainSession, Task
from temper.rollout.episodes import collect
from temper.train.learner import Learner, OptimConfig

SUBJECTS = ("our budget", "this invoice", "a bank balance", "the audit", "an approval", "the ledger", "a refund", "a transfer")
TASKS_PER_STEP, GROUP = 8, 8


class BriefEnvironment:
    """Say something about a subject in two to five words. The reward falls with the distance from the number asked for."""

    name, version = "brief", "brief-1"

    def tasks(self, split: Split, limit: int | None = None) -> list[Task]:
        """Every subject with every number of words."""
        asked = [(Message(role="user", content=f"Describe {subject} in {n} words."), n) for subject in SUBJECTS for n in range(2, 6)]
        made = [Task(id=f"{split}-{at}", messages=(ask,), answer={"words": n}, split=split, max_turns=1, max_tokens=24) for at, (ask, n) in enumerate(asked)]
        return made[:limit]

    def open(self, task: Task) -> PlainSession:
        """There are no tools."""
        return PlainSession()

    def verify(self, task: Task, turns: tuple[Message, ...], session: Any) -> Outcome:
        """1 for the right number of different words, less for one or two off, 0 for nothing at all."""
        words = turns[-1].content.lower().split() if turns else []
        miss = abs(len(set(words)) - task.answer["words"]) + len(words) - len(set(words))
        return Outcome(reward=max(0.0, 1 - miss / 3) if words else 0.0, checks={"exact": bool(words) and miss == 0})


def main(base: str, out: str, steps: int = 40, lr: float = 1e-4) -> list[float]:
    """Train `base` in the environment above; return the mean reward of each step."""
    environment, policy, curve = BriefEnvironment(), Policy.load(base), []
    engine, learner = Engine(policy), Learner(policy, OptimConfig(lr=lr, weight_decay=0.0, schedule="constant"), steps)
    order = learner.stream("tasks")

    def loss(batch: Batch) -> LossOut:
        """PPO's clipped objective on the very tokens that were sampled."""
        logprobs_B_T = policy.token_logprobs(batch).logprobs_B_T
        return clipped_pg(logprobs_B_T, batch.old_logprobs_B_T, batch.advantages_B_T, batch.mask_B_T, clip_high=0.28)

    for step in track(range(steps), "grpo"):
        tasks = order.sample(environment.tasks("train"), TASKS_PER_STEP)
        records_P_G = collect(engine, environment, tasks, group=GROUP, temperature=1.0, seed=step)
        rewards_P_G = [[record.outcome.reward for record in group] for group in records_P_G]
        credited = zip(chain(*records_P_G), chain(*group_mean(rewards_P_G)), strict=True)
        rows = [episode_sequence(record, advantage) for record, advantage in credited if advantage is not None and record.sampled]
        metrics = learner.forward_backward([collate(rows, policy.template.pad_id)], loss) | learner.optim_step()
        curve.append(fmean(reward or 0.0 for reward in chain(*rewards_P_G)))
        print(f"step {learner.step}/{steps}  reward {curve[-1]:.3f}  clipped {metrics['clipped']:.3f}")
    policy.save(Path(out) / "model")
    return curve


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--lr", type=float, default=1e-4)
    print(main(**vars(parser.parse_args())))
