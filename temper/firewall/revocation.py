"""Revocation: a record is withdrawn, and every manifest that admitted it, or something made from it, is tainted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from temper.core.records import Manifest, Record
from temper.core.storage import read_json, read_jsonl
from temper.firewall.admission import MANIFEST_FILE


@dataclass(frozen=True)
class Revocation:
    """What a withdrawal touches: manifest hash -> the tainted records in it, and the ids that stand nowhere.

    `names` gives each tainted manifest's name. A training run, and so a release, is tainted where it read one
    of these manifests.
    """

    tainted: dict[str, tuple[str, ...]]
    names: dict[str, str]
    nowhere: tuple[str, ...]


def revoke(record_ids: Iterable[str], manifests: Iterable[Manifest], records: Iterable[Record] = ()) -> Revocation:
    """Which manifests hold a revoked record, or one descended from it (redacted, rewritten, distilled).

    Descent is read from `records`' provenance: without them only the revoked ids themselves are found.
    """
    wanted = set(record_ids)
    parents = {record.id: record.provenance.parents for record in records}
    touched = descendants(wanted, parents)
    held = list(manifests)
    tainted = {item.hash: tuple(record for record in item.admitted if record in touched) for item in held}
    names = {item.hash: item.name for item in held if tainted[item.hash]}
    known = (
        {record for item in held for record in item.admitted} | {parent for line in parents.values() for parent in line} | parents.keys()
    )
    return Revocation({key: value for key, value in tainted.items() if value}, names, tuple(sorted(wanted - known)))


def revoke_in_folders(record_ids: Iterable[str], folders: Iterable[Path]) -> Revocation:
    """`revoke` over manifest folders on disk, their records' parents included. Raises DataError on a bad one."""
    manifests, records = [], []
    for folder in folders:
        manifest = Manifest.model_validate(read_json(folder / MANIFEST_FILE))
        manifests.append(manifest)
        records += read_jsonl(folder / manifest.records_file, Record)
    return revoke(record_ids, manifests, records)


def descendants(roots: Iterable[str], parents: Mapping[str, tuple[str, ...]]) -> set[str]:
    """`roots` and everything that has one of them among its ancestors."""
    children: dict[str, list[str]] = {}
    for child, line in parents.items():
        for parent in line:
            children.setdefault(parent, []).append(child)
    found = set(roots)
    waiting = list(found)
    while waiting:
        for child in children.get(waiting.pop(), ()):
            if child not in found:
                found.add(child)
                waiting.append(child)
    return found
