"""Records to rows: what is trained, what is refused, what a manifest proves."""

from __future__ import annotations

import json

import pytest

from temper.core.errors import DataError, ManifestError, TemplateError
from temper.core.hashing import hash_file
from temper.core.records import Manifest, Message, Preference, Sampled
from temper.core.storage import write_json, write_jsonl
from temper.data.inspect import counts, text_spans, token_diff, token_spans
from temper.data.sequence import episode_sequence, load_manifest, preference_sequences, to_sequence
from tests.data.conversations import AGAIN, ANSWER, ASK, CALL, RESULT, SYSTEM, TOOLS, TWO_CALLS, record, template

MADE = template("chatml")
REFUSAL = Message(role="assistant", content="I cannot do that.")


def trained_text(row) -> str:
    return "".join(text for text, trained in text_spans(row, MADE.tokenizer) if trained)


def test_a_record_becomes_a_row_with_its_answers_weighted():
    made = record(SYSTEM, ASK, CALL, RESULT, ANSWER, tools=TOOLS)
    row = to_sequence(made, MADE, 512)
    assert row.tokens == MADE.supervise(made.messages, TOOLS).tokens
    assert set(row.weights) == {0.0, 1.0}
    assert row.weights[0] == 0.0
    assert row.record == row.group == made.id
    assert trained_text(row).count("<|im_end|>") == 2
    assert RESULT.content not in trained_text(row)


def test_truncation_cuts_and_adds_nothing():
    """A cut row is a prefix of the whole one: no end token is put where nobody stopped."""
    made = record(ASK, ANSWER)
    whole = to_sequence(made, MADE, 512)
    cut = to_sequence(made, MADE, len(whole.tokens) - 4)
    assert cut.tokens == whole.tokens[:-4]
    assert cut.weights == whole.weights[:-4]
    assert cut.tokens[-1] not in MADE.stop_ids
    first = whole.weights.index(1.0)
    assert sum(to_sequence(made, MADE, first + 1).weights) == 1
    with pytest.raises(DataError, match=f"record {made.id[:16]} trains nothing within max_tokens={first}") as caught:
        to_sequence(made, MADE, first)
    assert str(len(whole.tokens)) in caught.value.why


BAD = {
    "has no assistant turn to train": (ASK,),
    "no assistant turn": (ASK, ANSWER.model_copy(update={"train": False})),
    "the first turn is of the assistant": (ANSWER, ASK),
    "the first turn is of the tool": (SYSTEM, RESULT, ANSWER),
    "message 1 is a tool result without a call": (ASK, RESULT, ANSWER),
    "message 3 is a tool result without a call": (ASK, CALL, RESULT, RESULT, ANSWER),
    "answers the call 'call_9'": (ASK, CALL, RESULT.model_copy(update={"tool_call_id": "call_9"}), ANSWER),
    "message 2 \\(user\\) follows a tool call without its result": (ASK, CALL, AGAIN, ANSWER),
    "message 3 \\(assistant\\) follows a tool call without its result": (ASK, TWO_CALLS, RESULT, ANSWER),
    "message 1 is a system message after the start": (ASK, SYSTEM, ANSWER),
}


@pytest.mark.parametrize("what", BAD)
def test_turns_out_of_order_are_refused_by_record(what):
    made = record(*BAD[what], tools=TOOLS)
    with pytest.raises(DataError, match=what) as caught:
        to_sequence(made, MADE, 512)
    assert made.id[:16] in caught.value.what


def test_calls_without_ids_are_answered_in_order():
    nameless = CALL.model_copy(update={"tool_calls": (CALL.tool_calls[0].model_copy(update={"id": ""}),)})
    to_sequence(record(ASK, nameless, RESULT.model_copy(update={"tool_call_id": None}), ANSWER, tools=TOOLS), MADE, 512)


def test_a_template_error_names_the_record():
    made = record(SYSTEM, ASK, ANSWER)
    with pytest.raises(TemplateError, match=f"record {made.id[:16]}: the chat template of .* has no system role"):
        to_sequence(made, template("gemma"), 512)


def test_a_pair_trains_only_its_answers():
    made = record(ASK, ANSWER, AGAIN, preference=Preference(chosen=(REFUSAL,), rejected=(ANSWER,)))
    chosen, rejected = preference_sequences(made, MADE, 512)
    assert trained_text(chosen) == "I cannot do that.<|im_end|>"
    assert trained_text(rejected) == "The Marketing budget for Q3 is 120000.<|im_end|>"
    prompt = MADE.prompt_ids([ASK, ANSWER, AGAIN])
    assert chosen.tokens[: len(prompt)] == rejected.tokens[: len(prompt)] == prompt
    assert chosen.group == rejected.group
    with pytest.raises(DataError, match="same tokens on both sides"):
        preference_sequences(record(ASK, preference=Preference(chosen=(REFUSAL,), rejected=(REFUSAL,))), MADE, 512)
    with pytest.raises(DataError, match="has no preference"):
        preference_sequences(record(ASK, ANSWER), MADE, 512)


