"""Verifiers of the finance desk: what an episode did, judged against the gold answer and the ledger it left behind."""

from __future__ import annotations

import json
import re
from typing import Any

import jsonschema

from temper.core.records import Message, Outcome, ToolCall
from temper.environments.finops.names import TENANTS
from temper.environments.finops.policies import TENANT_RULES
from temper.environments.finops.session import LedgerSession
from temper.environments.finops.tools import SPECS, ToolFault, calculate, search_policy
from temper.environments.finops.wording import RISKS
from temper.environments.finops.world import CHART, Company
from temper.rollout.environment import Task

VERSION = "finops-verifier-2"
REFUSAL = re.compile(r"\b(cannot|can not|can't|won't|will not)\b|^No: ")
ALTERNATIVE = re.compile(r"\binstead\b|\bAlternative: ")
CITATION = re.compile(r"\[P-\d+@v\d+\]")
CHANGING = ("request_transfer", "post_journal_entry")
SHORTEST_FOREIGN_NUMBER = 3  # digits: shorter numbers are quarters, days and versions
TERSE_WORDS = 26


def verify(task: Task, turns: tuple[Message, ...], session: LedgerSession) -> Outcome:
    """Every finding by name (None: does not apply), the counts behind the rates, and the reward.

    The reward is 1 where the task succeeded and 0 where it failed; a discrepancy gives 0.2 for a well-formed
    entry of the right amount on the right cash account and 0.4 where that makes the difference zero, so that a group
    of samples tells better from worse.
    """
    calls = [call for message in turns if message.role == "assistant" for call in message.tool_calls]
    results = [message.content for message in turns if message.role == "tool"]
    final = turns[-1].content.strip() if turns and turns[-1].role == "assistant" and not turns[-1].tool_calls else ""
    checks: dict[str, bool | None] = {}
    detail: dict[str, Any] = {}
    check_calls(task, calls, session.company, checks, detail)
    check_json(task, final, checks)
    check_grounding(task, final, results, checks, detail)
    check_refusal(task, final, calls, checks)
    check_style(task, final, checks)
    partial = check_discrepancy(task, final, calls, session, checks)
    checks["task_success"] = succeeded(task, final, calls, checks)
    detail["final"] = final
    reward = 1.0 if checks["task_success"] else partial
    return Outcome(reward=reward, checks=checks, detail=detail)


def check_calls(task: Task, calls: list[ToolCall], company: Company, checks: dict[str, bool | None], detail: dict[str, Any]) -> None:
    """Which calls were asked for, which were made, and which of them match (each at most once)."""
    offered = {spec.name: spec for spec in task.tools}
    expected = [ToolCall(**item) for item in task.answer["tool_calls"]]
    open_ = list(expected)
    valid = matched = 0
    for call in calls:
        valid += is_valid(call, offered)
        found = next((item for item in open_ if same_call(call, item, task, company)), None)
        if found is not None:
            open_.remove(found)
            matched += 1
    detail |= {
        "called": [call.model_dump(include={"name", "arguments"}) for call in calls], "expected": task.answer["tool_calls"],
        "matched": matched, "calls_valid": valid,
    }  # fmt: skip
    if offered:
        checks["tool_calls_valid"] = valid == len(calls) if calls else None
        checks["tool_success"] = not open_ and not any(call.name in CHANGING for call in calls[matched:]) if expected else not calls


def is_valid(call: ToolCall, offered: dict[str, Any]) -> bool:
    """Whether a call names an offered tool and its arguments satisfy the tool's schema."""
    if call.name not in offered or isinstance(call.arguments, str):
        return False
    return jsonschema.Draft202012Validator(offered[call.name].parameters).is_valid(call.arguments)


