"""What the stages that learn from sampled episodes share: their config, their sampling, their micro-batches."""

from __future__ import annotations

from collections.abc import Sequence as Rows
from random import Random
from typing import Any, Literal

from pydantic import Field, model_validator

from temper.core.hashing import stream_seed
from temper.core.records import Record
from temper.data.batch import Batch, collate, plan_units
from temper.data.sequence import Sequence
from temper.policy.losses.policy_gradient import LEVELS, TREATMENTS
from temper.rollout.engine import Engine
from temper.rollout.environment import Environment, Task
from temper.rollout.episodes import collect
from temper.train import parallel
from temper.train.learner import Learner
from temper.train.stage import AdaptableConfig, checkpoint_hash

# loss -> (clip_low, clip_high) as its paper has them
CLIPS = {"clipped": (0.2, 0.28), "gspo": (3e-4, 4e-4), "cispo": (1.0, 4.0), "luffy": (0.2, 0.28)}
ADDED = ("tokens", "positions", "supervised", "step_s")  # metrics of a step that are those of its parts together
OF_OWN = ("clipped", "ratio", "kl", "kl_old", "mismatch", "mismatch_kl")  # sums over the tokens that the policy sampled itself


class EpisodeConfig(AdaptableConfig):
    """Which tasks are sampled and how, and how far a step may follow the samples."""

    environment: str = Field(description="finops, gsm8k, tatqa, package.module:factory, or path/file.py:factory")
    environment_options: dict[str, Any] = Field({}, description="keywords for the environment's factory")
    tasks_per_step: int = Field(16, gt=0, description="P: tasks sampled a step")
    group: int = Field(8, gt=0, description="G: episodes sampled for each task")
    temperature: float = Field(1.0, gt=0, description="of sampling, and of the log-probs and the entropy that are trained")
    constrained: bool = Field(False, description="sample under the grammar of tools and schema; log-probs are renormalised over it")
    max_rows: int = Field(64, gt=0, description="rows the engine decodes at once")
    aggregation: Literal["token", "sequence", "constant"] = Field("token", description="what shares a step: tokens, rows, or a constant length")
    loss: str = Field("clipped", description="clipped (PPO, GRPO, DAPO), gspo, cispo or luffy")
    clip_low: float | None = Field(None, gt=0, le=1, description="how far a ratio may fall; null: 0.2, gspo 3e-4")
    clip_high: float | None = Field(None, gt=0, description="how far it may rise (above clip_low: DAPO's clip-higher); null: 0.28, gspo 4e-4, cispo 4")
    minibatches: int = Field(1, gt=0, description="optimizer steps on one batch of episodes")
    tis_cap: float | None = Field(None, ge=1, description="largest importance weight for sampler against learner; null: not applied, still logged")
    tis_floor: float = Field(0.0, ge=0, le=1, description="smallest importance weight")
    tis_level: str = Field("token", description="whose ratio it is: token, or sequence (the product over an episode's tokens)")
    tis_treatment: str = Field("clip", description="what becomes of a weight outside: clip (to the bound), or mask (to zero)")
    kl: float = Field(0.0, ge=0, description="coefficient of the KL to the starting policy")
    kl_target: float | None = Field(None, gt=0, description="nats an episode: the coefficient is adapted to come to this (Ziegler et al. 2019); null: fixed")
    entropy_bonus: float = Field(0.0, ge=0, description="coefficient of the entropy, which is added to the gain")
    probe_every: int = Field(10, gt=0, description="sampling steps between reward-hacking probes")
    procedure_checks: tuple[str, ...] = Field(("procedure_followed",), description="verifier findings that say how, not what")
    keep_episodes_every: int = Field(20, gt=0, description="sampling steps between files of whole episodes")

    @property
    def updates(self) -> int:
        """Optimizer steps on one batch of episodes."""
        return self.minibatches

    @property
    def clips(self) -> tuple[float, float]:
        """(clip_low, clip_high), from the loss's paper where the config leaves them open."""
        low, high = CLIPS[self.loss]
        return self.clip_low or low, self.clip_high or high

    @model_validator(mode="after")
    def known_parts(self) -> EpisodeConfig:
        """Refuse a loss or an importance weight that is not there, and a target for a KL that is not penalised."""
        for key, known in (("loss", tuple(CLIPS)), ("tis_level", LEVELS), ("tis_treatment", TREATMENTS)):
            if getattr(self, key) not in known:
                raise ValueError(f"{key}: there is no {getattr(self, key)!r}; use one of {', '.join(known)}")
        if self.kl_target and not self.kl:
            raise ValueError("kl_target adapts the coefficient `kl`, which is 0: give it a value to start from")
        return self


