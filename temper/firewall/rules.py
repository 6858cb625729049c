"""The rules of admission: what a record must be, state and leave out. Each says why it refuses, or None.

`RECORD_RULES` judge a record by itself, in this order; `check_contents` looks into what it says; overlap and
duplicates, which look at several records, follow in `admission`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from functools import lru_cache
from json import loads

from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError, best_match
from pydantic import Field, field_validator
from referencing import Registry
from referencing.exceptions import Unresolvable

from temper.core.config import Config
from temper.core.hashing import canonical_json
from temper.core.records import Message, Record, Split
from temper.firewall.contamination import Overlap
from temper.firewall.dedup import NearDuplicates, spoken
from temper.firewall.privacy import PERSONAL, SECRETS, scan

# SPDX names of licences that let anyone train and pass the result on; "internal" is a team's own data.
LICENCES = (
    "Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "CC-BY-3.0", "CC-BY-4.0", "CC0-1.0", "ISC", "MIT", "ODC-By-1.0", "PDDL-1.0", "Unlicense",
    "internal",
)  # fmt: skip
UNSTATED = {"", "unknown", "none", "null", "n/a", "na", "tbd", "todo", "?"}


class AdmissionRules(Config):
    """What one manifest admits. Every field goes into the manifest, so that it says by which rules it was made.

    `splits`, `licences` (SPDX names), `privacy` and `tenants` (None: any; `null` in the list: no tenant) are what
    is let in. `personal` and `secrets` are the kinds looked for. `near_duplicates` and `overlap` may be null,
    which turns them off. `failed_episodes` lets in episodes whose outcome holds an error.
    """

    splits: tuple[Split, ...] = ("train",)
    licences: tuple[str, ...] = LICENCES
    privacy: tuple[str, ...] = ("public", "synthetic", "internal")
    tenants: tuple[str | None, ...] | None = None
    max_generation_depth: int | None = Field(None, ge=0)
    failed_episodes: bool = False
    personal: tuple[str, ...] = tuple(PERSONAL)
    secrets: tuple[str, ...] = tuple(SECRETS)
    exact_duplicates: bool = True
    near_duplicates: NearDuplicates | None = NearDuplicates()
    overlap: Overlap | None = Overlap()

    @field_validator("personal", "secrets")
    @classmethod
    def _known(cls, kinds: tuple[str, ...], info: object) -> tuple[str, ...]:
        known = {"personal": PERSONAL, "secrets": SECRETS}[getattr(info, "field_name")]  # noqa: B009
        unknown = [kind for kind in kinds if kind not in known]
        if unknown:
            raise ValueError(f"unknown kinds {unknown}; known are {', '.join(known)}")
        return kinds


def check_schema(record: Record, rules: AdmissionRules) -> str | None:
    """A conversation that can be trained on: roles in order, results after calls, something said, whole calls."""
    pair = record.preference
    if pair is None:
        return _conversation_fault(record, record.messages, need_training=True) or _sampled_fault(record)
    if not record.messages:
        return "a preference pair without a prompt"
    if list(map(spoken, pair.chosen)) == list(map(spoken, pair.rejected)):
        return "chosen and rejected say the same"
    for name, side in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        fault = _conversation_fault(record, record.messages + side, need_training=False)
        if not any(message.role == "assistant" for message in side):
            fault = "has no assistant turn"
        if fault:
            return f"{name}: {fault}"
    return None


def _conversation_fault(record: Record, messages: tuple[Message, ...], *, need_training: bool) -> str | None:
    open_calls: Counter[str] = Counter()
    asked = False
    for index, message in enumerate(messages):
        place = f"messages[{index}] ({message.role})"
        if message.role == "system" and index:
            return f"{place} is not at the start"
        if message.role == "tool":
            if not open_calls[message.tool_call_id or ""]:
                return f"{place} is a tool result without a call (id {message.tool_call_id!r})"
            open_calls[message.tool_call_id or ""] -= 1
            continue
        if open_calls.total():
            waiting = ", ".join(+open_calls)
            return f"{place} follows calls without results ({waiting})"
        if message.role == "assistant":
            fault = _assistant_fault(record, message, asked)
            if fault:
                return f"{place} {fault}"
            open_calls.update(call.id for call in message.tool_calls)
        elif not message.content.strip():
            return f"{place} is empty"
        asked = True
    turns = [message for message in messages if message.role == "assistant"]
    if not turns:
        return "no assistant turn"
    if need_training and not any(message.train is not False for message in turns):
        return "every assistant turn is marked as not trained"
    return None


def _assistant_fault(record: Record, message: Message, asked: bool) -> str | None:
    if not asked:
        return "speaks before it is asked"
    if not message.content.strip() and not message.tool_calls:
        return "is empty"
    if len({call.id for call in message.tool_calls}) < len(message.tool_calls):
        return f"makes calls that share an id ({[call.id for call in message.tool_calls]})"
    if message.train is False:
        return None  # a mistake shown on purpose, to be followed by its repair
    specs = {tool.name: tool for tool in record.tools}
    for call in message.tool_calls:
        if isinstance(call.arguments, str):
            return f"calls {call.name} with arguments that are no JSON object: {call.arguments[:60]!r}"
        if specs and call.name not in specs:
            return f"calls {call.name}, which is not among the record's tools ({', '.join(specs)})"
        if not _finite(call.arguments):
            return f"calls {call.name} with a number that is not finite"
        fault = _schema_fault(canonical_json(specs[call.name].parameters), canonical_json(call.arguments)) if specs else None
        if fault:
            return f"calls {call.name} with arguments its schema refuses: {fault}"
    return None


def _finite(value: object) -> bool:
    if isinstance(value, dict):
        return all(map(_finite, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


@lru_cache(maxsize=1024)
def _validator(schema: str) -> Draft202012Validator | str:
    """The validator of a tool's schema, or what is wrong with the schema. References outside it are not fetched."""
    try:
        Draft202012Validator.check_schema(loads(schema))
    except SchemaError as error:
        return f"the tool's own schema is invalid: {error.message}"
    return Draft202012Validator(loads(schema), registry=Registry())


