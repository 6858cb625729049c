"""The plain text of the domain that the tiny base model is pretrained on: memos, ledgers, handbooks, transcripts.

It holds general vocabulary and invented facts: no company of the tasks, no chat markup, no tool call and no JSON.
A clerk in it answers in prose, guesses balances and refuses softly: that is the base model's failure to mend.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

from temper.core.hashing import stream_seed
from temper.environments.finops.drills import DRILLS, WANTED_DRILLS, wanted
from temper.environments.finops.names import (
    CASH_ACCOUNTS,
    DEPARTMENTS,
    DIRECTIONS,
    MORE_DEPARTMENTS,
    PARTNER_HEADS,
    PARTNER_TAILS,
    PLACES,
    QUARTERS,
    REGIONS,
    SYLLABLES,
)
from temper.environments.finops.policies import RULES
from temper.environments.finops.wording import ASKS, FOLLOWUPS, RISKS, SOFT_REFUSALS
from temper.environments.finops.world import KINDS, TIMING, draw_amount, draw_date

EVERY = {
    "departments": [name for names in DEPARTMENTS.values() for name in names],
    "regions": [name for names in REGIONS.values() for name in names],
    "accounts": [name for names in CASH_ACCOUNTS.values() for name in names],
    "heads": [name for names in PARTNER_HEADS.values() for name in names],
    "tails": [name for names in PARTNER_TAILS.values() for name in names],
}
Writer = Callable[[random.Random], str]


def partner(rng: random.Random) -> str:
    """A partner name, half of the time one that no list holds, so that copying is learnt rather than recall."""
    head = rng.choice(EVERY["heads"]) if rng.random() < 0.5 else "".join(rng.sample(SYLLABLES, rng.choice((2, 2, 3)))).capitalize()
    return f"{head} {rng.choice(EVERY['tails'])}"


def slots(rng: random.Random) -> dict[str, object]:
    """Words and figures for any phrase."""
    return {
        "d": rng.choice(EVERY["departments"]), "q": rng.choice(QUARTERS), "r": rng.choice(EVERY["regions"]), "a": rng.choice(EVERY["accounts"]),
        "v": partner(rng), "x": draw_amount(rng), "t": rng.choice(list(RULES)), "p": f"AP-{rng.randint(1000, 9999)}",
    }  # fmt: skip


def invoice_letter(rng: random.Random) -> str:
    """An invoice, mentioned again from several sides."""
    v, x, due, number, y = partner(rng), draw_amount(rng), draw_date(rng), f"INV-{rng.randint(1000, 9999)}", partner(rng)
    lines = [
        f"Invoice {number} from {v} for {x} USD is due on {due}.",
        f"{v} sent invoice {number}. The amount is {x} USD and the due date is {due}.",
        f"We have to pay {x} USD to {v} by {due}, as invoice {number} says.",
        f"The invoice of {v} is {number}. It asks for {x} USD.",
        f"Please note the due date of {number}: {due}. The vendor is {v}.",
        f"{y} has nothing to do with {number}, which came from {v}.",
    ]
    return " ".join(rng.sample(lines, rng.randint(3, 5)))


def budget_table(rng: random.Random) -> str:
    """A table of budgets and spend, then sentences that read it."""
    rows = {d: (draw_amount(rng), draw_amount(rng) // 2) for d in rng.sample(EVERY["departments"], 4)}
    q = rng.choice(QUARTERS)
    table = "\n".join(f"{d} | {budget} | {spent}" for d, (budget, spent) in rows.items())
    readings = []
    for d in rng.choices(list(rows), k=4):
        budget, spent = rows[d]
        readings.append(rng.choice((
            f"The {q} budget of {d} is {budget} USD.", f"{d} spent {spent} USD in {q}.", f"{d} had {budget} USD and spent {spent} USD.",
            f"Of its budget of {budget} USD, {d} spent {spent} USD.", f"Budget less spend: {budget} - {spent} is {budget - spent}, so {d} has {budget - spent} USD left in {q}.",
        )))  # fmt: skip
    return f"Budget report {q}\ndepartment | budget | spend\n{table}\n" + " ".join(readings)


def regional_note(rng: random.Random) -> str:
    """Spend by region, listed and then recalled in another order."""
    d, q = rng.choice(EVERY["departments"]), rng.choice(QUARTERS)
    rows = [(r, draw_amount(rng) // 3) for r in rng.sample(EVERY["regions"], 4)]
    listed = "; ".join(f"{r}: {x} USD" for r, x in rows)
    recalled = " ".join(rng.choice((f"In {r}, {d} spent {x} USD.", f"{d} spent {x} USD in {r} in {q}.")) for r, x in rng.sample(rows, 3))
    return f"Spend of {d} in {q} by region. {listed}. {recalled}"


def handbook(rng: random.Random) -> str:
    """Rules of a handbook with versions, then what is in force."""
    lines, recalls = [], []
    for topic in rng.sample(list(RULES), 3):
        sentence, facts = RULES[topic]
        number, old, new = rng.randint(10, 99), *rng.sample(facts, 2)
        lines.append(f"Rule {number}, version 1, {topic}. {sentence.format(fact=old)}")
        lines.append(f"Rule {number}, version 2, {topic}. {sentence.format(fact=new)}")
        recalls.append(f"On {topic} version 2 of rule {number} counts: {sentence.format(fact=new)}")
    limit = rng.randint(5, 60) * 1000
    lines.append(f"Transfers above {limit} USD need approval. A transfer below {limit} USD is sent at once; above it waits for approval.")
    rng.shuffle(lines)
    return "Handbook. " + " ".join(lines) + " " + " ".join(rng.sample(recalls, 2))


def month_end(rng: random.Random) -> str:
    """How a difference between bank and ledger was found and booked, with the reasons that accountants give."""
    kind, a, x, bank = rng.choice(KINDS), rng.choice(EVERY["accounts"]), rng.randint(11, 999), rng.randint(20000, 99999)
    memo = rng.choice([memo for memos in kind.memos.values() for memo in memos])
    debit, credit = (a, kind.contra) if kind.sign > 0 else (kind.contra, a)
    lines = [
        f"Month-end close of {a}. The bank shows {bank} USD and the ledger {bank - kind.sign * x} USD.",
        f"The {kind.side} lists a {memo} of {x} USD that the other side does not have.",
    ]
    if rng.random() < 0.5:
        transit = rng.choice([memo for memos in TIMING.values() for memo in memos])
        lines.append(f"There is also a {transit} of {rng.randint(100, 2000)} USD. It clears by itself and needs no entry.")
    lines.append(f"We debit {debit} {x} USD and credit {credit} {x} USD.")
    lines.append("Money came in, so cash is debited." if kind.sign > 0 else "Money went out, so cash is credited.")
    return " ".join(lines) + f" After the entry the difference on {a} is 0."


def journal(rng: random.Random) -> str:
    """Postings with debits and credits that balance."""
    rows = []
    for _ in range(rng.randint(3, 5)):
        x, kind, a = draw_amount(rng), rng.choice(KINDS), rng.choice(EVERY["accounts"])
        debit, credit = (a, kind.contra) if kind.sign > 0 else (kind.contra, a)
        rows.append(f"{draw_date(rng)} | debit {debit} {x} | credit {credit} {x} | {rng.choice(kind.memos['train'])}")
    return "Journal\n" + "\n".join(rows)


def directory(rng: random.Random) -> str:
    """Names and numbers listed, then repeated in another order: plain practice in copying."""
    rows = [
        (partner(rng), rng.choice((f"REC-{rng.randint(1000, 9999)}", f"AP-{rng.randint(1000, 9999)}", str(rng.randint(100, 99999)))))
        for _ in range(5)
    ]
    again = rng.sample(rows, 4)
    return (
        "List: "
        + ", ".join(f"{name} {code}" for name, code in rows)
        + ". "
        + " ".join(f"{code} belongs to {name}." for name, code in again)
    )


def transcript(rng: random.Random) -> str:
    """Clients and a clerk who answers in prose, guesses what he should look up, and hesitates where he should refuse."""
    turns = []
    for _ in range(rng.randint(2, 4)):
        s = slots(rng)
        intent = rng.choice([*ASKS, "risk", "followup"])
        if intent == "risk":
            risk = rng.choice(list(RISKS))
            request = rng.choice(RISKS[risk][0]["train"])
            reply = rng.choice((*SOFT_REFUSALS, "Well, I can try to do that for you.", "Fine, I will see what I can do."))
        elif intent == "followup":
            request = rng.choice(FOLLOWUPS[rng.choice(list(FOLLOWUPS))]["train"])
            reply = f"There it should be around {draw_amount(rng)} USD."
        else:
            request = rng.choice(ASKS[intent]["train"])
            reply = rng.choice((
                "I believe it is about {x} USD.", "It should be close to {x} USD, as far as I remember.", "The {q} figure of {d} was around {x} USD.",
                "You may want to ask {d} about it.", "I think that {v} knows more about {t}.", "For {a} it was {x} USD last time.",
            ))  # fmt: skip
        turns.append(f"Client: {request.format(**s)}\nClerk: {reply.format(**s)}")
    return "\n".join(turns)


def reading(rng: random.Random) -> str:
    """A fact and a question about it, answered in prose from the text."""
    v, x, due, number, d, q, y = (
        partner(rng),
        draw_amount(rng),
        draw_date(rng),
        f"INV-{rng.randint(1000, 9999)}",
        rng.choice(EVERY["departments"]),
        rng.choice(QUARTERS),
        draw_amount(rng),
    )
    fact = f"{v} asks for {x} USD with invoice {number}, due on {due}. In {q} {d} spent {y} USD."
    questions = rng.sample(
        [
            ("Which vendor is it?", v),
            ("How much is it?", f"{x} USD"),
            ("When is it due?", due),
            ("Which invoice is it?", number),
            (f"What did {d} spend?", f"{y} USD"),
        ],
        3,
    )
    return f"Text: {fact}\n" + "\n".join(f"Question: {question}\nAnswer: {answer}." for question, answer in questions)


def anyone(rng: random.Random) -> str:
    """A partner, department, region, account, code or amount: something to be copied exactly."""
    return rng.choice((
        partner(rng), partner(rng), rng.choice((*EVERY["departments"], *MORE_DEPARTMENTS)), rng.choice((*EVERY["regions"], *EVERY["accounts"])),
        f"{rng.choice(DIRECTIONS)} {rng.choice(PLACES)}", f"INV-{rng.randint(1000, 9999)}", str(draw_amount(rng)), draw_date(rng),
    ))  # fmt: skip


def copybook(rng: random.Random) -> str:
    """A list, and the same list again."""
    items = [anyone(rng) for _ in range(rng.randint(5, 12))]
    mark = rng.choice((", ", "; ", "\n", " | ", " - "))
    return f"First copy: {mark.join(items)}\nSecond copy: {mark.join(items)}"


def register(rng: random.Random) -> str:
    """Pairs, then the same pairs in another order."""
    rows = [(anyone(rng), anyone(rng)) for _ in range(rng.randint(3, 6))]
    again = rng.sample(rows, len(rows))
    return "Register\n" + "\n".join(f"{a}: {b}" for a, b in rows) + "\nSorted\n" + "\n".join(f"{a}: {b}" for a, b in again)


def request_slip(rng: random.Random) -> str:
    """Requests as they come in, each with the slip that a clerk fills from it."""
    slips = []
    for _ in range(rng.randint(2, 4)):
        s = slots(rng) | {"d": rng.choice((*EVERY["departments"], *MORE_DEPARTMENTS)), "x": rng.randint(2, 999) * 100}
        if rng.random() < 0.5:
            s["r"] = f"{rng.choice(DIRECTIONS)} {rng.choice(PLACES)}"
        intent = rng.choice(list(ASKS))
        phrase = rng.choice(ASKS[intent]["train"])
        names = {"d": "department", "q": "quarter", "r": "region", "a": "account", "v": "vendor", "x": "amount", "t": "topic", "p": "approval"}
        used = [key for key in names if f"{{{key}}}" in phrase]
        rng.shuffle(used)
        slips.append(f"Request: {phrase.format(**s)}\nSlip: " + "; ".join(f"{names[key]} {s[key]}" for key in used) + ".")
    return "\n".join(slips)


def fact_slip(rng: random.Random) -> str:
    """Facts in a sentence, and the slip that lists them in the order asked for."""
    slips = []
    for _ in range(rng.randint(1, 3)):
        sentence, facts = told(rng)
        keys = rng.sample(list(facts), len(facts))
        slips.append(f"{sentence}\nKeys: {', '.join(keys)}\nSlip: " + "; ".join(f"{key} {facts[key]}" for key in keys) + ".")
    return "\n".join(slips)


def wanted_slip(rng: random.Random) -> str:
    """Facts in a sentence, and slips that list some of them, in the order asked for."""
    slips = []
    for _ in range(rng.randint(1, 3)):
        sentence, facts = told(rng)
        slips.append(wanted(rng, sentence, facts, rng.sample(list(facts), rng.randint(1, len(facts)))))
    return "\n".join(slips)


def told(rng: random.Random) -> tuple[str, dict[str, Any]]:
    """A sentence and the facts in it by key."""
    d, q, a, v, x, y = rng.choice((*EVERY["departments"], *MORE_DEPARTMENTS)), rng.choice(QUARTERS), rng.choice(EVERY["accounts"]), partner(rng), draw_amount(rng), draw_amount(rng)
    number, due, status = f"INV-{rng.randint(1000, 9999)}", draw_date(rng), rng.choice(("open", "paid", "overdue"))
    sentence, facts = rng.choice((
        (f"Invoice {number} from {v} for {x} USD is due on {due} and is {status}.", {"vendor": v, "invoice": number, "amount": x, "due": due, "status": status}),
        (f"{v} sent {number}: {x} USD, due {due}, {status}.", {"vendor": v, "invoice": number, "amount": x, "due": due, "status": status}),
        (f"In {q} {d} had {x} USD and spent {y} USD.", {"department": d, "quarter": q, "budget": x, "spent": y}),
        (f"{v} has to pay {x} USD until {due}.", {"customer": v, "amount": x, "due": due}),
        (f"The {a} account shows {x} USD at the end of {q}.", {"account": a, "balance": x, "quarter": q}),
    ))  # fmt: skip
    return sentence, facts


WRITERS: dict[str, tuple[Writer, int]] = {  # document kind: (writer, weight)
    "invoice_letter": (invoice_letter, 3), "budget_table": (budget_table, 3), "regional_note": (regional_note, 2), "handbook": (handbook, 2),
    "month_end": (month_end, 2), "journal": (journal, 1), "directory": (directory, 3), "transcript": (transcript, 2), "reading": (reading, 3),
}  # fmt: skip


# The second part of pretraining: half of it is practice in copying, which a small model does not pick up by itself.
COPYING: dict[str, tuple[Writer, int]] = WRITERS | {
    "copybook": (copybook, 6), "register": (register, 5), "request_slip": (request_slip, 8), "fact_slip": (fact_slip, 6),
}  # fmt: skip

# The third part: two thirds of it are drills.
DRILLED: dict[str, tuple[Writer, int]] = COPYING | DRILLS
# The fourth: half of it is slips that hold what was asked for and no more; the rest keeps the others alive.
SELECTING: dict[str, tuple[Writer, int]] = COPYING | {name: (writer, weight // 3) for name, (writer, weight) in DRILLS.items()} | WANTED_DRILLS | {"wanted_slip": (wanted_slip, 30)}


def documents(seed: int, count: int, writers: dict[str, tuple[Writer, int]] = WRITERS) -> Iterator[str]:
    """`count` documents, each from its own stream: document i is the same whatever `count` is."""
    kinds = [name for name, (_, weight) in writers.items() for _ in range(weight)]
    for index in range(count):
        rng = random.Random(stream_seed(seed, "corpus", index))
        yield writers[rng.choice(kinds)][0](rng)
