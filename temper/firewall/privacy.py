"""Personal data and secrets: found by form and checksum, and redacted only into a new record that names its parent."""

from __future__ import annotations

import ipaddress
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

from temper.core.records import Provenance, Record
from temper.firewall.text import turns

Span = tuple[int, int]

EMAIL = re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.)+[A-Za-z]{2,24}(?![\w-])")
RESERVED_MAIL = re.compile(r"(?:^|[@.])(?:example\.(?:com|org|net)|[\w-]+\.(?:example|test|invalid|localhost))$", re.I)
# A plus sign in a sum ("5 +120") stands after a digit or bracket; a telephone number's does not.
PHONE_WORLD = re.compile(r"\+(?<![\w)\]>+]\+)(?<![\d)] \+)[1-9]\d{0,2}[ .-]?(?:\(\d{1,4}\)[ .-]?)?\d(?:[ .-]?\d){5,12}(?![\w]|[.,]\d|%)")
PHONE_US = re.compile(r"[(2-9](?<![\w.,$€£(-].)(?:(?<=\()([2-9]\d\d)\) ?|(?<=\d)(\d\d)([-.]))([2-9]\d\d)(?(3)\3|-)(\d{4})(?![\w]|[-.,]\d)")
PHONE_NAMED = re.compile(
    r"\b(?:tele)?(?:phone|mobile|cell|fax|tel)(?: number| no)?\.?(?: is|:|#)? {0,2}(\(?\d[\d ().-]{5,16}\d)(?![\w]|[.,]\d|%)", re.I
)
FICTIONAL = re.compile(r"555-?\.?01\d\d$")
IBAN = re.compile(r"[A-Z](?<![\w-].)[A-Z]\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?(?![\w])")
IBAN_LENGTHS = {
    "AD": 24, "AE": 23, "AT": 20, "BE": 16, "BG": 22, "BR": 29, "CH": 21, "CY": 28, "CZ": 24, "DE": 22, "DK": 18, "EE": 20,
    "ES": 24, "FI": 18, "FR": 27, "GB": 22, "GR": 27, "HR": 21, "HU": 28, "IE": 22, "IL": 23, "IS": 26, "IT": 27, "KW": 30,
    "LI": 21, "LT": 20, "LU": 20, "LV": 21, "MC": 27, "MT": 31, "NL": 18, "NO": 15, "PL": 28, "PT": 25, "QA": 29, "RO": 24,
    "SA": 24, "SE": 24, "SI": 19, "SK": 24, "SM": 27, "TR": 26, "UA": 29,
}  # fmt: skip
CARD = re.compile(r"[2-6](?<![\w.,$€£-].)(?:\d{3}([ -])\d{4}\1\d{4}\1\d{4}|\d{3}([ -])\d{6}\2\d{5}|\d{13,15}|\d{18})(?![\w-]|[.,]\d)")
CARD_ISSUERS = re.compile(
    r"(?:4(?:\d{15}|\d{18})|5[1-5]\d{14}|2(?:22[1-9]|2[3-9]\d|[3-6]\d\d|7[01]\d|720)\d{12}"
    r"|3[47]\d{13}|3(?:0[0-5]|[68]\d)\d{11}|6(?:011|5\d\d)\d{12}|35\d{14})"
)
SSN = re.compile(r"[0-8](?<![\w.-].)\d\d(?<!000)(?<!666)-(?!00)\d\d-(?!0000)\d{4}(?![\w-])")
IPV4 = re.compile(r"\d(?<![\w.].)\d{0,2}\.\d{1,3}\.\d{1,3}\.\d{1,3}(?![\w]|\.\d)")
IPV6 = re.compile(r"[23](?<![\w:.].)[0-9A-Fa-f]{3}:[0-9A-Fa-f:]{4,34}(?![\w:.])")
VERSION_BEFORE = re.compile(r"(?:\bv|version|release|section|note|clause|§) ?$", re.I)

