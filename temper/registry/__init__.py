"""Releases: complete, content-addressed, signed snapshots, and the aliases that point at them."""

from temper.registry.aliases import AliasEvent
from temper.registry.registry import Registry
from temper.registry.release import AccessPolicy, DeprecationPlan, Release, RollbackPlan, artifact_hash, artifact_hash_of
from temper.registry.signing import load_private, load_public, new_key

__all__ = [
    "AccessPolicy", "AliasEvent", "DeprecationPlan", "Registry", "Release", "RollbackPlan",
    "artifact_hash", "artifact_hash_of", "load_private", "load_public", "new_key",
]  # fmt: skip
