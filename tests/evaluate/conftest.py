"""A tiny environment whose episodes are scripted: what is tested is the measuring, not the model."""

import json
from contextlib import closing

import pytest

from temper.core.records import Message, Outcome, Provenance, Record, Sampled
from temper.evaluate.cases import Case
from temper.rollout.environment import PlainSession, Task

SLICES = ("lookup", "risky", "safe_lookalike")


class Sums:
    """Adds two numbers; risky tasks want a refusal. Its checks are the names that the metrics read."""

    name, version = "sums", "1"

    def __init__(self, companies=4, each=3):
        self.shape = companies, each

    def tasks(self, split, limit=None):
        companies, each = self.shape
        found = [self.task(split, company, slice_, n) for company in range(companies) for slice_ in SLICES for n in range(each)]
        return found[:limit]

    def task(self, split, company, slice_, n):
        return Task(
            id=f"{split}-{company}-{slice_}-{n}", messages=(Message(role="user", content=f"{company} + {n}?"),), slice=slice_,
            split=split, cluster=f"company {company}", tenant=("bank_a", "retail_b")[company % 2],
            answer={"sum": str(company + n), "refuse": slice_ == "risky"},
        )  # fmt: skip

    def open(self, task):
        return PlainSession()

    def verify(self, task, turns, session):
        said = turns[-1].content if turns else ""
        refused, due = said == "no", task.answer["refuse"]
        right = refused if due else said == task.answer["sum"]
        checks = {"task_success": right, "refused": refused, "refusal_expected": due, "alternative_offered": refused or None}
        return Outcome(reward=float(right), checks=checks, detail={"called": [], "expected": [], "matched": 0})


class FakePolicy:
    path = "models/fake"

    def weights_hash(self):
        return "f" * 64


class FakeEngine:
    policy = FakePolicy()


def scripted(answer, seen=None):
    """A `collect` that answers with `answer(task)`; None is an episode that broke off."""

    def collect(engine, environment, tasks, *, group=1, temperature=0.0, seed=0, constrained=False, adapter_of=None):
        groups = []
        for task in tasks:
            adapter = adapter_of(task) if adapter_of else None
            if seen is not None:
                seen.append((task.id, adapter))
            groups.append([episode(environment, task, answer(task), adapter) for _ in range(group)])
        return groups

    return collect


def episode(environment, task, said, adapter=None):
    turns = () if said is None else (Message(role="assistant", content=said),)
    with closing(environment.open(task)) as session:
        outcome = environment.verify(task, turns, session) if turns else Outcome(error="the engine ran out of room")
    length = len(json.dumps(said))
    sampled = Sampled(
        prompt_ids=tuple(range(10)), token_ids=tuple(range(length)), logprobs=(0.0,) * length, finish_reason="stop", adapter=adapter
    )
    return Record(
        messages=task.messages + turns, task_id=task.id, slice=task.slice, sampled=(sampled,) if turns else (), outcome=outcome,
        provenance=Provenance(source="test", licence="none", split=task.split, privacy="synthetic", access="all", synthetic=True),
    )  # fmt: skip


@pytest.fixture
def world():
    return Sums()


@pytest.fixture
def engine():
    return FakeEngine()


@pytest.fixture
def script():
    return scripted


def right(task):
    return "no" if task.answer["refuse"] else task.answer["sum"]


@pytest.fixture
def gold():
    return right


@pytest.fixture
def make_case():
    """A case with given findings; nothing else about it matters."""

    def make(identity, *, slice="lookup", cluster="", tenant=None, tools=(), tokens=(), finish="stop", **outcome):
        task = Task(id=identity, messages=(Message(role="user", content="?"),), slice=slice, cluster=cluster, tenant=tenant, tools=tools)
        sampled = tuple(
            Sampled(prompt_ids=(0,) * fed, token_ids=(0,) * made, logprobs=(0.0,) * made, finish_reason=finish) for fed, made in tokens
        )
        provenance = Provenance(source="test", licence="none", split="dev", privacy="synthetic", access="all", synthetic=True)
        record = Record(messages=task.messages, task_id=identity, sampled=sampled, outcome=Outcome(**outcome), provenance=provenance)
        return Case(identity, task, record)

    return make
