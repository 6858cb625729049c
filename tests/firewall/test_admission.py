"""Admission: every rule by hand, counts that add up, and a manifest that is whole or absent."""

from __future__ import annotations

import math
import re
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from temper.core.config import parse_config
from temper.core.errors import ConfigError, DataError, ManifestError
from temper.core.hashing import hash_file
from temper.core.records import Manifest, Message, Outcome, Preference, Provenance, Record, Refusal, Sampled, ToolCall, ToolSpec
from temper.core.storage import read_json, read_jsonl, verify_folder
from temper.firewall.admission import admit, write_manifest
from temper.firewall.contamination import HeldoutTask
from temper.firewall.rules import AdmissionRules

PROVENANCE = Provenance(source="test", licence="MIT", split="train", privacy="public", access="public", synthetic=False)
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
TOOL = ToolSpec(name="f", parameters=SCHEMA)
SYSTEM, USER, ANSWER = (Message(role=role, content=text) for role, text in (("system", "s"), ("user", "q"), ("assistant", "a")))  # type: ignore[arg-type]
RESULT = Message(role="tool", content="1", tool_call_id="c")


def call(arguments: Any = None, name: str = "f", **fields: Any) -> Message:
    given = {"a": 1} if arguments is None else arguments
    return Message(role="assistant", tool_calls=(ToolCall(name=name, arguments=given, id="c"),), **fields)


def record(*messages: Message, **fields: Any) -> Record:
    origin = fields.pop("provenance", {})
    return Record(messages=messages or (USER, ANSWER), provenance=PROVENANCE.model_copy(update=origin), **fields)


def pair(chosen: tuple[Message, ...], rejected: tuple[Message, ...], *prompt: Message) -> Record:
    return record(*(prompt or (USER,)), preference=Preference(chosen=chosen, rejected=rejected))


def sampled(count: int, *logprobs: float) -> tuple[Sampled, ...]:
    return (Sampled(prompt_ids=(1,), token_ids=tuple(range(count)), logprobs=logprobs, finish_reason="stop"),)


