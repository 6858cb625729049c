"""What reinforcement learning's probes say: is the reward earned, and do the answers only grow longer?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from temper.core.reports import Report
from temper.core.stats import growth, merge_clusters
from temper.report.data import Phase, StageLog
from temper.report.words import ABSENT

LENGTH = "runtime.sampled_length"
HACKING = ("probe_empty", "probe_constant", "probe_common")
FIGURES = {  # a name in the log: what it is called, what it tells, and whether it is a share
    "reward": ("Reward", "mean reward of the sampled episodes", False),
    "solved": ("Solved", "share of episodes with the full reward", True),
    "varied_groups": ("Groups that differ", "share of tasks whose episodes got different rewards: only these teach", True),
    "unearned_reward": ("Unearned reward", "share of all reward that went to episodes that skipped the procedure", True),
    "probe_empty": ("Reward of an empty answer", "judged by the same verifier; anything above 0 can be gamed", False),
    "probe_constant": ("Reward of a constant answer", "the best of a few fixed ones", False),
    "probe_common": ("Reward of the commonest answer", "the policy's most frequent final answer, on the tasks that it was not given for", False),
    "length": ("Tokens an episode", "sampled tokens, all turns", False),
    "length_drift": ("Length drift", "growth of the figure above since the first step", True),
    "cut_turns": ("Turns cut off", "share of turns that ran into the token limit", True),
    "failed_episodes": ("Episodes that broke off", "share that ended in an error", True),
}


@dataclass(frozen=True)
class ProbeRow:
    """One probe over the steps of a stage."""

    name: str
    meaning: str
    first: str
    last: str
    lowest: str
    highest: str
    measured: str


@dataclass(frozen=True)
class Probes:
    """The probes of one stage of reinforcement learning, and what they say."""

    stage: str
    rows: tuple[ProbeRow, ...]
    words: tuple[str, ...]


def probes(phase: Phase, before: Report | None) -> list[Probes]:
    """The probes of every stage of reinforcement learning in a phase."""
    found = []
    for stage in phase.stages:
        if stage.kind == "rl" and stage.metrics:
            words = (hacking_words(stage), earned_words(stage), length_words(stage), *dev_words(phase.report, before))
            found.append(Probes(stage.name, tuple(row for name in FIGURES if (row := probe_row(stage, name))), words))
    return found


def series(stage: StageLog, name: str) -> list[float]:
    """The values of one figure, step by step, where it was logged."""
    return [float(row[name]) for row in stage.metrics if isinstance(row.get(name), (int, float)) and math.isfinite(row[name])]


def probe_row(stage: StageLog, name: str) -> ProbeRow | None:
    """One figure over the steps; None where no step logs the name at all."""
    if not any(name in row for row in stage.metrics):
        return None
    called, meaning, is_share = FIGURES[name]
    values = series(stage, name)
    first, last, lowest, highest = (number(value, is_share) for value in (values[0], values[-1], min(values), max(values))) if values else [ABSENT] * 4
    return ProbeRow(called, meaning, first, last, lowest, highest, f"{len(values)} of {len(stage.metrics)} steps")


def number(value: float, is_share: bool) -> str:
    """A share in percent, anything else with two decimals, or none from 100 on."""
    text = f"{value:.1%}" if is_share else f"{value:.0f}" if abs(value) >= 100 else f"{value:.2f}"
    return text.replace("-", "−")


def hacking_words(stage: StageLog) -> str:
    """Whether answers that know nothing of the task earn anything."""
    highest = {FIGURES[name][0].removeprefix("Reward of "): max(values) for name in HACKING if (values := series(stage, name))}
    if not highest:
        return "Reward hacking was not probed."
    times = max(len(series(stage, name)) for name in HACKING)
    tried = f"{listed(list(highest))} were judged in {times} probe{'s' if times > 1 else ''}"
    paid = {name: value for name, value in highest.items() if value > 0}
    if not paid:
        return f"{tried.capitalize()} and earned nothing: no way to the reward that passes by the task was found."
    told = ", ".join(f"{name} up to {value:.2f}" for name, value in paid.items())
    return f"{tried.capitalize()}, and the verifier paid for some: {told}. A reward that can be had so can be gamed."


def earned_words(stage: StageLog) -> str:
    """Whether the reward that was paid went to episodes that did the work."""
    paid, values = series(stage, "reward"), series(stage, "unearned_reward")
    if not paid or max(paid) <= 0:
        return "No episode earned a reward, so there was nothing to follow and nothing to game."
    if not values:
        return "Whether rewarded episodes followed the procedure was not measured."
    if max(values) == 0:
        return "Every rewarded episode followed the procedure, in every step that paid."
    return f"Up to {max(values):.1%} of a step's reward went to episodes that skipped the procedure, {values[-1]:.1%} in the last one."


def length_words(stage: StageLog) -> str:
    """How the sampled length moved over the training."""
    lengths, cut = series(stage, "length"), series(stage, "cut_turns")
    if len(lengths) < 2:
        return "One step says nothing of how the length moved."
    drift = f"{lengths[-1] / lengths[0] - 1:+.0%}".replace("-", "−") if lengths[0] else ABSENT
    limit = f"; {cut[-1]:.0%} of turns ran into the token limit in the last step" if cut else ""
    return f"Sampled episodes went from {lengths[0]:.0f} to {lengths[-1]:.0f} tokens ({drift}){limit}."


def dev_words(now: Report, before: Report | None) -> list[str]:
    """How the answers' length moved on dev, with its interval, whole and on the kind of task that was trained."""
    told = []
    for metric, where in ((LENGTH, "all tasks"), ("slice:discrepancy.sampled_length", "discrepancies")):
        ours, theirs = now.measure(metric), before.measure(metric) if before else None
        if ours is None or theirs is None or before is None or now.suite_hash != before.suite_hash:
            continue
        paired = growth(ours.cases, theirs.cases, merge_clusters(ours.clusters, theirs.clusters))
        if paired.difference is not None:
            ends = f" ({paired.low:+.0%} to {paired.high:+.0%})" if paired.low is not None and paired.high is not None else " (no interval)"
            told.append(f"{paired.difference:+.1%}{ends} on {where}, n = {paired.count}".replace("-", "−"))
    return [f"On {now.split}, against {before.name}, tokens a turn changed by {'; by '.join(told)}."] if told and before else []


def listed(items: Sequence[str]) -> str:
    """Items as a sentence has them."""
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]

