"""TAT-QA: on a context written here, and on the real file where it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from temper.core.errors import DataError
from temper.core.records import Message
from temper.environments.tatqa import arithmetic, environment, label_fault
from temper.rollout.environment import require, self_check

REAL = Path(__file__).parents[3] / "shared" / "data" / "tatqa" / "dev.json"
needs_data = pytest.mark.skipif(not REAL.is_file(), reason=f"TAT-QA's dev.json is not at {REAL}")


def question(uid, answer, kind, scale="", derivation="") -> dict:
    return {"uid": uid, "order": 1, "question": f"Question {uid}?", "answer": answer, "answer_type": kind, "scale": scale, "derivation": derivation}


QUESTIONS = [
    question("change", -12.6, "arithmetic", "million", "44.1-56.7"),
    question("percent", -22.22, "arithmetic", "percent", "(44.1-56.7)/56.7"),
    question("sales", ["$1,496.5"], "span", "million"),
    question("kinds", ["fixed-price type", "cost-plus type"], "multi-span"),
    question("when", ["By the Board"], "span"),
    question("count", 4, "count", "", "a##b##c##d"),
]


def context(uid: str) -> dict:
    return {
        "table": {"uid": uid, "table": [["", "2019", "2018"], ["Other", "44.1", "56.7"]]},
        "paragraphs": [{"uid": "p2", "order": 2, "text": "second"}, {"uid": "p1", "order": 1, "text": "first"}],
        "questions": [item | {"uid": f"{uid}-{item['uid']}"} for item in QUESTIONS],
    }


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "dev.json"
    path.write_text(json.dumps([context(f"c{number}") for number in range(40)]))
    return path


def by_kind(env) -> dict:
    return {task.id.rpartition("-")[2]: task for task in env.tasks("train")}


@pytest.mark.parametrize(
    ("kind", "text", "reward"),
    [
        ("change", "Answer: -12.6 million", 1.0),
        ("change", "Answer: -12.6", 0.0),
        ("change", "Answer: 12.6 million", 0.0),
        ("change", "-12.6 million", 0.0),  # not in the form that was asked for
        ("percent", "44.1 less 56.7 …\nAnswer: -22.22%", 1.0),
        ("sales", "Answer: $1,496.5 million", 1.0),
        ("kinds", "Answer: Cost-plus type; fixed-price type", 1.0),
        ("kinds", "Answer: fixed-price type", 0.0),
        ("when", "Answer: by the board.", 1.0),
        ("count", "Answer: 4", 1.0),
        ("count", "Answer: ", 0.0),
    ],
)
def test_answers_are_right_in_value_and_scale(kind, text, reward, small):
    env = environment(str(small))
    assert env.verify(by_kind(env)[kind], (Message(role="assistant", content=text),), None).reward == reward


def test_the_prompt_holds_table_and_text_in_order_and_not_the_gold(small):
    task = by_kind(environment(str(small)))["percent"]
    shown = task.messages[1].content
    assert "Other | 44.1 | 56.7" in shown
    assert shown.index("first") < shown.index("second")
    assert "22.22" not in shown


def test_questions_of_one_context_stay_in_one_split(small):
    env = environment(str(small))
    clusters = [{task.cluster for task in env.tasks(split)} for split in ("train", "dev", "test")]
    assert sum(map(len, clusters)) == 40
    assert not clusters[0] & clusters[1]
    assert not clusters[1] & clusters[2]
    require(self_check(env, "train"))


@pytest.mark.parametrize(
    ("text", "value"),
    [("44.1-56.7", "-12.6"), ("(166+178)/2", "172"), ("-(3)", "-3"), ("2**9", None), ("__import__('os')", None), ("1/0", None), ("a+b", None), ("", None)],
)
def test_derivations_are_computed_without_running_them(text, value):
    found = arithmetic(text)
    assert (None if found is None else str(found.normalize())) == value


def test_a_label_that_its_derivation_contradicts_is_reported_and_not_overruled(small):
    wrong = question("wrong", 126, "arithmetic", "million", "44.1-56.7")
    assert label_fault(wrong) == ("126", "-12.6")
    for fine in (QUESTIONS[0], QUESTIONS[1], question("q", 16, "arithmetic", "", "3 + (13) + 26"), question("q", 12405.18, "arithmetic", "", "53%*$23,406")):
        assert label_fault(fine) is None
    path = small.with_name("other.json")
    path.write_text(json.dumps([context("c0") | {"questions": [wrong]}]))
    env = environment(str(path))
    findings = env.label_findings()
    assert [(item.observed, item.required) for item in findings] == [("126", "-12.6")]
    task = next(task for split in ("train", "dev", "test") for task in env.tasks(split))
    assert env.verify(task, (Message(role="assistant", content="Answer: 126 million"),), None).reward == 1.0


def test_a_malformed_context_is_named(tmp_path):
    path = tmp_path / "dev.json"
    path.write_text(json.dumps([{"table": {}}]))
    with pytest.raises(DataError, match="context 0"):
        environment(str(path)).tasks("dev")
    path.write_text("{}")
    with pytest.raises(DataError, match="not a list"):
        environment(str(path)).tasks("dev")
    with pytest.raises(DataError, match="does not exist"):
        environment(str(tmp_path / "none.json")).tasks("dev")


@needs_data
def test_the_real_file():
    env = environment(str(REAL))
    assert {split: len(env.tasks(split)) for split in ("train", "dev", "test")} == {"train": 1170, "dev": 222, "test": 276}
    require(self_check(env, "dev"))
    assert env.label_findings() == []
