"""The environment interface: it owns its prompts, its tools and its verifier; training, evaluation and serving use the same one."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from typing import Any, Protocol

from pydantic import Field

from temper.core.errors import DataError
from temper.core.records import Message, Noun, Outcome, Split, ToolCall, ToolSpec
from temper.core.reports import Finding

CONSTANT_ANSWERS = ("", "I don't know.", "Yes", "0", "1", "{}", "[]", "The answer is 42.")
LUCK = 0.05  # the largest share of tasks where a constant answer or an echo may be right by chance
ACCEPTED = 1.0  # the reward of a task that was done


class Task(Noun):
    """One thing to be done. `messages` is the prompt; `answer` is the hidden gold, never shown to a model.

    `slice` is the kind of task in reports, `cluster` what its neighbours share (a company, a document).
    `demonstration` holds the gold turns after the prompt, tool results included; it may be empty. `max_turns` bounds
    the assistant turns and `max_tokens` each of them.
    """

    id: str
    messages: tuple[Message, ...]
    tools: tuple[ToolSpec, ...] = ()
    slice: str = ""
    split: Split = "train"
    cluster: str = ""
    tenant: str | None = None
    response_schema: dict[str, Any] | None = None
    answer: dict[str, Any] = Field(default_factory=dict)
    demonstration: tuple[Message, ...] = ()
    max_turns: int = 6
    max_tokens: int = 160


class Session(Protocol):
    """The private state that one episode acts on; `verify` looks at it, then it is closed."""

    def call(self, call: ToolCall) -> str:
        """The tool's result as JSON text. A failed call is `{"error": …}`: data, not an exception."""
        ...

    def close(self) -> None:
        """Give back what the session holds."""
        ...


class Environment(Protocol):
    """Tasks, the sessions they act on, and a verifier. `version` changes whenever a task or a verdict could."""

    @property
    def name(self) -> str:
        """The short name that configs use."""
        ...

    @property
    def version(self) -> str:
        """Identifies tasks and verifier; stands in the provenance of every record."""
        ...

    def tasks(self, split: Split, limit: int | None = None) -> list[Task]:
        """The tasks of a split, in a fixed order."""
        ...

    def open(self, task: Task) -> Any:
        """A fresh `Session` for one episode of the task."""
        ...

    def verify(self, task: Task, turns: tuple[Message, ...], session: Any) -> Outcome:
        """What the turns after the prompt amount to: reward 1 where the task was done, None where nothing can be judged."""
        ...


class PlainSession:
    """The session of a task without tools."""

    def call(self, call: ToolCall) -> str:
        """An error as data: there is no tool to call."""
        return '{"error": "this task offers no tools"}'

    def close(self) -> None:
        """Nothing is held."""


def replay(environment: Environment, task: Task, turns: Sequence[Message]) -> tuple[Outcome, list[str]]:
    """Play `turns` for real in a fresh session; the outcome, and a line for each tool result that came out otherwise."""
    differences = []
    with closing(environment.open(task)) as session:
        waiting: list[ToolCall] = []
        for message in turns:
            if message.role == "assistant":
                waiting = list(message.tool_calls)
            elif message.role == "tool":
                if not waiting:
                    raise DataError(f"task {task.id}: the demonstration has a tool result without a call", do="add the call before it")
                call = waiting.pop(0)
                result = session.call(call)
                if result != message.content:
                    differences.append(f"{call.name} returned {result[:120]}, the demonstration says {message.content[:120]}")
        return environment.verify(task, tuple(turns), session), differences


