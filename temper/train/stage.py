"""What every stage shares: its config, its run directory, its plan of optimizer steps, its resume.

A stage is a module with `Config` and `run(cfg) -> dict`. Nothing here knows a training method.
"""

from __future__ import annotations

import importlib
import random
from collections.abc import Callable
from collections.abc import Sequence as Rows
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator

from temper.core.config import Config
from temper.core.errors import ConfigError, DataError, ManifestError
from temper.core.hashing import hash_file, hash_folder, hash_text, hash_value, stream_seed
from temper.core.progress import track
from temper.core.records import Manifest, Record
from temper.core.run import RunDirectory
from temper.core.storage import FILES, folder_hash, read_json
from temper.data.batch import plan_batches, plan_units
from temper.data.layout import Kind
from temper.data.sequence import Sequence, load_manifest, to_sequence
from temper.data.template import Template
from temper.policy.adapters import LoraConfig
from temper.policy.hardware import choose_precision
from temper.policy.model import Policy
from temper.policy.quantised import Quantisation
from temper.policy.scalar_head import RewardModel
from temper.rollout.environment import Environment, Task
from temper.train import parallel
from temper.train.learner import Learner, OptimConfig
from temper.train.shared_run import SharedRun, say, write_output
from temper.train.trackers import open_trackers

Plan = list[list[list[int]]]  # optimizer steps, each a list of micro-batches, each a list of row numbers
Micro = Callable[[list[int], random.Random], list[list[int]]]  # the rows of one step -> which of them share a micro-batch


class StageConfig(Config):
    """The keys every stage knows. Paths may refer to any top-level key as `${key}`."""

    stage: str = Field("", description="which stage this file configures: sft, preference, kto, reward, process_reward, rl, ppo or distill")
    run: str = Field("runs/demo", description="the folder that the paths below refer to as ${run}")
    out: str = Field(description="the folder this stage writes")
    base: str = Field(description="the checkpoint it starts from: a folder, or a hub name")
    seed: int = Field(0, description="the root of every random stream")
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    device: str = Field("auto", description="auto, cpu or cuda")
    threads: int | None = Field(None, gt=0, description="CPU threads; null leaves torch's choice")
    optim: OptimConfig = OptimConfig()
    max_tokens: int = Field(1024, gt=1, description="longest row of data: a longer one is cut, counted as cut, and refused where nothing trained is left; rl cuts demonstrations there too. What is sampled is as long as its environment lets it be: rl and ppo only divide by this, under aggregation: constant")
    tokens_per_batch: int = Field(8192, gt=0, description="positions computed at once, a micro-batch: memory, never the gradient; with bucket_steps above 1 also which rows share a step")
    layout: Literal["auto", "padded", "packed"] = Field(
        "auto", description="how rows are computed: padded; packed side by side; auto: packed, with what rows begin with alike computed once, where the model can"
    )
    tokens_per_step: int = Field(8192, gt=0, description="real tokens of one optimizer step")
    bucket_steps: int = Field(1, gt=0, description="steps whose rows are laid into micro-batches of like length together: less padding, steps less mixed")
    epochs: float = Field(1.0, gt=0, description="passes over the rows")
    steps: int | None = Field(None, gt=0, description="optimizer steps; overrides epochs")
    checkpoint_every: int = Field(50, gt=0, description="optimizer steps between checkpoints")
    recompute: bool = Field(False, description="activation checkpointing: less memory for more operations; what it costs is printed")
    trackers: tuple[str, ...] = Field((), description="where metrics go besides metrics.jsonl: tensorboard, wandb, mlflow, trackio")


