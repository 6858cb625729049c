"""`finops`: the finance desk as an environment. The same one trains, evaluates and serves."""

from __future__ import annotations

from functools import cache

from temper.core.errors import ConfigError
from temper.core.records import Message, Outcome, Split
from temper.environments.finops import verify as verifier
from temper.environments.finops.session import LedgerSession
from temper.environments.finops.tasks import SLICES, make_task
from temper.environments.finops.world import Company, make_company
from temper.rollout.environment import Task

COMPANIES: dict[Split, int] = {"train": 240, "dev": 30, "test": 30}


@cache
def company(seed: int, split: Split, index: int) -> Company:
    """Company `index` of a split, made once."""
    return make_company(seed, split, index)


class FinopsEnvironment:
    """Tasks over seeded companies, private ledgers to act on, and verifiers that look at what was done.

    `seed` draws the worlds; `slices` limits the tasks (None: all); `styled` makes the gold answers those of the
    tenant's desk. `per_company` is how many tasks of each slice a company gives.
    """

    name = "finops"

    def __init__(self, seed: int = 0, slices: tuple[str, ...] | None = None, per_company: int = 1, styled: bool = False) -> None:
        unknown = set(slices or ()) - SLICES.keys()
        if unknown:
            raise ConfigError(f"finops has no slice {sorted(unknown)}", do=f"choose among {sorted(SLICES)}")
        self.seed, self.slices, self.per_company, self.styled = seed, tuple(slices or SLICES), per_company, styled
        self.version = f"finops-4/{verifier.VERSION}/seed-{seed}"
        self._companies: dict[str, Company] = {}

    def tasks(self, split: Split, limit: int | None = None) -> list[Task]:
        """The tasks of a split in a fixed order, slices in turn; `limit` is per slice."""
        companies = [company(self.seed, split, index) for index in range(COMPANIES[split])]
        self._companies |= {item.name: item for item in companies}
        found: dict[str, Task] = {}
        for lap in range(self.per_company):
            for item in companies:
                for name in self.slices:
                    task = make_task(self.seed, item, name, lap, styled=self.styled)
                    found.setdefault(task.id, task)
        if limit is None:
            return list(found.values())
        kept: dict[str, int] = dict.fromkeys(self.slices, 0)
        chosen = []
        for task in found.values():
            if kept[task.slice] < limit:
                kept[task.slice] += 1
                chosen.append(task)
        return chosen

    def open(self, task: Task) -> LedgerSession:
        """A private ledger of the task's company, with the tools that the task offers."""
        return LedgerSession(self._company(task), offered=tuple(spec.name for spec in task.tools))

    def verify(self, task: Task, turns: tuple[Message, ...], session: LedgerSession) -> Outcome:
        """What the episode did; see `verify.verify`."""
        return verifier.verify(task, turns, session)

    def _company(self, task: Task) -> Company:
        if task.cluster not in self._companies:
            for index in range(COMPANIES[task.split]):
                item = company(self.seed, task.split, index)
                self._companies[item.name] = item
        return self._companies[task.cluster]


def environment(
    seed: int = 0, slices: tuple[str, ...] | list[str] | None = None, per_company: int = 1, styled: bool = False
) -> FinopsEnvironment:
    """The environment's factory, as `environment: finops` in a config calls it."""
    return FinopsEnvironment(seed, tuple(slices) if slices else None, per_company, styled)
