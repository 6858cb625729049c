"""Companies with a real SQLite ledger each: budgets, spend, invoices, receivables, balances, postings, discrepancies.

Everything is drawn from named, seeded streams: the same seed and index give the same company.
"""

from __future__ import annotations

import random
import sqlite3
from dataclasses import dataclass
from functools import cached_property

from temper.core.hashing import stream_seed
from temper.core.records import Split
from temper.environments.finops.names import (
    COMPANY_HEADS,
    COMPANY_TAILS,
    PARTNER_HEADS,
    PARTNER_TAILS,
    QUARTERS,
    SYLLABLES,
    TENANTS,
    pairings,
    split_of,
)
from temper.environments.finops.policies import Policy, write_policies

SCHEMA = """
CREATE TABLE budget(department TEXT, quarter TEXT, amount INTEGER);
CREATE TABLE spend(department TEXT, quarter TEXT, region TEXT, amount INTEGER);
CREATE TABLE invoice(id TEXT PRIMARY KEY, vendor TEXT, amount INTEGER, due TEXT, status TEXT);
CREATE TABLE receivable(id TEXT PRIMARY KEY, customer TEXT, amount INTEGER, due TEXT);
CREATE TABLE bank(account TEXT PRIMARY KEY, balance INTEGER);
CREATE TABLE account(name TEXT PRIMARY KEY, normal TEXT CHECK(normal IN ('debit', 'credit')));
CREATE TABLE entry(id INTEGER PRIMARY KEY, memo TEXT, posted_by TEXT);
CREATE TABLE posting(entry INTEGER REFERENCES entry(id), account TEXT REFERENCES account(name), debit INTEGER, credit INTEGER);
CREATE TABLE unmatched(account TEXT, side TEXT, memo TEXT, amount INTEGER);
CREATE TABLE transfer(id INTEGER PRIMARY KEY, vendor TEXT, amount INTEGER, approval TEXT, status TEXT);
CREATE TABLE approval(id TEXT PRIMARY KEY, vendor TEXT, amount INTEGER);
"""

CHART = {  # the accounts every company has beside its cash accounts
    "Accounts Receivable": "debit", "Accounts Payable": "credit", "Bank Fees": "debit", "Interest Income": "credit",
    "Sales Revenue": "credit", "Operating Expense": "debit", "Owner Equity": "credit",
}  # fmt: skip


@dataclass(frozen=True)
class DiscrepancyKind:
    """Why bank and ledger differ, and the entry that mends it.

    `sign` is the effect on cash of the entry (+1: cash is debited). `side` says whose list shows the item.
    """

    name: str
    side: str
    sign: int
    contra: str
    memos: dict[Split, tuple[str, ...]]


KINDS = (
    DiscrepancyKind("bank_fee", "bank", -1, "Bank Fees", {
        "train": ("wire fee", "monthly account fee", "bank charge"), "dev": ("card terminal fee",), "test": ("statement fee",)}),
    DiscrepancyKind("interest", "bank", +1, "Interest Income", {
        "train": ("interest earned", "interest for the month", "credit interest"), "dev": ("interest on deposit",), "test": ("savings interest",)}),
    DiscrepancyKind("deposit", "bank", +1, "Accounts Receivable", {
        "train": ("customer deposit", "payment from customer", "customer wire"), "dev": ("deposit by customer",), "test": ("customer payment",)}),
    DiscrepancyKind("direct_debit", "bank", -1, "Accounts Payable", {
        "train": ("vendor direct debit", "vendor collection", "direct debit by vendor"), "dev": ("vendor debit order",), "test": ("debit by vendor",)}),
    DiscrepancyKind("returned_check", "bank", -1, "Accounts Receivable", {
        "train": ("returned customer check", "customer check bounced", "unpaid customer check"), "dev": ("customer check returned",), "test": ("bounced check of customer",)}),
    DiscrepancyKind("duplicate", "ledger", +1, "Accounts Payable", {
        "train": ("vendor payment booked twice", "duplicate vendor payment", "second booking of vendor payment"), "dev": ("vendor payment entered twice",), "test": ("vendor payment duplicated",)}),
)  # fmt: skip
# How else the train split words a kind: with three memos each, a model learns the memos and not what they mean.
# They stand apart from `memos`, which the base was pretrained on.
FURTHER_MEMOS = {
    "bank_fee": ("transfer fee", "fee for a foreign payment", "charge by the bank", "account keeping fee", "overdraft fee", "yearly fee", "fee of the bank"),
    "interest": ("interest on the balance", "interest paid by the bank", "bank interest", "monthly interest", "interest for the quarter", "account interest"),
    "deposit": ("wire from customer", "deposit from a customer", "paid in by customer", "transfer by customer", "paid by customer", "customer transfer", "cash from customer"),
    "direct_debit": ("collection by vendor", "vendor debit", "collected by vendor", "direct debit of vendor", "vendor order collected", "debit order for vendor", "vendor charge collected"),
    "returned_check": ("check of customer returned", "customer check came back", "check from customer unpaid", "customer check not paid", "returned check from customer", "check of customer came back unpaid", "bad customer check"),
    "duplicate": ("vendor payment posted twice", "payment to vendor recorded twice", "double booking of vendor payment", "repeated vendor payment", "payment to vendor booked again", "vendor payment in the books twice", "vendor paid once and booked twice"),
}  # fmt: skip
# Items that will clear by themselves, so that posting an entry for them is an error:
# (booked in the ledger and not yet at the bank: money in, money out).
TIMING: dict[Split, tuple[str, str]] = {
    "train": ("deposit in transit", "check in the mail"),
    "dev": ("transit deposit", "mailed check"),
    "test": ("deposit on its way", "check on its way"),
}


