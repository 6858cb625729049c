"""`Release`: a complete snapshot of what would be served, why it may be, and how it ends."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from temper.core.errors import ReleaseError
from temper.core.hashing import hash_value
from temper.core.records import Noun
from temper.core.reports import Verdict
from temper.core.storage import folder_hash

STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://temper.dev/release/v1"
UNIT_FIELDS = (
    "model_id", "base_model_id", "training_data_manifest", "reward_manifest", "eval_manifest",
    "policy_manifest", "artifact_hash", "access_policy", "deprecation_plan",
)  # fmt: skip

JUDGED_ROLES = ("artifact", "artifact_hash", "candidate", "candidate_artifact", "candidate_model", "model", "model_hash")


class AccessPolicy(Noun):
    """Who may use a release.

    `tenants` may be served; empty means every tenant that has an adapter. `anonymous` allows requests that
    name no tenant (they get the shared base weights). `api_keys` maps the SHA-256 of a key to its tenant:
    once one key is listed, every request needs one, and reaches that tenant only.
    """

    visibility: str = "internal"
    tenants: tuple[str, ...] = ()
    anonymous: bool = True
    api_keys: dict[str, str] = Field(default_factory=dict)

    @field_validator("api_keys")
    @classmethod
    def _hashed(cls, keys: dict[str, str]) -> dict[str, str]:
        for key in keys:
            if len(key) != 64 or set(key) - set("0123456789abcdef"):
                raise ValueError("api_keys holds SHA-256 digests (64 hex digits), never the keys themselves")
        return keys


class DeprecationPlan(Noun):
    """How a release ends: warned about from `deprecated_from`, refused after the day `end`, replaced by `successor`."""

    deprecated_from: dt.date | None = None
    end: dt.date | None = None
    successor: str | None = None
    notice: str = ""

    def expired(self, day: dt.date) -> bool:
        """Whether `day` lies after the last day of use."""
        return self.end is not None and day > self.end


class RollbackPlan(Noun):
    """What is done when the release fails: the release to go `to` (None: the one before), on which `triggers`."""

    to: str | None = None
    triggers: tuple[str, ...] = ()
    steps: tuple[str, ...] = ("temper releases rollback production",)


def artifact_hash(weights: str, adapters: dict[str, str] | None = None) -> str:
    """The hash of what is judged and served: the weights folder and every tenant's adapter folder.

    Without adapters it is the hash of the weights folder itself.
    """
    return hash_value({"weights": weights, "adapters": adapters}) if adapters else weights


def artifact_hash_of(weights: Path | str, adapters: Mapping[str, Path | str] | None = None) -> str:
    """`artifact_hash` of folders on disk, by their recorded hashes: what evaluation stamps into a report as model_hash."""
    return artifact_hash(folder_hash(Path(weights)), {tenant: folder_hash(Path(folder)) for tenant, folder in (adapters or {}).items()})


class Release(Noun):
    """One complete snapshot. `id` is its content hash; `created` is not part of it, so equal content is one release.

    `weights` and `adapters` (tenant -> hash) name folders of the store; `artifact_hash` binds them together.
    The four manifests map a name (a stage, a suite) to the hash of what it used. `tokenizer_hash` is over the
    tokenizer and template files, `template_fingerprint` the template's own where it was given.
    """

    model_id: str
    base_model_id: str
    weights: str
    artifact_hash: str
    adapters: dict[str, str] = Field(default_factory=dict)
    parents: tuple[str, ...] = ()
    tokenizer_hash: str = ""
    template_fingerprint: str = ""
    training_data_manifest: dict[str, str] = Field(default_factory=dict)
    reward_manifest: dict[str, str] = Field(default_factory=dict)
    eval_manifest: dict[str, str] = Field(default_factory=dict)
    policy_manifest: dict[str, str] = Field(default_factory=dict)
    report_hash: str | None = None
    verdict: Verdict | None = None
    access_policy: AccessPolicy = AccessPolicy()
    deprecation_plan: DeprecationPlan = DeprecationPlan()
    rollback_plan: RollbackPlan = RollbackPlan()
    created: str = Field(default="")

    @cached_property
    def id(self) -> str:
        """The release's content hash."""
        return hash_value(self.model_dump(mode="json", exclude={"created"}))

    def manifests(self) -> list[tuple[str, str, str]]:
        """(role, name, hash) of every manifest the release names."""
        roles = {
            "training_data": self.training_data_manifest, "reward": self.reward_manifest,
            "eval": self.eval_manifest, "policy": self.policy_manifest,
        }  # fmt: skip
        return [(role, name, digest) for role, named in roles.items() for name, digest in sorted(named.items())]

    def statement(self) -> dict[str, Any]:
        """The release as an in-toto Statement v1: the subject is the artefact, the predicate all nine unit fields and the rest."""
        content = self.model_dump(mode="json")
        unit = {name: content.pop(name) for name in UNIT_FIELDS}
        return {
            "_type": STATEMENT_TYPE,
            "subject": [{"name": self.model_id, "digest": {"sha256": self.artifact_hash}}],
            "predicateType": PREDICATE_TYPE,
            "predicate": {"release_id": self.id, **unit, **content},
        }

    def summary(self) -> dict[str, Any]:
        """The release as plain JSON with its id first."""
        return {"id": self.id, **self.model_dump(mode="json")}


def require_verdict(release: Release) -> None:
    """Raise ReleaseError unless the verdict says promote, and judged exactly this artefact."""
    verdict, name = release.verdict, release.id[:16]
    if verdict is None:
        raise ReleaseError(
            f"release {name} has no verdict",
            why="nothing was judged, so nothing may be promoted",
            do="run `temper gate` on its report, and register it with the verdict",
        )
    failing = [f"{finding.rule}: {finding.reason}" for finding in verdict.findings if finding.status != "pass"]
    if verdict.decision != "promote":
        raise ReleaseError(
            f"release {name} may not be promoted: the verdict is {verdict.decision!r}",
            why="; ".join(failing) or "no finding says more",
            do="mend what failed, evaluate again, and register the new verdict",
        )
    judged = {role: verdict.evidence[role] for role in JUDGED_ROLES if role in verdict.evidence}
    if release.artifact_hash not in judged.values():
        names = {role: value[:16] for role, value in judged.items()} or "no candidate"
        raise ReleaseError(
            f"the verdict of release {name} judged another artefact",
            why=f"the artefact is {release.artifact_hash[:16]}; the evidence names {names}",
            do="gate the report of exactly these weights and adapters",
        )
    if (
        release.report_hash
        and "candidate_model" in judged
        and verdict.evidence.get("candidate", release.report_hash) != release.report_hash
    ):
        raise ReleaseError(
            f"the verdict of release {name} rests on another report",
            why=f"the release names report {release.report_hash[:16]}, the verdict {verdict.evidence['candidate'][:16]}",
            do="register the report that was judged",
        )
