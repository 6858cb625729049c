"""What a pipeline file spells: phases, what is measured after each, and what happens to the one that passes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from temper.core.config import Config as CoreConfig
from temper.core.config import apply_overrides, interpolate, read_yaml
from temper.evaluate.suite import Options


class StageRef(CoreConfig):
    """One stage file, beside the pipeline's own, with overrides (`key=value`)."""

    config: str
    set: tuple[str, ...] = ()


class Phase(CoreConfig):
    """Stages that belong together, and the model that is measured after them.

    `targets` are the metrics the phase aims at, `guardrails` those it must not harm; they are compared with the
    phase named `against` (default: the one before). `constrained`: JSON and tool calls are decoded under grammars.
    """

    name: str
    title: str
    fixes: str = ""
    stages: tuple[StageRef, ...] = ()
    model: str
    adapters: dict[str, str] = {}
    constrained: bool = False
    against: str | None = None
    targets: tuple[str, ...] = ()
    guardrails: tuple[str, ...] = ()


class ReleaseConfig(CoreConfig):
    """What is registered: the phase whose model and adapters are judged, against which baseline, by which rule."""

    phase: str
    baseline: str
    gate: str
    student: str | None = None
    student_gate: str | None = None
    model_id: str
    base_model_id: str
    stages: tuple[StageRef, ...] = ()
    registry: str
    alias: str = "production"
    routing_requests: int = Field(0, ge=0)


class PipelineConfig(CoreConfig):
    """A whole lap: data, phases, measurements, gate, release, serving, report."""

    stage: Literal["pipeline"] = "pipeline"
    run: str = "runs/demo"
    title: str
    environment: str = "finops"
    environment_options: dict[str, Any] = {}
    data: StageRef
    phases: tuple[Phase, ...]
    limit: int | None = Field(None, ge=1, description="dev tasks a slice after each phase")
    sealed_limit: int | None = Field(None, ge=1, description="tasks a slice on the sealed split, once")
    options: Options = Options()
    ledger: str = Field("", description="where every look at the sealed split is recorded; left out: looks.jsonl in the run folder")
    release: ReleaseConfig
    report: str

    @model_validator(mode="before")
    @classmethod
    def ledger_in_the_run(cls, values: Any) -> Any:
        """Where no ledger is named, it stands in the run folder."""
        if isinstance(values, dict) and not values.get("ledger"):
            return values | {"ledger": f"{values.get('run', cls.model_fields['run'].default)}/looks.jsonl"}
        return values

    def phase(self, name: str) -> Phase:
        """The phase of that name."""
        return next(phase for phase in self.phases if phase.name == name)


def beside(pipeline: Path, reference: StageRef) -> Path:
    """The file that a reference names."""
    return pipeline.parent / reference.config


def resolved(cfg: PipelineConfig, path: Path, reference: StageRef) -> dict[str, Any]:
    """A stage file's keys with the pipeline's run folder and overrides in place."""
    return interpolate(apply_overrides(read_yaml(beside(path, reference)), [f"run={cfg.run}", *reference.set]))


def stage_module(name: str) -> Any:
    """The module behind a stage file's `stage:` key."""
    from temper.pipeline import data  # not before a config is read: the schema alone needs no stage
    from temper.train import load_stage

    return data if name == "data" else load_stage(name)
