"""Whose request is it? Every place that names a tenant must name the same one; nothing is guessed."""

from __future__ import annotations

import datetime as dt
import hashlib
import hmac
from collections.abc import Sequence
from typing import Any

from temper.registry import Release
from temper.serve.errors import ApiError


def tenant_of(
    release: Release, alias: str, *, model: str, headers: Sequence[str], metadata: dict[str, Any] | None, authorization: str | None
) -> str | None:
    """The tenant of a request, or None for the shared base weights.

    It may be named by the X-Tenant header, as `model@tenant`, by metadata.tenant and by the API key; wherever
    two of them differ the request is refused. Raises ApiError 400, 401, 403 or 404.
    """
    suffix = _suffix((release.model_id, release.id, alias), model)
    named: dict[str, str] = {}
    for number, value in enumerate(headers):
        named["X-Tenant header" + (f" {number + 1}" if number else "")] = value
    if suffix is not None:
        named["model"] = suffix
    if metadata is not None and "tenant" in metadata:
        if not isinstance(metadata["tenant"], str):
            raise ApiError(400, "invalid_tenant", "metadata.tenant is not a string", param="metadata.tenant")
        named["metadata.tenant"] = metadata["tenant"]
    for place, value in named.items():
        if not value:
            raise ApiError(400, "invalid_tenant", f"{place} names an empty tenant; name one, or leave it out")
    keyed = _key_tenant(release, authorization)
    if keyed is not None and any(value != keyed for value in named.values()):
        raise ApiError(403, "tenant_not_yours", f"this API key belongs to tenant {keyed!r} and reaches no other")
    if len(set(named.values())) > 1:
        told = ", ".join(f"{place} says {value!r}" for place, value in named.items())
        raise ApiError(400, "conflicting_tenants", f"the request names different tenants: {told}")
    tenant = keyed if keyed is not None else next(iter(named.values()), None)
    _require_allowed(release, tenant)
    return tenant


def _suffix(names: tuple[str, ...], model: str) -> str | None:
    if model in names:
        return None
    name, at, suffix = model.rpartition("@")
    if at and name in names:
        return suffix
    raise ApiError(404, "model_not_found", f"model {model[:96]!r} is not served here; this is {names[0]!r}", param="model")


def _key_tenant(release: Release, authorization: str | None) -> str | None:
    keys = release.access_policy.api_keys
    if not keys:
        return None
    scheme, _, key = (authorization or "").partition(" ")
    if scheme.lower() != "bearer" or not key.strip():
        raise ApiError(401, "missing_api_key", "this release needs an API key: send `Authorization: Bearer …`")
    digest = hashlib.sha256(key.strip().encode()).hexdigest()
    found = [tenant for known, tenant in keys.items() if hmac.compare_digest(known, digest)]
    if not found:
        raise ApiError(401, "invalid_api_key", "this API key is not known to the release")
    return found[0]


def _require_allowed(release: Release, tenant: str | None) -> None:
    policy = release.access_policy
    if tenant is None:
        if not policy.anonymous:
            raise ApiError(403, "tenant_required", "this release answers named tenants only: set the X-Tenant header")
        return
    if tenant not in release.adapters:
        raise ApiError(403, "unknown_tenant", f"tenant {tenant[:64]!r} is not served by this release")
    if policy.tenants and tenant not in policy.tenants:
        raise ApiError(403, "tenant_not_allowed", f"tenant {tenant!r} may not use this release")


def list_models(release: Release, alias: str, authorization: str | None) -> list[dict[str, Any]]:
    """The model names a caller may use. With API keys, a tenant sees its own and learns of no other."""
    keyed = _key_tenant(release, authorization)
    policy = release.access_policy
    served = [tenant for tenant in sorted(release.adapters) if (not policy.tenants or tenant in policy.tenants) and keyed in (None, tenant)]
    created = int(dt.datetime.fromisoformat(release.created).timestamp())
    common = {"object": "model", "created": created, "owned_by": "temper", "release": release.id, "alias": alias}
    base = [{"id": release.model_id, **common, "root": release.base_model_id, "parent": None}] if policy.anonymous and keyed is None else []
    return base + [
        {"id": f"{release.model_id}@{tenant}", **common, "root": release.adapters[tenant], "parent": release.model_id} for tenant in served
    ]
