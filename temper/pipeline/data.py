"""The data stage: records from an environment's generators or from files, through admission, into manifests."""

from __future__ import annotations

import importlib
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from temper.core.config import Config as CoreConfig
from temper.core.config import parse_config
from temper.core.errors import ConfigError
from temper.core.hashing import hash_file
from temper.core.records import Provenance, Record, Refusal, Split
from temper.core.run import TRAINING_ROOMS, RunDirectory
from temper.core.storage import folder_hash
from temper.environments import load_environment
from temper.firewall.admission import Admission, admit, require_some, write_manifest
from temper.firewall.contamination import HeldoutTask, heldout_task
from temper.firewall.rules import AdmissionRules
from temper.traces.importers import import_records

DATA_ROOMS = ("traces", "firewall", "environments")


class Source(CoreConfig):
    """Where the records of a manifest come from: a generator, a file, or a model's own episodes.

    `generate` (`package.module:function`) is called with (seed, split, count) and `options`. A file at `path` needs
    `provenance`, and `format` where it cannot be told from the file. `sample` is a checkpoint that answers `count`
    tasks of the data stage's environment (`options` go to the environment); only episodes that the verifier accepts
    are offered to admission: what a model said is data only after it passes the firewall again.
    """

    generate: str | None = None
    path: str | None = None
    sample: str | None = None
    count: int = Field(0, ge=0)
    temperature: float = Field(0.0, ge=0)
    options: dict[str, Any] = {}
    format: str | None = None
    provenance: dict[str, Any] = {}

    @model_validator(mode="after")
    def one_origin(self) -> Source:
        """Refuse a source with no origin, or with two."""
        if sum(origin is not None for origin in (self.generate, self.path, self.sample)) != 1:
            raise ValueError("a source has exactly one of `generate`, `path` and `sample`")
        if self.path is None and self.count == 0:
            raise ValueError("`generate` and `sample` need a `count` above 0")
        return self


class SetConfig(CoreConfig):
    """One manifest: its sources, the split its records are of, and changes to the admission rules."""

    sources: tuple[Source, ...]
    split: Split = "train"
    rules: dict[str, Any] = {}


class Config(CoreConfig):
    """The data stage. `heldout` are the splits of `environment` whose tasks no training record may give away."""

    stage: Literal["data"] = "data"
    run: str = "runs/demo"
    out: str
    seed: int = 0
    environment: str | None = None
    environment_options: dict[str, Any] = {}
    heldout: tuple[Split, ...] = ("dev", "test")
    heldout_limit: int | None = None
    rules: dict[str, Any] = {}
    sets: dict[str, SetConfig]


def run(cfg: Config) -> dict[str, Any]:
    """Admit every set and write its manifest; return counts by set. Done work returns at once."""
    started = time.monotonic()
    sources = [source for item in cfg.sets.values() for source in item.sources]
    inputs = {source.path: hash_file(Path(source.path)) for source in sources if source.path and Path(source.path).is_file()}
    inputs |= {source.sample: folder_hash(Path(source.sample)) for source in sources if source.sample}
    rooms = (*TRAINING_ROOMS, *DATA_ROOMS) if any(source.sample for source in sources) else DATA_ROOMS
    folder = RunDirectory.planned(Path(cfg.out), stage="data", config=cfg.model_dump(mode="json"), inputs=inputs, rooms=rooms)
    if folder.done:
        print(f"unchanged: data in {cfg.out} (key {folder.key[:12]})")
        return folder.result()
    heldout = heldout_tasks(cfg)
    admitted = {name: admit_set(name, item, cfg, heldout) for name, item in cfg.sets.items()}
    folder.open()  # only now: what is refused leaves the data of an earlier run where it stands
    counts = {name: write_manifest(Path(cfg.out) / name, admission).counts for name, admission in admitted.items()}
    return folder.finish({"manifests": counts}, started)


def heldout_tasks(cfg: Config) -> list[HeldoutTask]:
    """The tasks that training data is compared with: prompts, and gold answers where a task has one."""
    if cfg.environment is None:
        return []
    environment = load_environment(cfg.environment, **cfg.environment_options)
    return [heldout_task(task) for split in cfg.heldout for task in environment.tasks(split, cfg.heldout_limit)]


def admit_set(name: str, item: SetConfig, cfg: Config, heldout: list[HeldoutTask]) -> Admission:
    """Generate or import the records of one set and judge them. Raises ManifestError where none is admitted."""
    records: list[Record] = []
    rows: list[str] = []
    refused: list[Refusal] = []
    for source in item.sources:
        if source.generate:
            found = list(call_generator(source, cfg.seed, item.split))
            records += found
            rows += [f"{source.generate}#{number}" for number in range(1, len(found) + 1)]
        elif source.sample:
            found = accepted_episodes(source, cfg, item.split)
            records += found
            rows += [f"{source.sample}#{number}" for number in range(1, len(found) + 1)]
        else:
            imported = import_records(Path(str(source.path)), provenance_of(source, item.split), format=source.format)
            records += imported.records
            rows += imported.rows
            refused += imported.refusals
    rules = parse_config(AdmissionRules, {"splits": (item.split,), **cfg.rules, **item.rules})
    compared = heldout if item.split == "train" else []
    admission = admit(records, name=name, heldout=compared, rules=rules, rows=rows, refused=refused)
    require_some(admission)
    return admission


def call_generator(source: Source, seed: int, split: Split) -> Iterable[Record]:
    """The records that `package.module:function` yields. Raises ConfigError where it cannot be imported."""
    module, _, function = str(source.generate).partition(":")
    try:
        generator = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"generator {source.generate!r} cannot be imported", why=str(error), do="write package.module:function"
        ) from error
    return generator(seed, split, source.count, **source.options)


def accepted_episodes(source: Source, cfg: Config, split: Split) -> list[Record]:
    """Episodes of a checkpoint on the environment's tasks that the verifier accepted, one generation deeper."""
    from temper.policy.model import Policy  # only a source that samples needs torch
    from temper.rollout.engine import Engine
    from temper.rollout.episodes import collect

    if cfg.environment is None:
        raise ConfigError(f"source {source.sample} samples, but the data stage names no environment", do="set `environment:`")
    environment = load_environment(cfg.environment, **{**cfg.environment_options, **source.options})
    engine = Engine(Policy.load(str(source.sample), precision="float32"))
    tasks = environment.tasks(split)[: source.count]
    episodes = [
        record
        for group in collect(engine, environment, tasks, temperature=source.temperature, seed=cfg.seed, constrained=True)
        for record in group
    ]
    accepted = [record for record in episodes if record.outcome.reward == 1.0]
    return [as_data(record, str(source.sample)) for record in accepted]


def as_data(record: Record, model: str) -> Record:
    """An episode as training data: its text without the sampled tokens, marked as made by a model."""
    messages = tuple(message.model_copy(update={"train": None}) for message in record.messages)
    origin = record.provenance.model_copy(
        update={"synthetic": True, "generation_depth": record.provenance.generation_depth + 1, "generator": model, "parents": (record.id,)}
    )
    return record.model_copy(update={"messages": messages, "provenance": origin, "sampled": ()})


def provenance_of(source: Source, split: Split) -> Provenance:
    """The provenance that a file's rows get. Raises ConfigError naming what is missing."""
    try:
        return Provenance.model_validate({"source": source.path, "split": split, **source.provenance})
    except ValidationError as error:
        raise ConfigError(
            f"source {source.path} has no complete provenance",
            why="; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()),
            do="state licence, privacy, access and synthetic: under `provenance:` in a file, by the options of that name for `temper data admit`",
        ) from error
