"""Real data, through import and admission: GSM8K and TAT-QA, where the folder stands beside the repository."""

from __future__ import annotations

from pathlib import Path

import pytest

from temper.core.records import Provenance
from temper.firewall.admission import admit, write_manifest
from temper.traces.importers import import_records

DATA = Path(__file__).parents[3] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"public data is absent: {DATA} does not exist")


def origin(source: str, licence: str, split: str) -> Provenance:
    return Provenance.model_validate(
        {"source": source, "licence": licence, "split": split, "privacy": "public", "access": "public", "synthetic": False}
    )


@needs_data
def test_gsm8k_train_against_its_test_file(tmp_path: Path) -> None:
    train = import_records(DATA / "gsm8k" / "train.jsonl", origin("openai/grade-school-math", "MIT", "train"))
    test = import_records(DATA / "gsm8k" / "test.jsonl", origin("openai/grade-school-math", "MIT", "test"))
    assert (train.format, len(train.records), len(test.records), train.unused) == ("gsm8k", 7473, 1319, {})
    assert all(record.outcome.detail["answer"] for record in train.records)
    admission = admit(train.records, name="gsm8k", heldout=test.records, rows=train.rows)
    # A few train problems share a run of 13 words with a test problem; nothing else is wrong with them.
    assert admission.counts["refused"] == admission.counts["refused_overlap"]
    assert 0 < admission.counts["refused"] < 40
    manifest = write_manifest(tmp_path / "gsm8k", admission)
    assert len(manifest.heldout) == 1319
    # All of the test file, offered as training data, is refused.
    assert admit(test.records, name="x").counts["refused_split"] == 1319


@needs_data
def test_a_test_problem_relabelled_as_train_is_caught() -> None:
    test = import_records(DATA / "gsm8k" / "test.jsonl", origin("openai/grade-school-math", "MIT", "test"))
    passed_off = [record.model_copy(update={"provenance": origin("web", "MIT", "train")}) for record in test.records[:50]]
    admission = admit(passed_off, name="x", heldout=test.records)
    assert admission.counts["refused_overlap"] == 50


@needs_data
def test_tatqa_questions_of_one_table_are_no_duplicates() -> None:
    imported = import_records(DATA / "tatqa" / "dev.json", origin("NExTplusplus/TAT-QA", "CC-BY-4.0", "train"))
    assert (imported.format, len(imported.records), imported.unused) == ("tatqa", 1668, {})
    counts = admit(imported.records, name="tatqa", rows=imported.rows).counts
    assert counts["admitted"] > 1650
    assert set(counts) <= {"seen", "admitted", "refused", "refused_near_duplicate", "refused_duplicate"}


@needs_data
def test_a_file_of_no_known_format_says_what_it_holds() -> None:
    from temper.core.errors import DataError

    with pytest.raises(DataError, match=r"first row has the keys \['function', 'id', 'question'\]"):
        import_records(DATA / "bfcl" / "BFCL_v4_parallel.json", origin("bfcl", "Apache-2.0", "train"))
