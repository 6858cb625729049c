"""Tiny data for the tests of the train room: records, manifests, and an environment that any model can learn."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from temper.core.hashing import hash_file
from temper.core.records import Manifest, Message, Outcome, Preference, Provenance, Record, Split, ToolCall
from temper.core.storage import write_json, write_jsonl
from temper.rollout.environment import PlainSession, Task

WORDS = ("budget", "sales", "account", "quarter", "the", "answer", "draft", "tool")


def provenance(split: Split = "train") -> Provenance:
    return Provenance(source="test", licence="Apache-2.0", split=split, privacy="synthetic", access="all", synthetic=True)


def conversations(count: int, seed: int = 0, split: Split = "train") -> list[Record]:
    """Questions of one to twelve words; the answer says the first word of each again."""
    rng = random.Random(seed)
    records = []
    for number in range(count):
        words = [rng.choice(WORDS) for _ in range(rng.randint(1, 12))]
        messages = (Message(role="user", content=f"{number} {' '.join(words)}"), Message(role="assistant", content=" ".join(words[:3])))
        records.append(Record(messages=messages, provenance=provenance(split)))
    return records


def tool_conversation() -> Record:
    call = ToolCall(name="get_balance", arguments={"account": "cash"}, id="c1")
    messages = (
        Message(role="user", content="What is the balance?"), Message(role="assistant", tool_calls=(call,)),
        Message(role="tool", content='{"balance": 42}', tool_call_id="c1", name="get_balance"), Message(role="assistant", content="The balance is 42."),
    )  # fmt: skip
    return Record(messages=messages, provenance=provenance())


def pairs(count: int, seed: int = 0) -> list[Record]:
    """Pairs whose chosen answer repeats the word and whose rejected one does not know."""
    rng = random.Random(seed)
    records = []
    for number in range(count):
        word = rng.choice(WORDS)
        preference = Preference(chosen=(Message(role="assistant", content=word),), rejected=(Message(role="assistant", content="I cannot do that"),))
        records.append(Record(messages=(Message(role="user", content=f"{number} {word}"),), provenance=provenance(), preference=preference, shape="preference"))
    return records


def manifest(folder: Path, records: list[Record]) -> str:
    """Write `records` as an admitted manifest; the folder as text."""
    write_jsonl(folder / "records.jsonl", records)
    made = Manifest(
        name=folder.name, records_file="records.jsonl", records_sha256=hash_file(folder / "records.jsonl"), admitted=tuple(record.id for record in records),
        rules={}, heldout={}, refusals=(), counts={"admitted": len(records)},
    )  # fmt: skip
    write_json(folder / "manifest.json", made)
    return str(folder)


class SayEnvironment:
    """Tasks without tools: a reward for each answer that holds the letter e, more for a short one."""

    name, version = "say", "say-1"

    def tasks(self, split: Split, limit: int | None = None) -> list[Task]:
        made = [Task(id=f"{split}-{n}", messages=(Message(role="user", content=f"{n} {word}"),), split=split, max_tokens=6, max_turns=1) for n, word in enumerate(WORDS)]
        return made[:limit]

    def open(self, task: Task) -> PlainSession:
        return PlainSession()

    def verify(self, task: Task, turns: tuple[Message, ...], session: Any) -> Outcome:
        text = turns[-1].content if turns else ""
        return Outcome(reward=float("e" in text), checks={"procedure_followed": len(text) < 20, "task_success": "e" in text})


def say(**options: Any) -> SayEnvironment:
    return SayEnvironment()
