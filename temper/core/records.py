"""`Record`: what happened in one conversation or episode, with its provenance and its outcome."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field

from temper.core.hashing import hash_value

Role = Literal["system", "user", "assistant", "tool"]
Split = Literal["train", "dev", "test"]
Part = Literal["thinking", "text", "calls", "arguments"]  # of an assistant turn; its end token goes with the last of the first three


class Noun(BaseModel):
    """A frozen value that refuses fields it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ToolCall(Noun):
    """One call of one tool. `arguments` is the parsed object, or the raw text where it did not parse."""

    name: str
    arguments: dict[str, Any] | str
    id: str = ""


class Message(Noun):
    """One turn. `train` overrides the default (assistant turns are trained, all others never): false, or the parts to train.

    `reasoning` is thinking that the template renders apart from `content`. A `tool` message answers the
    call whose id is `tool_call_id`.
    """

    role: Role
    content: str = ""
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    name: str | None = None
    train: bool | Annotated[tuple[Part, ...], Field(min_length=1)] | None = None


class ToolSpec(Noun):
    """A tool as the model sees it: name, description and JSON Schema of its arguments."""

    name: str
    description: str = ""
    parameters: dict[str, Any] = Field(default_factory=lambda: {"type": "object", "properties": {}})

    def openai(self) -> dict[str, Any]:
        """The form that chat templates and the OpenAI API expect."""
        return {"type": "function", "function": self.model_dump()}


class Sampled(Noun):
    """The tokens of one assistant turn exactly as sampled: what was sampled is what is trained on.

    `logprobs` are of the distribution really sampled (temperature, truncation, grammar). `prompt_ids` is
    the whole token context the turn was sampled from. `finish_reason` says why sampling ended.
    `support` holds, per token, what grammar or truncation allowed (None: the whole vocabulary): the allowed ids, or, where
    that is shorter, −1 − id for each id that was not: inside a JSON string a list would be nearly the whole vocabulary.
    `version` is the policy's weight version.
    """

    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: Literal["stop", "length", "error"]
    support: tuple[tuple[int, ...] | None, ...] | None = None
    temperature: float = 1.0
    adapter: str | None = None
    version: str = ""


class Outcome(Noun):
    """How it ended. `reward` is None where nothing was judged: absent is not zero.

    `checks` holds each verifier finding by name; None means the check did not apply.
    `error` marks an episode that failed (a failed episode is data).
    """

    reward: float | None = None
    checks: dict[str, bool | None] = Field(default_factory=dict)
    detail: dict[str, Any] = Field(default_factory=dict)
    error: str | None = None


class Provenance(Noun):
    """Where a record comes from and what may be done with it. The firewall requires every field without
    a default; `None` in the others means 'does not apply', never 'unknown'."""

    source: str
    licence: str
    split: Split
    privacy: Literal["public", "synthetic", "internal", "personal", "secret"]
    access: str
    synthetic: bool
    generation_depth: int = 0
    tenant: str | None = None
    generator: str | None = None
    reward_source: str | None = None
    judge_version: str | None = None
    verifier_version: str | None = None
    parents: tuple[str, ...] = ()


class Preference(Noun):
    """Two continuations of the record's messages, `chosen` preferred over `rejected`, with the `reason`."""

    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]
    reason: str = ""


class Record(Noun):
    """One conversation or episode.

    `shape` names the data shape (instruction, multi_turn, tool, safety, preference, episode …), `slice`
    the kind of task it stands for in reports. `task_id` links an episode to the task it answers.
    """

    messages: tuple[Message, ...]
    provenance: Provenance
    tools: tuple[ToolSpec, ...] = ()
    shape: str = "instruction"
    slice: str = ""
    task_id: str | None = None
    preference: Preference | None = None
    sampled: tuple[Sampled, ...] = ()
    outcome: Outcome = Outcome()

    @cached_property
    def id(self) -> str:
        """The record's content hash."""
        return hash_value(self)

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """A copy with some fields replaced; a hash that was looked at before is not copied along."""
        copy = super().model_copy(update=update, deep=deep)
        copy.__dict__.pop("id", None)
        return copy


class Refusal(Noun):
    """A record that was not admitted, which rule refused it, and why."""

    record: str
    rule: str
    reason: str
    row: str = ""


class Manifest(Noun):
    """What may be trained on: hashes of admitted records, the rules that admitted them, the refusals.

    `records_file` is the JSONL beside the manifest; `heldout` are the fingerprints of the tasks that the
    records were compared with. `hash` identifies the whole.
    """

    name: str
    records_file: str
    records_sha256: str
    admitted: tuple[str, ...]
    rules: dict[str, Any]
    heldout: dict[str, str]
    refusals: tuple[Refusal, ...]
    counts: dict[str, int]

    @cached_property
    def hash(self) -> str:
        """The manifest's content hash."""
        return hash_value(self)