LEAK = Message(role="assistant", content="AKIAIOSFODNN7EXAMPLE for a@b.io")
AWRY = ToolSpec(name="f", parameters={"type": "nothing"})
AFAR = ToolSpec(name="f", parameters={"$ref": "http://x.invalid/s"})
B = Message(role="assistant", content="b")
REFUSED: dict[str, tuple[str, Record, str]] = {
    "no assistant": ("schema", record(USER), "no assistant turn"),
    "no messages": ("schema", Record(messages=(), provenance=PROVENANCE), "no assistant turn"),
    "empty answer": ("schema", record(USER, Message(role="assistant", content=" ")), r"messages\[1\] \(assistant\) is empty"),
    "empty question": ("schema", record(Message(role="user"), ANSWER), r"messages\[0\] \(user\) is empty"),
    "unasked": ("schema", record(ANSWER, USER, ANSWER), "speaks before it is asked"),
    "late system": ("schema", record(USER, SYSTEM, ANSWER), "not at the start"),
    "result without call": ("schema", record(USER, RESULT, ANSWER), "tool result without a call"),
    "result twice": ("schema", record(USER, call(), RESULT, RESULT, ANSWER), r"messages\[3\] \(tool\) is a tool result without a call"),
    "call without result": ("schema", record(USER, call(), USER, ANSWER), "follows calls without results"),
    "shared id": ("schema", record(USER, call().model_copy(update={"tool_calls": call().tool_calls * 2})), "share an id"),
    "malformed arguments": ("schema", record(USER, call("{")), "no JSON object"),
    "unknown tool": ("schema", record(USER, call(name="g"), tools=(TOOL,)), r"calls g, which is not among the record's tools \(f\)"),
    "arguments off schema": ("schema", record(USER, call({"a": "x"}), tools=(TOOL,)), r"\$\.a: 'x' is not of type 'integer'"),
    "NaN argument": ("schema", record(USER, call({"a": math.nan})), "not finite"),
    "invalid schema": ("schema", record(USER, call(), tools=(AWRY,)), "own schema is invalid"),
    "schema from afar": ("schema", record(USER, call(), tools=(AFAR,)), "outside it"),
    "nothing trained": ("schema", record(USER, ANSWER.model_copy(update={"train": False})), "not trained"),
    "same pair": ("schema", pair((ANSWER,), (Message(role="assistant", content="a "),)), "chosen and rejected say the same"),
    "pair without prompt": ("schema", pair((ANSWER,), (B,)).model_copy(update={"messages": ()}), "without a prompt"),
    "pair without answer": ("schema", pair((), (B,)), "chosen: has no assistant turn"),
    "pair with stray result": ("schema", pair((ANSWER,), (RESULT, B)), "rejected: .*tool result without a call"),
    "log-probs missing": ("schema", record(sampled=sampled(2, -1.0)), "2 tokens and 1 log-probs"),
    "log-prob above zero": ("schema", record(sampled=sampled(1, 0.5)), "log-prob 0.5"),
    "log-prob not a number": ("schema", record(sampled=sampled(1, math.nan)), "log-prob nan"),
    "no source": ("provenance", record(provenance={"source": " "}), "source states nothing"),
    "unknown licence": ("provenance", record(provenance={"licence": "unknown"}), "licence states nothing"),
    "no access": ("provenance", record(provenance={"access": "TODO"}), "access states nothing"),
    "no generator": ("provenance", record(provenance={"synthetic": True}), "generator names nothing"),
    "generated, not synthetic": ("provenance", record(provenance={"generation_depth": 1}), "not marked synthetic"),
    "negative depth": ("provenance", record(provenance={"generation_depth": -1}), "generation_depth is -1"),
    "reward of nobody": ("provenance", record(outcome=Outcome(reward=0.0)), "reward_source names nothing"),
    "reward infinite": ("provenance", record(outcome=Outcome(reward=math.inf), provenance={"reward_source": "v"}), "reward is inf"),
    "licence": ("licence", record(provenance={"licence": "CC-BY-NC-4.0"}), "'CC-BY-NC-4.0' is not among"),
    "privacy": ("access", record(provenance={"privacy": "personal"}), "privacy class 'personal'"),
    "dev": ("split", record(provenance={"split": "dev"}), "split 'dev' is not among train"),
    "test": ("split", record(provenance={"split": "test"}), "split 'test' is not among train"),
    "failed episode": ("outcome", record(outcome=Outcome(error="timeout")), "the episode failed: timeout"),
    "secret": ("secrets", record(USER, LEAK), r"aws_key in messages\[1\].content"),
    "personal": ("personal", record(USER, Message(role="assistant", content="ask a@b.io")), r"email in messages\[1\].content"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_rule_refuses_and_says_why(name: str) -> None:
    rule, bad, reason = REFUSED[name]
    admission = admit([bad], name="x", rows=["file:7"])
    assert admission.admitted == ()
    (refusal,) = admission.refusals
    assert (refusal.rule, refusal.row, refusal.record) == (rule, "file:7", bad.id)
    assert re.search(reason, refusal.reason), refusal.reason


ADMITTED: dict[str, Record] = {
    "plain": record(),
    "system first": record(SYSTEM, USER, ANSWER),
    "calls and results": record(USER, call(), RESULT, ANSWER, tools=(TOOL,)),
    "ends in a call": record(USER, call(), tools=(TOOL,)),
    "a mistake shown, then mended": record(USER, call("{", train=False), RESULT, call(), RESULT, ANSWER, tools=(TOOL,)),
    "pair": pair((ANSWER,), (B,)),
    "pair of call and answer": pair((call(),), (ANSWER,)),
    "synthetic": record(provenance={"synthetic": True, "generator": "world 1", "generation_depth": 1}),
    "rewarded": record(outcome=Outcome(reward=1.0), provenance={"reward_source": "verifier"}, sampled=sampled(2, -0.5, 0.0)),
}


@pytest.mark.parametrize("name", ADMITTED)
def test_good_records_are_admitted_unchanged(name: str) -> None:
    assert admit([ADMITTED[name]], name="x").admitted == (ADMITTED[name],)


def test_rules_can_let_in_what_they_refuse_by_default() -> None:
    loose = AdmissionRules(splits=("dev",), licences=("CC-BY-NC-4.0",), privacy=("personal",), failed_episodes=True, personal=())
    origin = {"split": "dev", "licence": "CC-BY-NC-4.0", "privacy": "personal"}
    item = record(USER, Message(role="assistant", content="ask a@b.io"), provenance=origin, outcome=Outcome(error="x"))
    assert admit([item], name="x", rules=loose).admitted == (item,)
    assert admit([record()], name="x", rules=loose).counts["refused_licence"] == 1


def test_a_tenants_manifest_holds_its_own_and_the_shared_records_only() -> None:
    items = [
        record(USER, Message(role="assistant", content=str(tenant)), provenance={"tenant": tenant})
        for tenant in ("bank_a", "retail_b", None)
    ]
    admission = admit(items, name="x", rules=AdmissionRules(tenants=("bank_a", None)))
    assert [item.provenance.tenant for item in admission.admitted] == ["bank_a", None]
    assert admission.refusals[0].reason == "tenant 'retail_b' is not among bank_a, None"


def test_generation_depth_has_a_ceiling_where_one_is_set() -> None:
    deep = record(provenance={"synthetic": True, "generator": "g", "generation_depth": 3})
    assert admit([deep], name="x").admitted == (deep,)
    assert admit([deep], name="x", rules=AdmissionRules(max_generation_depth=2)).counts["refused_provenance"] == 1


def words(start: int, count: int) -> str:
    return " ".join(f"w{index}" for index in range(start, start + count))


def test_duplicates_name_the_row_they_repeat_and_a_refused_record_shadows_none() -> None:
    long = Message(role="assistant", content=words(0, 100))
    nearly = Message(role="assistant", content=words(0, 97) + " and the end")
    items = [
        record(USER, long, provenance={"split": "dev"}),  # refused: the next is not its duplicate
        record(USER, long),
        record(USER, long, provenance={"source": "elsewhere"}),
        record(USER, nearly),
        record(USER, Message(role="assistant", content=words(200, 100))),
    ]
    admission = admit(items, name="x")
    assert admission.admitted == (items[1], items[4])
    # 96 runs of five words each; the last three words differ, so seven.. : 93 shared of 96 + 96 - 93 = 99 -> 0.94
    assert [(refusal.row, refusal.rule, refusal.reason) for refusal in admission.refusals] == [
        ("1", "split", "split 'dev' is not among train"),
        ("3", "duplicate", "says the same as row 2"),
        ("4", "near_duplicate", "0.94 alike with row 2"),
    ]
    off = AdmissionRules(exact_duplicates=False, near_duplicates=None)
    assert len(admit(items, name="x", rules=off).admitted) == 4


def test_overlap_with_heldout_tasks_is_refused_and_their_fingerprints_kept() -> None:
    task = HeldoutTask(id="dev/7", prompt=("q",))
    admission = admit([record()], name="x", heldout=[task])
    assert admission.counts == {"seen": 1, "admitted": 0, "refused": 1, "refused_overlap": 1}
    assert admission.refusals[0].reason == "has the prompt of held-out task dev/7"
    assert admission.heldout == {"dev/7": task.fingerprint}
    assert admit([record()], name="x", heldout=[task], rules=AdmissionRules(overlap=None)).admitted == (record(),)


def test_two_heldout_tasks_of_one_id_are_an_error() -> None:
    with pytest.raises(DataError, match="two held-out tasks have the id 'x'"):
        admit([], name="m", heldout=[HeldoutTask(id="x", prompt=("a",)), HeldoutTask(id="x", prompt=("b",))])


def test_rows_must_match_the_records() -> None:
    with pytest.raises(DataError, match="1 records and 2 rows"):
        admit([record()], name="m", rows=["a", "b"])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"licenses": ["MIT"]}, "did you mean 'licences'"),
        ({"personal": ["emails"]}, "unknown kinds"),
        ({"near_duplicates": {"treshold": 0.9}}, "did you mean 'threshold'"),
        ({"near_duplicates": {"threshold": 0.5}}, "use more bands or fewer rows"),
        ({"splits": ["validation"]}, "splits"),
    ],
)
def test_a_misspelt_rule_is_an_error_with_a_suggestion(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config(AdmissionRules, values)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from([*ADMITTED.values(), *(item for _, item, _ in REFUSED.values())]), max_size=12))
def test_every_record_is_admitted_or_refused_once(items: list[Record]) -> None:
    admission = admit(items, name="x", refused=[Refusal(record="", rule="import", reason="bad", row="f:1")])
    counts = admission.counts
    assert counts["seen"] == len(items) + 1 == counts["admitted"] + counts["refused"]
    assert counts["refused"] == sum(count for rule, count in counts.items() if rule.startswith("refused_"))
    rows = [int(refusal.row) for refusal in admission.refusals[1:]]
    assert len(set(rows)) == len(rows)
    assert [items[number - 1].id for number in rows] == [refusal.record for refusal in admission.refusals[1:]]


