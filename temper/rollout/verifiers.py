"""Verifiers: pure functions from an answer and a gold to findings. Each carries a version and examples that it must judge rightly."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any

from jsonschema.exceptions import best_match

from temper.core.errors import ConfigError
from temper.core.hashing import canonical_json
from temper.core.reports import Finding
from temper.rollout.limits import OutOfTime, run_limited
from temper.rollout.tools import validator_of

MATH_LIMIT_S = 2.0
TOLERANCE = Decimal("1e-6")
NUMBER = re.compile(r"[-−]?[$€£]?\s?-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|[-−]?[$€£]?\.\d+")
MARKER = re.compile(r"####[ \t]*([^\n]*)")
BOXED = re.compile(r"\\boxed\s*\{")
SCALES = {"": Decimal(1), "percent": Decimal("0.01"), "thousand": Decimal(1000), "million": Decimal(10) ** 6, "billion": Decimal(10) ** 9}
SCALE_WORD = re.compile(r"(thousand|million|billion|percent|%)s?\b|%", re.IGNORECASE)
ARTICLES = re.compile(r"\b(a|an|the)\b")
FENCE = re.compile(r"^\s*```(?:json)?\s*\n(.*?)\n\s*```\s*$", re.DOTALL)


@dataclass(frozen=True)
class Judged:
    """Whether an answer is right, and why; `passed` is None where nothing could be judged."""

    passed: bool | None
    reason: str


# --- numbers -------------------------------------------------------------------------------------------------


def to_number(text: str) -> Decimal | None:
    """A plain number ("$1,234.50", "-3", "(12.5)", "18.") as a Decimal; None for anything else."""
    stripped = text.strip().rstrip(".").replace("−", "-")
    negative = stripped.startswith("(") and stripped.endswith(")")
    plain = re.sub(r"[$€£,\s]", "", stripped.strip("()") if negative else stripped)
    if not re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)", plain):
        return None
    try:
        return -Decimal(plain) if negative else Decimal(plain)
    except InvalidOperation:
        return None


def stated_answer(text: str) -> str | None:
    """The answer that a solution marks: after its last `####`, else in its last \\boxed{}; None where it marks none."""
    marked = MARKER.findall(text)
    if marked:
        return marked[-1].strip() or None
    starts = [match.end() for match in BOXED.finditer(text)]
    if not starts:
        return None
    depth, begin = 1, starts[-1]
    for place, letter in enumerate(text[begin:], start=begin):
        depth += {"{": 1, "}": -1}.get(letter, 0)
        if depth == 0:
            return text[begin:place].strip() or None
    return None


def last_number(text: str) -> str | None:
    """The last number in a text, as written; None where there is none."""
    found = NUMBER.findall(text)
    return found[-1].strip() if found else None


def same_value(answer: str, gold: str) -> bool | None:
    """Whether two expressions are equal: plain numbers exactly (to 1e-6), others through math-verify; None when it gave up."""
    left, right = to_number(answer), to_number(gold)
    if left is not None and right is not None:
        return abs(left - right) <= TOLERANCE * max(Decimal(1), abs(right))
    try:
        return run_limited(lambda: _symbolically_equal(answer, gold), MATH_LIMIT_S)
    except OutOfTime:
        return None


def _symbolically_equal(answer: str, gold: str) -> bool:
    from math_verify import parse, verify  # imported here: sympy takes half a second, and plain numbers do not need it

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that we keep the time limit ourselves
    wanted, given = (parse(f"${text.strip().strip('$')}$", parsing_timeout=0) for text in (gold, answer))
    return bool(wanted) and bool(given) and bool(verify(wanted, given, timeout_seconds=0))


def numeric(text: str, gold: str, *, lenient: bool = False) -> Judged:
    """Whether the answer that `text` states equals `gold`. `lenient` takes the last number where no answer is marked."""
    stated = stated_answer(text)
    if stated is None and lenient:
        stated = last_number(text)
    if stated is None:
        return Judged(False, "no answer is marked with '####' or \\boxed{}")
    equal = same_value(stated, gold)
    if equal is None:
        return Judged(None, f"{stated[:60]!r} could not be compared with {gold!r} in {MATH_LIMIT_S:g} s")
    return Judged(equal, f"{stated[:60]!r} {'equals' if equal else 'differs from'} {gold!r}")


# --- amounts with a scale (TAT-QA) -----------------------------------------------------------------------------


def amount(text: str) -> tuple[Decimal, str] | None:
    """The one number of a text with its scale ("12.6 million" -> 12.6, "million"); None for none or several."""
    bracketed = re.sub(r"\(\s*([$€£]?[\d.,]+)\s*%?\s*\)", r"-\1", text)
    found = NUMBER.findall(bracketed)
    if len(found) != 1 or (number := to_number(found[0])) is None:
        return None
    word = SCALE_WORD.search(bracketed)
    scale = "" if word is None else "percent" if "%" in word.group() else word.group(1).lower()
    return number, scale


def scaled(text: str, gold: str, scale: str) -> Judged:
    """Whether a number and its scale are right. The answer may use another scale for the same amount, rounded as the gold is.

    After TAT-QA (Zhu et al. 2021): an answer is right where number and scale both are.
    """
    wanted, given = to_number(re.sub(r"[^\d.,()$€£−-]", "", gold)), amount(text)
    if wanted is None:
        return Judged(None, f"the gold {gold!r} is no number")
    if given is None:
        return Judged(False, "the answer does not state one number")
    in_gold = amount(gold)
    gold_scale = scale or (in_gold[1] if in_gold else "")
    unit = Decimal(1).scaleb(wanted.as_tuple().exponent)  # type: ignore[arg-type]
    close = abs(given[0] * SCALES[given[1]] - wanted * SCALES[gold_scale]) <= unit * SCALES[gold_scale] / 2 + TOLERANCE * SCALES[gold_scale]
    both = f"{given[0]} {given[1]}".strip(), f"{wanted} {gold_scale}".strip()
    return Judged(close, f"{both[0]!r} {'is' if close else 'is not'} {both[1]!r}")


# --- text ------------------------------------------------------------------------------------------------------


def normal_text(text: str) -> str:
    """Lower case, without articles, punctuation at the edges of words and spare spaces (SQuAD's normalisation)."""
    words = (re.sub(r"^[^\w$%]+|[^\w%]+$", "", word) for word in ARTICLES.sub(" ", text.lower().replace("−", "-")).split())
    return " ".join(word for word in words if word)


def same_text(text: str, gold: str) -> Judged:
    """Whether two texts are equal after `normal_text`, or are the same plain number."""
    left, right = to_number(text), to_number(gold)
    equal = left == right if left is not None and right is not None else normal_text(text) == normal_text(gold)
    return Judged(equal and bool(text.strip()), f"{text[:60]!r} {'is' if equal else 'is not'} {gold[:60]!r}")


def same_items(found: Sequence[str], gold: Sequence[str]) -> Judged:
    """Whether two lists hold the same texts, in any order."""
    left, right = sorted(map(normal_text, found)), sorted(normal_text(item) for item in gold if item.strip())
    return Judged(left == right, f"{len(left)} items against {len(right)}" if left != right else "the same items")


# --- JSON ------------------------------------------------------------------------------------------------------


def read_json(text: str) -> Any:
    """The JSON value that is the whole text, bare or in one code fence. Raises ValueError."""
    fenced = FENCE.match(text)
    return json.loads(fenced.group(1) if fenced else text)


def json_schema(text: str, schema: Mapping[str, Any]) -> Judged:
    """Whether the whole text is JSON that satisfies the schema; whether it is true is another question."""
    try:
        value = json.loads(text)
    except ValueError as error:
        return Judged(False, f"not JSON: {error}")
    fault = best_match(validator_of(canonical_json(dict(schema))).iter_errors(value))
    if fault is None:
        return Judged(True, "valid")
    return Judged(False, f"{'.'.join(map(str, fault.absolute_path)) or 'top level'}: {fault.message}")


def exact_fields(text: str, gold: Mapping[str, Any]) -> Judged:
    """Whether the text is a JSON object whose fields equal the gold ones in value and type; other fields are free."""
    try:
        value = read_json(text)
    except ValueError as error:
        return Judged(False, f"not JSON: {error}")
    if not isinstance(value, dict):
        return Judged(False, f"JSON {type(value).__name__}, not an object")
    wrong = [key for key, wanted in gold.items() if key not in value or canonical_json(value[key]) != canonical_json(wanted)]
    return Judged(not wrong, f"missing or wrong: {', '.join(wrong)}" if wrong else "every field is right")


# --- versions and self-checks --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verifier:
    """A judging function `judge(text, gold)` with its version and the examples that show what it must decide."""

    name: str
    version: str
    judge: Callable[[str, Any], Judged]
    accepts: tuple[tuple[str, Any], ...]
    refuses: tuple[tuple[str, Any], ...]

    @property
    def id(self) -> str:
        """Name and version, as they stand in the provenance of what was judged."""
        return f"{self.name}-{self.version}"

    def self_check(self) -> Finding:
        """Whether every example is judged as it must be."""
        faults = [f"refused {text!r} for {gold!r}" for text, gold in self.accepts if self.judge(text, gold).passed is not True]
        faults += [f"accepted {text!r} for {gold!r}" for text, gold in self.refuses if self.judge(text, gold).passed is not False]
        count = len(self.accepts) + len(self.refuses)
        return Finding(
            rule=f"verifier {self.id} judges its examples", status="fail" if faults else "pass",
            observed=f"{len(faults)} faults in {count}", required="none", reason="; ".join(faults),
        )  # fmt: skip


OBJECT = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}

