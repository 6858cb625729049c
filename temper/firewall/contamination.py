"""Overlap with held-out tasks: the same prompt, or a run of words that both hold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np
from pydantic import Field

from temper.core.config import Config
from temper.core.hashing import hash_text, hash_value
from temper.core.records import Message, Noun, Record, Role
from temper.firewall.text import ngrams, said, turns, words


class Overlap(Config):
    """What counts as overlap with a held-out task.

    A record overlaps where its user turns, up to any point, are the task's (`exact_prompt`); or where the
    `roles` of the record hold runs of `ngram` words of the task, at least one of them (`min_share` 0) or that
    share of the task's. With `answers` the task's reference answer counts as its words too. Runs that stand in
    more than `boilerplate` held-out tasks are wording that all share, not the content of one, and do not count.
    """

    ngram: int = Field(13, ge=2)
    min_share: float = Field(0.0, ge=0, le=1)
    boilerplate: int | None = Field(None, ge=1)
    exact_prompt: bool = True
    answers: bool = True
    roles: tuple[Role, ...] = ("user", "assistant")


class HeldoutTask(Noun):
    """A task that no training record may give away: its user turns, and its reference answer where it has one."""

    id: str
    prompt: tuple[str, ...]
    answer: str = ""

    @property
    def fingerprint(self) -> str:
        """The hash of the task's normalised words: what a manifest keeps, so that no held-out text leaks into it."""
        return hash_value([[" ".join(words(turn)) for turn in self.prompt], " ".join(words(self.answer))])


class Conversation(Protocol):
    """Anything with an id and messages: a Record, or an environment's task."""

    @property
    def id(self) -> str:
        """The task's name."""

    @property
    def messages(self) -> tuple[Message, ...]:
        """The turns so far, the last user turn included."""


def heldout_task(item: HeldoutTask | Conversation | str, answer: str = "") -> HeldoutTask:
    """`item` as a held-out task. What the assistant says in a record after its last user turn is the answer.

    An environment's task gives its prompt only: where its gold answer is worth guarding too (it is not where answers
    quote the same handbook in every split), pass it as `answer`.
    """
    if isinstance(item, HeldoutTask):
        return item
    if isinstance(item, str):
        return HeldoutTask(id=hash_text(item)[:16], prompt=(item,), answer=answer)
    asked = [message.content for message in item.messages if message.role == "user"]
    last = max((index for index, message in enumerate(item.messages) if message.role == "user"), default=-1)
    spoken = list(item.messages[last + 1 :])
    if isinstance(item, Record) and item.preference is not None:
        spoken += [*item.preference.chosen]
    return HeldoutTask(id=item.id, prompt=tuple(asked), answer=answer or said(spoken, ("assistant",)))


def overlaps(records: Sequence[Record], tasks: Iterable[HeldoutTask], rule: Overlap) -> list[str | None]:
    """For each record, the held-out task it overlaps and by how much, in words; None where it overlaps none."""
    held = list(tasks)
    if not held:
        return [None] * len(records)
    found = _shared_runs(records, held, rule)
    if rule.exact_prompt:
        prompts = {prompt_key(task.prompt): task.id for task in held if any(words(turn) for turn in task.prompt)}
        for number, record in enumerate(records):
            same = next((prompts[key] for key in prompt_keys(record) if key in prompts), None)
            found[number] = f"has the prompt of held-out task {same}" if same is not None else found[number]
    return found


def prompt_key(prompt: Sequence[str]) -> str:
    """User turns as one string that ignores case, punctuation and white space."""
    return "\n".join(" ".join(words(turn)) for turn in prompt)


def prompt_keys(record: Record) -> list[str]:
    """The key of a record's user turns up to the first, the second, and so on."""
    keys: list[str] = []
    for message in record.messages:
        if message.role == "user":
            said_now = " ".join(words(message.content))
            keys.append(f"{keys[-1]}\n{said_now}" if keys else said_now)
    return keys


def _shared_runs(records: Sequence[Record], held: Sequence[HeldoutTask], rule: Overlap) -> list[str | None]:
    found: list[str | None] = [None] * len(records)
    texts = ["\n".join([*task.prompt, task.answer] if rule.answers else task.prompt) for task in held]
    runs = ngrams(texts, rule.ngram, keep_short=False)
    if not len(runs.hashes_N):
        return found
    owned = np.unique(np.stack([runs.hashes_N, runs.owners_N.astype(np.uint64)], axis=1), axis=0)
    hashes_U, counts_U = np.unique(owned[:, 0], return_counts=True)
    if rule.boilerplate is not None:
        kept = hashes_U[counts_U <= rule.boilerplate]
        owned = owned[np.isin(owned[:, 0], kept)]
    totals = Counter(owned[:, 1].tolist())
    theirs = ngrams([said(turns(record), rule.roles) for record in records], rule.ngram, keep_short=False)
    hit_N = np.isin(theirs.hashes_N, owned[:, 0])
    hits: dict[int, set[int]] = {}
    for document, value in zip(theirs.owners_N[hit_N].tolist(), theirs.hashes_N[hit_N].tolist(), strict=True):
        hits.setdefault(document, set()).add(value)
    holders: dict[int, list[int]] = {}
    for value, task in owned[np.isin(owned[:, 0], theirs.hashes_N[hit_N])].tolist():
        holders.setdefault(value, []).append(task)
    for document, values in hits.items():
        shared = Counter(task for value in values for task in holders[value])
        task, count = max(shared.items(), key=lambda item: (item[1] / totals[item[0]], -item[0]))
        if count / totals[task] >= rule.min_share:
            found[document] = f"holds {count} of the {totals[task]} runs of {rule.ngram} words of held-out task {held[task].id}"
    return found