class AdaptableConfig(StageConfig):
    """The keys of a stage that trains a whole model, or an adapter on it."""

    lora: LoraConfig | None = Field(None, description="train an adapter of this form instead of the weights")
    adapter: str = Field("adapter", description="the adapter's name")
    initial_adapter: str | None = Field(None, description="folder of an adapter to go on from")
    quantise: Quantisation | None = Field(None, description="hold the frozen base in four bits while an adapter is trained (QLoRA): nf4")

    @model_validator(mode="after")
    def one_adapter(self) -> AdaptableConfig:
        """Refuse a form for an adapter that has one already."""
        if self.lora and self.initial_adapter:
            raise ValueError("give `lora` for a fresh adapter or `initial_adapter` to go on from one: its form is that of the adapter")
        return self

    @property
    def trains(self) -> str | None:
        """The name of the adapter under training; None where the weights are trained."""
        return self.adapter if self.lora or self.initial_adapter else None


def open_run(cfg: StageConfig, stage: str, inputs: dict[str, str]) -> RunDirectory:
    """The run directory of this work, named by the config and the `inputs`' hashes. Says so where it is already done.

    Where torchrun started several processes, they join here and share it.
    """
    parallel.join(cfg.device)
    shared = SharedRun if parallel.world() > 1 else RunDirectory
    with parallel.rank_zero_first():
        # where metrics are sent besides changes no weight, so it does not name the work
        run = shared.create(Path(cfg.out), stage=stage, config=cfg.model_dump(mode="json", exclude={"trackers"}), inputs=inputs)
    if run.done:
        say(f"unchanged: {stage} in {cfg.out} (key {run.key[:12]})")
        return run
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    if parallel.rank() == 0:
        run.trackers = open_trackers(cfg.trackers, run, stage, cfg.model_dump(mode="json"))
    return run


def checkpoint_hash(path: str) -> str:
    """What names a checkpoint's content: its recorded hashes, its files' hashes, or its hub name."""
    folder = Path(path)
    if not folder.is_dir():
        return hash_text(path)
    return folder_hash(folder) if (folder / FILES).is_file() else hash_value(hash_folder(folder))


def manifest_hash(path: str) -> str:
    """The hash of the manifest in folder `path` and of the records beside it, without reading them one by one."""
    listing = Path(path) / "manifest.json"
    if not listing.is_file():
        raise ManifestError(f"{listing} does not exist", why="training takes admitted records only", do="let the data through admission: temper data admit")
    manifest = Manifest.model_validate(read_json(listing))
    records = listing.parent / manifest.records_file
    if not records.is_file():
        raise ManifestError(f"{records} does not exist", why=f"{listing} names it", do="restore it, or run the admission again")
    return hash_value([manifest.hash, hash_file(records)])


def load_policy(cfg: StageConfig, path: str | None = None, *, frozen: bool = False) -> Policy:
    """The policy at `path` (default: the stage's base) in the stage's precision, with the random streams at their start."""
    torch.manual_seed(stream_seed(cfg.seed, "init"))
    policy = Policy.load(path or cfg.base, precision=cfg.precision, device=cfg.device, frozen=frozen)
    policy.recompute = cfg.recompute
    dtype, reason = choose_precision(cfg.precision, policy.device)
    say(f"{policy.path} on {policy.device}: products in {str(dtype).removeprefix('torch.')} ({reason}), what is trained and its moments in float32")
    return policy


def prepare(cfg: AdaptableConfig) -> Policy:
    """The base with what is to be trained on it: all weights, a fresh adapter, or one to go on from."""
    policy = load_policy(cfg, frozen=cfg.trains is not None)
    policy.template.require()
    if cfg.quantise:
        if not cfg.trains:
            raise ConfigError(f"quantise: {cfg.quantise} without an adapter", why="weights in four bits cannot be trained", do="set lora, or leave quantise out")
        policy.quantise(cfg.quantise)
    if cfg.initial_adapter:
        policy.load_adapter(cfg.adapter, cfg.initial_adapter)
    elif cfg.lora:
        policy.add_lora(cfg.adapter, cfg.lora)
    policy.model.train()
    return policy