def episode(**changes):
    """Two turns: prompt 1 2 3, sampled 4 5; then 6 7 come from a tool, and 8 9 are sampled."""
    first = Sampled(prompt_ids=(1, 2, 3), token_ids=(4, 5), logprobs=(-0.5, -0.25), finish_reason="stop", adapter="bank")
    second = Sampled(prompt_ids=(1, 2, 3, 4, 5, 6, 7), token_ids=(8, 9), logprobs=(-1.0, -2.0), finish_reason="stop", adapter="bank")
    return record(ASK, ANSWER, task_id="task-1", sampled=(first.model_copy(update=changes), second))


def test_an_episode_is_what_was_sampled():
    row = episode_sequence(episode(support=((4, 40), None)), advantage=1.5)
    assert row.tokens == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert row.weights == [0, 0, 0, 1, 1, 0, 0, 1, 1]
    assert row.advantages == [0, 0, 0, 1.5, 1.5, 0, 0, 1.5, 1.5]
    assert row.old_logprobs == [0, 0, 0, -0.5, -0.25, 0, 0, -1.0, -2.0]
    assert row.support == [None, None, None, (4, 40), None, None, None, None, None]
    assert (row.adapter, row.group) == ("bank", "task-1")
    assert episode_sequence(episode(), advantage=0.0).advantages == [0.0] * 9  # no advantage is not no weight
    assert episode_sequence(episode(), advantage=0.0).supervised == 4


def test_an_episode_that_does_not_append_is_refused():
    with pytest.raises(DataError, match="turn 0 is not a prefix of the whole episode") as caught:
        episode_sequence(episode(token_ids=(4, 44)), 1.0)
    assert "token 4 differs" in caught.value.why
    with pytest.raises(DataError, match="2 tokens and 1 log-probs"):
        episode_sequence(episode(logprobs=(-0.5,)), 1.0)
    with pytest.raises(DataError, match="another temperature or with another adapter"):
        episode_sequence(episode(adapter="retail"), 1.0)
    with pytest.raises(DataError, match="no sampled tokens"):
        episode_sequence(record(ASK, ANSWER), 1.0)


@pytest.fixture
def admitted(tmp_path):
    records = [record(ASK, ANSWER), record(SYSTEM, ASK, ANSWER)]
    write_jsonl(tmp_path / "records.jsonl", records)
    manifest = Manifest(
        name="sft", records_file="records.jsonl", records_sha256=hash_file(tmp_path / "records.jsonl"), admitted=tuple(item.id for item in records),
        rules={}, heldout={}, refusals=(), counts={"admitted": 2},
    )  # fmt: skip
    write_json(tmp_path / "manifest.json", manifest)
    return tmp_path


def test_a_manifest_is_recomputed(admitted):
    manifest, records = load_manifest(admitted)
    assert tuple(item.id for item in records) == manifest.admitted
    assert load_manifest(admitted / "manifest.json")[0] == manifest
    with pytest.raises(ManifestError, match="does not exist"):
        load_manifest(admitted / "absent")


def test_a_changed_row_is_refused(admitted):
    file = admitted / "records.jsonl"
    file.write_text(file.read_text().replace("120000", "130000", 1))
    with pytest.raises(ManifestError, match="is not what was admitted"):
        load_manifest(admitted)
    listing = json.loads((admitted / "manifest.json").read_text())
    (admitted / "manifest.json").write_text(json.dumps(listing | {"records_sha256": hash_file(file)}))
    with pytest.raises(ManifestError, match=r"records.jsonl:1 is not the record that was admitted"):
        load_manifest(admitted)
    (admitted / "manifest.json").write_text(json.dumps(listing | {"records_sha256": hash_file(file), "admitted": listing["admitted"][:1]}))
    with pytest.raises(ManifestError, match="1 were admitted"):
        load_manifest(admitted)


def test_inspection_shows_every_token_once():
    rows = [to_sequence(record(ASK, ANSWER), MADE, 512), to_sequence(record(SYSTEM, ASK, ANSWER), MADE, 512)]
    assert [trained for _, trained in token_spans(rows[0], MADE.tokenizer)] == [weight != 0 for weight in rows[0].weights]
    assert "".join(text for text, _ in token_spans(rows[0], MADE.tokenizer)) == MADE.render([ASK, ANSWER])
    assert [trained for _, trained in text_spans(rows[0], MADE.tokenizer)] == [False, True, False]
    found = counts(rows)
    assert found.rows == 2
    assert found.tokens == len(rows[0].tokens) + len(rows[1].tokens)
    assert found.supervised == 2 * rows[0].supervised
    assert counts([]).share == 0.0
    assert token_diff([1, 2, 3], [1, 2, 3], MADE.tokenizer) == []
    lines = token_diff(rows[0].tokens, rows[0].tokens[:-1], MADE.tokenizer)
    assert [line.shown() for line in lines if line.kind in "+-"] == [f"- {len(rows[0].tokens) - 1:5d} {rows[0].tokens[-1]:6d} '\\n'"]
