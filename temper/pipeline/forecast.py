"""`--dry-run` of a pipeline: every step in order, and what each would cost, before anything has run.

A step reads what earlier steps write. Where that is not there yet, something stands in for it: for a checkpoint the
nearest ancestor that exists (of one shape with it, and the shape is what costs), for a manifest a small sample made the
way the data stage would make it, whose figures are scaled to the planned rows. Every estimate says what stood in.
"""

from __future__ import annotations

import math
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from temper.core.config import load_config
from temper.core.errors import TemperError
from temper.core.progress import track
from temper.environments import load_environment
from temper.evaluate.suite import pick_tasks, spread
from temper.firewall.admission import admit, write_manifest
from temper.firewall.rules import AdmissionRules
from temper.pipeline import data as data_stage
from temper.pipeline.config import Phase, PipelineConfig, StageRef, beside, resolved, stage_module
from temper.policy.model import Policy
from temper.rollout.engine import Engine
from temper.rollout.episodes import collect
from temper.traces.importers import import_records

SAMPLE = 64  # rows that stand in for a manifest


@dataclass(frozen=True)
class Step:
    """One stage of the pipeline as it will run."""

    phase: str
    file: Path
    stage: str
    module: Any
    config: Any


@dataclass(frozen=True)
class Sampled:
    """A manifest of `taken` rows that stands in for one of `planned` rows; `at_most` where a model's own answers are among them."""

    folder: Path
    taken: int
    planned: int
    at_most: bool


def plan(cfg: PipelineConfig, path: Path) -> dict[str, Any]:
    """The resolved config, every step with its estimate, every evaluation with its own, and the sum of the seconds."""
    steps = [step_of(cfg, path, name, item) for name, item in [("data", cfg.data), *((p.name, s) for p in cfg.phases for s in p.stages)]]
    with tempfile.TemporaryDirectory() as scratch:
        found = [
            {
                "phase": step.phase, "config": str(step.file), "stage": step.stage, "out": step.config.out,
                "resolved": step.config.model_dump(mode="json"), "estimate": forecast(step, steps, Path(scratch)),
            }
            for step in track(steps, "estimate")
        ]  # fmt: skip
    evaluations = forecast_evaluations(cfg, steps)
    costs = [item for item in [*(step["estimate"] for step in found), *evaluations] if isinstance(item, dict)]
    return {
        "run": cfg.run, "config": cfg.model_dump(mode="json"), "steps": found, "evaluations": evaluations,
        "seconds": round(sum(cost.get("seconds") or 0.0 for cost in costs), 1),
    }  # fmt: skip


def step_of(cfg: PipelineConfig, path: Path, phase: str, reference: StageRef) -> Step:
    """A stage file with the pipeline's run folder and overrides in place."""
    stage = resolved(cfg, path, reference)["stage"]
    module, file = stage_module(stage), beside(path, reference)
    return Step(phase, file, stage, module, load_config(module.Config, file, [f"run={cfg.run}", *reference.set]))


def forecast(step: Step, steps: list[Step], scratch: Path) -> dict[str, Any] | str:
    """What a step would cost; where that cannot be said, why."""
    if step.stage == "data":
        planned = {name: sum(source.count for source in item.sources) for name, item in step.config.sets.items()}
        return {"rows": sum(planned.values()), "planned": planned}
    if not hasattr(step.module, "estimate"):
        return f"{step.module.__name__} gives no estimate"
    try:
        return estimate(step, steps, scratch)
    except TemperError as error:
        return f"not yet: {error.what}"


def estimate(step: Step, steps: list[Step], scratch: Path) -> dict[str, Any]:
    """The stage's own estimate with stand-ins for what is not there yet, scaled to the planned rows."""
    changed: dict[str, Any] = {"base": ancestor(step.config.base, steps)}
    notes = [f"{changed['base']} stands in for {step.config.base}"] if changed["base"] != step.config.base else []
    changed |= {key: None for key in ("dev", "heldout") if getattr(step.config, key, None)}  # measured, not trained on
    data, sampled = getattr(step.config, "data", None), None
    if data and not (Path(data) / "manifest.json").is_file():
        sampled = sample_of(Path(data), steps, scratch)
    if sampled:
        changed |= {"data": str(sampled.folder), "steps": None, "epochs": 1.0}  # each sampled row once, to be scaled
        most = "at most " if sampled.at_most else ""
        notes.append(f"from {sampled.taken} rows, scaled to the {most}{sampled.planned} that are planned")
    found = step.module.estimate(step.config.model_copy(update=changed)).model_dump(mode="json")
    if sampled:
        found |= scaled(found, sampled, step.config)
    return found | {"seconds_from": "; ".join([found["seconds_from"], *notes])}