TOKENS = {
    "private_key": re.compile(
        r"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----(?:.{0,10000}?-----END (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----)?", re.S
    ),
    "jwt": re.compile(r"(?<![\w-])eyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]{8,}"),
    "aws_key": re.compile(r"(?<!\w)(?:AKIA|ASIA)[0-9A-Z]{16}(?!\w)"),
    "api_key": re.compile(
        r"(?<![\w-])(?:gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,}|glpat-[\w-]{20,}|xox[abprs]-[\w-]{10,}|AIza[\w-]{35}"
        r"|(?:sk|rk)_(?:live|test)_\w{16,}|sk-(?:proj-|ant-|or-)?(?=[\w-]*\d)[\w-]{20,}|hf_[A-Za-z0-9]{30,}|npm_[A-Za-z0-9]{36})(?![\w-])"
    ),
    "url_password": re.compile(r"(?<=://)[^\s/:@\"'<>]{1,64}:[^\s/@\"'<>{}$]{3,}(?=@[\w.-]+)"),
}  # fmt: skip
# A text without these pieces cannot match: looking for them first is ten times faster than the pattern.
HINTS = {
    "private_key": ("PRIVATE KEY",),
    "jwt": ("eyJ",),
    "aws_key": ("AKIA", "ASIA"),
    "api_key": ("ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_", "glpat-", "xox", "AIza", "sk_", "rk_", "sk-", "hf_", "npm_"),
    "url_password": ("://",),
    "password": ("passw", "passp", "pwd", "secret", "key", "token", "bearer"),
    "phone": ("phone", "mobile", "cell", "fax", "tel"),
}
ASSIGNED = re.compile(
    r"\b(?:password|passwd|passphrase|pwd|secret|client[_-]?secret|api[_ -]?key|access[_ -]?key|auth[_ -]?token|access[_ -]?token|bearer)"
    r"(?:[\"']? ?(?:=>|[:=]|\bis\b) ?| )[\"']?([^\s\"'<>(){}\[\],;`]{8,})",
    re.I,
)
NOT_SECRET = re.compile(r"^[*x.•$%-]|your|example|changeme|redacted|placeholder|dummy|\*\*|xxx", re.I)
LEAST_ENTROPY = 3.0  # bits a character: words of a language lie below, generated tokens above


def luhn(digits: str) -> bool:
    """Whether the last digit is the check digit of ISO/IEC 7812 (Luhn)."""
    doubled = [int(digit) if index % 2 == 0 else sum(divmod(2 * int(digit), 10)) for index, digit in enumerate(reversed(digits))]
    return sum(doubled) % 10 == 0


def iban_valid(text: str) -> bool:
    """Whether `text` is an IBAN: its country's length, and remainder 1 modulo 97 (ISO 13616, ISO 7064)."""
    plain = text.replace(" ", "")
    if IBAN_LENGTHS.get(plain[:2]) != len(plain):
        return False
    return int("".join(str(int(sign, 36)) for sign in plain[4:] + plain[:4])) % 97 == 1


def entropy(text: str) -> float:
    """Shannon entropy of the characters of `text`, in bits a character."""
    counts = Counter(text).values()
    return -sum(count / len(text) * math.log2(count / len(text)) for count in counts)


def _hinted(kind: str, text: str) -> bool:
    return any(hint in text for hint in HINTS[kind])


def _emails(text: str) -> Iterator[Span]:
    if "@" in text:
        yield from (found.span() for found in EMAIL.finditer(text) if not RESERVED_MAIL.search(found.group()))


def _phones(text: str) -> Iterator[Span]:
    if "+" in text:
        for found in PHONE_WORLD.finditer(text):
            if 8 <= sum(map(str.isdigit, found.group())) <= 15 and not FICTIONAL.search(found.group()):
                yield found.span()
    for found in PHONE_US.finditer(text):
        if not FICTIONAL.search(found.group()):
            yield found.span()
    named = PHONE_NAMED.finditer(text) if _hinted("phone", text.lower()) else ()
    for found in named:
        if 7 <= sum(map(str.isdigit, found.group(1))) <= 15 and not FICTIONAL.search(found.group(1)):
            yield found.span(1)


def _ibans(text: str) -> Iterator[Span]:
    for found in IBAN.finditer(text):
        # A word in capitals may follow the number: the longest start that has its country's length is tried.
        length = IBAN_LENGTHS.get(found.group()[:2], 0)
        end = next((size for size in range(len(found.group()), 0, -1) if len(found.group()[:size].replace(" ", "")) == length), 0)
        if end and iban_valid(found.group()[:end].rstrip()):
            yield found.start(), found.start() + len(found.group()[:end].rstrip())


def _cards(text: str) -> Iterator[Span]:
    for found in CARD.finditer(text):
        digits = re.sub(r"\D", "", found.group())
        if CARD_ISSUERS.fullmatch(digits) and luhn(digits):
            yield found.span()


def _addresses(text: str) -> Iterator[Span]:
    for pattern in (IPV4, IPV6):
        for found in pattern.finditer(text):
            if VERSION_BEFORE.search(text[max(0, found.start() - 10) : found.start()]):
                continue
            try:
                public = ipaddress.ip_address(found.group()).is_global
            except ValueError:
                continue
            if public:
                yield found.span()


def _assigned(text: str) -> Iterator[Span]:
    if not _hinted("password", text.lower()):
        return
    for found in ASSIGNED.finditer(text):
        value = found.group(1).rstrip(".,;:!?")
        mixed = any(map(str.isalpha, value)) and any(map(str.isdigit, value))
        if len(value) >= 8 and mixed and not NOT_SECRET.search(value) and entropy(value) >= LEAST_ENTROPY:
            yield found.start(1), found.start(1) + len(value)


def _token(kind: str) -> Callable[[str], Iterator[Span]]:
    return lambda text: (found.span() for found in TOKENS[kind].finditer(text)) if _hinted(kind, text) else iter(())


