"""temper's side: the same rows through Policy, the stages' losses and the Learner."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from worker import serve
from workloads import BETA, CHECK_STEPS, CLIP, PAD, Workload, by_name, check_rows, rows_of

from temper.data.batch import Batch, collate, plan_units
from temper.data.sequence import Sequence as Row
from temper.policy.losses import LossOut, reverse_kl
from temper.policy.model import Policy
from temper.policy.scalar_head import RewardModel
from temper.train import preference, reward, rl
from temper.train.cost import synchronise
from temper.train.credit import policy_loss
from temper.train.learner import Learner, OptimConfig, loss_weight

ADAPTER = "bench"


class Ours:
    """One workload on temper."""

    def __init__(self, job: dict[str, Any]) -> None:
        torch.set_num_threads(job["threads"])
        self.job, self.device = job, job["device"]
        self.workload: Workload = by_name([job["workload"]], self.device, tiny=job["tiny"], changed=job["changed"])[0]
        self.models = Path(job["models"])
        self.base: Policy | None = None

    def check(self) -> list[float]:
        """The losses of CHECK_STEPS steps on the check rows."""
        units = [self.sequences(row) for row in check_rows(self.workload)]
        self.prepare(CHECK_STEPS)
        if self.workload.kind == "dpo":
            units = self.with_reference(units)
        losses = [self.step(units) for _ in range(CHECK_STEPS)]
        del self.trained, self.learner, self.loss
        return losses

    def load(self) -> dict[str, float]:
        """Policy, learner and rows; the reference where the objective has one."""
        units = [self.sequences(row) for row in rows_of(self.workload)]
        self.prepare(1 << 20)
        timed: dict[str, float] = {}
        if self.workload.kind == "dpo":
            started = time.perf_counter()
            units = self.with_reference(units)
            timed["reference_s"] = time.perf_counter() - started
        width = self.workload.step_rows
        self.steps = [units[at : at + width] for at in range(0, len(units), width)]
        return timed

    def warm(self) -> dict[str, float]:
        """One step: the shortest rows; on a GPU the longest, whose memory and kernels every other one can use."""
        started = time.perf_counter()
        self.step(self.steps[-1 if self.device.startswith("cuda") else 0])
        synchronise(self.device)
        return {"warm_s": time.perf_counter() - started}

    def measured(self) -> float:
        """Every optimizer step of a pass, from rows to updated weights."""
        started = time.perf_counter()
        for units in self.steps:
            self.step(units)
        synchronise(self.device)
        return time.perf_counter() - started

    # --- what is trained ---

    def policy(self, model: str, *, frozen: bool = False) -> Policy:
        """A model in the precision of the comparison."""
        return Policy.load(self.models / model, precision=self.job["precision"], device=self.device, frozen=frozen)

    def prepare(self, total_steps: int) -> None:
        """Fresh weights, their loss and their learner; a base that no step changed is not loaded again."""
        workload, policy = self.workload, self.base or self.policy(self.workload.model, frozen=self.workload.lora)
        self.trained: Any = policy
        if workload.lora:
            if self.base:
                policy.remove_adapter(ADAPTER)
            self.base = policy
            policy.load_adapter(ADAPTER, self.models / workload.model / "adapter")
        if workload.kind == "reward":
            self.trained = RewardModel(policy)
            with torch.no_grad():
                self.trained.model.score.weight.copy_(load_file(self.models / workload.model / "score.safetensors")["weight"])
        self.trained.model.train()
        self.kind = self.trained.kind("auto")
        self.loss = self.objective(policy)
        optim = OptimConfig(lr=workload.rate, weight_decay=0.0, betas=(0.9, 0.999), eps=1e-8, clip=1.0, warmup_share=0.0, schedule="constant")
        self.learner = Learner(self.trained, optim, total_steps)

    def objective(self, policy: Policy) -> Callable[[Batch], LossOut]:
        """The stage's own loss of one batch."""
        kind = self.workload.kind
        if kind == "dpo":
            self.settings = preference.Config(out="unused", base="unused", data="unused", beta=BETA, tokens_per_batch=self.workload.tokens_per_batch)
            return lambda batch: preference.pair_loss(policy, batch, self.settings)
        if kind == "grpo":
            return policy_loss(policy, None, rl.Config(out="unused", base="unused", environment="unused", clip_low=CLIP, clip_high=CLIP))
        if kind == "reward":
            judge, settings = self.trained, reward.Config(out="unused", base="unused", data="unused", centring=0.0)
            return lambda batch: reward.reward_loss(judge, batch, settings)
        if kind == "distill":
            teacher = self.policy(str(self.workload.teacher))
            teacher.model.requires_grad_(False)
            return lambda batch: policy.divergence(batch, teacher, reverse_kl)
        return policy.cross_entropy

    # --- rows ---

    def sequences(self, row: dict[str, Any]) -> list[Row]:
        """A row of the workload as sequences: one, two (better first), or one for each answer of a group."""
        adapter = ADAPTER if self.workload.lora else None
        if "tokens" in row:
            start = row["trained_from"]
            return [Row(tokens=row["tokens"], weights=[0.0] * start + [1.0] * (len(row["tokens"]) - start), adapter=adapter)]
        prompt, made = row["prompt"], []
        for number, answer in enumerate(row["answers"]):
            before, group = [0.0] * len(prompt), str(id(row))
            streams: dict[str, Any] = {}
            if "advantages" in row:
                streams["advantages"] = before + [row["advantages"][number]] * len(answer)
                streams["old_logprobs"] = before + row["old_logprobs"][number]
            made.append(Row(tokens=prompt + answer, weights=before + [1.0] * len(answer), adapter=adapter, group=group, **streams))
        return made

    def with_reference(self, units: list[list[Row]]) -> list[list[Row]]:
        """Pairs with the log-probs of the policy as it starts: the adapter is still the identity."""
        pairs = [(unit[0], unit[1]) for unit in units]
        flat = preference.score(pairs, self.trained, self.settings)
        return [[_referred(row, flat[2 * at + side].tolist()) for side, row in enumerate(unit)] for at, unit in enumerate(units)]

    def step(self, units: Sequence[list[Row]]) -> float:
        """One optimizer step on these units; its loss."""
        planned = plan_units(units, self.kind, self.workload.tokens_per_batch)
        batches = [collate([row for at in part for row in units[at]], PAD, self.kind) for part in planned]
        count = preference.count_pairs if self.workload.kind in ("dpo", "reward") else loss_weight
        found = self.learner.forward_backward(batches, self.loss, count)
        self.learner.optim_step()
        return float(found["loss"])


def _referred(row: Row, logprobs: list[float]) -> Row:
    return Row(tokens=row.tokens, weights=row.weights, ref_logprobs=logprobs, adapter=row.adapter, group=row.group)


if __name__ == "__main__":
    serve(Ours)
