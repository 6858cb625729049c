"""`Registry`: releases, the aliases that point at them, and every check between the two."""

from __future__ import annotations

import datetime as dt
import getpass
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

import sqlalchemy as sa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import BaseModel
from sqlalchemy.orm import Session, sessionmaker

from temper.core.errors import IntegrityError, ReleaseError
from temper.core.hashing import canonical_json, hash_value
from temper.core.records import Manifest
from temper.core.reports import Finding, Report, Verdict
from temper.core.storage import FILES, read_json
from temper.registry.aliases import SCRATCH, AliasEvent, append_event, as_stamp, read_history, stamp, standing
from temper.registry.database import open_database
from temper.registry.lineage import lineage, rollback_check, with_descendants
from temper.registry.release import AccessPolicy, DeprecationPlan, Release, RollbackPlan, artifact_hash, require_verdict
from temper.registry.signing import key_id, sign, verify
from temper.registry.store import Store
from temper.registry.tables import AliasEventRow, DocumentRow, ManifestRow, ParentRow, ReleaseRow, SignatureRow

DATABASE = "registry.sqlite"
TOKENIZER_FILES = re.compile(r"^(tokenizer.*|special_tokens_map\.json|added_tokens\.json|vocab.*|merges\.txt|chat_template.*)$")
Named = Mapping[str, str] | str | None
Releases: TypeAlias = list[Release]  # inside the class, `list` is the method
Events: TypeAlias = list[AliasEvent]
Envelopes: TypeAlias = list[dict[str, Any]]


