"""A lap small enough to be killed and run again in a test: a tiny model, eight tasks, four stages, a release that is served."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml

from temper.core.records import Message, Outcome, Preference, Provenance, Record, Split
from temper.rollout.environment import PlainSession, Task

WORDS = ("budget", "sales", "account", "quarter", "the", "answer", "draft", "tool")
OPTIM = {"lr": 1e-2}


def provenance(split: Split) -> Provenance:
    return Provenance(source="test", licence="Apache-2.0", split=split, privacy="synthetic", access="all", synthetic=True, generator="small")


def rows(seed: int, split: Split, count: int) -> Iterator[Record]:
    rng = random.Random(f"{seed} {split}")
    for number in range(count):
        words = " ".join(rng.choice(WORDS) for _ in range(6))
        messages = (Message(role="user", content=f"say {number} {words}"), Message(role="assistant", content=words))
        yield Record(messages=messages, provenance=provenance(split), slice="say")


def ranked(seed: int, split: Split, count: int) -> Iterator[Record]:
    rng = random.Random(f"{seed} {split} ranked")
    for number in range(count):
        words = " ".join(rng.choice(WORDS) for _ in range(6))
        sides = Preference(chosen=(Message(role="assistant", content=words),), rejected=(Message(role="assistant", content="I cannot do that"),))
        messages = (Message(role="user", content=f"rank {number} {words}"),)
        yield Record(messages=messages, provenance=provenance(split), preference=sides, shape="preference", slice="say")


class Say:
    """Tasks without tools: a reward for each answer that holds the letter e."""

    name, version = "say", "say-1"

    def tasks(self, split: Split, limit: int | None = None) -> list[Task]:
        return [
            Task(id=f"{split}-{n}", messages=(Message(role="user", content=f"{split} {n} {word}"),), slice="say", split=split, max_tokens=6, max_turns=1)
            for n, word in enumerate(WORDS)
        ][:limit]

    def open(self, task: Task) -> PlainSession:
        return PlainSession()

    def verify(self, task: Task, turns: tuple[Message, ...], session: Any) -> Outcome:
        text = turns[-1].content if turns else ""
        return Outcome(reward=float("e" in text), checks={"task_success": "e" in text})


def environment() -> Say:
    return Say()


def write_lap(folder: Path, base: str) -> Path:
    """The lap's files in `folder`; the path of the pipeline's own."""
    stage = {"max_tokens": 96, "tokens_per_batch": 256, "checkpoint_every": 1, "precision": "float32", "optim": OPTIM}
    files: dict[str, dict[str, Any]] = {
        "data.yaml": {
            "stage": "data", "out": "${run}/data", "environment": "small:environment",
            "sets": {
                "sft": {"sources": [{"generate": "small:rows", "count": 40}]},
                "pairs": {"sources": [{"generate": "small:ranked", "count": 24}]},
                "pairs_dev": {"split": "dev", "sources": [{"generate": "small:ranked", "count": 8}]},
            },
        },
        "sft.yaml": {"stage": "sft", "base": base, "data": "${run}/data/sft", "out": "${run}/sft", "steps": 6, "tokens_per_step": 256, **stage},
        "preference.yaml": {"stage": "preference", "base": "${run}/sft/model", "data": "${run}/data/pairs", "out": "${run}/preference", "pairs_per_step": 8, **stage},
        "reward.yaml": {
            "stage": "reward", "base": "${run}/sft/model", "data": "${run}/data/pairs", "heldout": "${run}/data/pairs_dev", "out": "${run}/reward",
            "pairs_per_step": 8, **stage,
        },
        "gate.yaml": {"alpha": 0.05, "min_count": 1, "coverage": 1.0, "targets": [{"metric": "runtime.episode_errors", "max": 0.0, "by": "point"}]},
        "lap.yaml": {
            "stage": "pipeline", "run": str(folder / "run"), "title": "a small lap", "environment": "small:environment", "data": {"config": "data.yaml"},
            "options": {"latency_tasks": 0}, "report": "${run}/report.html",
            "phases": [
                {"name": "base", "title": "base", "model": base},
                {"name": "sft", "title": "sft", "stages": [{"config": "sft.yaml"}], "model": "${run}/sft/model", "targets": ["instruction.task_success"]},
                {
                    "name": "preference", "title": "preference", "stages": [{"config": "preference.yaml"}, {"config": "reward.yaml"}],
                    "model": "${run}/preference/model", "against": "sft", "targets": ["instruction.task_success"], "guardrails": ["runtime.episode_errors"],
                },
            ],
            "release": {
                "phase": "preference", "baseline": "base", "gate": "gate.yaml", "model_id": "small", "base_model_id": "tiny", "registry": "${run}/registry",
            },
        },
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    for name, values in files.items():
        (folder / name).write_text(yaml.safe_dump(values, sort_keys=False))
    return folder / "lap.yaml"


def work(path: str) -> None:
    """Run the lap with a single thread."""
    from temper.pipeline import lap

    torch.set_num_threads(1)
    lap.run(Path(path))