@dataclass(frozen=True)
class Discrepancy:
    """A planted difference on one cash account: `amount` USD (positive), mended by the entry of its kind."""

    account: str
    kind: DiscrepancyKind
    amount: int
    memo: str

    @property
    def debits(self) -> dict[str, int]:
        """The debit side of the entry that mends it."""
        return {self.account if self.kind.sign > 0 else self.kind.contra: self.amount}

    @property
    def credits(self) -> dict[str, int]:
        """The credit side of the entry that mends it."""
        return {self.kind.contra if self.kind.sign > 0 else self.account: self.amount}


@dataclass(frozen=True)
class Company:
    """The facts of one company; `ledger()` opens a private copy of its database."""

    name: str
    tenant: str
    split: Split
    departments: tuple[str, ...]
    regions: tuple[str, ...]
    accounts: tuple[str, ...]
    budgets: dict[tuple[str, str], int]
    spend: dict[tuple[str, str, str], int]
    invoices: tuple[tuple[str, str, int, str, str], ...]  # id, vendor, amount, due, status
    receivables: tuple[tuple[str, str, int, str], ...]  # id, customer, amount, due
    balances: dict[str, int]  # cash account -> ledger balance before the discrepancies are mended
    discrepancies: tuple[Discrepancy, ...]
    timing: dict[str, tuple[str, int]]  # cash account -> (memo, bank minus ledger in USD) of an item that clears by itself
    approvals: tuple[tuple[str, str, int], ...]  # id, vendor, amount
    policies: tuple[Policy, ...]

    @property
    def vendors(self) -> tuple[str, ...]:
        """Every vendor that has sent an invoice."""
        return tuple(dict.fromkeys(row[1] for row in self.invoices))

    def total_spend(self, department: str, quarter: str) -> int:
        """Spend of a department in a quarter over all regions, USD."""
        return sum(self.spend[department, quarter, region] for region in self.regions)

    @cached_property
    def _image(self) -> bytes:
        connection = sqlite3.connect(":memory:")
        connection.executescript(SCHEMA)
        connection.executemany("INSERT INTO budget VALUES (?,?,?)", [(*key, amount) for key, amount in self.budgets.items()])
        connection.executemany("INSERT INTO spend VALUES (?,?,?,?)", [(*key, amount) for key, amount in self.spend.items()])
        connection.executemany("INSERT INTO invoice VALUES (?,?,?,?,?)", self.invoices)
        connection.executemany("INSERT INTO receivable VALUES (?,?,?,?)", self.receivables)
        connection.executemany("INSERT INTO approval VALUES (?,?,?)", self.approvals)
        chart = CHART | dict.fromkeys(self.accounts, "debit")
        connection.executemany("INSERT INTO account VALUES (?,?)", chart.items())
        for number, (account, balance) in enumerate(self.balances.items(), start=1):
            connection.execute("INSERT INTO entry VALUES (?, 'opening balance', 'close')", (number,))
            connection.execute("INSERT INTO posting VALUES (?,?,?,0)", (number, account, balance))
            connection.execute("INSERT INTO posting VALUES (?, 'Owner Equity', 0, ?)", (number, balance))
        planted = {item.account: item for item in self.discrepancies}
        for account, balance in self.balances.items():
            found = planted.get(account)
            memo, drift = self.timing.get(account, ("", 0))
            difference = found.kind.sign * found.amount if found else 0
            connection.execute("INSERT INTO bank VALUES (?,?)", (account, balance + difference + drift))
            if found:
                signed = difference if found.kind.side == "bank" else -difference
                connection.execute("INSERT INTO unmatched VALUES (?,?,?,?)", (account, found.kind.side, found.memo, signed))
            if drift:
                connection.execute("INSERT INTO unmatched VALUES (?, 'ledger', ?, ?)", (account, memo, -drift))
        connection.commit()
        return connection.serialize()

    def ledger(self) -> sqlite3.Connection:
        """A private in-memory copy of the company's database: what one session does, no other one sees."""
        connection = sqlite3.connect(":memory:", check_same_thread=False)
        connection.deserialize(self._image)
        return connection


