"""`temper data` and `temper template`: rows as training sees them, files through admission, templates held to their contract."""

from __future__ import annotations

import json
import re
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


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """The same tokenizer under Qwen3's own template, which drops earlier thinking and marks the lack of it."""
    folder = tiny_checkpoint("qwen3", tmp_path_factory.mktemp("hub") / "base")
    (folder / "chat_template.jinja").write_text((Path(__file__).parents[1] / "data/templates/qwen3_hub.jinja").read_text())
    return folder


def test_template_diff_of_a_template_with_itself_is_empty(temper, model):
    code, out, _ = temper("template", "diff", model, model, "--json")
    found = json.loads(out)
    assert code == 0
    assert found["a"] == found["b"]
    assert found["facts"] == {}
    assert len(found["conversations"]) == 7
    assert all(item["same"] and not item["lines"] for item in found["conversations"].values())


def test_template_diff_shows_token_by_token_what_one_has_and_the_other_not(temper, model, hub):
    code, out, _ = temper("template", "diff", model, hub, "--json")
    found = json.loads(out)
    assert code == 1
    assert set(found["facts"]) == {"template text", "history is kept"}
    single = found["conversations"]["single turn"]
    added = [(line["text"], line["trained"]) for line in single["lines"] if line["kind"] == "+"]
    assert added == [("<think>", True), ("\n\n", True), ("</think>", True), ("\n\n", True)]  # Qwen3 writes that it did not think
    assert [line for line in single["lines"] if line["kind"] == "-"] == []
    assert single["tokens"][1] - single["tokens"][0] == single["trained"][1] - single["trained"][0] == 4
    multi = found["conversations"]["multi-turn"]
    assert multi["trained"][1] < multi["trained"][0]  # equal tokens that only one of them trains differ too
    assert found["conversations"]["thinking"]["same"]


def test_template_diff_in_colour_and_of_two_tokenizers(temper, model, hub, tmp_path, monkeypatch):
    code, out, _ = temper("template", "diff", model, hub)
    assert code == 1
    assert "+    22    495 '<think>'  trained" in out
    assert "thinking · the same; both" in out
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "\x1b[1;32m+    22    495 '<think>'  trained" in temper("template", "diff", model, hub)[1]  # bold green
    monkeypatch.delenv("FORCE_COLOR")
    llama = tiny_checkpoint("llama", tmp_path / "llama")
    code, out, _ = temper("template", "diff", model, llama)
    assert code == 1
    assert "tokens are compared by their text" in out
    assert re.search(r"parallel calls · A: \d+ of \d+ trained · B: refused: the chat template has no parallel calls", out)


def test_template_diff_of_ones_own_conversations(temper, model, hub, tmp_path):
    path = chats(tmp_path / "chats.jsonl", ["The sales ledger holds it.", "None does."])
    code, out, _ = temper("template", "diff", model, hub, "--conversation", path, "--json")
    assert code == 1
    assert list(json.loads(out)["conversations"]) == ["row 1", "row 2"]
    assert temper("template", "diff", model, hub, "--conversation", path, "--limit", 1, "--json")[1].count('"row') == 1
    code, _, err = temper("template", "diff", model, hub, "--conversation", tmp_path / "absent.jsonl")
    assert (code, "does not exist" in err) == (2, True)


def test_template_check_tells_a_pinned_template_from_one_that_was_changed(temper, model, tmp_path):
    from temper.policy.model import Policy

    saved = tmp_path / "saved"
    Policy.load(model).save(saved)
    pinned = lambda code, out, _: (code, {line["rule"]: line["status"] for line in json.loads(out)["findings"]}["pinned"])  # noqa: E731
    assert pinned(*temper("template", "check", model, "--json")) == (0, "unknown")
    assert pinned(*temper("template", "check", saved, "--json")) == (0, "pass")
    text = saved / "chat_template.jinja"
    text.write_text(text.read_text().replace("<|im_end|>\\n", "<|im_end|>"))
    assert pinned(*temper("template", "check", saved, "--json")) == (1, "fail")
