"""Strict JSON: facts in a sentence, to be returned under the keys that the request names."""

from __future__ import annotations

import random
from typing import Any

from temper.core.records import Split
from temper.environments.finops.names import QUARTERS
from temper.environments.finops.wording import SHARE_COMPOSED, Phrases
from temper.environments.finops.world import Company

INTEGER, STRING = {"type": "integer"}, {"type": "string"}
STATUS, QUARTER = {"enum": ["open", "paid", "overdue"]}, {"enum": list(QUARTERS)}
FIELDS: dict[str, dict[str, dict[str, Any]]] = {  # kind of fact: its keys, each with its schema
    "invoice": {"invoice": STRING, "vendor": STRING, "amount": INTEGER, "due": STRING, "status": STATUS},
    "budget": {"department": STRING, "quarter": QUARTER, "budget": INTEGER, "spent": INTEGER},
    "receivable": {"reference": STRING, "customer": STRING, "amount": INTEGER, "due": STRING},
    "balance": {"account": STRING, "quarter": QUARTER, "balance": INTEGER},
}

SENTENCES: dict[str, Phrases] = {
    "invoice": {
        "train": (
            "Invoice {invoice} from {vendor} for {amount} USD is due on {due} and is {status}.",
            "{vendor} sent invoice {invoice}. It is {status}, the amount is {amount} USD and the due date is {due}.",
            "The vendor {vendor} asks for {amount} USD: invoice {invoice}, due date {due}, {status}.",
            "{amount} USD to {vendor}, {invoice}, due {due}, status {status}.",
            "Please file {invoice}, {status}, from {vendor}: due {due}, {amount} USD.",
            "From {vendor} came {invoice} over {amount} USD, {status}, to be paid by {due}.",
            "{invoice} ({status}): {vendor}, {amount} USD, {due}.",
        ),
        "dev": ("We got invoice {invoice} of {vendor}: {amount} USD, due {due}, {status}.",),
        "test": ("{vendor} bills {amount} USD with invoice {invoice}, due on {due}, now {status}.",),
    },
    "budget": {
        "train": (
            "In {quarter} the {department} department had a budget of {budget} USD and spent {spent} USD.",
            "{department} spent {spent} USD of its {quarter} budget of {budget} USD.",
            "Budget of {department} in {quarter}: {budget} USD. Spent: {spent} USD.",
            "For {quarter}, {department} got {budget} USD and used {spent} USD.",
            "Of {budget} USD for {department}, {spent} USD is gone after {quarter}.",
            "{quarter}, {department}: {spent} USD spent, {budget} USD budgeted.",
        ),
        "dev": ("The {quarter} budget of {department} is {budget} USD, of which {spent} USD is spent.",),
        "test": ("{department} had {budget} USD for {quarter} and has spent {spent} USD.",),
    },
    "receivable": {
        "train": (
            "{customer} owes us {amount} USD under {reference}, payable by {due}.",
            "{customer}: {amount} USD due {due}, reference {reference}.",
            "Reference {reference} says that {customer} owes {amount} USD by {due}.",
            "We expect {amount} USD from {customer} by {due} ({reference}).",
            "By {due} we get {amount} USD of {customer}, see {reference}.",
        ),
        "dev": ("Under {reference}, {customer} owes {amount} USD until {due}.",),
        "test": ("{reference}: {customer} has to pay {amount} USD by {due}.",),
    },
    "balance": {
        "train": (
            "The {account} account holds {balance} USD in the ledger at the end of {quarter}.",
            "{account} stands at {balance} USD after {quarter}.",
            "After {quarter} there are {balance} USD on the {account} account.",
            "Ledger balance of {account}, {quarter}: {balance} USD.",
        ),
        "dev": ("At the end of {quarter} the ledger shows {balance} USD on {account}.",),
        "test": ("For {quarter} the {account} account shows {balance} USD.",),
    },
}

