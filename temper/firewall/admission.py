"""Admission: records in, a manifest out. What is not in a manifest is not trained on.

admission = admit(records, name="sft", heldout=tasks, rules=AdmissionRules())
manifest = write_manifest(Path("runs/demo/data/sft"), admission)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from temper.core.errors import DataError, ManifestError
from temper.core.hashing import hash_file, hash_value
from temper.core.progress import track
from temper.core.records import Manifest, Record, Refusal
from temper.core.storage import whole_folder, write_json, write_jsonl
from temper.firewall.contamination import Conversation, HeldoutTask, heldout_task, overlaps
from temper.firewall.dedup import content_hash, near_duplicates
from temper.firewall.rules import RECORD_RULES, AdmissionRules, check_contents
from temper.firewall.text import said, turns

RECORDS_FILE = "records.jsonl"
MANIFEST_FILE = "manifest.json"


@dataclass(frozen=True)
class Admission:
    """What `admit` decided: the admitted records in their order, and one refusal for every other one."""

    name: str
    admitted: tuple[Record, ...]
    refusals: tuple[Refusal, ...]
    rules: AdmissionRules
    heldout: dict[str, str]

    @property
    def counts(self) -> dict[str, int]:
        """`seen` = `admitted` + `refused`, and `refused_<rule>` for each rule that refused any."""
        by_rule = Counter(refusal.rule for refusal in self.refusals)
        seen = len(self.admitted) + len(self.refusals)
        totals = {"seen": seen, "admitted": len(self.admitted), "refused": len(self.refusals)}
        return totals | {f"refused_{rule}": count for rule, count in sorted(by_rule.items())}


def admit(
    records: Iterable[Record],
    *,
    name: str,
    heldout: Iterable[HeldoutTask | Conversation | str] = (),
    rules: AdmissionRules = AdmissionRules(),
    rows: Sequence[str] | None = None,
    refused: Sequence[Refusal] = (),
) -> Admission:
    """Judge every record by `rules`; each is admitted, or refused by the first rule it breaks, with the reason.

    `heldout` are the tasks that training data must not give away (held-out tasks, environment tasks, records, or
    prompts as text). `rows` says where each record came from (an import's `rows`; else its number is used), and
    `refused` are an import's own refusals, which are kept. Rules that judge a record alone come first, so that a
    refused one never stands in the way of a good one as its duplicate. Raises DataError where two held-out tasks
    of different content share an id.
    """
    items = list(records)
    places = list(rows) if rows is not None else [str(number) for number in range(1, len(items) + 1)]
    if len(places) != len(items):
        raise DataError(
            f"{name}: {len(items)} records and {len(places)} rows", why="each record needs one place", do="pass the rows of the same import"
        )
    tasks, fingerprints = _heldout(heldout)
    reasons: list[tuple[str, str] | None] = [_alone(record, rules) for record in track(items, f"admitting {name}")]
    alive = [number for number, reason in enumerate(reasons) if reason is None]
    if rules.overlap is not None:
        found = overlaps([items[number] for number in alive], tasks, rules.overlap)
        alive = _refuse(reasons, alive, "overlap", found)
    if rules.exact_duplicates:
        alive = _refuse(reasons, alive, "duplicate", _repeats([items[number] for number in alive], places, alive))
    if rules.near_duplicates is not None:
        spoken = [[said(turns(items[number]), (role,)) for number in alive] for role in rules.near_duplicates.roles]
        near = near_duplicates(spoken, rules.near_duplicates)
        said_near = [f"{hit[1]:.2f} alike with row {places[alive[hit[0]]]}" if hit else None for hit in near]
        _refuse(reasons, alive, "near_duplicate", said_near)
    refusals = [
        Refusal(record=record.id, rule=reason[0], reason=reason[1], row=place)
        for record, reason, place in zip(items, reasons, places, strict=True)
        if reason is not None
    ]
    admitted = tuple(record for record, reason in zip(items, reasons, strict=True) if reason is None)
    return Admission(name, admitted, (*refused, *refusals), rules, fingerprints)


def _alone(record: Record, rules: AdmissionRules) -> tuple[str, str] | None:
    """The first rule that a record breaks by itself, and why."""
    for rule, check in RECORD_RULES.items():
        reason = check(record, rules)
        if reason is not None:
            return rule, reason
    return check_contents(record, rules)


def _refuse(reasons: list[tuple[str, str] | None], alive: list[int], rule: str, found: Sequence[str | None]) -> list[int]:
    """Note what `rule` found against those still alive, and return who is left."""
    for number, reason in zip(alive, found, strict=True):
        if reason is not None:
            reasons[number] = (rule, reason)
    return [number for number in alive if reasons[number] is None]


def _repeats(records: Sequence[Record], places: Sequence[str], alive: Sequence[int]) -> list[str | None]:
    first: dict[str, str] = {}
    found: list[str | None] = []
    for record, number in zip(records, alive, strict=True):
        key = content_hash(record)
        found.append(f"says the same as row {first[key]}" if key in first else None)
        first.setdefault(key, places[number])
    return found


def _heldout(items: Iterable[HeldoutTask | Conversation | str]) -> tuple[list[HeldoutTask], dict[str, str]]:
    tasks = [heldout_task(item) for item in items]
    fingerprints: dict[str, str] = {}
    for task in tasks:
        if fingerprints.setdefault(task.id, task.fingerprint) != task.fingerprint:
            raise DataError(f"two held-out tasks have the id {task.id!r}", why="their content differs", do="give each task its own id")
    return tasks, fingerprints


def require_some(admission: Admission) -> None:
    """Raise ManifestError, with the first refusal, where no record was admitted."""
    if not admission.admitted:
        counts = ", ".join(f"{rule} {count}" for rule, count in admission.counts.items())
        first = f"; the first refusal: {admission.refusals[0].reason}" if admission.refusals else ""
        raise ManifestError(
            f"manifest {admission.name!r} would admit nothing", why=f"{counts}{first}", do="mend the data, or the rules that refuse it"
        )


def write_manifest(folder: Path, admission: Admission) -> Manifest:
    """Write the admitted records and their manifest into `folder`, whole or not at all, and return the manifest.

    Raises ManifestError, and writes nothing, where no record was admitted.
    """
    require_some(admission)
    with whole_folder(folder) as scratch:
        write_jsonl(scratch / RECORDS_FILE, admission.admitted)
        manifest = Manifest(
            name=admission.name,
            records_file=RECORDS_FILE,
            records_sha256=hash_file(scratch / RECORDS_FILE),
            admitted=tuple(record.id for record in admission.admitted),
            rules={**admission.rules.model_dump(mode="json"), "hash": hash_value(admission.rules)},
            heldout=admission.heldout,
            refusals=admission.refusals,
            counts=admission.counts,
        )
        write_json(scratch / MANIFEST_FILE, manifest)
    return manifest