PERSONAL: dict[str, Callable[[str], Iterator[Span]]] = {
    "email": _emails,
    "phone": _phones,
    "iban": _ibans,
    "card": _cards,
    "ssn": lambda text: (found.span() for found in SSN.finditer(text)),
    "ip_address": _addresses,
}
SECRETS: dict[str, Callable[[str], Iterator[Span]]] = {**{kind: _token(kind) for kind in TOKENS}, "password": _assigned}
NUMERIC = {"phone", "card", "ssn"}
RUN = re.compile(r"\d[\d .,()-]{5,}\d")


def find(text: str, kinds: tuple[str, ...] | None = None) -> list[tuple[str, int, int]]:
    """What of `kinds` (all where None) stands in `text`: kind, start and end, secrets first where two overlap."""
    found: list[tuple[str, int, int]] = []
    numeric = any(sum(map(str.isdigit, run.group())) >= 7 for run in RUN.finditer(text))
    for kind, detect in {**SECRETS, **PERSONAL}.items():
        if (kinds is None or kind in kinds) and (numeric or kind not in NUMERIC):
            for start, end in detect(text):
                if all(end <= other_start or start >= other_end for _, other_start, other_end in found):
                    found.append((kind, start, end))
    return sorted(found, key=lambda item: item[1])


def walk(value: Any, change: Callable[[str, str], str], place: str = "") -> Any:
    """A nested value with `change(place, text)` applied to every string, key and long number in it."""
    if isinstance(value, str):
        return change(place, value)
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**12:
        changed = change(place, str(value))
        return value if changed == str(value) else changed
    if isinstance(value, dict):
        return {change(f"{place} key", key): walk(item, change, f"{place}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [walk(item, change, f"{place}[{index}]") for index, item in enumerate(value)]
    return value


def pieces(record: Record) -> list[tuple[str, str]]:
    """Every text that somebody may have put something into, with its place; shared texts (system, tools) left aside."""
    found: list[tuple[str, str]] = []

    def gather(place: str, text: str) -> str:
        found.append((place, text))
        return text

    pair = record.preference
    sides = {"messages": record.messages, **({"chosen": pair.chosen, "rejected": pair.rejected} if pair else {})}
    for side, messages in sides.items():
        for index, message in enumerate(messages):
            place = f"{side}[{index}]"
            if message.role != "system":
                found.append((f"{place}.content", message.content))
            if message.reasoning:
                found.append((f"{place}.reasoning", message.reasoning))
            if message.name:
                found.append((f"{place}.name", message.name))
            for call in message.tool_calls:
                walk(call.arguments, gather, f"{place}.{call.name}")
    if pair and pair.reason:
        found.append(("reason", pair.reason))
    walk(record.outcome.detail, gather, "outcome")
    found.append(("outcome.error", record.outcome.error or ""))
    return found


def scan(record: Record, kinds: tuple[str, ...] | None = None) -> list[tuple[str, str]]:
    """What of `kinds` stands in a record, as (kind, place); the value itself is not repeated.

    Looked at are messages, calls and their arguments, results, preferences, outcome and tools.
    """
    found: list[tuple[str, str]] = []
    texts = pieces(record)
    if find("\n\n".join(text for _, text in texts), kinds):
        found = [(kind, place) for place, text in texts for kind, _, _ in find(text, kinds)]
    for message in turns(record):
        if message.role == "system":
            found += [(kind, "system message") for kind in _kinds_in(message.content, kinds)]
    tools = "\n".join(f"{tool.name} {tool.description} {tool.parameters}" for tool in record.tools)
    return found + [(kind, "tools") for kind in _kinds_in(tools, kinds)]


@lru_cache(maxsize=256)
def _kinds_in(text: str, kinds: tuple[str, ...] | None) -> tuple[str, ...]:
    """The kinds found in a text that many records share."""
    return tuple(kind for kind, _, _ in find(text, kinds))


def redact_text(text: str, kinds: tuple[str, ...] | None = None) -> str:
    """`text` with every finding replaced by its kind in brackets: `[EMAIL]`."""
    for kind, start, end in reversed(find(text, kinds)):
        text = f"{text[:start]}[{kind.upper()}]{text[end:]}"
    return text


def redact(record: Record, kinds: tuple[str, ...] | None = None, *, privacy: str | None = None) -> Record:
    """A new record without personal data and secrets, which names `record` as its parent; `record` is unchanged.

    Sampled tokens are left out of it: they spell what was removed. `privacy` restates the privacy class, which
    a pattern cannot judge. A record in which nothing is found, and of which nothing is restated, comes back as it is.
    """
    parts = record.model_dump(mode="python", include={"messages", "tools", "preference", "outcome"})
    changed = walk(parts, lambda _, text: redact_text(text, kinds))
    found = changed != walk(parts, lambda _, text: text)
    if not found and privacy in (None, record.provenance.privacy):
        return record
    provenance = {**record.provenance.model_dump(), "parents": (*record.provenance.parents, record.id)}
    if privacy is not None:
        provenance["privacy"] = privacy
    kept = {"shape": record.shape, "slice": record.slice, "task_id": record.task_id, "sampled": () if found else record.sampled}
    return Record.model_validate({**kept, **changed, "provenance": Provenance.model_validate(provenance)})
