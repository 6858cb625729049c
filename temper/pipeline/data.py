"""The data stage: records from an environment's generators or from files, through admission, into manifests."""

from __future__ import annotations

import importlib
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from temper.core.config import Config as CoreConfig
from temper.core.errors import ConfigError
from temper.core.hashing import hash_file
from temper.core.records import Manifest, Provenance, Record, Refusal, Split
from temper.core.run import RunDirectory
from temper.environments import load_environment
from temper.firewall.admission import admit, write_manifest
from temper.firewall.contamination import HeldoutTask, heldout_task
from temper.firewall.rules import AdmissionRules
from temper.traces.importers import import_records

DATA_ROOMS = ("traces", "firewall", "environments")


class Source(CoreConfig):
    """Where the records of a manifest come from: `generate` (`package.module:function`) or a file `path`.

    A generator is called with (seed, split, count) and `options`; a file needs `provenance`, and `format` where it
    cannot be told from the file.
    """

    generate: str | None = None
    count: int = Field(0, ge=0)
    options: dict[str, Any] = {}
    path: str | None = None
    format: str | None = None
    provenance: dict[str, Any] = {}

    @model_validator(mode="after")
    def one_origin(self) -> Source:
        """Refuse a source with no origin, or with two."""
        if (self.generate is None) == (self.path is None):
            raise ValueError("a source has either `generate` or `path`")
        if self.generate is not None and self.count == 0:
            raise ValueError("`generate` needs a `count` above 0")
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
    files = {source.path: hash_file(Path(source.path)) for item in cfg.sets.values() for source in item.sources if source.path and Path(source.path).is_file()}
    folder = RunDirectory.create(Path(cfg.out), stage="data", config=cfg.model_dump(mode="json"), inputs=files, rooms=DATA_ROOMS)
    if folder.done:
        print(f"unchanged: data in {cfg.out} (key {folder.key[:12]})")
        return folder.result()
    heldout = heldout_tasks(cfg)
    counts = {name: admit_set(name, item, cfg, heldout).counts for name, item in cfg.sets.items()}
    return folder.finish({"manifests": counts}, started)


def heldout_tasks(cfg: Config) -> list[HeldoutTask]:
    """The tasks that training data is compared with: prompts, and gold answers where a task has one."""
    if cfg.environment is None:
        return []
    environment = load_environment(cfg.environment, **cfg.environment_options)
    return [heldout_task(task) for split in cfg.heldout for task in environment.tasks(split, cfg.heldout_limit)]


def admit_set(name: str, item: SetConfig, cfg: Config, heldout: list[HeldoutTask]) -> Manifest:
    """Generate or import the records of one set, admit them, write the manifest."""
    records: list[Record] = []
    rows: list[str] = []
    refused: list[Refusal] = []
    for source in item.sources:
        if source.generate:
            found = list(call_generator(source, cfg.seed, item.split))
            records += found
            rows += [f"{source.generate}#{number}" for number in range(1, len(found) + 1)]
        else:
            imported = import_records(Path(str(source.path)), provenance_of(source, item.split), format=source.format)
            records += imported.records
            rows += imported.rows
            refused += imported.refusals
    rules = AdmissionRules.model_validate({"splits": (item.split,), **cfg.rules, **item.rules})
    compared = heldout if item.split == "train" else []
    return write_manifest(Path(cfg.out) / name, admit(records, name=name, heldout=compared, rules=rules, rows=rows, refused=refused))


def call_generator(source: Source, seed: int, split: Split) -> Iterable[Record]:
    """The records that `package.module:function` yields. Raises ConfigError where it cannot be imported."""
    module, _, function = str(source.generate).partition(":")
    try:
        generator = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"generator {source.generate!r} cannot be imported", why=str(error), do="write package.module:function") from error
    return generator(seed, split, source.count, **source.options)


def provenance_of(source: Source, split: Split) -> Provenance:
    """The provenance that a file's rows get. Raises ConfigError naming what is missing."""
    try:
        return Provenance.model_validate({"source": source.path, "split": split, **source.provenance})
    except ValueError as error:
        raise ConfigError(f"source {source.path} has no complete provenance", why=str(error), do="give licence, privacy, access and synthetic under `provenance:`") from error
