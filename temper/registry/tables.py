"""The registry's tables. Rows of releases, documents, signatures and alias events are never changed."""

from __future__ import annotations

from sqlalchemy import ForeignKey, Index, Text, UniqueConstraint
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

APPEND_ONLY = ("releases", "release_manifests", "release_parents", "documents", "signatures", "alias_events")


class Base(DeclarativeBase):
    """The declarative base of the registry's tables."""


class ReleaseRow(Base):
    """One release; `content` is its whole JSON, from which `id` is recomputed on every read."""

    __tablename__ = "releases"
    id: Mapped[str] = mapped_column(primary_key=True)
    model_id: Mapped[str] = mapped_column(index=True)
    artifact_hash: Mapped[str] = mapped_column(index=True)
    created: Mapped[str]
    content: Mapped[str] = mapped_column(Text)


class ManifestRow(Base):
    """One manifest that a release names: the index by which a revocation finds tainted releases."""

    __tablename__ = "release_manifests"
    release_id: Mapped[str] = mapped_column(ForeignKey("releases.id"), primary_key=True)
    role: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(primary_key=True)
    manifest: Mapped[str] = mapped_column(index=True)


class ParentRow(Base):
    """One edge of the lineage; a parent may lie outside this registry."""

    __tablename__ = "release_parents"
    release_id: Mapped[str] = mapped_column(ForeignKey("releases.id"), primary_key=True)
    parent: Mapped[str] = mapped_column(primary_key=True, index=True)


class DocumentRow(Base):
    """A report or manifest kept whole, under its content hash."""

    __tablename__ = "documents"
    hash: Mapped[str] = mapped_column(primary_key=True)
    kind: Mapped[str]
    content: Mapped[str] = mapped_column(Text)


class SignatureRow(Base):
    """One DSSE envelope over a release's statement."""

    __tablename__ = "signatures"
    release_id: Mapped[str] = mapped_column(ForeignKey("releases.id"), primary_key=True)
    key_id: Mapped[str] = mapped_column(primary_key=True)
    envelope: Mapped[str] = mapped_column(Text)
    signed: Mapped[str]


class AliasEventRow(Base):
    """One move of an alias. `number` counts from 1 within the alias; `chain` hashes the row and the one before it."""

    __tablename__ = "alias_events"
    __table_args__ = (UniqueConstraint("alias", "number"), Index("ix_alias_events_when", "alias", "moved"))
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    alias: Mapped[str]
    number: Mapped[int]
    release_id: Mapped[str] = mapped_column(ForeignKey("releases.id"))
    action: Mapped[str]
    who: Mapped[str]
    why: Mapped[str] = mapped_column(Text)
    moved: Mapped[str]
    chain: Mapped[str]
