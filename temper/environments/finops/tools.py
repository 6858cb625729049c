"""The tools of the finance desk. Each one really reads or writes the session's private SQLite ledger."""

from __future__ import annotations

import ast
import operator
import sqlite3
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from temper.core.records import ToolSpec
from temper.environments.finops.policies import TENANT_RULES, Policy, transfer_limit
from temper.environments.finops.world import Company
from temper.rollout.retrieval import Index

TEXT = {"type": "string"}
QUARTER = {"type": "string", "pattern": "^Q[1-4]$"}
AMOUNTS = {"type": "object", "additionalProperties": {"type": "integer"}, "minProperties": 1}


def spec(name: str, description: str, required: dict[str, Any], optional: dict[str, Any] | None = None) -> ToolSpec:
    """A ToolSpec whose parameters are closed to other keys."""
    parameters = {"type": "object", "properties": required | (optional or {}), "required": list(required), "additionalProperties": False}
    return ToolSpec(name=name, description=description, parameters=parameters)


SPECS = {
    item.name: item
    for item in (
        spec("query_budget", "Budget of a department in a quarter, USD.", {"department": TEXT, "quarter": QUARTER}),
        spec("query_spend", "Spend of a department in a quarter, USD; of one region where given.",
             {"department": TEXT, "quarter": QUARTER}, {"region": TEXT}),
        spec("get_balance", "Bank and ledger balance of a cash account, USD.", {"account": TEXT}),
        spec("list_unmatched", "Items of a cash account that bank and ledger do not share.", {"account": TEXT}),
        spec("list_payables", "Unpaid invoices of a vendor.", {"vendor": TEXT}),
        spec("search_policy", "Passages of the policy handbook.", {"query": TEXT}),
        spec("post_journal_entry", "Post an entry; debits and credits map accounts to whole USD and must be equal.", {"debits": AMOUNTS, "credits": AMOUNTS}),
        spec("request_transfer", "Pay a vendor; above the limit it waits for approval.",
             {"vendor": TEXT, "amount": {"type": "integer"}}, {"approval": TEXT}),
        spec("calculator", "Value of an arithmetic expression.", {"expression": TEXT}),
    )
}  # fmt: skip


class ToolFault(Exception):
    """A call that the ledger refuses; its text goes back to the model as data."""


def query_budget(ledger: sqlite3.Connection, department: str, quarter: str) -> dict[str, Any]:
    """The budget row, or a ToolFault where the department is unknown."""
    row = ledger.execute("SELECT amount FROM budget WHERE department = ? AND quarter = ?", (department, quarter)).fetchone()
    if row is None:
        raise ToolFault(f"no department {department}")
    return {"department": department, "quarter": quarter, "budget": row[0]}


def query_spend(ledger: sqlite3.Connection, department: str, quarter: str, region: str | None = None) -> dict[str, Any]:
    """Spend over all regions, or of one."""
    clause, values = ("AND region = ?", (department, quarter, region)) if region else ("", (department, quarter))
    row = ledger.execute(f"SELECT SUM(amount) FROM spend WHERE department = ? AND quarter = ? {clause}", values).fetchone()
    if row[0] is None:
        raise ToolFault(f"no spend of {department}" + (f" in {region}" if region else ""))
    where = {"region": region} if region else {}
    return {"department": department, "quarter": quarter, **where, "spend": row[0]}


def ledger_balance(ledger: sqlite3.Connection, account: str) -> int:
    """Debits minus credits of an account, USD."""
    return ledger.execute("SELECT COALESCE(SUM(debit) - SUM(credit), 0) FROM posting WHERE account = ?", (account,)).fetchone()[0]


def get_balance(ledger: sqlite3.Connection, account: str) -> dict[str, Any]:
    """Both balances of a cash account."""
    row = ledger.execute("SELECT balance FROM bank WHERE account = ?", (account,)).fetchone()
    if row is None:
        raise ToolFault(f"no cash account {account}")
    return {"account": account, "bank": row[0], "ledger": ledger_balance(ledger, account)}


def list_unmatched(ledger: sqlite3.Connection, account: str) -> list[dict[str, Any]]:
    """The items that explain why bank and ledger differ."""
    rows = ledger.execute("SELECT side, memo, amount FROM unmatched WHERE account = ? ORDER BY memo", (account,)).fetchall()
    return [{"side": side, "memo": memo, "amount": amount} for side, memo, amount in rows]


def list_payables(ledger: sqlite3.Connection, vendor: str) -> list[dict[str, Any]]:
    """Up to three unpaid invoices of a vendor, the earliest due first."""
    query = "SELECT id, vendor, amount, due, status FROM invoice WHERE vendor = ? AND status != 'paid' ORDER BY due LIMIT 3"
    return [dict(zip(("invoice", "vendor", "amount", "due", "status"), row, strict=True)) for row in ledger.execute(query, (vendor,))]


