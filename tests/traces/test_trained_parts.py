"""`train` on a message of a file names the parts of its turn, there and back."""

from __future__ import annotations

import json

import pytest

from temper.core.errors import DataError
from temper.core.records import Provenance
from temper.traces.exporters import message_form
from temper.traces.importers import import_records

ORIGIN = Provenance(source="test", licence="CC0-1.0", split="train", privacy="synthetic", access="public", synthetic=True)


def rows(path, train, **more):
    said = {"role": "assistant", "content": "Hi.", "reasoning_content": "Easy.", "train": train, **more}
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "Hello"}, said]}) + "\n")
    return path


def test_parts_are_read_and_written(tmp_path):
    (record,) = import_records(rows(tmp_path / "a.jsonl", ["text"]), ORIGIN).records
    assert record.messages[1].train == ("text",)
    assert message_form(record.messages[1])["train"] == ["text"]


@pytest.mark.parametrize(("train", "more"), [(["prose"], {}), ([], {}), ("text", {}), (["text"], {"weight": 0})])
def test_parts_that_are_none_are_refused(tmp_path, train, more):
    with pytest.raises(DataError, match=r"train|contradict|weight"):
        import_records(rows(tmp_path / "a.jsonl", train, **more), ORIGIN)