@lru_cache(maxsize=65536)
def _schema_fault(schema: str, arguments: str) -> str | None:
    validator = _validator(schema)
    if isinstance(validator, str):
        return validator
    try:
        fault = best_match(validator.iter_errors(loads(arguments)))
    except Unresolvable as error:
        return f"the tool's schema refers to something outside it: {error}"
    return f"{fault.json_path}: {fault.message}" if fault else None


def _sampled_fault(record: Record) -> str | None:
    for index, sampled in enumerate(record.sampled):
        if len(sampled.token_ids) != len(sampled.logprobs):
            return f"sampled[{index}] has {len(sampled.token_ids)} tokens and {len(sampled.logprobs)} log-probs"
        if sampled.support is not None and len(sampled.support) != len(sampled.token_ids):
            return f"sampled[{index}] has {len(sampled.token_ids)} tokens and support for {len(sampled.support)}"
        bad = next((value for value in sampled.logprobs if not (math.isfinite(value) and value <= 1e-6)), None)
        if bad is not None:
            return f"sampled[{index}] has the log-prob {bad}"
    return None


def check_provenance(record: Record, rules: AdmissionRules) -> str | None:
    """Every required field states something, and what it states agrees with the rest."""
    origin = record.provenance
    for name in ("source", "licence", "access"):
        if getattr(origin, name).strip().lower() in UNSTATED:
            return f"{name} states nothing ({getattr(origin, name)!r})"
    if origin.generation_depth < 0:
        return f"generation_depth is {origin.generation_depth}"
    if origin.synthetic and not (origin.generator or "").strip():
        return "synthetic, but generator names nothing that made it"
    if origin.generation_depth > 0 and not origin.synthetic:
        return f"generation_depth {origin.generation_depth}, but not marked synthetic"
    if rules.max_generation_depth is not None and origin.generation_depth > rules.max_generation_depth:
        return f"generation_depth {origin.generation_depth} is above {rules.max_generation_depth}"
    if record.outcome.reward is not None and not (origin.reward_source or "").strip():
        return f"reward {record.outcome.reward}, but reward_source names nothing that gave it"
    if record.outcome.reward is not None and not math.isfinite(record.outcome.reward):
        return f"reward is {record.outcome.reward}"
    return None


def check_licence(record: Record, rules: AdmissionRules) -> str | None:
    """The licence is one of those allowed."""
    licence = record.provenance.licence
    return None if licence in rules.licences else f"licence {licence!r} is not among {', '.join(rules.licences)}"


def check_access(record: Record, rules: AdmissionRules) -> str | None:
    """Privacy class and tenant are among those this manifest is for."""
    origin = record.provenance
    if origin.privacy not in rules.privacy:
        return f"privacy class {origin.privacy!r} is not among {', '.join(rules.privacy)}"
    if rules.tenants is not None and origin.tenant not in rules.tenants:
        return f"tenant {origin.tenant!r} is not among {', '.join(map(str, rules.tenants))}"
    return None


def check_split(record: Record, rules: AdmissionRules) -> str | None:
    """The record belongs to the split that the manifest is for: train data holds no dev or test record."""
    split = record.provenance.split
    return None if split in rules.splits else f"split {split!r} is not among {', '.join(rules.splits)}"


def check_outcome(record: Record, rules: AdmissionRules) -> str | None:
    """An episode that failed is data for analysis, not a demonstration."""
    error = record.outcome.error
    return f"the episode failed: {error[:120]}" if error is not None and not rules.failed_episodes else None


def check_contents(record: Record, rules: AdmissionRules) -> tuple[str, str] | None:
    """Neither keys, tokens and passwords (rule "secrets") nor personal data of a recognisable form ("personal")."""
    kinds = rules.secrets + rules.personal
    found = list(dict.fromkeys(scan(record, kinds))) if kinds else []
    if not found:
        return None
    shown = ", ".join(f"{kind} in {place}" for kind, place in found[:3])
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return ("secrets" if any(kind in SECRETS for kind, _ in found) else "personal"), shown + more


RECORD_RULES: dict[str, Callable[[Record, AdmissionRules], str | None]] = {
    "schema": check_schema,
    "provenance": check_provenance,
    "licence": check_licence,
    "access": check_access,
    "split": check_split,
    "outcome": check_outcome,
}