def scaled(found: dict[str, Any], sampled: Sampled, config: Any) -> dict[str, Any]:
    """The figures of one pass over the sample at the size of the plan: its rows, its passes or its fixed number of steps."""
    tokens_of_pass = found["tokens"] * sampled.planned / sampled.taken
    rows_a_step = getattr(config, "pairs_per_step", None)
    steps_of_pass = math.ceil(sampled.planned / rows_a_step) if rows_a_step else max(1, round(tokens_of_pass / config.tokens_per_step))
    steps = config.steps or max(1, round(steps_of_pass * config.epochs))
    times = tokens_of_pass * steps / steps_of_pass / found["tokens"]
    return {
        "rows": sampled.planned, "tokens": round(found["tokens"] * times), "supervised": round(found["supervised"] * times), "steps": steps,
        "seconds": round(found["seconds"] * times, 3),
    }  # fmt: skip


def ancestor(path: str, steps: list[Step]) -> str:
    """The nearest checkpoint that exists among those that `path` will be made from; `path` itself where nothing plans to make it."""
    while not Path(path).is_dir():
        maker = next((step for step in steps if step.stage != "data" and Path(step.config.out) == Path(path).parent), None)
        if maker is None:
            return path
        path = maker.config.base
    return path


def sample_of(path: Path, steps: list[Step], scratch: Path) -> Sampled | None:
    """A small manifest like the one that will stand at `path`; None where no data step makes it, or nothing can be sampled yet."""
    maker = next((step for step in steps if step.stage == "data" and Path(step.config.out) == path.parent), None)
    if maker is None or path.name not in maker.config.sets:
        return None
    item = maker.config.sets[path.name]
    generated = sum(source.count for source in item.sources if source.generate)
    records, planned = [], sum(source.count for source in item.sources)
    for source in item.sources:
        if source.generate:
            few = source.model_copy(update={"count": math.ceil(SAMPLE * source.count / generated)})
            records += list(data_stage.call_generator(few, maker.config.seed, item.split))
        elif source.path:
            found = import_records(Path(source.path), data_stage.provenance_of(source, item.split), format=source.format).records
            planned += len(found)
            records += found[:SAMPLE]
    if not records:
        return None
    rules = AdmissionRules.model_validate({"splits": (item.split,), **maker.config.rules, **item.rules})
    manifest = write_manifest(scratch / path.parent.name / path.name, admit(records, name=path.name, heldout=[], rules=rules))
    return Sampled(scratch / path.parent.name / path.name, len(manifest.admitted), planned, any(source.sample for source in item.sources))


def forecast_evaluations(cfg: PipelineConfig, steps: list[Step]) -> list[dict[str, Any]]:
    """What each measurement would cost, from one task of each kind answered by the model that stands in for the phase's."""
    environment = load_environment(cfg.environment, **cfg.environment_options)
    tasks = {"dev": pick_tasks(environment, "dev", cfg.limit), "test": pick_tasks(environment, "test", cfg.sealed_limit)}
    few = spread(tasks["dev"], len({task.slice for task in tasks["dev"]}))
    rates: dict[tuple[str, bool], tuple[float, float]] = {}
    found = []
    for phase, split in looks(cfg):
        model = ancestor(phase.model, steps)
        try:
            key = (model, phase.constrained)
            rates[key] = rates.get(key) or answering(model, environment, few, phase.constrained)
        except TemperError as error:
            found.append({"phase": phase.name, "split": split, "tasks": len(tasks[split]), "seconds_from": f"not yet: {error.what}"})
            continue
        tokens, seconds = rates[key]
        rounds = len(tasks[split]) * cfg.options.repeats + cfg.options.latency_tasks
        source = f"{len(few)} tasks answered by {model}" + ("" if model == phase.model else f", in place of {phase.model}")
        found.append(
            {
                "phase": phase.name, "split": split, "tasks": len(tasks[split]), "tokens": round(tokens * rounds),
                "seconds": round(seconds * rounds, 3), "seconds_from": source,
            }
        )  # fmt: skip
    return found


def looks(cfg: PipelineConfig) -> list[tuple[Phase, str]]:
    """Every measurement of the lap: each phase on dev, and at the end the released ones once on the sealed split."""
    sealed = dict.fromkeys(name for name in (cfg.release.baseline, cfg.release.phase, cfg.release.student) if name)
    return [*((phase, "dev") for phase in cfg.phases), *((cfg.phase(name), "test") for name in sealed)]


def answering(model: str, environment: Any, tasks: list[Any], constrained: bool) -> tuple[float, float]:
    """Sampled tokens and seconds a task, measured on `tasks` answered together; a first answer warms up."""
    engine = Engine(Policy.load(model, precision="float32"))
    collect(engine, environment, tasks[:1], temperature=0.0, constrained=constrained)
    started = time.perf_counter()
    groups = collect(engine, environment, tasks, temperature=0.0, constrained=constrained)
    seconds = time.perf_counter() - started
    sampled = sum(len(turn.token_ids) for group in groups for record in group for turn in record.sampled)
    return sampled / len(tasks), seconds / len(tasks)
