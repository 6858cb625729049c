"""A release in memory: one engine, its adapters, and what was really loaded, read back."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from temper.core.errors import IntegrityError
from temper.core.hashing import hash_text
from temper.core.storage import verify_folder
from temper.registry import Registry, Release
from temper.rollout.engine import Engine
from temper.serve.config import ServeConfig

log = logging.getLogger("temper.serve")
OpenEngine = Callable[[Path], Engine]


@dataclass
class Loaded:
    """One release, ready to answer. `adapter_of` maps a tenant to the engine's adapter name, `hash_of` that name to the
    hash of the folder that was loaded under it, and `numbers_of` to the hash of its numbers as they stand in memory.
    The engine belongs to the worker thread alone.
    """

    release: Release
    engine: Engine
    adapter_of: dict[str, str]
    hash_of: dict[str, str]
    numbers_of: dict[str, str]
    weights_hash: str
    seconds: float

    def expected(self, tenant: str | None) -> str | None:
        """The engine's adapter name for a tenant; None for the shared base."""
        return None if tenant is None else self.adapter_of[tenant]

    def adapter_hash(self, adapter: str | None) -> str | None:
        """The content hash of what is loaded under the engine's adapter name."""
        return None if adapter is None else self.hash_of[adapter]


def load_release(registry: Registry, reference: str, open_engine: OpenEngine, *, override: bool = False) -> Loaded:
    """Verify and load a release and every adapter of it. Raises IntegrityError, ReleaseError, TemplateError.

    Inside the engine an adapter is named by its tenant's salt and its content hash: no two tenants share a name, even
    with equal adapters, so no cache that is keyed by the name is ever shared between them or outlives the content.
    """
    started = time.monotonic()
    release = registry.resolve(reference, override=override)
    weights = registry.weights_path(release)
    engine = open_engine(weights)
    template = engine.policy.template
    template.require()
    if not release.template_fingerprint:  # registered by hand: `temper run` records it always
        log.warning(
            "release %s records no chat template, so nothing says that the one served (%s) is the one it was trained and judged with; "
            "register it with template_fingerprint", release.id[:16], template.fingerprint[:16],
        )  # fmt: skip
    elif template.fingerprint != release.template_fingerprint:
        raise IntegrityError(
            f"release {release.id[:16]} was judged with another chat template",
            why=f"recorded {release.template_fingerprint[:16]}, the weights folder holds {template.fingerprint[:16]}",
            do="register the release with the template it was evaluated with",
        )
    adapter_of, hash_of, numbers_of = {}, {}, {}
    for tenant, digest in sorted(release.adapters.items()):
        name, folder = f"{hash_text(tenant)[:16]}_{digest}", registry.adapter_path(release, tenant)
        engine.policy.load_adapter(name, folder)
        found = verify_folder(folder)  # read again after loading: what was read is what is recorded
        if found != digest:
            raise IntegrityError(
                f"adapter of tenant {tenant!r} changed while it was loaded", why=f"recorded {digest[:16]}, found {found[:16]}"
            )
        adapter_of[tenant], hash_of[name], numbers_of[name] = name, found, engine.policy.adapter_hash(name)
    return Loaded(release, engine, adapter_of, hash_of, numbers_of, verify_folder(weights), time.monotonic() - started)


def opener(config: ServeConfig) -> OpenEngine:
    """How a weights folder becomes an engine under `config`."""

    def open_engine(weights: Path) -> Engine:
        return Engine.load(
            weights, precision=config.precision, device=config.device, max_rows=config.max_rows, keep_prefixes=config.keep_prefixes
        )

    return open_engine