def inputs(cfg: EpisodeConfig, environment: Environment) -> dict[str, str]:
    """The content hashes that, with the config, name this work."""
    named = {"base": checkpoint_hash(cfg.base), "environment": environment.version}
    return named | {"initial_adapter": checkpoint_hash(cfg.initial_adapter)} if cfg.initial_adapter else named


def steps_of(cfg: EpisodeConfig, tasks: Rows[Task]) -> int:
    """How many times tasks are sampled."""
    return cfg.steps or max(1, round(cfg.epochs * len(tasks) / cfg.tasks_per_step))


def sample(engine: Engine, environment: Environment, tasks: Rows[Task], cfg: EpisodeConfig, *stream: str | int) -> list[list[Record]]:
    """`group` judged episodes of each task, through the adapter under training; `stream` names the random stream.

    Of several ranks each samples its share of the tasks, and every one gets all episodes.
    """
    with parallel.whole(engine.policy.model):
        mine = collect(engine, environment, parallel.share(tasks), group=cfg.group, temperature=cfg.temperature, constrained=cfg.constrained,
                       seed=stream_seed(cfg.seed, *stream), adapter_of=lambda task: cfg.trains)  # fmt: skip
    return parallel.gathered(mine)


def parts(rows: Rows[Sequence], learner: Learner, cfg: EpisodeConfig) -> list[list[Batch]]:
    """`rows` in `minibatches` random parts, each in micro-batches where rows that begin alike stand together; a part may be empty."""
    order = list(range(len(rows)))
    Random(stream_seed(cfg.seed, "rows", learner.step)).shuffle(order)
    found = []
    for part in range(cfg.minibatches):
        chosen = [rows[row] for row in order[part :: cfg.minibatches]]
        kind, rng = learner.policy.kind(cfg.layout), Random(stream_seed(cfg.seed, "batches", learner.step + part))
        planned = parallel.spread(plan_units([[row] for row in chosen], kind, cfg.tokens_per_batch, rng)) if chosen else []
        found.append([collate([chosen[row] for row in batch], learner.policy.template.pad_id, kind) for batch in planned])
    return found


def over_parts(found: Rows[dict[str, Any]]) -> dict[str, Any]:
    """The metrics of several updates as those of one step; empty where there was none.

    What is counted is added, the rate is the last, the rest is the mean over supervised tokens. Sampler and learner are
    compared before the first update moves the learner away.
    """
    if len(found) < 2:
        return per_own(found[0]) if found else {}
    counted, seconds = sum(part["supervised"] for part in found), sum(part["step_s"] for part in found)
    whole = {name: sum(part[name] * part["supervised"] for part in found) / counted for name in found[0]}
    whole |= {name: sum(part[name] for part in found) for name in ADDED}
    whole |= {"limit_share": sum(part["limit_share"] * part["step_s"] for part in found) / seconds, "lr": found[-1]["lr"]}
    first = {name: value for name, value in per_own(found[0]).items() if name.startswith("mismatch")}
    return per_own(whole) | {"tokens_per_s": whole["tokens"] / seconds} | first


def per_own(metrics: dict[str, Any]) -> dict[str, Any]:
    """`metrics`, means over all tokens, with those that only own or only guided tokens have as means over these; None where there are none."""
    guided = metrics.get("guided", 0.0)
    of = dict.fromkeys(OF_OWN, 1 - guided) | {"guided_probability": guided}
    return {name: value if of.get(name, 1) == 1 else value / of[name] if of[name] else None for name, value in metrics.items()}
