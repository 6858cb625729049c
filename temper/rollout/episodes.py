"""Episodes: tasks answered turn by turn with tools really executed, token in and token out, then verified."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, Protocol

from temper.core.errors import TemperError
from temper.core.hashing import stream_seed
from temper.core.records import Message, Outcome, Provenance, Record, Sampled
from temper.rollout.engine import Engine, Reply, Request
from temper.rollout.environment import Environment, Task
from temper.rollout.grammar import Grammar
from temper.rollout.limits import OutOfTime
from temper.rollout.tools import ToolFailure

FAILURES = (TemperError, ToolFailure, OutOfTime, OSError)  # of a task, its tools or its machine; anything else is a bug and raises
AdapterOf = Callable[[Task], str | None]


class Sampler(Protocol):
    """What `collect` needs of an engine; a server's queue has it too."""

    @property
    def policy(self) -> Any:
        """Whose template renders, appends and parses."""
        ...

    def sample(self, requests: Sequence[Request]) -> list[Sampled]:
        """One turn for each request."""
        ...


@dataclass(frozen=True)
class How:
    """How episodes are sampled; the same for all of them."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    constrained: bool = False
    keep_support: bool = False
    adapter_of: AdapterOf | None = None


@dataclass
class Episode:
    """One attempt at a task, while it runs."""

    task: Task
    number: int
    adapter: str | None
    session: Any = None
    turns: list[Message] = field(default_factory=list)
    sampled: list[Sampled] = field(default_factory=list)
    error: str | None = None


def collect(
    engine: Sampler, environment: Environment, tasks: Sequence[Task], *, group: int = 1, temperature: float = 0.0, seed: int = 0,
    constrained: bool = False, adapter_of: AdapterOf | None = None, top_p: float = 1.0, top_k: int = 0, keep_support: bool | None = None,
) -> list[list[Record]]:  # fmt: skip
    """`group` episodes of each task, as one list of records a task.

    Every assistant turn is sampled from exactly the tokens before it; tool results are appended, never re-encoded.
    An episode ends with a turn that calls nothing, at the task's last turn, or when it fails: then `outcome.error`
    says how, and its reward is None. `constrained` holds turns to the tools' and the answer's schemas.
    `keep_support` records what grammar, top-k or top-p allowed; unless told, wherever they restrict what is drawn.
    What is drawn depends on `seed`, task and number alone. A programming error in an environment raises.
    """
    restricted = constrained or top_p < 1 or top_k > 0  # log-probs are then of fewer tokens, and the learner must know which
    kept = (restricted and temperature > 0) if keep_support is None else keep_support
    how = How(temperature, top_p, top_k, seed, constrained, kept, adapter_of)
    runs = [Episode(task, number, adapter_of(task) if adapter_of else None) for task in tasks for number in range(group)]
    live: list[Episode] = []
    requests: list[Request] = []
    for episode in runs:
        request = begin(engine, environment, episode, how)
        if request is not None:
            live.append(episode)
            requests.append(request)

    def reply(index: int, sampled: Sampled) -> Request | None:
        request = go_on(engine, live[index], sampled, how)
        if request is None:
            finish(environment, live[index], outcomes)
        return request

    outcomes: dict[int, Outcome] = {}
    converse(engine, requests, reply)
    records = [record_of(engine, environment, episode, outcomes) for episode in runs]
    return [records[start : start + group] for start in range(0, len(records), group)]


def converse(engine: Sampler, requests: Sequence[Request], reply: Reply) -> None:
    """The engine's own `converse`, or turn by turn through `sample` where what samples is not an Engine."""
    if isinstance(engine, Engine):
        engine.converse(requests, reply)
        return
    waiting = list(enumerate(requests))
    while waiting:
        sampled = engine.sample([request for _, request in waiting])
        replies = [(index, reply(index, turn)) for (index, _), turn in zip(waiting, sampled, strict=True)]
        waiting = [(index, request) for index, request in replies if request is not None]


