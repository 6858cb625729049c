"""`Learner`: the four verbs every stage loops over: forward_backward, optim_step, save, load.

The learner owns the denominator: it is counted over the whole optimizer batch and all ranks before the first
backward, so that neither the size of a micro-batch, nor the order of rows, nor the number of processes can change
a gradient. It never learns the name of an algorithm: a loss is a function of one batch that returns sums.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor, nn

from temper.core.config import Config
from temper.core.errors import DataError, ShapeError, TemperError
from temper.core.hashing import stream_seed
from temper.data.batch import Batch
from temper.policy.losses import LossOut
from temper.train import checkpoint, parallel
from temper.train.cost import Cost, price_of_recomputing
from temper.train.optimizers import Kind, make_optimizer
from temper.train.shared_run import say

Loss = Callable[[Batch], LossOut]
Count = Callable[[Batch], float]


class DivergedError(TemperError, ArithmeticError):
    """A loss or gradient that is no longer a finite number."""


class OptimConfig(Config):
    """AdamW (Loshchilov & Hutter 2019) with warm-up, a schedule and clipping."""

    kind: Kind = Field("adamw", description="adamw; adamw8bit and paged_adamw8bit hold the moments in eight bits, by bitsandbytes")
    lr: float = Field(1e-3, gt=0, description="highest learning rate, reached at the end of the warm-up")
    weight_decay: float = Field(0.01, ge=0, description="decoupled decay of matrices; norms, biases and embeddings have none")
    betas: tuple[float, float] = Field((0.9, 0.95), description="decay of AdamW's first and second moment")
    eps: float = Field(1e-8, gt=0)
    clip: float | None = Field(1.0, gt=0, description="largest gradient norm; null turns clipping off")
    warmup_share: float = Field(0.05, ge=0, lt=1, description="share of all steps over which the rate rises linearly")
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="how the rate falls after the warm-up")
    final_share: float = Field(0.1, ge=0, le=1, description="the rate at the last step, as a share of lr")

    def rate(self, step: int, total: int) -> float:
        """The learning rate of optimizer step `step` (from 0) of `total`."""
        warmup = math.ceil(self.warmup_share * total)
        if step < warmup:
            return self.lr * (step + 1) / warmup
        if self.schedule == "constant":
            return self.lr
        done = (step - warmup) / max(1, total - 1 - warmup)
        left = 0.5 * (1 + math.cos(math.pi * min(1.0, done))) if self.schedule == "cosine" else 1 - min(1.0, done)
        return self.lr * (self.final_share + (1 - self.final_share) * left)


class Trainable(Protocol):
    """What a learner can train: a Policy or a RewardModel."""

    version: int

    @property
    def model(self) -> nn.Module:
        """The module the weights belong to."""
        ...

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        ...

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """Every weight that takes a gradient, by name."""
        ...


def loss_weight(batch: Batch) -> float:
    """The sum of a batch's loss weights: for weights of one, the number of supervised tokens."""
    return float(batch.weights_B_T.sum(dtype=torch.float64))


def rows(batch: Batch) -> float:
    """The number of rows of a batch."""
    return float(batch.tokens_B_T.shape[0])


