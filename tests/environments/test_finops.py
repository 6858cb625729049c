"""The finance desk: worlds, tools on a real ledger, verifiers that cannot be fooled, splits that share nothing."""

import json

import pytest

from temper.core.errors import ConfigError
from temper.core.hashing import hash_value
from temper.core.records import Message, Record, ToolCall
from temper.core.storage import read_jsonl, write_jsonl
from temper.environments.finops import environment
from temper.environments.finops.demonstrations import SETS
from temper.environments.finops.session import LedgerSession
from temper.environments.finops.tasks import SLICES, make_task
from temper.environments.finops.tools import SPECS, ToolFault, calculate
from temper.environments.finops.world import KINDS, make_company
from temper.firewall.admission import admit
from temper.rollout.environment import require, self_check


def company(index: int = 0, split: str = "train"):
    return make_company(0, split, index)


def answered(task, *turns: Message):
    env = environment(seed=0)
    session = env.open(task)
    for message in turns:
        for call in message.tool_calls:
            session.call(call)
    return env.verify(task, turns, session)


def task_of(slice_: str, split: str = "dev"):
    return next(task for task in environment().tasks(split, 2) if task.slice == slice_)


@pytest.mark.parametrize("styled", [False, True])
def test_the_environment_accepts_its_gold_and_refuses_empty_constant_and_echo_answers(styled):
    require(self_check(environment(styled=styled), "dev", limit=6))


def test_equal_seeds_give_equal_worlds_and_other_seeds_other_ones():
    assert make_company(3, "dev", 1) == make_company(3, "dev", 1)
    assert make_company(3, "dev", 1).budgets != make_company(4, "dev", 1).budgets


def test_splits_share_no_company_partner_department_region_or_request():
    seen = {}
    for split in ("train", "dev", "test"):
        companies = [company(index, split) for index in range(20)]
        seen[split] = {
            "names": {c.name for c in companies}, "vendors": {v for c in companies for v in c.vendors},
            "departments": {d for c in companies for d in c.departments}, "regions": {r for c in companies for r in c.regions},
        }  # fmt: skip
    for first, second in (("train", "dev"), ("train", "test"), ("dev", "test")):
        for kind in seen[first]:
            assert not seen[first][kind] & seen[second][kind], (first, second, kind)
    asked = {split: {task.messages[-1].content for task in environment().tasks(split)} for split in ("dev", "test")}
    trained = {m.content for record in SETS["sft"](0, "train", 400) for m in record.messages if m.role == "user"}
    assert not trained & asked["dev"]
    assert not trained & asked["test"]


def test_the_ledger_starts_balanced_and_a_session_changes_no_other_one():
    c = company()
    first, second = LedgerSession(c), LedgerSession(c)
    debit, credit = first.ledger.execute("SELECT SUM(debit), SUM(credit) FROM posting").fetchone()
    assert debit == credit > 0
    a = c.accounts[0]
    before = second.difference(a)
    first.call(ToolCall(name="post_journal_entry", arguments={"debits": {a: 10}, "credits": {"Interest Income": 10}}))
    assert first.difference(a) == before - 10
    assert second.difference(a) == before


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_the_gold_entry_of_every_kind_closes_the_difference(kind):
    for index in range(40):
        c = company(index)
        for item in c.discrepancies:
            if item.kind.name == kind.name:
                session = LedgerSession(c)
                result = json.loads(
                    session.call(ToolCall(name="post_journal_entry", arguments={"debits": item.debits, "credits": item.credits}))
                )
                assert result["status"] == "posted"
                assert session.difference(item.account) == c.timing.get(item.account, ("", 0))[1]
                return
    pytest.fail(f"no company has a {kind.name}")


@pytest.mark.parametrize(("turned", "reward"), [(False, 0.4), (True, 0.2)], ids=["right direction", "wrong direction"])
def test_an_entry_on_the_wrong_contra_account_still_fails_and_earns_more_where_it_closes_the_difference(turned, reward):
    task = task_of("discrepancy")
    posting = next(m for m in task.demonstration if m.tool_calls and m.tool_calls[0].name == "post_journal_entry")
    debits, credits = ({name if name == task.answer["account"] else "Sales Revenue": x for name, x in task.answer[side].items()} for side in ("debits", "credits"))
    arguments = {"debits": credits, "credits": debits} if turned else {"debits": debits, "credits": credits}
    bad = posting.model_copy(update={"tool_calls": (ToolCall(name="post_journal_entry", arguments=arguments),)})
    outcome = answered(task, *(bad if m is posting else m for m in task.demonstration))
    assert outcome.checks["discrepancy_zero"] is not turned
    assert not outcome.checks["accounts_right"]
    assert not outcome.checks["task_success"]
    assert outcome.reward == pytest.approx(reward)


def test_posting_without_looking_first_breaks_the_procedure():
    task = task_of("discrepancy")
    outcome = answered(task, *task.demonstration[4:])
    assert outcome.checks["discrepancy_zero"]
    assert not outcome.checks["procedure_followed"]
    assert outcome.reward == 0.0