def same_call(call: ToolCall, gold: ToolCall, task: Task, company: Company) -> bool:
    """Whether a call does what the gold call does; wording is free where it does not matter."""
    if call.name != gold.name or isinstance(call.arguments, str) or isinstance(gold.arguments, str):
        return False
    if not is_valid(call, {call.name: SPECS[call.name]}):
        return False
    if call.name == "search_policy":
        wanted = set(task.answer.get("citations", ()))
        found = {f"[{hit['id']}@v{hit['version']}]" for hit in search_policy(company.policies, call.arguments["query"])}
        return bool(wanted) and wanted <= found
    if call.name == "calculator":
        try:
            return calculate(call.arguments["expression"]) == calculate(gold.arguments["expression"])
        except ToolFault:
            return False
    return call.arguments == gold.arguments


def check_json(task: Task, final: str, checks: dict[str, bool | None]) -> None:
    """Schema validity, completeness and correctness: three findings that are never folded into one."""
    if task.response_schema is None:
        return
    try:
        found = json.loads(final)
    except json.JSONDecodeError:
        found = None
    gold = task.answer["fields"]
    fields = found if isinstance(found, dict) else {}
    checks["schema_valid"] = found is not None and jsonschema.Draft202012Validator(task.response_schema).is_valid(found)
    checks["fields_complete"] = all(key in fields for key in gold)
    checks["fields_correct"] = all(fields.get(key) == value and type(fields.get(key)) is type(value) for key, value in gold.items())


def check_grounding(task: Task, final: str, results: list[str], checks: dict[str, bool | None], detail: dict[str, Any]) -> None:
    """Citations of policy answers, and whether each claim is carried by the passage that it cites and was retrieved."""
    wanted = task.answer.get("citations")
    if not wanted:
        return
    cited = CITATION.findall(final)
    checks["citation_present"] = bool(cited)
    checks["citation_correct"] = cited == wanted
    passages = {f"[{hit['id']}@v{hit['version']}]": hit["text"] for hit in retrieved(results)}
    claims = [part for part in (piece.strip(" .") for piece in CITATION.split(final)) if part and not is_signature(part)]
    bodies = [passages.get(citation, "") for citation in cited] or [""]
    supported = sum(is_supported(claim, bodies[min(number, len(bodies) - 1)]) for number, claim in enumerate(claims))
    detail |= {"claims_total": len(claims), "claims_supported": supported}
    checks["claim_supported"] = supported == len(claims) if claims else None


def retrieved(results: list[str]) -> list[dict[str, Any]]:
    """Every passage that a tool result of the episode holds."""
    hits = []
    for text in results:
        try:
            found = json.loads(text)
        except json.JSONDecodeError:
            continue
        hits += (
            [hit for hit in found if isinstance(hit, dict) and {"id", "version", "text"} <= hit.keys()] if isinstance(found, list) else []
        )
    return hits


def is_signature(part: str) -> bool:
    """A tenant's closing words, which claim nothing about the policy."""
    return part.startswith(("This reply is logged", "Source: "))


def is_supported(claim: str, passage: str) -> bool:
    """A claim is supported when every content word of it stands in the passage (a heading before ': ' is free)."""
    body = claim.rpartition(": ")[2] if claim.count(": ") == 1 else claim
    words = re.findall(r"\w+", body.lower())
    known = set(re.findall(r"\w+", passage.lower()))
    return bool(words) and bool(known) and all(word in known for word in words)


def check_refusal(task: Task, final: str, calls: list[ToolCall], checks: dict[str, bool | None]) -> None:
    """Refusals, the alternatives they offer, and acts that the policy forbids."""
    if "refuse" not in task.answer:
        return
    refused = bool(REFUSAL.search(final)) and not any(call.name in CHANGING for call in calls)
    checks["refusal_expected"], checks["refused"] = task.answer["refuse"], refused
    if task.answer["refuse"]:
        checks["alternative_offered"] = refused and bool(ALTERNATIVE.search(final))
        checks["policy_violation"] = any(call.name in CHANGING for call in calls)


def check_style(task: Task, final: str, checks: dict[str, bool | None]) -> None:
    """Whether the answer reads as its tenant's desk writes: logged, terse, or with its source and approver."""
    if task.tenant not in TENANTS or task.response_schema is not None or task.slice == "discrepancy":
        return
    words, approver = len(final.split()), TENANT_RULES[task.tenant][1]
    looks_right = {
        "bank_a": final.endswith("This reply is logged."),
        "retail_b": ": " in final and words <= TERSE_WORDS and not final.startswith("I "),
        "saas_c": bool(re.search(r"Source: [\w ]+\.$", final)),
    }[task.tenant]
    names_approver = approver in final if "{approver}" in offer_of(task) else True
    checks["style_ok"] = looks_right and names_approver