def test_a_manifest_on_disk_holds_the_hashes_the_rules_and_the_refusals(tmp_path: Path) -> None:
    text = "line separators \u2028 \x85 inside"
    items = [record(USER, Message(role="assistant", content=text)), record(), record()]
    manifest = write_manifest(tmp_path / "sft", admit(items, name="sft", heldout=["another"]))
    assert Manifest.model_validate(read_json(tmp_path / "sft" / "manifest.json")) == manifest
    assert sorted(path.name for path in (tmp_path / "sft").iterdir()) == ["FILES.json", "manifest.json", "records.jsonl"]
    assert read_jsonl(tmp_path / "sft" / manifest.records_file, Record) == items[:2]
    assert manifest.records_sha256 == hash_file(tmp_path / "sft" / "records.jsonl")
    assert manifest.admitted == (items[0].id, items[1].id)
    assert manifest.counts == {"seen": 3, "admitted": 2, "refused": 1, "refused_duplicate": 1}
    assert manifest.rules["near_duplicates"]["threshold"] == 0.8
    assert len(manifest.heldout) == 1
    verify_folder(tmp_path / "sft")


def test_equal_input_gives_equal_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_manifest(tmp_path / name, admit([record(), *ADMITTED.values()], name="m", heldout=["z"]))
    for file in ("manifest.json", "records.jsonl"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_nothing_admitted_writes_nothing_and_keeps_what_stood_there(tmp_path: Path) -> None:
    write_manifest(tmp_path / "m", admit([record()], name="m"))
    before = (tmp_path / "m" / "manifest.json").read_bytes()
    with pytest.raises(ManifestError, match=r"refused_schema 1.*no assistant turn"):
        write_manifest(tmp_path / "m", admit([record(USER)], name="m"))
    with pytest.raises(ManifestError, match="would admit nothing"):
        write_manifest(tmp_path / "new", admit([], name="m"))
    assert (tmp_path / "m" / "manifest.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_failure_while_writing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("temper.firewall.admission.write_json", full)
    with pytest.raises(OSError, match="no space left"):
        write_manifest(tmp_path / "m", admit([record()], name="m"))
    assert list(tmp_path.iterdir()) == []


def test_four_thousand_templated_records_take_seconds() -> None:
    system = Message(role="system", content="You are a careful assistant of the finance department. " * 8)
    items = []
    for index in range(4000):
        asked = (
            f"For company {index % 97}, what did department {index % 13} spend in Q{index % 4} of {index}, and what is left for the year?"
        )
        answer = (
            f"Department {index % 13} spent {index * 7} USD in that quarter against a budget of {index * 11} USD; {index * 4} USD are left."
        )
        items.append(
            record(
                system, Message(role="user", content=asked), call(), RESULT, Message(role="assistant", content=answer), tools=(TOOL,) * 6
            )
        )
    started = time.monotonic()
    admission = admit(items, name="x", heldout=[HeldoutTask(id=str(index), prompt=(words(index, 40),)) for index in range(300)])
    # 20,000 in 10 s is 2 s for these; three times that leaves room for a busy machine.
    assert time.monotonic() - started < 6.0
    assert admission.counts["seen"] == 4000