def begin(engine: Sampler, environment: Environment, episode: Episode, how: How) -> Request | None:
    """Open the episode's session and ask for its first turn; None where that fails."""
    try:
        episode.session = environment.open(episode.task)
        prompt = engine.policy.template.prompt_ids(episode.task.messages, episode.task.tools)
    except FAILURES as error:
        episode.error = describe(error)
        return None
    return ask(engine, episode, prompt, how)


def go_on(engine: Sampler, episode: Episode, sampled: Sampled, how: How) -> Request | None:
    """Take a sampled turn, run the tools it calls, and ask for the next turn; None where the episode has ended."""
    task, template = episode.task, engine.policy.template
    if sampled.finish_reason == "error":
        episode.error = "the model could not finish a turn: its grammar or its numbers left no way on"
        return None
    episode.sampled.append(sampled)
    message = template.parse(list(sampled.token_ids))
    calls = tuple(
        call.model_copy(update={"id": call.id or f"call_{len(episode.sampled) - 1}_{place}"}) for place, call in enumerate(message.tool_calls)
    )
    episode.turns.append(message.model_copy(update={"tool_calls": calls}))
    if not calls or sampled.finish_reason == "length" or len(episode.sampled) >= task.max_turns:
        return None
    try:
        results = [Message(role="tool", content=episode.session.call(call), tool_call_id=call.id, name=call.name) for call in calls]
        episode.turns += results
        prompt = template.append([*sampled.prompt_ids, *sampled.token_ids], results, task.tools)
    except FAILURES as error:
        episode.error = describe(error)
        return None
    return ask(engine, episode, prompt, how)


def ask(engine: Sampler, episode: Episode, prompt: list[int], how: How) -> Request | None:
    """The request for the next turn; None where the prompt fills the model's context or the grammar cannot be enforced."""
    task = episode.task
    context = int(engine.policy.model.config.get_text_config().max_position_embeddings)
    room = context - len(prompt)
    if room < 1:
        episode.error = f"the conversation fills the model's context: {len(prompt)} tokens of {context}"
        return None
    try:
        grammar = grammar_of(task) if how.constrained else None
    except TemperError as error:
        episode.error = describe(error)
        return None
    return Request(
        prompt_ids=prompt, max_tokens=min(task.max_tokens, room), temperature=how.temperature, top_p=how.top_p, top_k=how.top_k,
        seed=stream_seed(how.seed, task.id, episode.number, len(episode.sampled)), adapter=episode.adapter, grammar=grammar,
        keep_support=how.keep_support,
    )  # fmt: skip


def grammar_of(task: Task) -> Grammar | None:
    """What a turn of the task may be: a valid call or the answer, which is free text where the task has no schema."""
    if task.tools:
        return Grammar.tool_call(task.tools, schema=task.response_schema)
    return Grammar.json_schema(task.response_schema) if task.response_schema is not None else None


def finish(environment: Environment, episode: Episode, outcomes: dict[int, Outcome]) -> None:
    """Verify an episode that ended, and close its session."""
    with closing(episode.session):
        if episode.error is None:
            try:
                outcomes[id(episode)] = environment.verify(episode.task, tuple(episode.turns), episode.session)
            except FAILURES as error:
                episode.error = describe(error)
    episode.session = None


def record_of(engine: Sampler, environment: Environment, episode: Episode, outcomes: dict[int, Outcome]) -> Record:
    """What happened, with where it comes from."""
    if episode.session is not None:  # it failed before its first turn
        episode.session.close()
    task, outcome = episode.task, outcomes.get(id(episode), Outcome(error=episode.error))
    return Record(
        messages=(*task.messages, *episode.turns), tools=task.tools, shape="episode", slice=task.slice, task_id=task.id,
        sampled=tuple(episode.sampled), outcome=outcome,
        provenance=Provenance(
            source=f"episode:{environment.version}", licence=getattr(environment, "licence", "internal"), split=task.split,
            privacy=getattr(environment, "privacy", "synthetic"), access=getattr(environment, "access", "internal"), synthetic=True,
            generation_depth=1, tenant=task.tenant, generator=f"{engine.policy.path or 'policy'}@{engine.policy.version}",
            reward_source=environment.version, verifier_version=environment.version,
        ),
    )  # fmt: skip


def describe(error: BaseException) -> str:
    """A failure in one line."""
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