class Registry:
    """Releases below `path`: the database, and the content-addressed store of their artefacts.

    `path` is a folder (SQLite inside it); with `url` the database is there instead, for example
    postgresql+psycopg://…. With `trusted` keys, promote and resolve demand a signature by one of them. Without
    `create`, a folder that is no registry is refused.
    """

    def __init__(self, path: Path | str, *, url: str | None = None, trusted: Iterable[Ed25519PublicKey] = (), create: bool = True) -> None:
        self.path = Path(path)
        if not create and url is None and not (self.path / DATABASE).is_file():
            raise ReleaseError(
                f"{self.path} is no registry", why=f"it holds no {DATABASE}", do="give the registry's folder, or register a release first"
            )
        self.store = Store(self.path / "store")
        self.trusted = tuple(trusted)
        self._engine = open_database(url or f"sqlite:///{self.path / DATABASE}", self.path)
        self._session = sessionmaker(self._engine)

    # --- registering -------------------------------------------------------------------------------------

    def register(
        self, *, model_id: str, weights: Path, base_model_id: str, adapters: Mapping[str, Path] | None = None,
        parents: Iterable[str] = (), training_data_manifest: Named = None, reward_manifest: Named = None,
        eval_manifest: Named = None, policy_manifest: Named = None, report: Report | str | None = None,
        verdict: Verdict | None = None, access_policy: AccessPolicy | None = None, deprecation_plan: DeprecationPlan | None = None,
        rollback_plan: RollbackPlan | None = None, template_fingerprint: str = "", documents: Iterable[BaseModel] = (),
        key: Ed25519PrivateKey | None = None, link: bool = False,
    ) -> Release:  # fmt: skip
        """Take the artefacts into the store and record the release; equal content gives the same release again.

        `weights` and each of `adapters` (tenant -> folder) must be whole folders with FILES.json. A `report`
        or `documents` (manifests) given as values are kept whole. Raises IntegrityError where bytes differ
        from their hashes, ReleaseError where the report judged something else.
        """
        stored = self.store.add(Path(weights), link=link)
        adapter_hashes = {tenant: self.store.add(Path(folder), link=link) for tenant, folder in sorted((adapters or {}).items())}
        artifact = artifact_hash(stored, adapter_hashes)
        if isinstance(report, Report) and report.model_hash != artifact:
            raise ReleaseError(
                f"report {report.name!r} did not judge what is being registered",
                why=f"it names model_hash {report.model_hash[:16]}, the artefact is {artifact[:16]}",
                do="evaluate these weights with these adapters; pass model_hash=artifact_hash_of(weights, adapters) to the suite",
            )
        listing = read_json(self.store.folder(stored) / FILES)
        tokenizer = {name: value for name, value in listing.items() if TOKENIZER_FILES.match(name)}
        release = Release(
            model_id=model_id, base_model_id=base_model_id, weights=stored, artifact_hash=artifact, adapters=adapter_hashes,
            parents=tuple(parents), tokenizer_hash=hash_value(tokenizer),
            template_fingerprint=template_fingerprint, training_data_manifest=named(training_data_manifest),
            reward_manifest=named(reward_manifest), eval_manifest=named(eval_manifest), policy_manifest=named(policy_manifest),
            report_hash=hash_value(report) if isinstance(report, Report) else report, verdict=verdict,
            access_policy=access_policy or AccessPolicy(), deprecation_plan=deprecation_plan or DeprecationPlan(),
            rollback_plan=rollback_plan or RollbackPlan(), created=stamp(),
        )  # fmt: skip
        kept = [*documents, *([report] if isinstance(report, Report) else [])]
        with self._session() as session:
            release = self._insert(session, release, kept)
        if key is not None:
            self.sign(release.id, key)
        return release

    def _insert(self, session: Session, release: Release, documents: Iterable[BaseModel]) -> Release:
        for document in documents:
            digest = hash_value(document)
            if session.get(DocumentRow, digest) is None:
                session.add(DocumentRow(hash=digest, kind=type(document).__name__, content=canonical_json(document)))
        existing = session.get(ReleaseRow, release.id)
        if existing is not None:
            session.commit()
            return Release.model_validate_json(existing.content)
        session.add(
            ReleaseRow(
                id=release.id,
                model_id=release.model_id,
                artifact_hash=release.artifact_hash,
                created=release.created,
                content=canonical_json(release),
            )
        )
        session.flush()
        session.add_all(
            ManifestRow(release_id=release.id, role=role, name=name, manifest=digest) for role, name, digest in release.manifests()
        )
        session.add_all(ParentRow(release_id=release.id, parent=parent) for parent in dict.fromkeys(release.parents))
        session.commit()
        return release

    def sign(self, release_id: str, key: Ed25519PrivateKey) -> dict[str, Any]:
        """Sign the release's statement with `key`, keep the DSSE envelope, and return it."""
        release = self.show(release_id)
        envelope = sign(release.statement(), key)
        with self._session() as session:
            row = SignatureRow(release_id=release.id, key_id=key_id(key.public_key()), envelope=canonical_json(envelope), signed=stamp())
            if session.get(SignatureRow, (row.release_id, row.key_id)) is None:
                session.add(row)
                session.commit()
        return envelope

    # --- looking -----------------------------------------------------------------------------------------

    def list(self) -> Releases:
        """Every release, oldest first."""
        with self._session() as session:
            rows = session.scalars(sa.select(ReleaseRow).order_by(ReleaseRow.created, ReleaseRow.id)).all()
        return [self._checked(row) for row in rows]

    def show(self, reference: str) -> Release:
        """The release of that id, unique id prefix (8 digits or more), or alias. Raises ReleaseError."""
        current = self.current(reference)
        with self._session() as session:
            row = session.get(ReleaseRow, current or reference)
            if row is None and re.fullmatch(r"[0-9a-f]{8,63}", reference):
                rows = session.scalars(sa.select(ReleaseRow).where(ReleaseRow.id.startswith(reference)).limit(2)).all()
                row = rows[0] if len(rows) == 1 else None
        if row is None:
            raise ReleaseError(
                f"no release or alias {reference!r} in {self.path}",
                why=f"its aliases are {sorted(self.aliases()) or 'none yet'}",
                do="see `temper releases list`",
            )
        return self._checked(row)

    def _checked(self, row: ReleaseRow) -> Release:
        release = Release.model_validate_json(row.content)
        if release.id != row.id:
            raise IntegrityError(
                f"release {row.id[:16]} was altered in the database",
                why=f"its content hashes to {release.id[:16]}",
                do="restore the registry's database from a backup",
            )
        return release

    def aliases(self, *, scratch: bool = False) -> dict[str, str]:
        """Alias -> id of the release it points at now; those of rollback checks only with `scratch`."""
        newest = sa.select(AliasEventRow.alias, sa.func.max(AliasEventRow.number).label("number")).group_by(AliasEventRow.alias).subquery()
        join = sa.and_(AliasEventRow.alias == newest.c.alias, AliasEventRow.number == newest.c.number)
        with self._session() as session:
            rows = session.execute(sa.select(AliasEventRow.alias, AliasEventRow.release_id).join(newest, join)).all()
        return dict(sorted((row[0], row[1]) for row in rows if scratch or not row[0].startswith(SCRATCH)))

    def current(self, alias: str) -> str | None:
        """The id that `alias` points at now: one indexed row, cheap enough to poll. Nothing is verified."""
        wanted = sa.select(AliasEventRow.release_id).where(AliasEventRow.alias == alias).order_by(AliasEventRow.number.desc()).limit(1)
        with self._session() as session:
            return session.scalars(wanted).first()

    def history(self, alias: str = "production") -> Events:
        """Every move of `alias`, oldest first, its chain checked."""
        with self._session() as session:
            return read_history(session, alias)

    def at(self, alias: str, when: dt.datetime | dt.date | str) -> Release | None:
        """Which release `alias` pointed at then (a bare date: at the end of that day, UTC); None before its first move."""
        moment = as_stamp(when)
        past = [event for event in self.history(alias) if event.moved <= moment]
        return self.show(past[-1].release_id) if past else None

    def document(self, digest: str) -> dict[str, Any] | None:
        """The report or manifest kept under `digest`; None where only its hash is known."""
        with self._session() as session:
            row = session.get(DocumentRow, digest)
        if row is None:
            return None
        content: dict[str, Any] = json.loads(row.content)
        if hash_value(content) != digest:
            raise IntegrityError(f"document {digest[:16]} was altered in the database", do="restore the registry's database from a backup")
        return content

    def envelopes(self, release_id: str) -> Envelopes:
        """Every signature envelope of a release."""
        with self._session() as session:
            rows = session.scalars(sa.select(SignatureRow).where(SignatureRow.release_id == release_id)).all()
        return [json.loads(row.envelope) for row in rows]

    # --- verifying and resolving -------------------------------------------------------------------------

    def verify(self, reference: str, *, keys: Iterable[Ed25519PublicKey] | None = None) -> Release:
        """Read every byte of a release and compare; check its signature against `keys` (default: the trusted ones).

        Raises IntegrityError at the first difference.
        """
        release = self.show(reference)
        self.store.verify(release.weights)
        for digest in release.adapters.values():
            self.store.verify(digest)
        if artifact_hash(release.weights, release.adapters) != release.artifact_hash:
            raise IntegrityError(
                f"release {release.id[:16]} names an artefact that is not its weights and adapters", do="register it again"
            )
        wanted = tuple(self.trusted if keys is None else keys)
        if wanted:
            self._verify_signature(release, wanted)
        return release

    def _verify_signature(self, release: Release, keys: tuple[Ed25519PublicKey, ...]) -> None:
        faults = []
        for envelope in self.envelopes(release.id):
            for key in keys:
                try:
                    if verify(envelope, key) == json.loads(canonical_json(release.statement())):
                        return
                    faults.append("the signed statement is of another release")
                except IntegrityError as error:
                    faults.append(error.why)
        raise IntegrityError(
            f"release {release.id[:16]} carries no valid signature by a trusted key",
            why="; ".join(faults) or "it is not signed",
            do="sign it with `registry.sign(release_id, key)`",
        )

    def resolve(self, reference: str = "production", *, override: bool = False, today: dt.date | None = None) -> Release:
        """The release to load, every byte verified. Raises ReleaseError past its last day unless `override`."""
        release = self.verify(reference)
        self._require_alive(release, override=override, today=today)
        return release

    def _require_alive(self, release: Release, *, override: bool, today: dt.date | None = None) -> None:
        plan = release.deprecation_plan
        if plan.expired(today or dt.datetime.now(dt.UTC).date()) and not override:
            successor = f"use its successor {plan.successor}" if plan.successor else "promote another release"
            raise ReleaseError(
                f"release {release.id[:16]} ended on {plan.end}",
                why=plan.notice or "its deprecation plan says so",
                do=f"{successor}, or override the plan explicitly",
            )

    def weights_path(self, release: Release) -> Path:
        """The folder of the release's base weights in the store."""
        return self.store.folder(release.weights)

    def adapter_path(self, release: Release, tenant: str) -> Path:
        """The folder of one tenant's adapter. Raises ReleaseError where the release has none for it."""
        if tenant not in release.adapters:
            raise ReleaseError(
                f"release {release.id[:16]} has no adapter for tenant {tenant!r}", why=f"its tenants are {sorted(release.adapters)}"
            )
        return self.store.folder(release.adapters[tenant])

    # --- moving aliases ----------------------------------------------------------------------------------

    def promote(self, reference: str, alias: str = "production", *, reason: str, who: str | None = None) -> AliasEvent:
        """Point `alias` at a release. Refuses without a promoting verdict on exactly this artefact."""
        release = self.verify(reference)
        require_verdict(release)
        self._require_alive(release, override=False)
        return self._move(alias, release, "promote", who, reason)

    def rollback(self, alias: str = "production", *, reason: str, who: str | None = None, override: bool = False) -> AliasEvent:
        """Point `alias` at the distinct release before the current one; twice goes two back, never forward."""
        stack = standing(self.history(alias))
        if len(stack) < 2:
            raise ReleaseError(
                f"alias {alias!r} has nothing to roll back to",
                why="nothing stands before the release it points at" if stack else "it points at no release",
                do="promote a release by its id; `temper releases history` shows every move",
            )
        release = self.verify(stack[-2])
        self._require_alive(release, override=override)
        return self._move(alias, release, "rollback", who, reason)

    def _move(self, alias: str, release: Release, action: Literal["promote", "rollback"], who: str | None, why: str) -> AliasEvent:
        if not re.fullmatch(r"[a-z][a-z0-9._/-]{0,99}", alias) or re.fullmatch(r"[0-9a-f]{8,64}", alias):
            raise ReleaseError(
                f"{alias!r} is no name for an alias",
                why="an alias is lower-case and cannot look like a release id",
                do="use for example production",
            )
        if not why.strip():
            raise ReleaseError(f"moving {alias!r} needs a reason", do="say why: it stays in the history")
        with self._session() as session:
            return append_event(session, alias, release.id, action=action, who=who or getpass.getuser(), why=why)

    def rollback_check(self, reference: str, *, previous: str | None = None, who: str | None = None) -> Finding:
        """Really go previous → candidate → back → candidate on a scratch alias, and say whether it worked.

        `previous` is the release to fall back to: by default the rollback plan's, else what production points at.
        """
        return rollback_check(self, reference, previous=previous, who=who)

    # --- lineage -----------------------------------------------------------------------------------------

    def lineage(self, reference: str) -> dict[str, Any]:
        """The tree behind a release: its manifests, report and verdict, and the same for each parent."""
        return lineage(self, reference)

    def releases_using_manifest(self, digest: str) -> Releases:
        """Every release that names a manifest, and every release descended from one: the tainted ones, oldest first."""
        with self._session() as session:
            tainted = set(session.scalars(sa.select(ManifestRow.release_id).where(ManifestRow.manifest == digest)))
            edges = [(row.release_id, row.parent) for row in session.scalars(sa.select(ParentRow))]
        tainted = with_descendants(tainted, edges)
        return [release for release in self.list() if release.id in tainted]

    def releases_using_record(self, record_id: str) -> Releases:
        """Every release tainted by one record, through the manifests that are kept here whole."""
        with self._session() as session:
            rows = session.scalars(sa.select(DocumentRow).where(DocumentRow.kind == Manifest.__name__)).all()
        naming = [row.hash for row in rows if record_id in json.loads(row.content)["admitted"]]
        found = {release.id: release for digest in naming for release in self.releases_using_manifest(digest)}
        return sorted(found.values(), key=lambda release: (release.created, release.id))


def named(manifests: Named) -> dict[str, str]:
    """Manifests as name -> hash; a bare hash is named `all`."""
    if manifests is None:
        return {}
    return {"all": manifests} if isinstance(manifests, str) else dict(sorted(manifests.items()))
