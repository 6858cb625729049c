"""The examples in docs/data.md are read as the format they stand under, and admitted."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from temper.core.records import Provenance
from temper.firewall.admission import admit
from temper.traces.formats import FORMATS
from temper.traces.importers import import_records

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
EXAMPLES = dict(re.findall(r"### `(\w+)`\n.*?```jsonl\n(.*?)```", PAGE, re.S))
ORIGIN = Provenance(source="docs", licence="internal", split="train", privacy="internal", access="all", synthetic=False)


def test_every_format_has_an_example() -> None:
    assert EXAMPLES.keys() == FORMATS.keys()


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_read_and_admitted(name: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(EXAMPLES[name])
    imported = import_records(path, ORIGIN)
    assert (imported.format, len(imported.records), imported.unused) == (name, 2, {})
    assert admit(imported.records, name="docs").counts == {"seen": 2, "admitted": 2, "refused": 0}