# In train most of the sentences are put together from what each key may sound like, in any order.
FRAGMENTS: dict[str, tuple[str, ...]] = {
    "invoice": ("invoice {}", "{}", "number {}", "see {}"), "vendor": ("from {}", "{}", "vendor {}", "sent by {}", "of {}"),
    "amount": ("for {} USD", "{} USD", "over {} USD", "it asks for {} USD", "the amount is {} USD"),
    "due": ("due {}", "due on {}", "payable by {}", "until {}", "by {}", "to be paid on {}"), "status": ("{}", "status {}", "which is {}", "now {}"),
    "department": ("{}", "department {}", "the {} team", "of {}"), "quarter": ("in {}", "{}", "for {}", "at the end of {}", "during {}"),
    "budget": ("a budget of {} USD", "budget {} USD", "{} USD budgeted", "may use {} USD", "the limit is {} USD"),
    "spent": ("spent {} USD", "{} USD spent", "{} USD is gone", "used {} USD", "{} USD went out", "spend of {} USD"),
    "reference": ("under {}", "{}", "reference {}", "see {}", "filed as {}"), "customer": ("customer {}", "{} owes", "owed by {}", "from {}", "{}"),
    "account": ("account {}", "{}", "on {}", "the {} account"), "balance": ("{} USD", "balance {} USD", "holds {} USD", "{} USD in the ledger"),
}  # fmt: skip
# Requests that name only some of the fact's keys. In train nearly all: where everything is asked for, a model need not read the list.
SHARE_OF_SOME_KEYS: dict[Split, float] = {"train": 0.85, "dev": 0.5, "test": 0.5}
LEADS = ("", "", "Note: ", "We have ", "This came in: ", "For the file: ", "Please see: ")


def composed(rng: random.Random, values: dict[str, Any]) -> str:
    """A sentence of fragments in any order."""
    parts = [rng.choice(FRAGMENTS[key]).format(value) for key, value in rng.sample(list(values.items()), len(values))]
    mark = rng.choice((", ", "; ", " and ", ", ", " - "))
    text = rng.choice(LEADS) + mark.join(parts) + "."
    return text[0].upper() + text[1:]


REQUESTS: Phrases = {
    "train": (
        "Return JSON with the keys {k}. {t}",
        "Summarise as JSON ({k}): {t}",
        "Give me only JSON with {k}. {t}",
        "{t} As JSON with {k}, please.",
        "Turn this into JSON with {k}. {t}",
        "Keys {k}, JSON: {t}",
        "I need JSON ({k}) for this: {t}",
        "{t} Give me that as JSON: {k}.",
        "Make JSON with the keys {k} from: {t}",
        "JSON with {k}. {t}",
        "Nothing but JSON, keys {k}: {t}",
        "JSON and nothing else, with {k}: {t}",
        "Just JSON ({k}): {t}",
        "JSON, please, keys: {k}. {t}",
        "As JSON, fields {k}: {t}",
        "{t} Keys for the JSON: {k}.",
        "JSON object, keys {k}: {t}",
        "Plain JSON, fields {k}. {t}",
        "Answer in JSON. Keys: {k}. {t}",
        "JSON keys {k}, taken from: {t}",
        "Make a JSON object of {k} out of this: {t}",
        "{k} as JSON. {t}",
        "No prose, JSON alone, with {k}: {t}",
        "Copy {k} into JSON. {t}",
        "Fill JSON with the fields {k}: {t}",
    ),
    "dev": ("Write this as JSON with the keys {k}. {t}", "JSON only, keys {k}: {t}"),
    "test": ("Put this into JSON with the keys {k}. {t}", "Only JSON with {k}, please: {t}"),
}


def facts(rng: random.Random, c: Company, kind: str) -> dict[str, Any]:
    """The values of one fact of that kind in a company's books, by key."""
    if kind == "invoice":
        return dict(zip(FIELDS[kind], rng.choice(c.invoices), strict=True))
    if kind == "receivable":
        return dict(zip(FIELDS[kind], rng.choice(c.receivables), strict=True))
    quarter = rng.choice(QUARTERS)
    if kind == "budget":
        department = rng.choice(c.departments)
        return {"department": department, "quarter": quarter, "budget": c.budgets[department, quarter], "spent": c.total_spend(department, quarter)}
    account = rng.choice(c.accounts)
    return {"account": account, "quarter": quarter, "balance": c.balances[account]}


def summary(rng: random.Random, c: Company) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """A request, the fields that answer it, and the schema of each; keys in any order, and not always all of them."""
    kind, sentence = rng.choice([(kind, sentence) for kind, phrases in SENTENCES.items() for sentence in phrases[c.split]])
    values = facts(rng, c, kind)
    text = composed(rng, values) if c.split == "train" and rng.random() < SHARE_COMPOSED else sentence.format(**values)
    keys = list(values)
    if rng.random() < 0.7:
        rng.shuffle(keys)
    if rng.random() < SHARE_OF_SOME_KEYS[c.split]:
        keys = keys[: rng.randint(1 if c.split == "train" else 2, len(keys) - 1)]
    request = rng.choice(REQUESTS[c.split]).format(k=", ".join(keys), t=text)
    return request, {key: values[key] for key in keys}, {key: FIELDS[kind][key] for key in keys}