class Learner:
    """Owns gradients, optimizer, schedule and random streams of one `policy`; `step` counts optimizer steps.

    Under torchrun every rank makes one, is given the same batches, and takes its share of them; the weights are
    sharded here, before the optimizer sees them.
    """

    def __init__(self, policy: Any, optim: OptimConfig, total_steps: int, *, seed: int = 0) -> None:
        self.policy, self.optim, self.total_steps, self.seed = policy, optim, total_steps, seed
        if not policy.trainable_parameters():
            raise DataError("nothing to train", why="every parameter is frozen", do="add an adapter, or load the policy without freeze_base")
        if halved := [name for name, weight in policy.trainable_parameters().items() if weight.dtype in (torch.bfloat16, torch.float16)]:
            raise ShapeError(f"{halved[0]} would be trained in half precision", why="small updates are lost to rounding there; a frozen base may be held so",
                             do="load the policy without frozen=True")  # fmt: skip
        self.cost = Cost.of(policy)
        if getattr(policy, "policy", policy).recompute:
            say(price_of_recomputing(self.cost, getattr(policy, "policy", policy)))
        if parallel.world() > 1:
            parallel.shard(policy)
        self.parameters: dict[str, nn.Parameter] = policy.trainable_parameters()
        self.optimizer = make_optimizer(optim.kind, decay_groups(policy.model, optim.weight_decay), lr=optim.lr, betas=optim.betas, eps=optim.eps)
        self.held: dict[str, Tensor] = {}
        self.step = 0
        self.memory: dict[str, Any] = {}  # what a stage must remember across a resume, in JSON's types
        self.streams: dict[str, random.Random] = {}
        self._pending: dict[str, float] | None = None
        self.seed_torch()

    def seed_torch(self) -> None:
        """Start torch's generators: rank 0's as on one process, the others' each on its own, so that dropout differs."""
        torch.manual_seed(stream_seed(self.seed, "torch", *([parallel.rank()] if parallel.rank() else [])))

    def hold(self, weight: nn.Parameter, moves: Tensor) -> None:
        """Let only the entries of `weight` move where `moves` (bool, broadcast over it) is true; frozen weights never do."""
        for name, trained in self.parameters.items():
            if trained is weight:
                self.held[name] = parallel.spread_like(moves.expand(trained.shape).contiguous(), trained)

    def stream(self, name: str) -> random.Random:
        """The named random stream; its state is part of a checkpoint."""
        if name not in self.streams:
            self.streams[name] = random.Random(stream_seed(self.seed, name))
        return self.streams[name]

    def forward_backward(self, batches: Sequence[Batch], loss: Loss, count: Count = loss_weight) -> dict[str, float]:
        """Add the gradient of Σ loss / Σ count over all `batches` of one optimizer step; return their metrics.

        `count` is taken over every batch before the first backward. Raises DataError where it is zero,
        DivergedError where the loss is not finite, ShapeError on a second call before `optim_step`.
        """
        if self._pending is not None:
            raise ShapeError("forward_backward was called twice in one optimizer step", why="each call divides by the count of its own batches",
                             do="pass all micro-batches of the step in one call")  # fmt: skip
        try:
            return self._forward_backward(batches, loss, count)
        except BaseException:
            self.optimizer.zero_grad(set_to_none=True)  # a second try must not add to what this one left
            self._pending = None
            raise

    def _forward_backward(self, batches: Sequence[Batch], loss: Loss, count: Count) -> dict[str, float]:
        started, world = time.perf_counter(), parallel.world()
        mine = parallel.share(batches)
        with parallel.together(f"step {self.step}"):
            whole = parallel.summed({"denominator": math.fsum(map(count, mine)), "tokens": sum(batch.tokens_real for batch in mine),
                                     "supervised": sum(int(batch.mask_B_T.sum()) for batch in mine), "positions": sum(batch.work.positions for batch in mine), "flops": sum(map(self.cost.flops, mine))})  # fmt: skip
            denominator = whole["denominator"]
            if denominator <= 0:
                raise DataError(f"step {self.step} has nothing to learn from", why=f"its {len(batches)} batches hold no supervised token",
                                do="leave such rows out, or skip the step")  # fmt: skip
            sums: dict[str, list[Tensor]] = {}
            for number in range(-(-len(batches) // world)):
                # a rank that runs out of batches goes on gathering weights for the others, with a gradient of zero
                real = number < len(mine)
                out = loss((mine[number] if real else batches[0]).to(self.policy.device))
                (out.total * (1 / denominator if real else 0.0)).backward()
                for name, value in {"total": out.total, "count": out.count, **out.sums}.items():
                    sums.setdefault(name, []).extend([value.detach()] if real else [])  # read after the last backward: no wait in between
            found = parallel.summed({name: math.fsum(float(value) for value in values) for name, values in sums.items()})
        total, counted = found.pop("total"), found.pop("count")
        if not math.isfinite(total):
            raise DivergedError(f"the loss of step {self.step} is {total}", why=f"learning rate {self.rate():.3g}, {len(batches)} batches",
                                do="lower optim.lr, lengthen optim.warmup_share, or lower optim.clip")  # fmt: skip
        tokens, supervised = int(whole["tokens"]), int(whole["supervised"])
        self._pending = {"started": started, "flops": whole["flops"], "tokens": tokens}
        metrics = {name: value / max(1.0, counted) for name, value in found.items()}
        return {"loss": total / denominator, **metrics, "tokens": tokens, "positions": int(whole["positions"]), "supervised": supervised}

    def optim_step(self) -> dict[str, float]:
        """Clip, step, clear the gradients, bump the policy's version; return rate, norm and speed."""
        if self._pending is None:
            raise ShapeError("optim_step has no gradient", do="call forward_backward first")
        rate = self.rate()
        with parallel.together(f"the update of step {self.step}"):
            norm = self._clipped()
        if not math.isfinite(norm):
            raise DivergedError(f"the gradient norm of step {self.step} is {norm}", do="lower optim.lr, or look at the rows of this step")
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        seconds = time.perf_counter() - self._pending["started"]
        limit = self.cost.limit * parallel.world()
        speed = {"step_s": seconds, "tokens_per_s": self._pending["tokens"] / seconds, "limit_share": self._pending["flops"] / seconds / limit}
        self._advance()
        return {"lr": rate, "grad_norm": norm, **speed}

    def _clipped(self) -> float:
        """The norm of the whole gradient, over all ranks, before it is clipped in place."""
        for name, moves in self.held.items():
            weight = self.parameters[name]
            if weight.grad is not None:
                weight.grad = torch.where(moves, weight.grad, torch.zeros_like(weight.grad))
        clip = self.optim.clip
        norm: Any = nn.utils.clip_grad_norm_(self.parameters.values(), math.inf if clip is None else clip)
        return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)

    def skip(self) -> None:
        """Count an optimizer step that had nothing to learn from; the schedule moves on."""
        self.optimizer.zero_grad(set_to_none=True)
        self._pending = None
        self.step += 1

    def rate(self) -> float:
        """The learning rate of the step to come."""
        return self.optim.rate(self.step, self.total_steps)

    def _advance(self) -> None:
        self._pending = None
        self.step += 1
        self.policy.version += 1

    def save(self, folder: Path) -> None:
        """Write trained weights, optimizer, step, sampler position and every random stream into `folder`; all ranks call it."""
        streams = {name: stream.getstate() for name, stream in self.streams.items()}
        state = {"step": self.step, "total_steps": self.total_steps, "version": self.policy.version, "streams": streams, "memory": self.memory}
        checkpoint.write(folder, self.parameters, checkpoint.moments_of(self.optimizer, self.parameters), state)

    def load(self, folder: Path) -> None:
        """Restore what `save` wrote, on any number of ranks; on as many as wrote it, to the bit.

        Raises IntegrityError where it belongs to other weights.
        """
        state, moments = checkpoint.read(folder, self.parameters, self.total_steps)
        self.optimizer.zero_grad(set_to_none=True)
        self.optimizer.state.clear()
        self._pending = None
        for key, value in moments.items():
            name, _, field = key.rpartition("|")
            self.optimizer.state[self.parameters[name]][field] = value
        for name, (kind, values, gauss) in state["streams"].items():
            self.stream(name).setstate((kind, tuple(values), gauss))
        self.step, self.memory, self.policy.version = state["step"], state["memory"], state["version"]


def decay_groups(model: nn.Module, decay: float) -> list[dict[str, Any]]:
    """Trainable weights in two groups: matrices with weight decay; norms, biases and embeddings without."""
    tables = {id(weight) for module in model.modules() if isinstance(module, nn.Embedding) for weight in module.parameters(recurse=False)}
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    decayed = [weight for weight in weights if weight.ndim >= 2 and id(weight) not in tables]
    chosen = {id(weight) for weight in decayed}
    kept = [weight for weight in weights if id(weight) not in chosen]
    return [group for group in ({"params": decayed, "weight_decay": decay}, {"params": kept, "weight_decay": 0.0}) if group["params"]]
