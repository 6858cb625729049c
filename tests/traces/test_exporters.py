"""Exporters: what is written is real text, and importing it gives the same records."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from temper.core.errors import DataError
from temper.core.records import Message, Outcome, Preference, Provenance, Record, Sampled, ToolCall, ToolSpec
from temper.traces.exporters import export_records
from temper.traces.importers import import_records

PROVENANCE = Provenance(source="test", licence="MIT", split="train", privacy="public", access="public", synthetic=False)
OTHER = Provenance(source="elsewhere", licence="?", split="test", privacy="internal", access="nobody", synthetic=True)
TOOL = ToolSpec(name="f", description="does it", parameters={"type": "object", "properties": {"a": {"type": "integer"}}})

TEXT = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12).filter(str.strip)
VALUE = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | TEXT, lambda inner: st.dictionaries(TEXT, inner, max_size=2), max_leaves=4
)


@st.composite
def records(draw: st.DrawFn) -> Record:
    messages = [Message(role="user", content=draw(TEXT))]
    for turn in range(draw(st.integers(1, 3))):
        calls = tuple(
            ToolCall(name="f", arguments=draw(st.dictionaries(TEXT, VALUE, max_size=2) | st.just("{not json")), id=f"{turn}.{index}")
            for index in range(draw(st.integers(0, 2)))
        )
        reasoning, train = draw(st.none() | TEXT), draw(st.none() | st.booleans())
        messages.append(Message(role="assistant", content=draw(TEXT), tool_calls=calls, reasoning=reasoning, train=train))
        messages += [Message(role="tool", content=draw(TEXT), tool_call_id=call.id) for call in calls]
        messages.append(Message(role="user", content=draw(TEXT), name=draw(st.none() | TEXT)))
    sampled = (Sampled(prompt_ids=(1,), token_ids=(2, 3), logprobs=(-0.5, -1.0), finish_reason="stop"),)
    outcome = Outcome(reward=0.5, checks={"ok": True}, detail={"x": 1})
    return Record(
        messages=tuple(messages), tools=draw(st.sampled_from([(), (TOOL,)])), provenance=draw(st.sampled_from([PROVENANCE, OTHER])),
        shape="episode", slice=draw(st.sampled_from(["", "lookup"])), task_id=draw(st.none() | TEXT),
        sampled=draw(st.sampled_from([(), sampled])), outcome=draw(st.sampled_from([Outcome(), outcome])),
    )  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(st.lists(records(), min_size=1, max_size=3))
def test_exported_records_come_back_the_same(items: list[Record]) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "out.jsonl"
        assert export_records(items, path).left_out == {}
        imported = import_records(path, PROVENANCE)
    assert list(imported.records) == items
    assert imported.unused == {}


def pair() -> Record:
    chosen, rejected = (Message(role="assistant", content=text) for text in ("the real answer", "the worse answer"))
    return Record(
        messages=(Message(role="user", content="Q?"),), tools=(TOOL,), provenance=PROVENANCE, shape="preference",
        preference=Preference(chosen=(chosen,), rejected=(rejected,), reason="clearer"),
    )  # fmt: skip


def test_a_pair_is_exported_as_text_never_as_hashes(tmp_path: Path) -> None:
    export_records([pair()], tmp_path / "p.jsonl", format="preference", extras=False)
    row = json.loads((tmp_path / "p.jsonl").read_text())
    assert row["prompt"] == [{"role": "user", "content": "Q?"}]
    assert row["chosen"] == [{"role": "assistant", "content": "the real answer"}]
    assert row["rejected"] == [{"role": "assistant", "content": "the worse answer"}]
    assert row["reason"] == "clearer"
    assert "temper" not in row


def test_a_pair_comes_back_the_same(tmp_path: Path) -> None:
    export_records([pair()], tmp_path / "p.jsonl", format="preference")
    assert import_records(tmp_path / "p.jsonl", OTHER).records == (pair(),)


def test_arguments_are_written_as_json_text(tmp_path: Path) -> None:
    messages = (Message(role="user", content="x"), Message(role="assistant", tool_calls=(ToolCall(name="f", arguments={"a": 1}, id="c"),)))
    export_records([Record(messages=messages, provenance=PROVENANCE)], tmp_path / "r.jsonl")
    row = json.loads((tmp_path / "r.jsonl").read_text())
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    assert row["messages"][1] == {"role": "assistant", "content": None, "tool_calls": [call]}


def test_what_is_left_out_is_counted(tmp_path: Path) -> None:
    record = Record(messages=(Message(role="user", content="x"), Message(role="assistant", content="y")), provenance=PROVENANCE, slice="s")
    exported = export_records([record, record.model_copy(update={"slice": ""})], tmp_path / "r.jsonl", extras=False)
    assert exported.rows == 2
    assert exported.left_out == {"provenance": 2, "shape": 2, "slice": 1}


def test_refused_exports_leave_no_file(tmp_path: Path) -> None:
    chat = Record(messages=(Message(role="user", content="x"), Message(role="assistant", content="y")), provenance=PROVENANCE)
    personal = chat.model_copy(update={"provenance": PROVENANCE.model_copy(update={"privacy": "personal"})})
    for items, format, message in (
        ([chat, pair()], "openai", "record 2 .* is a preference pair"),
        ([chat], "preference", "holds no preference pair"),
        ([chat], "csv", "unknown export format"),
        ([personal], "openai", "may not be exported"),
    ):
        with pytest.raises(DataError, match=message):
            export_records(items, tmp_path / "out.jsonl", format=format)
    assert list(tmp_path.iterdir()) == []
    assert export_records([personal], tmp_path / "out.jsonl", privacy=("personal",)).rows == 1