def self_check(environment: Environment, split: Split = "dev", limit: int | None = None) -> list[Finding]:
    """Whether the environment accepts its own gold and refuses empty, constant and prompt-echo answers.

    One Finding a rule. An empty answer must never be accepted; a constant answer or an echo in at most 5% of tasks,
    and of every slice with 20 tasks or more: what is right by chance is not a hole.
    """
    tasks = environment.tasks(split, limit)
    if not tasks:
        return [_finding("has tasks", [f"no task in split {split!r}"], 0, "at least one task")]
    counts: dict[str, int] = {}
    for task in tasks:
        counts[task.id] = counts.get(task.id, 0) + 1
    twice = [f"task id {name} stands {count} times" for name, count in counts.items() if count > 1]
    other = [f"task {task.id} says split {task.split!r}" for task in tasks if task.split != split]
    findings = [_finding("task ids are unique", twice, len(tasks), "no id twice")]
    findings.append(_finding("tasks are of the split", other, len(tasks), split))
    findings += _check_gold(environment, [task for task in tasks if task.demonstration])
    empty = [task.id for task in tasks if _accepts(environment, task, "") or _accepts(environment, task, None)]
    findings.append(_finding("refuses an empty answer", empty, len(tasks), "never accepted"))
    for constant in CONSTANT_ANSWERS[1:]:
        findings.append(_by_chance(f"refuses the constant answer {constant!r}", environment, tasks, [constant] * len(tasks)))
    echoes = [next((m.content for m in reversed(task.messages) if m.role == "user"), "") for task in tasks]
    findings.append(_by_chance("refuses the prompt as an answer", environment, tasks, echoes))
    return findings


def require(findings: Sequence[Finding]) -> None:
    """Raise DataError naming every finding that failed."""
    failed = [f"{item.rule}: {item.observed} ({item.reason})" for item in findings if item.status == "fail"]
    if failed:
        why = "; ".join(failed)
        raise DataError("the environment does not pass its own checks", why=why, do="mend its tasks or its verify before training on it")


def _check_gold(environment: Environment, tasks: list[Task]) -> list[Finding]:
    refused, changed, unsteady = [], [], []
    for task in tasks:
        outcome, differences = replay(environment, task, task.demonstration)
        if outcome.reward is None or outcome.reward < ACCEPTED:
            failed = sorted(name for name, passed in outcome.checks.items() if passed is False)
            refused.append(f"{task.id}: reward {outcome.reward}, failed {failed}")
        if outcome != replay(environment, task, task.demonstration)[0]:
            unsteady.append(task.id)
        changed += [f"{task.id}: {line}" for line in differences]
    return [
        _finding("accepts its own gold answers", refused, len(tasks), f"reward {ACCEPTED:g} for every demonstration"),
        _finding("gold tool results are what the tools return", changed, len(tasks), "equal text"),
        _finding("gives equal outcomes for equal episodes", unsteady, len(tasks), "equal outcomes"),
    ]


def _accepts(environment: Environment, task: Task, answer: str | None) -> bool:
    turns = () if answer is None else (Message(role="assistant", content=answer),)
    outcome, _ = replay(environment, task, turns)
    return outcome.reward is not None and outcome.reward >= ACCEPTED


def _by_chance(rule: str, environment: Environment, tasks: list[Task], answers: list[str]) -> Finding:
    accepted = [_accepts(environment, task, answer) for task, answer in zip(tasks, answers, strict=True)]
    groups: dict[str, list[int]] = {"all tasks": list(range(len(tasks)))}
    for number, task in enumerate(tasks):
        groups.setdefault(f"slice {task.slice}", []).append(number)
    faults = []
    for name, members in groups.items():
        count = sum(accepted[number] for number in members)
        enough = name == "all tasks" or len(members) >= 1 / LUCK
        if enough and count > max(1.0, LUCK * len(members)):
            first = next(tasks[number].id for number in members if accepted[number])
            faults.append(f"accepted in {count} of {len(members)} of {name}, first {first}")
    return _finding(rule, faults, len(tasks), f"at most {LUCK:.0%} by chance")


def _finding(rule: str, faults: Sequence[str], count: int, required: str) -> Finding:
    shown = "; ".join(faults[:3]) + (f" and {len(faults) - 3} more" if len(faults) > 3 else "")
    status = "fail" if faults else "pass" if count else "unknown"
    return Finding(rule=rule, status=status, observed=f"{len(faults)} faults in {count} tasks", required=required, reason=shown)  # type: ignore[arg-type]