def same_family(what: str, other: Policy | RewardModel, policy: Policy) -> None:
    """Raise ConfigError where `other`, which `what` names, has another tokenizer or template than `policy`."""
    if other.template.fingerprint != policy.template.fingerprint:
        raise ConfigError(f"{what} has another tokenizer or template than {policy.path}", why="it would speak of other tokens than are trained",
                          do="use a checkpoint of the same family, or leave it out")  # fmt: skip


def hold_unseen(learner: Learner, rows: Rows[Sequence]) -> None:
    """Keep the embeddings of tokens that no row holds as they are.

    The softmax pushes every token that is not the target away, so a word that never stands in the rows would
    be unlearnt as something to say: a small model then cannot copy it from a request.
    """
    table = learner.policy.model.get_input_embeddings().weight
    seen_V_1 = torch.zeros(table.shape[0], 1, dtype=torch.bool, device=table.device)
    seen_V_1[sorted({token for row in rows for token in row.tokens})] = True
    learner.hold(table, seen_V_1)


def save_trained(run: RunDirectory, policy: Policy, cfg: AdaptableConfig) -> dict[str, Any]:
    """Write `model/` or `adapter/`, whatever was trained; return its path and hash."""
    name = "adapter" if cfg.trains else "model"
    adapter = cfg.trains
    path = str(write_output(run, name, policy.model, partial(policy.save_adapter, adapter) if adapter else policy.save))
    return {name: path, "hash": checkpoint_hash(path)}


def load_environment(name: str, options: dict[str, Any]) -> Environment:
    """The environment that `name` makes with `options`. Raises ConfigError where there is none of that name."""
    # by name, not by import: a trainer knows the interface of environments and none of them
    return importlib.import_module("temper.environments").load_environment(name, **options)


def load_records(path: str) -> tuple[Manifest, list[Record]]:
    """The admitted records of a manifest folder, every hash recomputed. Raises ManifestError, DataError."""
    manifest, records = load_manifest(Path(path))
    if not records:
        raise DataError(f"{path} admits no record", do="look at the refusals in its manifest.json")
    return manifest, records


def rows_of(records: list[Record], template: Template, max_tokens: int) -> list[Sequence]:
    """Each record as a training row. Raises DataError naming the record that cannot be one."""
    rows = [to_sequence(record, template, max_tokens) for record in track(records, "rows")]
    say_cut(rows, max_tokens)
    return rows


def say_cut(rows: Rows[Sequence], max_tokens: int) -> None:
    """Say how many rows lost their ends, where any did: what is cut, an end token among it, is never learnt."""
    cut = [row.cut for row in rows if row.cut]
    if cut:
        say(f"{len(cut)} of {len(rows)} rows are longer than max_tokens={max_tokens}: {sum(cut):,} tokens at their ends are not trained on")


def training_tasks(environment: Environment) -> list[Task]:
    """The environment's training tasks. Raises DataError where there is none."""
    tasks = environment.tasks("train")
    if not tasks:
        raise DataError(f"environment {environment.name!r} has no training task", do="look at its options in the config")
    return tasks


def tasks_of(step: int, tasks: Rows[Task], count: int, seed: int) -> list[Task]:
    """The `count` tasks of one step: passes over all of them, each in its own order; a function of seed and step alone."""
    chosen = []
    for at in range(step * count, (step + 1) * count):
        lap, place = divmod(at, len(tasks))
        order = list(range(len(tasks)))
        random.Random(stream_seed(seed, "tasks", lap)).shuffle(order)
        chosen.append(tasks[order[place]])
    return chosen


def micro_of(units: Rows[Rows[Sequence]], kind: Kind, cfg: StageConfig) -> Micro:
    """Micro-batches of `tokens_per_batch` positions as `kind` lays them out; a unit (a row, a pair) stays together."""
    return lambda chosen, rng: plan_units([units[unit] for unit in chosen], kind, cfg.tokens_per_batch, rng)


