"""`Case`: one task with the episode that answered it; what every metric is a function of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from temper.core.errors import DataError
from temper.core.records import Record

if TYPE_CHECKING:
    from temper.rollout.environment import Task


@dataclass(frozen=True)
class Case:
    """`id` is the task's id, with `#n` behind it where a task was answered several times."""

    id: str
    task: Task
    record: Record

    @property
    def slice(self) -> str:
        """The kind of task."""
        return self.task.slice

    @property
    def failed(self) -> bool:
        """Whether the episode broke off with an error, which is data: the user got no answer."""
        return self.record.outcome.error is not None

    @property
    def reward(self) -> float | None:
        """The verifier's score; None where nothing was judged."""
        return self.record.outcome.reward

    def check(self, name: str) -> bool | None:
        """A verifier finding; None where it did not apply or the verifier does not know it."""
        return self.record.outcome.checks.get(name)

    def number(self, name: str) -> float | None:
        """A count in the outcome's detail. Raises DataError where it is there and is no number of zero or more."""
        found = self.record.outcome.detail.get(name)
        if found is None:
            return None
        if isinstance(found, bool) or not isinstance(found, (int, float)) or not found >= 0:
            raise DataError(
                f"outcome of task {self.task.id}: detail {name!r} is {found!r}, not a count", do="correct the environment's verify"
            )
        return float(found)

    def length(self, name: str) -> int | None:
        """How many items a list in the outcome's detail has."""
        found: Any = self.record.outcome.detail.get(name)
        if found is None:
            return None
        if not isinstance(found, (list, tuple)):
            raise DataError(
                f"outcome of task {self.task.id}: detail {name!r} is {found!r}, not a list", do="correct the environment's verify"
            )
        return len(found)

    def share(self, part: float | None, whole: float | None, part_name: str, whole_name: str) -> float | None:
        """`part` of `whole`; None where either is absent or the whole is zero. Raises DataError where the part is larger."""
        if part is None or not whole:
            return None
        if part > whole:
            raise DataError(
                f"outcome of task {self.task.id}: {part_name} is {part:g}, more than {whole_name} ({whole:g})",
                do="correct the environment's verify",
            )
        return part / whole


def pair_up(tasks: Sequence[Task], records: Sequence[Sequence[Record]]) -> list[Case]:
    """Each task with its records, as `collect` returns them. Raises DataError where they do not belong together."""
    if len(tasks) != len(records):
        raise DataError(f"{len(tasks)} tasks and {len(records)} groups of records", why="every task needs its own group")
    cases = []
    for task, group in zip(tasks, records, strict=True):
        for number, record in enumerate(group):
            if record.task_id is not None and record.task_id != task.id:
                raise DataError(f"a record of task {record.task_id} stands where one of task {task.id} belongs")
            cases.append(Case(task.id if len(group) == 1 else f"{task.id}#{number}", task, record))
    twice = len(cases) - len({case.id for case in cases})
    if twice:
        raise DataError(
            f"{twice} cases have the id of another", why="two tasks of one id cannot be told apart", do="give every task its own id"
        )
    return cases


def clusters_of(cases: Sequence[Case]) -> dict[str, str]:
    """The cluster (company) of each case; a task without one clusters its own repeats."""
    return {case.id: case.task.cluster or f"task {case.task.id}" for case in cases}
