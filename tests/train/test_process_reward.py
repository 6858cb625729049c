"""The step-level reward model: where a step ends, what its labels may be, and that it learns which step is wrong."""

from __future__ import annotations

import json
import random

import pytest
import torch
from worlds import WORDS, manifest, provenance, tool_conversation

from temper.core.errors import DataError
from temper.core.records import Message, Outcome, Record
from temper.policy.model import Policy
from temper.policy.scalar_head import RewardModel
from temper.train import process_reward

FAST = {"tokens_per_step": 400, "tokens_per_batch": 256, "optim": {"lr": 1e-2}, "precision": "float32"}


def config(**keys) -> process_reward.Config:
    return process_reward.Config(**{"out": "o", "base": "b", "data": "d", **keys})


def solutions(count: int, seed: int = 0) -> list[Record]:
    """Three paragraphs; a step that says `budget`, `sales` or `draft` is wrong."""
    rng, records = random.Random(seed), []
    for number in range(count):
        words = [rng.choice(WORDS) for _ in range(3)]
        messages = (Message(role="user", content=f"{number} solve"), Message(role="assistant", content="\n\n".join(f"so {word}" for word in words)))
        labels = [float(word not in ("budget", "sales", "draft")) for word in words]
        records.append(Record(messages=messages, provenance=provenance(), outcome=Outcome(detail={"steps": labels})))
    return records


@pytest.fixture(scope="module")
def template(base):
    return Policy.load(base, precision="float32").template


def labelled(record: Record, labels) -> Record:
    return record.model_copy(update={"outcome": Outcome(detail={"steps": labels})})


def test_a_turn_ends_with_its_end_token(template) -> None:
    """A call and an answer: two steps, each read after its end token; the second was not judged."""
    row = process_reward.step_row(labelled(tool_conversation(), [0.25, None]), template, config())
    ends = [at for at, weight in enumerate(row.weights) if weight]
    assert len(ends) == 1
    assert row.tokens[ends[0]] in template.stop_ids
    assert row.targets[ends[0]] == 0.25
    assert sum(token in template.stop_ids for token in row.tokens[: ends[0]]) == 1  # the question's
    both = process_reward.step_row(labelled(tool_conversation(), [1, 0]), template, config())
    assert [both.targets[at] for at, weight in enumerate(both.weights) if weight] == [1.0, 0.0]


def test_a_paragraph_ends_with_the_blank_line_after_it(template) -> None:
    record = solutions(1)[0]
    tokens, ends = process_reward.step_ends(record, template, "paragraph")
    texts = [template.tokenizer.decode(tokens[: end + 1]).partition("solve")[2] for end in ends]
    paragraphs = record.messages[1].content.split("\n\n")
    assert [text.rstrip("\n").endswith(paragraph) for text, paragraph in zip(texts[:2], paragraphs[:2], strict=True)] == [True, True]
    assert [text.endswith("\n\n") for text in texts] == [True, True, False]
    assert tokens[ends[-1]] in template.stop_ids
    wide = record.model_copy(update={"messages": (record.messages[0], Message(role="assistant", content="so\n\n\nthen"))})
    assert len(process_reward.step_ends(wide, template, "paragraph")[1]) == 2  # three line feeds are one blank line


def test_labels_that_do_not_fit_are_refused_by_record(template) -> None:
    record = solutions(1)[0]
    for labels, word in (([1.0], "has 1 labels and 3 steps"), ([1, 2, 0], "has no step labels"), (None, "has no step labels"), ([None] * 3, "no judged step")):
        with pytest.raises(DataError, match=f"{labelled(record, labels).id[:16]} .*{word}"):
            process_reward.step_row(labelled(record, labels), template, config(step="paragraph"))
    tokens, ends = process_reward.step_ends(record, template, "paragraph")
    cut = process_reward.step_row(record, template, config(step="paragraph", max_tokens=ends[1] + 1))
    assert (cut.supervised, len(cut.tokens)) == (2, ends[1] + 1)
    assert len(tokens) > len(cut.tokens)


def test_it_learns_which_step_is_wrong_and_loads_again(base, tmp_path) -> None:
    data, heldout = manifest(tmp_path / "rows", solutions(120)), manifest(tmp_path / "heldout", solutions(40, seed=9))
    cfg = config(out=str(tmp_path / "prm"), base=base, data=data, heldout=heldout, step="paragraph", epochs=4, **FAST)
    result = process_reward.run(cfg)
    assert result["data"]["supervised"] == result["judged_steps"] > 0
    log = [json.loads(line) for line in (tmp_path / "prm/metrics.jsonl").read_text().splitlines()]
    assert log[0]["loss"] == pytest.approx(0.6931, abs=1e-3)  # the head starts at zero: ln 2
    assert result["metrics"]["heldout_accuracy"] > 0.95
    assert result["metrics"]["heldout_steps"] == 120
    judge = RewardModel.load(result["reward_model"], precision="float32")
    wrong = solutions(1)[0].model_copy(update={"messages": (Message(role="user", content="0 solve"), Message(role="assistant", content="so the\n\nso budget\n\nso tool"))})
    found = process_reward.score_steps(judge, wrong, "paragraph")
    assert found.index(min(found)) == 1
    assert process_reward.run(cfg) == json.loads(json.dumps(result))
    assert process_reward.estimate(cfg).rows == 120
    assert (result["data"]["cut"], result["judged_steps_cut"]) == (0, 0)


def test_judged_steps_behind_the_cut_are_counted_and_said(base, template, tmp_path, capsys) -> None:
    """Cut after the first record's second step: of each record the third is lost, and more of those with longer words."""
    records = [labelled(record, [1, None, 0]) for record in solutions(6)]
    longest = process_reward.step_ends(records[0], template, "paragraph")[1][1] + 1
    ends = [end for record in records for at, end in enumerate(process_reward.step_ends(record, template, "paragraph")[1]) if at != 1]
    lost = sum(end >= longest for end in ends)
    cfg = config(out=str(tmp_path / "prm"), base=base, data=manifest(tmp_path / "rows", records), step="paragraph", max_tokens=longest, **FAST)
    result = process_reward.run(cfg)
    assert lost >= 1
    assert result["judged_steps_cut"] == lost == 12 - result["judged_steps"]
    assert result["data"]["cut"] == sum(len(process_reward.step_ends(record, template, "paragraph")[0]) > longest for record in records)
    assert f"{lost} judged steps end behind max_tokens={longest}" in capsys.readouterr().err


def test_the_score_is_read_after_the_step_and_not_before_it(base, template) -> None:
    """Another word inside a step changes its own score; another word after it does not."""
    judge = RewardModel(Policy.load(base, precision="float32"))
    torch.nn.init.normal_(judge.model.score.weight, generator=torch.Generator().manual_seed(0))

    def scores(*words: str) -> list[float]:
        record = Record(messages=(Message(role="user", content="solve"), Message(role="assistant", content="\n\n".join(words))), provenance=provenance())
        return process_reward.score_steps(judge, record, "paragraph")

    first, other, later = scores("the sales", "the draft"), scores("the tool", "the draft"), scores("the sales", "the tool")
    assert first[0] != other[0]
    assert first[0] == pytest.approx(later[0], abs=1e-6)
    assert first[1] != later[1]
