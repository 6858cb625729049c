"""Policy documents: versioned, with values that differ by company and approval rules that differ by tenant."""

from __future__ import annotations

import random
from dataclasses import dataclass

TENANT_RULES = {
    # tenant: transfer threshold in USD (version 1, current version 2), and who approves above it
    "bank_a": ((15000, 10000), "the compliance desk"),
    "retail_b": ((40000, 50000), "the store controller"),
    "saas_c": ((20000, 25000), "the finance lead"),
}


@dataclass(frozen=True)
class Policy:
    """One version of one rule. `fact` is the value that an answer about it must state."""

    id: str
    version: int
    topic: str
    text: str
    fact: str

    @property
    def citation(self) -> str:
        """How an answer cites it, for example `[P-12@v2]`."""
        return f"[{self.id}@v{self.version}]"


# topic: (sentence with {fact}, possible facts)
RULES: dict[str, tuple[str, tuple[str, ...]]] = {
    "travel receipts": ("Travel receipts must be filed within {fact}.", ("7 days", "10 days", "14 days", "21 days", "30 days")),
    "meal limits": ("The meal limit on a business trip is {fact} a day.", ("45 USD", "60 USD", "75 USD", "90 USD")),
    "vendor onboarding": ("A new vendor must be checked by {fact} before the first payment.", ("the tax team", "the legal team", "two managers", "the audit team")),
    "payment terms": ("The standard payment terms are {fact} after the invoice date.", ("15 days", "30 days", "45 days", "60 days")),
    "split payments": ("Payments that were split to stay below the limit are reported to {fact}.", ("the auditor", "the board", "the risk team", "the controller")),
    "backdated entries": ("Backdated entries are blocked and reviewed by {fact}.", ("the auditor", "the controller", "the audit team", "the chief accountant")),
    "payroll data": ("Payroll data may be shared only as {fact}.", ("team totals", "yearly totals", "department totals", "quarterly totals")),
    "journal review": ("Journal entries above {fact} need a second reviewer.", ("2000 USD", "3000 USD", "5000 USD", "8000 USD")),
    "month-end close": ("The month-end close is due on {fact}.", ("working day 3", "working day 4", "working day 5", "working day 6")),
    "card purchases": ("Card purchases are limited to {fact} each month.", ("500 USD", "800 USD", "1200 USD", "1500 USD")),
    "petty cash": ("Petty cash is counted every {fact}.", ("Monday", "Tuesday", "Thursday", "Friday")),
    "record keeping": ("Ledger records are kept for {fact}.", ("6 years", "7 years", "8 years", "10 years")),
}  # fmt: skip
TRANSFER_TOPIC = "transfer approval"


def transfer_limit(tenant: str) -> int:
    """The current threshold in USD above which a transfer of this tenant needs approval."""
    return TENANT_RULES[tenant][0][1]


def write_policies(rng: random.Random, tenant: str) -> tuple[Policy, ...]:
    """A company's handbook: every rule in its current version, about half with an older one still on file."""
    ids = rng.sample(range(10, 100), len(RULES) + 1)
    thresholds, approver = TENANT_RULES[tenant]
    policies = [
        Policy(f"P-{ids[0]}", version, TRANSFER_TOPIC, f"Transfers above {limit} USD need approval by {approver}.", f"{limit} USD")
        for version, limit in enumerate(thresholds, start=1)
    ]
    for number, (topic, (sentence, facts)) in zip(ids[1:], RULES.items(), strict=True):
        old, new = rng.sample(facts, 2)
        versions = (old, new) if rng.random() < 0.5 else (new,)
        policies += [
            Policy(f"P-{number}", version, topic, sentence.format(fact=fact), fact) for version, fact in enumerate(versions, start=1)
        ]
    return tuple(policies)


def current(policies: tuple[Policy, ...], topic: str) -> Policy:
    """The newest version of the rule on `topic`. Raises ValueError where there is none."""
    return max((policy for policy in policies if policy.topic == topic), key=lambda policy: policy.version)
