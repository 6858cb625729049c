"""`run_suite`: a model answers the tasks of one split; every figure of the Report comes from what the verifier found."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from temper.core.config import Config
from temper.core.errors import DataError
from temper.core.hashing import hash_text, hash_value
from temper.core.progress import track
from temper.core.records import Record, Split
from temper.core.reports import Report
from temper.evaluate import ledger as sealed
from temper.evaluate.cases import Case, pair_up
from temper.evaluate.compare import with_win_rate
from temper.evaluate.metrics import Price, by_slice, measure

if TYPE_CHECKING:
    from temper.rollout.engine import Engine
    from temper.rollout.environment import Environment, Task

SEALED: Split = "test"
INTERVALS = "95%; rates: Wilson at the clustered effective sample size; means: clustered t; latency quantiles: order statistics"
AdapterOf = Callable[["Task"], str | None]
Collect = Callable[..., list[list[Record]]]


class Options(Config):
    """How a suite is run. `temperature`, `seed` and `repeats` are part of the suite's hash; the others change no answer.

    `conversations`: how many are kept a slice. `latency_tasks`: how many tasks are run once more, one at a
    time, to time a turn (0: latency is not measured). `chunk`: tasks handed to the engine at once.
    """

    temperature: float = Field(default=0.0, ge=0)
    seed: int = 0
    repeats: int = Field(default=1, ge=1)
    conversations: int = Field(default=2, ge=0)
    latency_tasks: int = Field(default=12, ge=0)
    chunk: int = Field(default=64, ge=1)
    price: Price | None = None


def run_suite(
    engine: Engine,
    environment: Environment,
    split: Split,
    *,
    name: str,
    constrained: bool = False,
    adapter_of: AdapterOf | None = None,
    limit: int | None = None,
    options: Options | None = None,
    previous: Report | None = None,
    ledger: Path | None = None,
    model_hash: str | None = None,
    collect: Collect | None = None,
) -> tuple[Report, list[Record]]:
    """Answer the tasks of `split` (at most `limit` a slice), verify, and measure. Returns the report and the records.

    `previous` (a report of the same suite) adds the win rate against it. The sealed split asks for `ledger`,
    and the look is on record before the first token is sampled. `collect` is `rollout.episodes.collect` unless told.
    """
    how = options or Options()
    tasks = pick_tasks(environment, split, limit)
    suite = suite_hash(environment, split, tasks, how)
    require_suite(previous, split, suite)
    weights = model_hash or engine.policy.weights_hash()
    seen = count_look(ledger, name=name, model_hash=weights, suite_hash=suite, environment=environment.name, split=split)
    collector = collect or default_collect()
    arguments = {
        "group": how.repeats,
        "temperature": how.temperature,
        "seed": how.seed,
        "constrained": constrained,
        "adapter_of": adapter_of,
    }

    started = time.monotonic()
    groups: list[list[Record]] = []
    for chunk in track([tasks[i : i + how.chunk] for i in range(0, len(tasks), how.chunk)], f"evaluate {name} on {split}"):
        groups += collector(engine, environment, chunk, **arguments)
    answering = time.monotonic() - started
    cases = pair_up(tasks, groups)
    seconds = time_turns(collector, engine, environment, spread(tasks, how.latency_tasks), cases, arguments)

    settings = settings_of(environment, tasks, how, limit=limit, constrained=constrained, adapter_of=adapter_of)
    report = Report(
        name=name,
        model=str(getattr(engine.policy, "path", "")),
        model_hash=weights,
        split=split,
        suite_hash=suite,
        dimensions=measure(cases, seconds=seconds, price=how.price),
        slices=by_slice(cases),
        conversations=tuple(conversation(case) for case in pick_conversations(cases, how.conversations)),
        settings={**settings, "answering_seconds": round(answering, 3), "sealed_looks": seen},
    )
    records = [record for group in groups for record in group]
    return (with_win_rate(report, previous) if previous else report), records


def require_suite(previous: Report | None, split: Split, suite: str) -> None:
    """Raise DataError where the report to compare with answered another suite; said before anything is sampled."""
    if previous is not None and (previous.split, previous.suite_hash) != (split, suite):
        raise DataError(
            f"report {previous.name!r} is of another suite",
            why=f"{previous.split} {previous.suite_hash[:16]}, this one is {split} {suite[:16]}",
            do="evaluate it again with these tasks and options",
        )


def settings_of(
    environment: Environment, tasks: Sequence[Task], options: Options, *, limit: int | None, constrained: bool, adapter_of: AdapterOf | None
) -> dict[str, Any]:
    """How the figures were made, for the reader of a report."""
    return {
        "environment": environment.name,
        "environment_version": environment.version,
        "tasks": len(tasks),
        "limit": limit,
        "constrained": constrained,
        "adapters": sorted({adapter_of(task) or "" for task in tasks} - {""}) if adapter_of else [],
        "intervals": INTERVALS,
        **options.model_dump(mode="json"),
    }


def default_collect() -> Collect:
    """The room's own way to collect episodes."""
    from temper.rollout.episodes import collect

    return collect


