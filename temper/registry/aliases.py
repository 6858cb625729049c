"""Alias history: who moved an alias to which release, when and why; appended to, chained, never edited."""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError as ConstraintError
from sqlalchemy.orm import Session

from temper.core.errors import IntegrityError, ReleaseError
from temper.core.hashing import hash_value
from temper.core.records import Noun
from temper.registry.tables import AliasEventRow

SCRATCH = "check/"  # aliases that a rollback check moves; nothing is served from them


class AliasEvent(Noun):
    """One move of an alias: `action` is promote or rollback; `number` counts from 1 within the alias."""

    alias: str
    number: int
    release_id: str
    action: str
    who: str
    why: str
    moved: str


def stamp(when: dt.datetime | None = None) -> str:
    """UTC time as fixed-width ISO 8601, so that text order is time order."""
    when = when or dt.datetime.now(dt.UTC)
    if when.tzinfo is None:
        raise ReleaseError(f"{when.isoformat()} has no time zone", do="give an aware datetime, or text such as 2026-11-21T08:00:00Z")
    return when.astimezone(dt.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def as_stamp(when: dt.datetime | dt.date | str) -> str:
    """A moment as `stamp` text. A bare date means the end of that day in UTC. Raises ReleaseError."""
    if isinstance(when, str):
        try:
            when = dt.date.fromisoformat(when) if len(when) == len("2026-11-21") else dt.datetime.fromisoformat(when)
        except ValueError as error:
            raise ReleaseError(f"{when!r} is not a date or time", why=str(error), do="write 2026-11-21 or 2026-11-21T08:00:00Z") from error
    if not isinstance(when, dt.datetime):
        when = dt.datetime.combine(when, dt.time.max, tzinfo=dt.UTC)
    return stamp(when)


def read_history(session: Session, alias: str) -> list[AliasEvent]:
    """Every move of `alias`, oldest first. Raises IntegrityError where the chain does not hold."""
    rows = session.scalars(sa.select(AliasEventRow).where(AliasEventRow.alias == alias).order_by(AliasEventRow.number)).all()
    chain, events = "", []
    for expected, row in enumerate(rows, start=1):
        event = AliasEvent.model_validate({name: getattr(row, name) for name in AliasEvent.model_fields})
        chain = link(chain, event)
        if row.number != expected or row.chain != chain:
            raise IntegrityError(
                f"the history of alias {alias!r} was altered at move {expected}",
                why=f"recorded chain {row.chain[:16]}, computed {chain[:16]}", do="restore the registry's database from a backup",
            )  # fmt: skip
        events.append(event)
    return events


def link(previous: str, event: AliasEvent) -> str:
    """The chain value of `event` after `previous`."""
    return hash_value([previous, event])


def append_event(session: Session, alias: str, release_id: str, *, action: str, who: str, why: str) -> AliasEvent:
    """Add one move and commit. Raises ReleaseError where someone else moved the alias meanwhile."""
    history = read_history(session, alias)
    last = history[-1] if history else None
    moved = max(stamp(), last.moved) if last else stamp()  # a clock set back must not reorder the past
    event = AliasEvent(alias=alias, number=len(history) + 1, release_id=release_id, action=action, who=who, why=why, moved=moved)
    chain = ""
    for old in [*history, event]:
        chain = link(chain, old)
    session.add(AliasEventRow(**event.model_dump(), chain=chain))
    try:
        session.commit()
    except ConstraintError as error:
        session.rollback()
        raise ReleaseError(
            f"alias {alias!r} was moved by someone else at the same moment", do="look at its history, and try again"
        ) from error
    return event


def standing(history: Sequence[AliasEvent]) -> list[str]:
    """The releases that rollbacks would walk through, current one last.

    A promotion puts a release on top, a rollback takes the top off: rolling back twice goes two releases
    back, and never forward to the one that was just left.
    """
    stack: list[str] = []
    for event in history:
        if event.action == "rollback":
            stack.pop()
            while stack and stack[-1] != event.release_id:
                stack.pop()
        if not stack or stack[-1] != event.release_id:
            stack.append(event.release_id)
    return stack