def make_company(seed: int, split: Split, index: int) -> Company:
    """Company number `index` of a split; tenants take turns."""
    rng = random.Random(stream_seed(seed, "company", split, index))
    tenant = TENANTS[index % len(TENANTS)]
    departments = tuple(rng.sample(pairings("department", split), 4))
    regions = tuple(rng.sample(pairings("region", split), 3))
    accounts = tuple(rng.sample(pairings("account", split), 3))
    partners = draw_partners(rng, split, 8)
    vendors, customers = partners[:5], partners[5:]
    numbers = rng.sample(range(1000, 10000), 16)
    invoices = tuple(
        (f"INV-{number}", rng.choice(vendors), draw_amount(rng), draw_date(rng), rng.choice(("open", "open", "paid", "overdue")))
        for number in numbers[:8]
    )
    kinds = rng.sample(KINDS, 2)
    discrepancies = tuple(
        Discrepancy(account, kind, rng.randint(11, 999), rng.choice(kind.memos[split] + (FURTHER_MEMOS[kind.name] if split == "train" else ())))
        for account, kind in zip(accounts[:2], kinds, strict=True)
    )
    timed = {account: draw_timing(rng, split) for account in accounts if rng.random() < 0.4}
    return Company(
        name=company_name(split, index),
        tenant=tenant,
        split=split,
        departments=departments,
        regions=regions,
        accounts=accounts,
        budgets={(d, q): draw_amount(rng) for d in departments for q in QUARTERS},
        spend={(d, q, r): draw_amount(rng) // 4 for d in departments for q in QUARTERS for r in regions},
        invoices=invoices,
        receivables=tuple((f"REC-{number}", rng.choice(customers), draw_amount(rng), draw_date(rng)) for number in numbers[8:12]),
        balances={account: rng.randint(20000, 99999) for account in accounts},
        discrepancies=discrepancies,
        timing=timed,
        approvals=tuple((f"AP-{number}", rng.choice(vendors), rng.randint(20, 90) * 1000) for number in numbers[12:]),
        policies=write_policies(rng, tenant),
    )


def company_name(split: Split, index: int) -> str:
    """The name of company `index`; different for every index below heads x tails."""
    heads, tails = COMPANY_HEADS[split], COMPANY_TAILS[split]
    lap, position = divmod(index, len(heads))
    return f"{heads[position]} {tails[(position + lap) % len(tails)]}"


def draw_amount(rng: random.Random) -> int:
    """A whole USD amount between 1,200 and 99,900, in tens."""
    return rng.randint(120, 9990) * 10


def draw_timing(rng: random.Random, split: Split) -> tuple[str, int]:
    """Memo and bank-minus-ledger of one item in transit."""
    money_in = rng.random() < 0.5
    amount = rng.randint(100, 2000)
    return TIMING[split][0 if money_in else 1], -amount if money_in else amount


def draw_date(rng: random.Random) -> str:
    """An ISO date in 2026."""
    return f"2026-{rng.randint(1, 12):02d}-{rng.randint(1, 28):02d}"


def draw_partners(rng: random.Random, split: Split, count: int) -> list[str]:
    """`count` different partner names of a split; the head of most is made up."""
    heads, tails = ([word for words in group.values() for word in words] for group in (PARTNER_HEADS, PARTNER_TAILS))
    found: dict[str, None] = {}
    while len(found) < count:
        invented = "".join(rng.sample(SYLLABLES, rng.choice((2, 2, 3)))).capitalize()
        name = f"{invented if rng.random() < 0.5 else rng.choice(heads)} {rng.choice(tails)}"
        if split_of(name) == split:
            found[name] = None
    return list(found)
