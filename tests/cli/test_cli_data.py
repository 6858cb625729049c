"""`temper data` and `temper template`: rows as training sees them, files through admission, templates held to their contract."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import temper.cli as cli
from temper.cli.data import coloured
from tests.checkpoints import tiny_checkpoint

STATED = ("--licence", "CC-BY-4.0", "--privacy", "internal", "--access", "support")


@pytest.fixture
def temper(capsys):
    def run(*arguments: str | Path) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stopped:
            cli.main([str(item) for item in arguments])
        told = capsys.readouterr()
        return int(stopped.value.code or 0), told.out, told.err

    return run


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_checkpoint("qwen3", tmp_path_factory.mktemp("model") / "base")


def chats(path: Path, answers: list[str]) -> Path:
    rows = [
        {"messages": [{"role": "user", "content": f"Which ledger holds invoice {number * 7919}?"}, {"role": "assistant", "content": answer}]}
        for number, answer in enumerate(answers, start=1)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_inspect_marks_what_is_trained(temper, model, tmp_path):
    path = chats(tmp_path / "chats.jsonl", ["The sales ledger holds it.", "None does."])
    code, out, err = temper("data", "inspect", path, "--model", model, "--row", 2)
    assert (code, err) == (0, "")
    trained = out.split("⟦")[1].split("⟧")[0]
    assert "None does." in trained
    assert "Which ledger" not in trained
    assert "tokens trained" in out


def test_inspect_as_json_counts_what_it_shows(temper, model, tmp_path):
    path = chats(tmp_path / "chats.jsonl", ["The sales ledger holds it."])
    code, out, _ = temper("data", "inspect", path, "--model", model, "--json")
    (row,) = json.loads(out)
    assert code == 0
    assert len(row["pieces"]) == len(row["token_ids"]) == row["tokens"]
    assert sum(trained for _, trained in row["pieces"]) == row["trained"] > 0
    code, out, _ = temper("data", "inspect", path, "--model", model, "--json", "--text")
    stretches = json.loads(out)[0]["pieces"]
    assert next(piece for piece, trained in stretches if trained).startswith("The sales ledger holds it.")


def test_inspect_shows_both_sides_of_a_pair(temper, model, tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"prompt": "Pay it now?", "chosen": "It needs an approval first.", "rejected": "Paid."}) + "\n")
    code, out, _ = temper("data", "inspect", path, "--model", model, "--json")
    assert code == 0
    assert [row["side"] for row in json.loads(out)] == ["chosen", "rejected"]


def test_inspect_of_a_row_that_is_not_there(temper, model, tmp_path):
    path = chats(tmp_path / "chats.jsonl", ["Yes, the first one."])
    code, _, err = temper("data", "inspect", path, "--model", model, "--row", 9)
    assert code == 2
    assert "has 1 rows" in err


def test_inspect_without_model_or_file(temper, model, tmp_path):
    path = chats(tmp_path / "chats.jsonl", ["Yes, the first one."])
    assert temper("data", "inspect", path, "--model", tmp_path / "absent")[0] == 2
    assert temper("data", "inspect", tmp_path / "absent.jsonl", "--model", model)[0] == 2


def test_colour_never_hides_markup_in_the_text():
    text = coloured([("[bold]", False), ("x", True), ("[/bold]", True), ("y", False)], brackets=True)
    assert text.plain == "[bold]⟦x[/bold]⟧y"


def test_admit_writes_a_manifest_and_says_what_was_refused(temper, model, tmp_path):
    path = chats(tmp_path / "chats.jsonl", ["The sales ledger holds it.", "Write to jane.roe@example-bank.com for it.", "Nobody booked that one yet."])
    out = tmp_path / "data"
    code, text, err = temper("data", "admit", path, "--out", out, *STATED, "--json")
    assert code == 0, err
    result = json.loads(text)
    manifest = json.loads((out / "train" / "manifest.json").read_text())
    assert manifest["counts"]["admitted"] == 2
    assert result["manifests"]["train"]["refused_personal"] == 1
    assert temper("data", "inspect", out / "train", "--model", model)[0] == 0
    code, text, _ = temper("data", "admit", path, "--out", out, *STATED)
    assert code == 0
    assert "personal" in text


def test_a_changed_record_is_refused_when_it_is_read_again(temper, model, tmp_path):
    path = chats(tmp_path / "chats.jsonl", ["The sales ledger holds it."])
    assert temper("data", "admit", path, "--out", tmp_path / "data", *STATED)[0] == 0
    records = tmp_path / "data" / "train" / "records.jsonl"
    records.write_text(records.read_text().replace("sales ledger", "other ledger"))
    code, _, err = temper("data", "inspect", tmp_path / "data" / "train", "--model", model)
    assert code == 2
    assert "records" in err


def test_admit_names_the_file_and_row_of_a_bad_row(temper, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "wizard", "content": "x"}, {"role": "assistant", "content": "y"}]}) + "\n")
    code, _, err = temper("data", "admit", path, "--out", tmp_path / "data", *STATED)
    assert code == 2
    assert "bad.jsonl:1" in err
    assert not (tmp_path / "data" / "train").exists()


def test_admit_of_a_missing_file_writes_nothing(temper, tmp_path):
    code, _, err = temper("data", "admit", tmp_path / "none.jsonl", "--out", tmp_path / "data", *STATED)
    assert code == 2
    assert "none.jsonl does not exist" in err
    assert not (tmp_path / "data").exists()


def test_hash_records_then_verifies(temper, tmp_path):
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "a.bin").write_bytes(b"1")
    code, first, _ = temper("data", "hash", tmp_path / "weights", "--json")
    assert code == 0
    assert json.loads(temper("data", "hash", tmp_path / "weights", "--json")[1]) == json.loads(first)
    (tmp_path / "weights" / "a.bin").write_bytes(b"2")
    code, _, err = temper("data", "hash", tmp_path / "weights")
    assert code == 2
    assert "differs from its manifest" in err


def test_template_check_lists_findings_and_exits_by_them(temper, model):
    code, out, _ = temper("template", "check", model, "--json")
    found = json.loads(out)
    assert code == int(any(line["status"] == "fail" for line in found["findings"]))
    assert found["findings"]
    assert len(found["fingerprint"]) == 64


def test_template_check_of_nothing(temper, tmp_path):
    code, _, err = temper("template", "check", tmp_path / "absent")
    assert code == 2
    assert "does not exist" in err