def plan_steps(lengths: Rows[int], cfg: StageConfig, micro: Micro | None = None, *, rows_of_step: int | None = None) -> Plan:
    """Every optimizer step of the stage, in order: which rows, in which micro-batches.

    Each epoch shuffles the rows and cuts them into steps of `tokens_per_step` real tokens (or of `rows_of_step`
    rows); `micro` makes the micro-batches of a step (None: padded, rows of like length together). With `bucket_steps` it
    makes those of so many steps at once, which are then dealt to the steps at random. A function of the config alone, so
    the position in it is the number of the step.
    """
    total: Plan = []
    wanted = cfg.steps
    epoch, budget = 0, cfg.epochs
    while (len(total) < wanted) if wanted is not None else budget > 0:
        rng = random.Random(stream_seed(cfg.seed, "order", epoch))
        order = list(range(len(lengths)))
        rng.shuffle(order)
        if wanted is None and budget < 1:
            order = order[: max(1, round(budget * len(order)))]
        steps = cut(order, lengths, cfg.tokens_per_step, rows_of_step)
        for first in range(0, len(steps), cfg.bucket_steps):
            together = steps[first : first + cfg.bucket_steps]
            rows = [row for step in together for row in step]
            batches = micro(rows, rng) if micro else plan_batches([lengths[row] for row in rows], cfg.tokens_per_batch, rng)
            total += [parallel.spread([[rows[at] for at in batch] for batch in some]) for some in deal(batches, [lengths[row] for row in rows], len(together), rng)]
        epoch, budget = epoch + 1, budget - 1
    return total[:wanted]


def deal(batches: list[list[int]], lengths: Rows[int], steps: int, rng: random.Random) -> list[list[list[int]]]:
    """Micro-batches, shuffled, in `steps` parts of about equal tokens; as they are where there is one step."""
    if steps == 1:
        return [batches]
    rng.shuffle(batches)
    tokens = [sum(lengths[at] for at in batch) for batch in batches]
    return [[batches[number] for number in part] for part in pieces(list(range(len(batches))), tokens, steps) if part]


def cut(order: list[int], lengths: Rows[int], tokens: int, rows_of_step: int | None) -> list[list[int]]:
    """`order` in consecutive pieces of about equal tokens, none far above `tokens` (or of `rows_of_step` rows)."""
    if rows_of_step is not None:
        return [order[at : at + rows_of_step] for at in range(0, len(order), rows_of_step)]
    return pieces(order, lengths, max(1, round(sum(lengths[row] for row in order) / tokens)))


def pieces(order: list[int], lengths: Rows[int], count: int) -> list[list[int]]:
    """`order` in at most `count` consecutive pieces of about equal tokens."""
    share = sum(lengths[row] for row in order) / count
    found: list[list[int]] = [[]]
    reached = 0.0
    for row in order:
        if found[-1] and len(found) < count and reached >= share * len(found):
            found.append([])
        found[-1].append(row)
        reached += lengths[row]
    return found


def resume(run: RunDirectory, learner: Learner) -> int:
    """Put `learner` back to the newest whole checkpoint of `run`, if any, and the log with it; return the step."""
    found = run.latest()
    if found is not None:
        learner.load(found[1])
        say(f"going on from step {learner.step} of {learner.total_steps} in {run.path}")
    run.rewind_metrics(learner.step)
    return learner.step


def keep(run: RunDirectory, learner: Learner, cfg: StageConfig, *, stride: int = 1) -> None:
    """Write a checkpoint where the last `stride` steps reached the next one due and work is left to lose."""
    due = learner.step // cfg.checkpoint_every > (learner.step - stride) // cfg.checkpoint_every
    if due and learner.step < learner.total_steps:
        run.checkpoint(learner.step, learner.save)


def rounded(metrics: dict[str, Any]) -> dict[str, Any]:
    """Metrics for one log line: floats with six significant digits."""
    return {name: float(f"{value:.6g}") if isinstance(value, float) else value for name, value in metrics.items()}
