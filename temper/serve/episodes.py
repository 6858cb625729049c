"""Episodes on the server: an environment's task, its tools really executed, its verifier's outcome in the answer."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from temper.core.records import Message, Outcome, Record, Sampled, Split
from temper.rollout.engine import Request
from temper.rollout.environment import Environment, Task
from temper.rollout.episodes import collect
from temper.serve.errors import ApiError
from temper.serve.loaded import Loaded
from temper.serve.schema import ChatMessage, to_messages
from temper.serve.worker import Job, Worker

OPEN_SPLITS: tuple[Split, ...] = ("train", "dev")  # the test split stays sealed


class EpisodeRequest(BaseModel):
    """The body of POST /v1/episodes. `messages` replace the task's prompt; then nothing can be verified."""

    model_config = ConfigDict(extra="forbid")
    model: str
    task: str
    messages: list[ChatMessage] | None = Field(default=None, min_length=1)
    temperature: float = Field(default=0.0, ge=0, le=2)
    seed: int = Field(default=0, ge=0, lt=2**63)
    constrained: bool = True
    metadata: dict[str, Any] | None = None


class QueuedEngine:
    """The engine as an episode sees it: its rows wait in the server's queue and share batches with everyone else's."""

    def __init__(self, worker: Worker, loaded: Loaded) -> None:
        self.worker, self.loaded, self.policy = worker, loaded, loaded.engine.policy
        self.jobs: list[Job] = []
        self.sampled: list[Sampled] = []

    def sample(self, requests: Sequence[Request]) -> list[Sampled]:
        """Queue the rows and wait for them."""
        job = self.worker.submit(self.loaded, list(requests))
        self.jobs.append(job)
        rows = job.future.result()
        self.sampled += rows
        return rows


class Unjudged:
    """An environment whose verifier is not asked: the prompt is not the one that the hidden answer belongs to."""

    def __init__(self, environment: Environment) -> None:
        self.environment, self.name, self.version = environment, environment.name, environment.version

    def tasks(self, split: Split, limit: int | None = None) -> list[Task]:
        """The environment's own tasks."""
        return self.environment.tasks(split, limit)

    def open(self, task: Task) -> Any:
        """The environment's own session."""
        return self.environment.open(task)

    def verify(self, task: Task, turns: tuple[Message, ...], session: Any) -> Outcome:
        """No reward: absent is not zero."""
        return Outcome()


class Tasks:
    """The tasks that may be asked for, by id."""

    def __init__(self, environment: Environment) -> None:
        self.environment = environment

    @cached_property
    def by_id(self) -> dict[str, Task]:
        """Every open task by its id; made when first asked for, since making a world takes time."""
        return {task.id: task for split in OPEN_SPLITS for task in self.environment.tasks(split)}

    def find(self, request: EpisodeRequest, tenant: str | None) -> Task:
        """The task, its prompt replaced where the request brings its own. Raises ApiError 403 or 404."""
        task = self.by_id.get(request.task)
        if task is None:
            raise ApiError(404, "task_not_found", f"no task {request.task[:96]!r}; GET /v1/tasks lists them", param="task")
        if task.tenant is not None and task.tenant != tenant:
            raise ApiError(403, "tenant_not_yours", f"task {task.id} belongs to tenant {task.tenant!r}", param="task")
        if request.messages is None:
            return task
        return task.model_copy(
            update={"messages": to_messages(request.messages), "answer": {}, "demonstration": (), "response_schema": None}
        )


def run_episode(engine: QueuedEngine, environment: Environment, task: Task, request: EpisodeRequest, adapter: str | None) -> Record:
    """One episode through the server's queue; nothing is judged where the prompt was not the task's own."""
    where = environment if request.messages is None else Unjudged(environment)
    groups = collect(
        engine,
        where,
        [task],
        temperature=request.temperature,
        seed=request.seed,
        constrained=request.constrained,
        adapter_of=lambda _: adapter,
    )
    return groups[0][0]


def turns(record: Record, task: Task) -> list[dict[str, Any]]:
    """What was said after the prompt, as JSON."""
    said: tuple[Message, ...] = record.messages[len(task.messages) :]
    return [message.model_dump(mode="json", exclude_none=True, exclude={"train"}) for message in said]