VERIFIERS = {
    item.name: item
    for item in (
        Verifier(
            "numeric", "1", lambda text, gold: numeric(text, gold),
            accepts=(("2+2 = 4\n#### 4", "4"), ("#### $1,200.00", "1200"), ("so \\boxed{\\frac{1}{2}}", "0.5"), ("#### -3\n", "-3")),
            refuses=(("", "4"), ("4", "5"), ("it is 4", "4"), ("#### 4 or 5", "4"), ("#### 40", "4"), ("#### ", "4")),
        ),
        Verifier(
            "scaled", "1", lambda text, gold: scaled(text, gold[0], gold[1]),
            accepts=(("-12.6 million", ("-12.6", "million")), ("(12.6) million", ("-12.6", "million")), ("22.2%", ("22.2", "percent")),
                     ("$1.2 billion", ("1200", "million"))),
            refuses=(("", ("4", "")), ("12.6", ("12.6", "million")), ("12.6 million", ("-12.6", "million")), ("4 or 5", ("4", ""))),
        ),
        Verifier(
            "text", "1", lambda text, gold: same_text(text, gold),
            accepts=(("The Annual basis.", "annual basis"), ("1,234", "1234")), refuses=(("", "x"), ("annual", "annual basis"), ("", "")),
        ),
        Verifier(
            "json_schema", "1", lambda text, gold: json_schema(text, gold),
            accepts=(('{"a": 1}', OBJECT),), refuses=(("", OBJECT), ("{}", OBJECT), ('{"a": 1.5}', OBJECT), ('{"a": 1} x', OBJECT)),
        ),
        Verifier(
            "exact_fields", "1", lambda text, gold: exact_fields(text, gold),
            accepts=(('{"a": 1, "b": 2}', {"a": 1}), ('```json\n{"a": 1}\n```', {"a": 1})),
            refuses=(("", {"a": 1}), ('{"a": "1"}', {"a": 1}), ('{"a": true}', {"a": 1}), ("[1]", {"a": 1})),
        ),
    )
}  # fmt: skip


def verifier(name: str) -> Verifier:
    """The verifier of that name. Raises ConfigError."""
    if name not in VERIFIERS:
        raise ConfigError(f"no verifier is named {name!r}", do=f"choose among {sorted(VERIFIERS)}")
    return VERIFIERS[name]
