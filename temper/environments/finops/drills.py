"""Drills: text that can only be continued by copying what stands above it.

A small model pretrained on a few million tokens of prose learns figures and grammar, and no general copying: it
recalls a name where it should repeat one. Nothing foretells the words of a drill, so recall never pays.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping

from temper.environments.finops.names import (
    CASH_ACCOUNTS,
    DEPARTMENTS,
    DIRECTIONS,
    HOLDERS,
    MORE_ACCOUNTS,
    MORE_DEPARTMENTS,
    PARTNER_HEADS,
    PARTNER_TAILS,
    PLACES,
    QUARTERS,
    REGIONS,
    SYLLABLES,
    UNITS,
    split_of,
)
from temper.environments.finops.policies import RULES
from temper.environments.finops.world import draw_date

LETTERS = "abcdefghijklmnopqrstuvwxyz"
NAME_WORDS = tuple(sorted({
    *UNITS, *HOLDERS, *DIRECTIONS, *PLACES, *MORE_DEPARTMENTS, *MORE_ACCOUNTS,
    *(word for group in (DEPARTMENTS, REGIONS, CASH_ACCOUNTS, PARTNER_HEADS, PARTNER_TAILS) for names in group.values() for name in names for word in name.split()),
}))  # fmt: skip
PLAIN_WORDS = tuple(sorted({word for sentence, facts in RULES.values() for text in (sentence, *facts) for word in re.findall(r"\b[a-z]{3,}\b", text)}))


def atom(rng: random.Random) -> str:
    """One word or figure that nothing foretells."""
    kind = rng.random()
    if kind < 0.45:
        return rng.choice(NAME_WORDS)
    if kind < 0.6:
        return "".join(rng.sample(SYLLABLES, rng.choice((2, 2, 3)))).capitalize()
    if kind < 0.7:
        return "".join(rng.choices(LETTERS, k=rng.randint(3, 7))).capitalize()
    if kind < 0.8:
        return rng.choice(PLAIN_WORDS)
    if kind < 0.9:
        return str(rng.randint(10, 99999))
    return rng.choice((f"INV-{rng.randint(1000, 9999)}", f"REC-{rng.randint(1000, 9999)}", f"AP-{rng.randint(1000, 9999)}", draw_date(rng), rng.choice(QUARTERS), f"P-{rng.randint(10, 99)}"))


def name(rng: random.Random) -> str:
    """One to three atoms; two together are never a name of a held-out split."""
    while True:
        found = " ".join(atom(rng) for _ in range(rng.choice((1, 2, 2, 2, 3))))
        if split_of(found) == "train":
            return found


MARKS = (", ", "; ", "\n", " | ", " - ", " / ", ". ", ": ")


def drill_list(rng: random.Random) -> str:
    """A list of names, two to four times over, each time with another mark between them."""
    items = [name(rng) for _ in range(rng.randint(3, 12))]
    return "\n".join(rng.choice(MARKS).join(items) for _ in range(rng.randint(2, 4)))


def drill_pairs(rng: random.Random) -> str:
    """Keys with values; then the keys in another order, each with its value."""
    rows = [(name(rng), name(rng)) for _ in range(rng.randint(2, 7))]
    laps = []
    for _ in range(rng.randint(2, 3)):
        of, end = rng.choice((": ", " = ", " is ", " has ", " | ", " -> ")), rng.choice(("\n", ". ", "; ", ", "))
        laps.append(end.join(f"{key}{of}{value}" for key, value in rng.sample(rows, len(rows))))
    return "\n".join(laps)


def drill_form(rng: random.Random) -> str:
    """A sentence with filled slots, then a form that asks for some of them by their label, in any order."""
    labels = rng.sample(PLAIN_WORDS, rng.randint(2, 5))
    values = {label: name(rng) for label in labels}
    said = " ".join(f"{label} {values[label]} {rng.choice(PLAIN_WORDS)}" for label in labels)
    laps = []
    for _ in range(rng.randint(1, 3)):
        asked = rng.sample(labels, rng.randint(1, len(labels)))
        of, end = rng.choice((": ", " ", " = ")), rng.choice(("; ", "\n", ", "))
        laps.append(end.join(f"{label}{of}{values[label]}" for label in asked))
    return said + "\n" + "\n".join(laps)


WANTED = ("Wanted: {k}.", "Only {k}.", "Fill in {k}.", "Slip with {k}.", "{k}, please.", "We need {k} of it.", "Note down {k}.", "Say {k}.")
BRACKETS = (("", "."), ("(", ")"), ("<", ">"), ("- ", "\n"), ("", " #"), ("* ", " *"))


def label(rng: random.Random) -> str:
    """What a value may be asked for by: a plain word, two of them, or letters that nobody has seen."""
    kind = rng.random()
    if kind < 0.6:
        return rng.choice(PLAIN_WORDS)
    return " ".join(rng.sample(PLAIN_WORDS, 2)) if kind < 0.75 else "".join(rng.sample(SYLLABLES, 2)).lower()


def wanted(rng: random.Random, said: str, values: Mapping[str, object], some: list[str]) -> str:
    """`said`, with a request for the labels `some` before or after it, and the slip that holds exactly those."""
    request = rng.choice(WANTED).format(k=", ".join(some))
    before, after = rng.choice(BRACKETS)
    of, between = rng.choice((": ", " ", " = ", " is ")), rng.choice(("; ", ", ", " | "))
    slip = before + between.join(f"{key}{of}{values[key]}" for key in some) + after
    return "\n".join((*((said, request) if rng.random() < 0.5 else (request, said)), slip))


def drill_wanted(rng: random.Random) -> str:
    """Labels with values in a sentence, and slips that must hold what was asked for: all of it, in that order, and no more."""
    labels = list(dict.fromkeys(label(rng) for _ in range(rng.randint(3, 6))))
    values = {key: name(rng) for key in labels}
    said = rng.choice((", ", "; ", " and ", ". ")).join(f"{key} {values[key]}" for key in rng.sample(labels, len(labels))) + "."
    return "\n".join(wanted(rng, said, values, rng.sample(labels, rng.randint(1, len(labels)))) for _ in range(rng.randint(1, 3)))


def drill_next(rng: random.Random) -> str:
    """A row of names, then which name stands after which."""
    items = [name(rng) for _ in range(rng.randint(4, 10))]
    asked = rng.sample(range(len(items) - 1), min(len(items) - 1, rng.randint(2, 5)))
    return "Row: " + ", ".join(items) + ".\n" + " ".join(f"After {items[at]} comes {items[at + 1]}." for at in asked)


# A second course, after these had been learnt: asked for some labels, give those and stop.
WANTED_DRILLS: dict[str, tuple[Callable[[random.Random], str], int]] = {"drill_wanted": (drill_wanted, 30)}
DRILLS: dict[str, tuple[Callable[[random.Random], str], int]] = {  # document kind: (writer, weight)
    "drill_list": (drill_list, 24), "drill_pairs": (drill_pairs, 30), "drill_form": (drill_form, 24), "drill_next": (drill_next, 12),
}  # fmt: skip
