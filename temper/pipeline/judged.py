"""What a phase's own reward model says of its answers: a number on the side of the targets, never one that releases.

A phase that trains a reward model (`stage: reward`) is judged by it: the same tasks' first answers before and after,
of the kinds of task whose pairs it learned from. How far its word goes is measured on pairs that it did not train on.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from temper.core.errors import DataError
from temper.core.records import Noun, Record
from temper.core.reports import Measure, Report
from temper.core.run import TRAINING_ROOMS, RunDirectory
from temper.core.stats import mean, mean_interval, wilson
from temper.core.storage import read_json
from temper.data.sequence import load_manifest
from temper.data.template import Template
from temper.evaluate.compare import with_measure
from temper.pipeline.config import Phase, PipelineConfig
from temper.pipeline.measure import evaluation_folder, records_of, stage_outputs
from temper.policy.scalar_head import RewardModel

METRIC = "preference.reward_model"
COIN = 0.5  # the accuracy of a judge that knows nothing


class Judged(Noun):
    """A reward model's word on a phase: its `accuracy` on held-out pairs, and the mean reward of the answers on both sides.

    `slices` are the kinds of task that it learned to judge, and the only ones it is asked about.
    """

    against: str
    accuracy: Measure
    slices: tuple[str, ...]
    before: Measure
    after: Measure

    @property
    def trusted(self) -> bool:
        """Whether it tells held-out pairs apart better than a coin: the whole interval lies above one half."""
        return self.accuracy.low is not None and self.accuracy.low > COIN


def judge_phase(cfg: PipelineConfig, phase: Phase, against: str, reward_out: str, reports: dict[str, Report]) -> Judged:
    """Score the answers of `phase` and of the phase `against` with the reward model in `reward_out`; done work is read back.

    `reports` are those of both phases; they give each case its cluster.
    """
    started = time.monotonic()
    trained = stage_outputs(reward_out)
    inputs = {"reward_model": trained["result"]["hash"]}
    for name in (against, phase.name):
        inputs[name] = read_json(evaluation_folder(cfg, name) / "done.json")["key"]
    settings = {"phase": phase.name, "against": against, "accuracy": trained["result"]["metrics"].get("heldout_accuracy")}
    out = Path(cfg.run) / "judged" / phase.name
    folder = RunDirectory.create(out, stage="judge", config=settings, inputs=inputs, rooms=(*TRAINING_ROOMS, "evaluate", "pipeline"))
    if folder.done:
        print(f"unchanged: the reward model's word on {phase.name} in {out} (key {folder.key[:12]})", file=sys.stderr)
        return Judged.model_validate(folder.result())
    judge = RewardModel.load(trained["result"]["reward_model"], precision="float32")
    slices = tuple(sorted({record.slice for record in load_manifest(Path(trained["config"]["data"]))[1]}))
    sides = []
    for name in (against, phase.name):
        require_same_tokens(judge, cfg.phase(name))
        asked = [record for record in records_of(cfg, name) if record.slice in slices]
        sides.append(reward_measure(judge, asked, clusters_in(reports[name])))
    judged = Judged(against=against, accuracy=accuracy_of(trained["result"]["metrics"]), slices=slices, before=sides[0], after=sides[1])
    folder.finish(judged.model_dump(mode="json"), started)
    return judged


def require_same_tokens(judge: RewardModel, phase: Phase) -> None:
    """Raise DataError where a phase's tokens mean something else to the reward model."""
    if Template.of(AutoTokenizer.from_pretrained(phase.model)).fingerprint != judge.template.fingerprint:
        raise DataError(
            f"the reward model {judge.path} cannot read what {phase.model} sampled",
            why="their tokenizers or templates differ",
            do="train the reward model on a base of the same family",
        )


def accuracy_of(metrics: dict[str, Any]) -> Measure:
    """The share of held-out pairs that were ranked rightly; not measured where the stage was given none."""
    value, count = metrics.get("heldout_accuracy"), int(metrics.get("heldout_pairs") or 0)
    if value is None or not count:
        return Measure(value=None, count=0)
    low, high = wilson(value * count, count)
    return Measure(value=value, count=count, low=low, high=high, method="Wilson")


def reward_measure(judge: RewardModel, records: Sequence[Record], clusters: dict[str, str]) -> Measure:
    """The mean reward of the first sampled answer of each record: exactly the tokens that were sampled, none re-encoded."""
    answered = {case: record.sampled[0] for case, record in zip(case_ids(records), records, strict=True) if record.sampled}
    if not answered:
        return Measure(value=None, count=0, unit="reward")
    rewards = judge.score([[*turn.prompt_ids, *turn.token_ids] for turn in answered.values()])
    cases = dict(zip(answered, rewards, strict=True))
    within = {case: clusters[case] for case in cases if case in clusters}
    interval = mean_interval(cases, within)
    return Measure(
        value=mean(rewards), count=len(cases), low=interval.low, high=interval.high, unit="reward", cases=cases, clusters=within,
        method=interval.method,
    )  # fmt: skip


def case_ids(records: Sequence[Record]) -> list[str]:
    """The id of each record's case as reports name it: the task's, with `#n` behind it where a task was answered several times."""
    times, seen, ids = Counter(record.task_id for record in records), Counter[str | None](), []
    for record in records:
        ids.append(str(record.task_id) if times[record.task_id] == 1 else f"{record.task_id}#{seen[record.task_id]}")
        seen[record.task_id] += 1
    return ids


def clusters_in(report: Report) -> dict[str, str]:
    """The cluster of every case that the report's verifier judged."""
    scores = report.measure("preference.score")
    return scores.clusters if scores else {}


def with_judgement(reports: dict[str, Report], phase: str, judged: Judged) -> dict[str, Report]:
    """`reports` with the reward model's figure in those of both sides."""
    sides = {judged.against: judged.before, phase: judged.after}
    return reports | {name: with_measure(reports[name], "preference", "reward_model", measure) for name, measure in sides.items()}
