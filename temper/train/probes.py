"""What to watch while a policy learns from a reward: how long, how varied, and whether the reward is earned or found."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any

from temper.core.records import Message, Record
from temper.rollout.environment import CONSTANT_ANSWERS, Environment, Task, replay


def summarise(records_P_G: Sequence[Sequence[Record]], procedure: Sequence[str], memory: dict[str, Any]) -> dict[str, float | None]:
    """Reward, length and the first signs of gaming over one batch of episodes.

    `memory` keeps the mean sampled length of the first batch; `length_drift` is the growth since then.
    `unearned_reward` is the share of all reward that episodes got although a `procedure` finding failed.
    """
    records = [record for group in records_P_G for record in group]
    rewards = [record.outcome.reward for record in records if record.outcome.reward is not None]
    lengths = [sum(len(turn.token_ids) for turn in record.sampled) for record in records]
    length = statistics.fmean(lengths)
    first = memory.setdefault("first_length", length)
    unearned = sum(record.outcome.reward or 0.0 for record in records if any(record.outcome.checks.get(name) is False for name in procedure))
    varied = sum(len({record.outcome.reward for record in group if record.outcome.reward is not None}) > 1 for group in records_P_G)
    return {
        "reward": statistics.fmean(rewards) if rewards else None,
        "reward_std": statistics.pstdev(rewards) if rewards else None,
        "solved": share(reward >= 1.0 for reward in rewards),
        "unjudged": share(record.outcome.reward is None for record in records),
        "failed_episodes": share(record.outcome.error is not None for record in records),
        "varied_groups": varied / len(records_P_G),
        "unearned_reward": unearned / sum(rewards) if sum(rewards) > 0 else None,
        "length": length,
        "length_drift": length / first - 1 if first else None,
        "cut_turns": share(turn.finish_reason == "length" for record in records for turn in record.sampled),
        "turns": statistics.fmean(len(record.sampled) for record in records),
        "calls": statistics.fmean(sum(len(message.tool_calls) for message in spoken(record)) for record in records),
    }


def hacking_probes(environment: Environment, tasks: Sequence[Task], records_P_G: Sequence[Sequence[Record]]) -> dict[str, float | None]:
    """Answers that know nothing of the task, judged by the same verifier; any reward they get can be gamed.

    `probe_empty` plays an empty answer, `probe_constant` the best of a few fixed ones, `probe_common` the final
    answer the policy gives most often, on the tasks it was not given for.
    """
    finals = [final(record) for group in records_P_G for record in group]
    common = Counter(text for text in finals if text).most_common(1)
    empty = [reward_of(environment, task, "") for task in tasks]
    constant = max(statistics.fmean(reward_of(environment, task, answer) for task in tasks) for answer in CONSTANT_ANSWERS[1:])
    foreign = [
        reward_of(environment, task, common[0][0])
        for task, group in zip(tasks, records_P_G, strict=True)
        if common and all(final(record) != common[0][0] for record in group)
    ]
    return {"probe_empty": statistics.fmean(empty), "probe_constant": constant,
            "probe_common": statistics.fmean(foreign) if foreign else None}  # fmt: skip


def reward_of(environment: Environment, task: Task, answer: str) -> float:
    """The reward of saying only `answer`; an answer that nobody judges earns nothing."""
    outcome, _ = replay(environment, task, (Message(role="assistant", content=answer),))
    return outcome.reward or 0.0


def spoken(record: Record) -> list[Message]:
    """The assistant turns the policy sampled, which stand at the end of the conversation."""
    turns = [message for message in record.messages if message.role == "assistant"]
    return turns[len(turns) - len(record.sampled) :]


def final(record: Record) -> str:
    """The text of the last sampled turn; empty where it only called tools."""
    turns = spoken(record)
    return turns[-1].content.strip() if turns else ""


def share(flags: Any) -> float | None:
    """The share of true flags; None of none."""
    found = [bool(flag) for flag in flags]
    return sum(found) / len(found) if found else None
