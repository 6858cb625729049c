"""What stands behind a release and what it would take to leave it: lineage, and the rollback that is exercised."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from temper.core.errors import IntegrityError, ReleaseError
from temper.core.reports import Finding
from temper.registry.aliases import SCRATCH, standing

if TYPE_CHECKING:
    from temper.registry.registry import Registry


def lineage(registry: Registry, reference: str) -> dict[str, Any]:
    """The tree behind a release; parents outside the registry are named and marked."""
    release = registry.show(reference)
    manifests = [
        {"role": role, "name": name, "hash": digest, "kept": registry.document(digest) is not None}
        for role, name, digest in release.manifests()
    ]
    known = {found.id for found in registry.list()}
    parents = [lineage(registry, parent) if parent in known else {"id": parent, "registered": False} for parent in release.parents]
    return {
        "id": release.id,
        "registered": True,
        "model_id": release.model_id,
        "base_model_id": release.base_model_id,
        "artifact_hash": release.artifact_hash,
        "adapters": release.adapters,
        "manifests": manifests,
        "report_hash": release.report_hash,
        "decision": release.verdict.decision if release.verdict else None,
        "created": release.created,
        "parents": parents,
    }


def with_descendants(roots: set[str], edges: Iterable[tuple[str, str]]) -> set[str]:
    """`roots` and everything that descends from them along (child, parent) `edges`."""
    edges, found = list(edges), set(roots)
    while children := {child for child, parent in edges if parent in found} - found:
        found |= children
    return found


def rollback_check(registry: Registry, reference: str, *, previous: str | None, who: str | None) -> Finding:
    """Promote `previous`, promote the candidate, roll back, promote again, on a scratch alias; every byte verified each time."""
    release = registry.show(reference)
    earlier = [found for found in standing(registry.history("production")) if found != release.id]
    target = previous or release.rollback_plan.to or (earlier[-1] if earlier else None)
    required = "promote, rollback and promote again, each byte verified"
    if target is None or registry.show(target).id == release.id:
        reason = "a first release has nothing to fall back to"
        return Finding(rule="rollback", status="unknown", observed="no earlier release", required=required, reason=reason)
    alias, started = f"{SCRATCH}rollback-{release.id[:12]}", time.monotonic()
    seen: list[str] = []
    try:
        registry.promote(target, alias, reason="rollback check: the release before", who=who)
        registry.promote(release.id, alias, reason="rollback check: the candidate", who=who)
        registry.rollback(alias, reason="rollback check: back", who=who)
        seen.append(registry.resolve(alias).id)
        registry.promote(release.id, alias, reason="rollback check: forward again", who=who)
        seen.append(registry.resolve(alias).id)
    except (ReleaseError, IntegrityError) as error:
        return Finding(rule="rollback", status="fail", observed=error.what, required=required, reason=error.why or error.what)
    passed = seen == [registry.show(target).id, release.id]
    observed = f"{' → '.join(item[:12] for item in seen)} in {time.monotonic() - started:.2f} s"
    status = "pass" if passed else "fail"
    return Finding(rule="rollback", status=status, observed=observed, required=required, reason="exercised on a scratch alias")
