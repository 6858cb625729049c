"""Importers: each format by hand, each kind of bad row with its file and number."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from temper.core.errors import DataError
from temper.core.records import Message, Provenance, Record, ToolCall
from temper.traces.importers import IMPORTERS, import_records, sniff

PROVENANCE = Provenance(source="test", licence="MIT", split="train", privacy="public", access="public", synthetic=False)
CALL = {"id": "c1", "type": "function", "function": {"name": "get_balance", "arguments": '{"account": "cash"}'}}
TOOL = {
    "type": "function",
    "function": {"name": "get_balance", "description": "The balance.", "parameters": {"type": "object", "properties": {}}},
}
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def one(tmp_path: Path, row: dict[str, Any], format: str = "auto") -> Record:
    imported = import_records(write(tmp_path / "rows.jsonl", row), PROVENANCE, format=format)
    assert imported.refusals == ()
    (record,) = imported.records
    return record


def said(record: Record) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in record.messages]


def test_openai_chat_with_tool_calls(tmp_path: Path) -> None:
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Cash?"}]},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c1", "content": '{"balance": 12}'},
        {"role": "assistant", "content": "12.", "weight": 0},
    ]
    record = one(tmp_path, {"messages": messages, "tools": [TOOL]})
    assert said(record) == [
        ("system", "Be brief."),
        ("user", "Cash?"),
        ("assistant", ""),
        ("tool", '{"balance": 12}'),
        ("assistant", "12."),
    ]
    assert record.messages[2].tool_calls == (ToolCall(name="get_balance", arguments={"account": "cash"}, id="c1"),)
    assert record.messages[3].tool_call_id == "c1"
    assert record.messages[4].train is False
    assert record.tools[0].openai() == TOOL
    assert record.shape == "tool"
    assert record.provenance == PROVENANCE


def test_malformed_arguments_stay_the_raw_text(tmp_path: Path) -> None:
    call = {"id": "c", "function": {"name": "f", "arguments": '{"a": 1'}}
    record = one(tmp_path, {"messages": [*CHAT, {"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [call]}]})
    assert record.messages[3].tool_calls[0].arguments == '{"a": 1'


def test_calls_without_ids_get_them_and_results_find_their_call(tmp_path: Path) -> None:
    calls = [{"function": {"name": name, "arguments": "{}"}} for name in ("first", "second")]
    rows = [
        {"role": "user", "content": "both"},
        {"role": "assistant", "tool_calls": calls},
        {"role": "tool", "name": "second", "content": "2"},
        {"role": "tool", "content": "1"},
        {"role": "assistant", "content": "1 and 2"},
    ]
    messages = one(tmp_path, {"messages": rows}).messages
    ids = {call.name: call.id for call in messages[1].tool_calls}
    assert ids["first"] != ids["second"]
    assert (messages[2].tool_call_id, messages[3].tool_call_id) == (ids["second"], ids["first"])


def test_sharegpt_roles_calls_and_tags(tmp_path: Path) -> None:
    turns = [
        {"from": "human", "value": "Cash?"},
        {"from": "function_call", "value": '{"name": "get_balance", "arguments": {"account": "cash"}}'},
        {"from": "observation", "value": "12"},
        {"from": "gpt", "value": "12."},
        {"from": "human", "value": "And debt?"},
        {"from": "gpt", "value": 'One moment.\n<tool_call>\n{"name": "get_balance", "arguments": {"account": "debt"}}\n</tool_call>'},
        {"from": "tool", "value": "<tool_response>\n7\n</tool_response>"},
        {"from": "gpt", "value": "7."},
    ]
    record = one(tmp_path, {"system": "Be brief.", "conversations": turns, "tools": json.dumps([TOOL])})
    assert [role for role, _ in said(record)] == [
        "system",
        "user",
        "assistant",
        "tool",
        "assistant",
        "user",
        "assistant",
        "tool",
        "assistant",
    ]
    assert record.messages[2].tool_calls[0].arguments == {"account": "cash"}
    assert record.messages[6].content == "One moment."
    assert record.messages[6].tool_calls[0].arguments == {"account": "debt"}
    assert record.messages[7].content == "7"
    assert record.messages[7].tool_call_id == record.messages[6].tool_calls[0].id
    assert record.tools[0].name == "get_balance"


def test_alpaca_as_jsonl_and_as_json_array(tmp_path: Path) -> None:
    rows = [
        {"instruction": "Add.", "input": "1 and 2", "output": "3"},
        {"instruction": "Say hi.", "input": "", "output": "hi", "history": [["a", "b"]]},
    ]
    lines = write(tmp_path / "a.jsonl", *rows)
    array = tmp_path / "a.json"
    array.write_text(json.dumps(rows, indent=2))
    read = import_records(lines, PROVENANCE)
    assert read.format == "alpaca"
    assert said(read.records[0]) == [("user", "Add.\n\n1 and 2"), ("assistant", "3")]
    assert said(read.records[1]) == [("user", "a"), ("assistant", "b"), ("user", "Say hi."), ("assistant", "hi")]
    assert import_records(array, PROVENANCE).records == read.records
    assert import_records(array, PROVENANCE).rows == (f"{array} item 1", f"{array} item 2")


def test_preference_as_text_as_messages_and_with_a_shared_start(tmp_path: Path) -> None:
    asked, good, bad = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "good"}, {"role": "assistant", "content": "bad"}
    forms = [
        {"prompt": "Q", "chosen": "good", "rejected": "bad"},
        {"prompt": [asked], "chosen": [good], "rejected": [bad]},
        {"chosen": [asked, good], "rejected": [asked, bad]},
        {"prompt": "Q", "chosen": [asked, good], "rejected": [asked, bad]},
    ]
    for record in import_records(write(tmp_path / "p.jsonl", *forms), PROVENANCE).records:
        assert said(record) == [("user", "Q")]
        assert record.preference is not None
        assert record.preference.chosen == (Message(role="assistant", content="good"),)
        assert record.preference.rejected == (Message(role="assistant", content="bad"),)
        assert record.shape == "preference"


def test_parquet_of_every_format_gives_what_json_gives(tmp_path: Path) -> None:
    rows: dict[str, list[dict[str, Any]]] = {
        "openai": [
            {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": None, "tool_calls": [CALL]}]},
            {"messages": CHAT},
        ],
        "sharegpt": [{"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]}],
        "alpaca": [{"instruction": "i", "input": None, "output": "o"}],
        "preference": [{"prompt": "Q", "chosen": "a", "rejected": "b"}],
        "gsm8k": [{"question": "q", "answer": "because\n#### 1,200"}],
    }
    for name, items in rows.items():
        path = tmp_path / f"{name}.parquet"
        pq.write_table(pa.Table.from_pylist(items), path)
        assert sniff(path) == name
        from_json = list(IMPORTERS[name](write(tmp_path / f"{name}.jsonl", *items), PROVENANCE))
        assert list(IMPORTERS["parquet"](path, PROVENANCE)) == from_json


def test_parquet_struct_nulls_are_left_out_and_said(tmp_path: Path) -> None:
    def row(**arguments: int) -> dict[str, Any]:
        return {
            "messages": [CHAT[0], {"role": "assistant", "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": arguments}}]}]
        }

    pq.write_table(pa.Table.from_pylist([row(a=1, b=2), row(a=1)]), tmp_path / "x.parquet")
    imported = import_records(tmp_path / "x.parquet", PROVENANCE)
    assert imported.records[1].messages[1].tool_calls[0].arguments == {"a": 1}
    assert [count for name, count in imported.unused.items() if "nulls of a Parquet struct" in name] == [1]


def test_gsm8k_keeps_the_answer_word_for_word_and_its_number(tmp_path: Path) -> None:
    record = one(tmp_path, {"question": "How many?", "answer": "600*2=<<600*2=1200>>1200\n#### 1,200"})
    assert said(record) == [("user", "How many?"), ("assistant", "600*2=<<600*2=1200>>1200\n#### 1,200")]
    assert record.outcome.detail == {"answer": "1200"}
    assert record.outcome.reward is None


def test_tatqa_gives_one_record_a_question(tmp_path: Path) -> None:
    context = {
        "table": {"uid": "t", "table": [["", "2019"], ["Other", "44.1"]]},
        "paragraphs": [{"order": 2, "text": "Second."}, {"order": 1, "text": "First."}],
        "questions": [
            {
                "uid": "a",
                "question": "Change?",
                "answer": -12.6,
                "derivation": "44.1-56.7",
                "answer_type": "arithmetic",
                "scale": "million",
            },
            {"uid": "b", "question": "Which?", "answer": ["x", "y"], "derivation": "", "answer_type": "multi-span", "scale": ""},
        ],
    }
    path = tmp_path / "dev.json"
    path.write_text(json.dumps([context]))
    imported = import_records(path, PROVENANCE)
    assert imported.rows == (f"{path} item 1 question 1", f"{path} item 1 question 2")
    assert said(imported.records[0]) == [
        ("user", "|  | 2019 |\n| Other | 44.1 |\n\nFirst.\nSecond.\n\nQuestion: Change?"),
        ("assistant", "Derivation: 44.1-56.7\nAnswer: -12.6 million"),
    ]
    assert said(imported.records[1])[1] == ("assistant", "Answer: x; y")
    assert imported.records[0].outcome.detail["answer"] == -12.6
    assert (imported.records[0].task_id, imported.records[0].slice) == ("a", "tatqa/arithmetic")


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no assistant turn": ({"messages": [CHAT[0]]}, "no assistant turn"),
    "empty assistant turn": ({"messages": [CHAT[0], {"role": "assistant", "content": " "}]}, "no assistant turn with content"),
    "unknown role": ({"messages": [{"role": "narrator", "content": "x"}, *CHAT]}, r"messages\[0\] has the unknown role 'narrator'"),
    "role of another type": ({"messages": [{"role": ["user"], "content": "x"}, *CHAT]}, "unknown role"),
    "result without a call": (
        {"messages": [CHAT[0], {"role": "tool", "content": "5"}, CHAT[1]]},
        r"messages\[1\] is a tool result without a call",
    ),
    "result of another call": (
        {"messages": [CHAT[0], {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "tool_call_id": "zz", "content": "5"}]},
        "answers zz; open calls are c1",
    ),
    "result twice": (
        {"messages": [CHAT[0], {"role": "assistant", "tool_calls": [CALL]}, *[{"role": "tool", "tool_call_id": "c1", "content": "5"}] * 2]},
        r"messages\[3\] is a tool result without a call",
    ),
    "two calls of one id": ({"messages": [CHAT[0], {"role": "assistant", "tool_calls": [CALL, CALL]}]}, "two calls of one id"),
    "calls of the user": ({"messages": [{"role": "user", "content": "x", "tool_calls": [CALL]}, CHAT[1]]}, "carries tool calls"),
    "messages of a wrong type": ({"messages": "hello"}, "'messages' holds str 'hello'"),
    "a message of a wrong type": ({"messages": ["hello"]}, r"messages\[0\] holds str 'hello'"),
    "content of a wrong type": ({"messages": [{"role": "user", "content": 5}, CHAT[1]]}, r"messages\[0\].content' holds int 5"),
    "an image": ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, CHAT[1]]}, r"content\[0\] is dict"),
    "no content": ({"messages": [{"role": "user"}, CHAT[1]]}, r"messages\[0\] \(user\) has no content"),
    "tools of a wrong type": ({"messages": CHAT, "tools": {"a": 1}}, "'tools' holds dict"),
    "a weight of 2": ({"messages": [CHAT[0], {**CHAT[1], "weight": 2}]}, "weight is 2"),
    "a lone surrogate": ({"messages": [{"role": "user", "content": "a\ud800"}, CHAT[1]]}, r"lone surrogate \(U\+D800\)"),
    "a surrogate in arguments": (
        {"messages": [CHAT[0], {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"a": "\udc00"}}}]}]},
        "lone surrogate",
    ),
    "an unknown key of ours": ({"messages": CHAT, "temper": {"colour": 1}}, "'temper' holds"),
    "a wrong provenance": ({"messages": CHAT, "temper": {"provenance": {"split": "validation"}}}, "split"),
    "ShareGPT role": ({"conversations": [{"from": "bot", "value": "x"}]}, "unknown role 'bot'"),
    "ShareGPT value": ({"conversations": [{"from": "gpt", "value": None}]}, r"conversations\[0\].value' holds NoneType"),
    "ShareGPT call": (
        {"conversations": [{"from": "human", "value": "x"}, {"from": "function_call", "value": "{"}]},
        "function call that is not JSON",
    ),
    "ShareGPT without an answer": ({"conversations": [{"from": "human", "value": "x"}]}, "no assistant turn"),
    "Alpaca output null": ({"instruction": "x", "output": 5}, "'output' holds int 5"),
    "Alpaca output empty": ({"instruction": "x", "output": ""}, "no assistant turn with content"),
    "preference without a prompt": ({"chosen": "a", "rejected": "b"}, "no 'prompt'"),
    "preference of the user": (
        {"prompt": "Q", "chosen": [{"role": "user", "content": "a"}], "rejected": "b"},
        "chosen has no assistant turn",
    ),
    "preference rejected empty": ({"prompt": "Q", "chosen": "a", "rejected": ""}, "rejected has no assistant turn with content"),
    "preference type": ({"prompt": "Q", "chosen": 1, "rejected": "b"}, "'chosen' holds int 1"),
    "GSM8K without its mark": ({"question": "q", "answer": "42"}, "no '#### number'"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_named_by_file_and_line(tmp_path: Path, name: str) -> None:
    row, message = BAD[name]
    marks = {"messages": "openai", "conversations": "sharegpt", "instruction": "alpaca", "question": "gsm8k", "chosen": "preference"}
    format = next(format for mark, format in marks.items() if mark in row)
    path = tmp_path / "rows.jsonl"
    path.write_text("\n" + json.dumps(row) + "\n")  # a blank first line: numbers are the file's
    with pytest.raises(DataError, match=message) as caught:
        import_records(path, PROVENANCE, format=format)
    assert caught.value.what.startswith(f"{path}:2: ")
    assert caught.value.why
    assert caught.value.do


def test_bad_rows_can_be_collected_and_none_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    good = json.dumps({"messages": CHAT})
    path.write_text("\n".join([good, '{"messages": [', "[1]", json.dumps({"messages": []}), '{"messages": NaN}', good]))
    imported = import_records(path, PROVENANCE, bad_rows="collect")
    assert imported.rows == (f"{path}:1", f"{path}:6")
    assert [refusal.row for refusal in imported.refusals] == [f"{path}:{line}" for line in (2, 3, 4, 5)]
    assert {refusal.rule for refusal in imported.refusals} == {"import"}
    assert "not JSON" in imported.refusals[0].reason
    assert "NaN" in imported.refusals[3].reason


def test_a_bad_tatqa_question_does_not_take_its_neighbours_along(tmp_path: Path) -> None:
    fine = {"question": "Q", "answer": 1, "answer_type": "count"}
    context = {"table": {"table": [["a"]]}, "paragraphs": [], "questions": [fine, "what", {**fine, "answer": None}, fine]}
    imported = import_records(write(tmp_path / "t.jsonl", context), PROVENANCE, bad_rows="collect")
    assert [row.rpartition(" ")[2] for row in imported.rows] == ["1", "4"]
    assert [refusal.row.rpartition(" ")[2] for refusal in imported.refusals] == ["2", "3"]


def test_fields_that_no_record_carries_are_counted(tmp_path: Path) -> None:
    rows = [
        {"messages": [CHAT[0], {**CHAT[1], "mood": "glad"}], "score": 5},
        {"messages": CHAT, "score": 4},
        {"messages": CHAT, "score": None},
    ]
    assert import_records(write(tmp_path / "r.jsonl", *rows), PROVENANCE).unused == {"score": 2, "messages[].mood": 1}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no rows"),
        (b"[]", "holds no rows"),
        (b"\x1f\x8b\x08\x00", "gzip-compressed"),
        (b'{"a": "\xff"}', "not UTF-8"),
        (b'{\n "data": [{"messages": []}]\n}', "is one JSON object"),
        (b"[1, 2]\n[3]\n", "holds a list"),
        (b"hello\n", "not JSON"),
        (b"PAR1 but not really", "cannot be read as Parquet"),
        (b'{"foo": 1, "bar": 2}\n', r"keys \['bar', 'foo'\]"),
        (b"[" * 100_000, "nested too deeply|not JSON"),
    ],
)
def test_a_file_that_holds_no_rows_says_what_it_is(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "data"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        sniff(path)


def test_a_missing_file_a_folder_and_an_unknown_format(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        import_records(tmp_path / "nothing.jsonl", PROVENANCE)
    with pytest.raises(DataError, match="is a folder"):
        import_records(tmp_path, PROVENANCE)
    with pytest.raises(DataError, match="unknown data format 'csv'"):
        import_records(write(tmp_path / "r.jsonl", {"messages": CHAT}), PROVENANCE, format="csv")


def test_byte_order_mark_and_line_separators_inside_text(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    row = json.dumps({"messages": [{"role": "user", "content": "a\u2028b\x85c"}, CHAT[1]]}, ensure_ascii=False)
    path.write_bytes(b"\xef\xbb\xbf" + row.encode())
    (record,) = import_records(path, PROVENANCE).records
    assert record.messages[0].content == "a\u2028b\x85c"