def pick_tasks(environment: Environment, split: Split, limit: int | None) -> list[Task]:
    """The tasks of a split, at most `limit` a slice: those whose ids hash lowest, so the pick is the same for every model."""
    tasks = list(environment.tasks(split))
    if limit is not None:
        if limit < 1:
            raise DataError(f"limit is {limit}, so no task would be answered", do="give a limit of 1 or more, or none")
        taken: dict[str, list[str]] = {}
        for task in sorted(tasks, key=lambda item: hash_text(item.id)):
            taken.setdefault(task.slice, []).append(task.id)
        kept = {identity for ids in taken.values() for identity in ids[:limit]}
        tasks = [task for task in tasks if task.id in kept]
    if not tasks:
        raise DataError(f"environment {environment.name!r} has no task in split {split!r}", do="choose a split that it has")
    strays = [task.id for task in tasks if task.split != split]
    if strays:
        raise DataError(
            f"{len(strays)} tasks of {environment.name!r} asked for as {split!r} are of another split", why=f"the first is {strays[0]}"
        )
    return tasks


def suite_hash(environment: Environment, split: Split, tasks: Sequence[Task], options: Options) -> str:
    """What was asked, and how: the environment's version, each task's id and content, and the sampling settings.

    Whether decoding was constrained and which adapters were used belong to the model under test, not to the
    question, so a release with a grammar can be compared with a base without one.
    """
    return hash_value({
        "environment": environment.name, "version": environment.version, "split": split,
        "tasks": {task.id: hash_value(task) for task in tasks},
        "temperature": options.temperature, "seed": options.seed, "repeats": options.repeats,
    })  # fmt: skip


def count_look(path: Path | None, *, name: str, model_hash: str, suite_hash: str, environment: str, split: Split) -> int | None:
    """Put a look at the sealed split on record; None for the open splits."""
    if split != SEALED:
        return None
    if path is None:
        raise DataError(
            f"split {split!r} is sealed",
            why="every look at it has to be on record",
            do="give ledger=<file>, for example runs/looks.jsonl; or evaluate on dev",
        )
    return sealed.look(path, name=name, model_hash=model_hash, suite_hash=suite_hash, environment=environment, split=split)


def spread(tasks: Sequence[Task], count: int) -> list[Task]:
    """`count` tasks taken slice by slice in turn, lowest id hash first."""
    groups: dict[str, list[Task]] = {}
    for task in sorted(tasks, key=lambda item: hash_text(item.id)):
        groups.setdefault(task.slice, []).append(task)
    ranked = sorted((place, name) for name, group in groups.items() for place in range(len(group)))
    return [groups[name][place] for place, name in ranked[:count]]


def time_turns(
    collector: Collect, engine: Engine, environment: Environment, tasks: Sequence[Task], cases: Sequence[Case], arguments: Mapping[str, Any]
) -> dict[str, float]:
    """Seconds a turn of each of `tasks`, run alone after the suite (so nothing is compiled while the clock runs).

    Tools, grammar and verification are inside the time. Keys are case ids.
    """
    known = {case.task.id: case.id for case in reversed(cases)}
    found = {}
    for task in track(tasks, "time single requests"):
        started = time.perf_counter()
        (record,) = collector(engine, environment, [task], **{**arguments, "group": 1})[0]
        elapsed = time.perf_counter() - started
        if record.sampled:
            found[known[task.id]] = elapsed / len(record.sampled)
    return found


def pick_conversations(cases: Sequence[Case], count: int) -> list[Case]:
    """`count` cases a slice by the hash of the task's id: the same tasks in every report of the suite."""
    groups: dict[str, list[Case]] = {}
    for case in sorted(cases, key=lambda item: hash_text(item.id)):
        groups.setdefault(case.slice, []).append(case)
    return [case for name in sorted(groups) for case in groups[name][:count]]


def conversation(case: Case) -> dict[str, Any]:
    """One conversation as a reader wants it: the turns, what the verifier found, and what was expected."""
    outcome = case.record.outcome
    return {
        "case": case.id, "slice": case.slice, "tenant": case.task.tenant, "cluster": case.task.cluster,
        "messages": [message.model_dump(mode="json", exclude_none=True) for message in case.record.messages],
        "checks": {name: found for name, found in outcome.checks.items() if found is not None},
        "reward": outcome.reward, "error": outcome.error, "expected": case.task.answer,
    }  # fmt: skip