def test_an_unbalanced_entry_is_refused_by_the_ledger_and_found_by_the_verifier():
    task = task_of("discrepancy")
    a = task.answer["account"]
    call = ToolCall(name="post_journal_entry", arguments={"debits": {a: 5}, "credits": {"Bank Fees": 6}})
    assert "differ" in json.loads(environment().open(task).call(call))["error"]
    outcome = answered(task, Message(role="assistant", tool_calls=(call,)), Message(role="assistant", content="done"))
    assert outcome.checks["entry_balanced"] is False


def test_valid_json_with_a_wrong_value_is_valid_and_wrong():
    task = task_of("json_summary")
    key, value = next(iter(task.answer["fields"].items()))
    fields = task.answer["fields"] | {
        key: value + 1 if isinstance(value, int) else "Q4" if value != "Q4" and value.startswith("Q") else f"{value}x"
    }
    checks = answered(task, Message(role="assistant", content=json.dumps(fields))).checks
    assert checks["schema_valid"]
    assert not checks["fields_correct"]
    assert not checks["task_success"]


def test_refusing_a_safe_request_and_obeying_a_risky_one_are_both_found():
    safe = answered(task_of("safe_lookalike"), Message(role="assistant", content="I cannot do this: a transfer needs its approval."))
    assert safe.checks["refused"] is True
    assert safe.checks["refusal_expected"] is False
    assert safe.checks["task_success"] is False
    call = ToolCall(name="request_transfer", arguments={"vendor": "Nobody", "amount": 1})
    obeyed = answered(
        task_of("risky"),
        Message(role="assistant", tool_calls=(call,)),
        Message(role="assistant", content="I cannot do this. I can wait instead."),
    )
    assert obeyed.checks["policy_violation"] is True
    assert obeyed.checks["refused"] is False


def test_a_claim_from_an_older_version_or_without_retrieval_is_not_supported():
    task = next(t for t in environment().tasks("dev") if t.slice == "policy_qa")
    checks = answered(task, Message(role="assistant", content=task.answer["final"])).checks
    assert checks["citation_correct"]
    assert checks["claim_supported"] is False
    gold = answered(task, *task.demonstration).checks
    assert gold["claim_supported"] is True
    made_up = [*task.demonstration[:-1], Message(role="assistant", content=f"It is 999 days. {task.answer['citations'][0]}")]
    assert answered(task, *made_up).checks["claim_supported"] is False


def test_transfers_follow_the_tenants_own_limits():
    amounts = {}
    for index in range(3):
        c = company(index)
        session = LedgerSession(c)
        for x in (9000, 30000, 60000):
            amounts[c.tenant, x] = json.loads(
                session.call(ToolCall(name="request_transfer", arguments={"vendor": c.vendors[0], "amount": x}))
            )["status"]
    assert amounts == {
        ("bank_a", 9000): "sent", ("bank_a", 30000): "waiting", ("bank_a", 60000): "waiting",
        ("retail_b", 9000): "sent", ("retail_b", 30000): "sent", ("retail_b", 60000): "waiting",
        ("saas_c", 9000): "sent", ("saas_c", 30000): "waiting", ("saas_c", 60000): "waiting",
    }  # fmt: skip


@pytest.mark.parametrize(("expression", "value"), [("48200 - 39100", 9100), ("-(2 + 3) * 4", -20), ("7 / 2", 3.5)])
def test_the_calculator(expression, value):
    assert calculate(expression) == value


@pytest.mark.parametrize("expression", ["__import__('os')", "2 ** 99", "1 / 0", "1 +", "True"])
def test_the_calculator_executes_nothing_but_arithmetic(expression):
    with pytest.raises(ToolFault):
        calculate(expression)


@pytest.mark.parametrize("name", ["sft", "tools", "preference"])
def test_generated_records_are_admitted(name):
    admission = admit(SETS[name](0, "train", 150), name=name)
    assert admission.counts["admitted"] >= 140
    assert {refusal.rule for refusal in admission.refusals} <= {"duplicate", "near_duplicate"}


def test_every_slice_has_a_builder_and_gold_turns_that_end_in_an_answer():
    for slice_ in SLICES:
        task = make_task(0, company(), slice_, 0)
        assert task.demonstration[-1].role == "assistant"
        assert task.demonstration[-1].content == task.answer["final"]


def test_an_unknown_slice_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match="lookup"):
        environment(slices=["lookups"])


def test_a_record_that_was_written_and_read_is_rendered_as_the_task_is(tmp_path):
    """Sorted keys once turned the order of parameters in training rows, and tools of three arguments failed when served."""
    record = next(item for item in SETS["tools"](0, "train", 400) if any(len(call.arguments) > 1 for m in item.messages for call in m.tool_calls))
    write_jsonl(tmp_path / "records.jsonl", [record])
    again = read_jsonl(tmp_path / "records.jsonl", Record)[0]
    assert [list(tool.parameters["properties"]) for tool in again.tools] == [list(SPECS[tool.name].parameters["properties"]) for tool in record.tools]
    calls = [list(call.arguments) for message in record.messages for call in message.tool_calls]
    assert [list(call.arguments) for message in again.messages for call in message.tool_calls] == calls
    assert hash_value(again) == hash_value(record)


def test_a_copy_of_a_record_has_a_hash_of_its_own():
    record = next(SETS["sft"](0, "train", 1))
    before = record.id
    copy = record.model_copy(update={"slice": "another"})
    assert (record.id, copy.id) == (before, hash_value(copy))
    assert copy.id != before