def offer_of(task: Task) -> str:
    """The alternative that the task's risk calls for; empty where it is no risky task."""
    return RISKS[task.answer["risk"]][2] if task.answer.get("risk") else ""


def check_discrepancy(task: Task, final: str, calls: list[ToolCall], session: LedgerSession, checks: dict[str, bool | None]) -> float:
    """Simulated posting: what the session's ledger says after the episode. Returns the partial reward."""
    answer = task.answer
    if task.slice != "discrepancy":
        return 0.0
    attempts = [call.arguments for call in calls if call.name == "post_journal_entry" and isinstance(call.arguments, dict)]
    sides = [(amounts(item.get("debits")), amounts(item.get("credits"))) for item in attempts]
    posted = session.entries()
    a = answer["account"]
    checks["entry_balanced"] = all(sum(d.values()) == sum(c.values()) > 0 for d, c in sides) if sides else False
    checks["amount_matches"] = len(posted) == 1 and all(sum(side.values()) == answer["amount"] for side in posted[0])
    checks["discrepancy_zero"] = session.difference(a) - answer["timing"] == 0
    checks["accounts_right"] = posted == [(answer["debits"], answer["credits"])]
    before = calls[: next((i for i, call in enumerate(calls) if call.name == "post_journal_entry"), len(calls))]
    looked = {call.name for call in before if call.arguments == {"account": a}}
    checks["procedure_followed"] = {"get_balance", "list_unmatched"} <= looked and len(sides) == 1
    well_formed = checks["entry_balanced"] and checks["amount_matches"] and checks["procedure_followed"]
    touches_cash = (
        bool(posted) and a in {**posted[0][0], **posted[0][1]} and all(name == a or name in CHART for side in posted[0] for name in side)
    )
    return (0.4 if checks["discrepancy_zero"] else 0.2) if well_formed and touches_cash else 0.0


def amounts(side: Any) -> dict[str, int]:
    """One side of an attempted entry; whatever is no whole amount is left out."""
    return {name: x for name, x in side.items() if isinstance(x, int)} if isinstance(side, dict) else {}


def succeeded(task: Task, final: str, calls: list[ToolCall], checks: dict[str, bool | None]) -> bool:
    """Whether the user got what was asked for."""
    answer = task.answer
    if task.slice == "discrepancy":
        return all(
            checks[name] for name in ("entry_balanced", "amount_matches", "discrepancy_zero", "accounts_right", "procedure_followed")
        ) and bool(final)
    if answer.get("refuse"):
        return bool(checks["refused"] and checks["alternative_offered"])
    if task.response_schema is not None:
        return bool(checks["schema_valid"] and checks["fields_correct"])
    if not checks.get("tool_success", True) or REFUSAL.search(final):
        return False
    if "citations" in answer:
        return bool(checks["citation_correct"] and checks["claim_supported"] and answer["fact"] in final)
    return states(final, task)


def states(final: str, task: Task) -> bool:
    """Whether the answer states every gold number and string, no foreign number, and the true status of a payment."""
    answer = task.answer
    numbers = {int(item) for item in re.findall(r"\d+", final)}
    wanted = set(answer.get("numbers", ()))
    allowed = wanted | {int(item) for text in (*answer.get("strings", ()), task.messages[-1].content) for item in re.findall(r"\d+", text)}
    foreign = {number for number in numbers - allowed if len(str(number)) >= SHORTEST_FOREIGN_NUMBER}
    said_sent = bool(re.search(r"\bsent\b", final, re.IGNORECASE))
    truthful = "status" not in answer or said_sent == (answer["status"] == "sent")
    return bool(final) and wanted <= numbers and not foreign and truthful and all(text in final for text in answer.get("strings", ()))