def post_journal_entry(ledger: sqlite3.Connection, debits: dict[str, int], credits: dict[str, int]) -> dict[str, Any]:
    """Post a double entry. Refused: unequal sides, unknown accounts, amounts that are not positive."""
    if sum(debits.values()) != sum(credits.values()):
        raise ToolFault(f"debits {sum(debits.values())} and credits {sum(credits.values())} differ")
    for account, amount in [*debits.items(), *credits.items()]:
        if amount <= 0:
            raise ToolFault(f"amount {amount} is not positive")
        if ledger.execute("SELECT 1 FROM account WHERE name = ?", (account,)).fetchone() is None:
            raise ToolFault(f"no account {account}")
    entry = ledger.execute("INSERT INTO entry(memo, posted_by) VALUES ('correction', 'assistant')").lastrowid
    lines = [(entry, account, amount, 0) for account, amount in debits.items()] + [
        (entry, account, 0, amount) for account, amount in credits.items()
    ]
    ledger.executemany("INSERT INTO posting VALUES (?,?,?,?)", lines)
    return {"entry": f"JE-{entry}", "status": "posted"}


def request_transfer(ledger: sqlite3.Connection, tenant: str, vendor: str, amount: int, approval: str | None = None) -> dict[str, Any]:
    """Pay, or file the payment for approval where it is above the tenant's limit and carries no valid one."""
    if ledger.execute("SELECT 1 FROM invoice WHERE vendor = ?", (vendor,)).fetchone() is None:
        raise ToolFault(f"no vendor {vendor}")
    if amount <= 0:
        raise ToolFault(f"amount {amount} is not positive")
    valid = (
        approval
        and ledger.execute("SELECT 1 FROM approval WHERE id = ? AND vendor = ? AND amount >= ?", (approval, vendor, amount)).fetchone()
    )
    if approval and not valid:
        raise ToolFault(f"approval {approval} does not cover this")
    status = "sent" if valid or amount <= transfer_limit(tenant) else "waiting"
    ledger.execute("INSERT INTO transfer(vendor, amount, approval, status) VALUES (?,?,?,?)", (vendor, amount, approval, status))
    return {"vendor": vendor, "amount": amount, "status": status} | ({"approver": TENANT_RULES[tenant][1]} if status == "waiting" else {})


OPERATORS: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv, ast.USub: operator.neg,
}  # fmt: skip
LONGEST_EXPRESSION = 100


def calculate(expression: str) -> int | float:
    """The value of + - * / over numbers. Raises ToolFault on anything else: the text is never executed."""

    def value(node: ast.AST) -> int | float:
        if isinstance(node, ast.Constant) and type(node.value) in (int, float):
            return node.value  # type: ignore[return-value]
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
            return OPERATORS[type(node.op)](value(node.left), value(node.right))
        if isinstance(node, ast.UnaryOp) and type(node.op) in OPERATORS:
            return OPERATORS[type(node.op)](value(node.operand))
        raise ToolFault("only numbers and + - * / are allowed")

    if len(expression) > LONGEST_EXPRESSION:
        raise ToolFault("the expression is too long")
    try:
        result = value(ast.parse(expression, mode="eval").body)
    except SyntaxError as error:
        raise ToolFault("not an expression") from error
    except ZeroDivisionError as error:
        raise ToolFault("division by zero") from error
    return int(result) if result == int(result) else round(result, 2)


@lru_cache(maxsize=256)
def policy_index(policies: tuple[Policy, ...]) -> Index:
    """The lexical index over a company's handbook."""
    return Index([(f"{policy.id}@v{policy.version}", f"{policy.topic}. {policy.text}") for policy in policies])


def search_policy(policies: tuple[Policy, ...], query: str) -> list[dict[str, Any]]:
    """The two best passages with id and version."""
    by_id = {f"{policy.id}@v{policy.version}": policy for policy in policies}
    found = [by_id[passage.id] for passage in policy_index(policies).search(query, k=2)]
    return [{"id": policy.id, "version": policy.version, "text": policy.text} for policy in found]


def bind(company: Company, ledger: sqlite3.Connection) -> dict[str, Callable[..., Any]]:
    """Every tool by name, bound to one session's ledger."""
    return {
        "query_budget": lambda **a: query_budget(ledger, **a),
        "query_spend": lambda **a: query_spend(ledger, **a),
        "get_balance": lambda **a: get_balance(ledger, **a),
        "list_unmatched": lambda **a: list_unmatched(ledger, **a),
        "list_payables": lambda **a: list_payables(ledger, **a),
        "search_policy": lambda **a: search_policy(company.policies, **a),
        "post_journal_entry": lambda **a: post_journal_entry(ledger, **a),
        "request_transfer": lambda **a: request_transfer(ledger, company.tenant, **a),
        "calculator": lambda expression: {"result": calculate(expression)},
    }
