"""GSM8K: on two problems written here, and on the real files where they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from temper.core.errors import DataError
from temper.core.records import Message
from temper.environments.gsm8k import environment
from temper.rollout.environment import require, self_check

REAL = Path(__file__).parents[3] / "shared" / "data" / "gsm8k"
needs_data = pytest.mark.skipif(not REAL.is_dir(), reason=f"the GSM8K files are not at {REAL}")
PROBLEM = {"question": "A robe takes 2 bolts of blue fiber and half that much white. How many bolts?", "answer": "White: 2/2=<<2/2=1>>1.\nTotal 2+1=<<2+1=3>>3.\n#### 3"}


@pytest.fixture
def small(tmp_path):
    rows = [PROBLEM | {"question": f"{PROBLEM['question']} ({number})"} for number in range(200)]
    for name, chosen in (("train.jsonl", rows[:150]), ("test.jsonl", rows[150:])):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in chosen))
    return tmp_path


def answered(env, text: str):
    return env.verify(env.tasks("test", 1)[0], (Message(role="assistant", content=text),), env.open(env.tasks("test", 1)[0]))


def test_splits_are_apart_and_dev_is_a_seeded_slice_of_train(small):
    env = environment(str(small))
    train, dev, test = ({task.messages[1].content for task in env.tasks(split)} for split in ("train", "dev", "test"))
    assert (len(train) + len(dev), len(test)) == (150, 50)
    assert not train & dev
    assert 1 <= len(dev) <= 20  # a twentieth of 150, give or take
    assert dev == {task.messages[1].content for task in environment(str(small)).tasks("dev")}
    assert dev != {task.messages[1].content for task in environment(str(small), seed=1).tasks("dev")}
    assert len(env.tasks("train", 3)) == 3


def test_the_gold_is_hidden_and_the_demonstration_has_no_calculator_marks(small):
    task = environment(str(small)).tasks("test", 1)[0]
    assert "####" not in task.messages[1].content
    assert task.answer == {"number": "3"}
    assert task.demonstration[0].content == "White: 2/2=1.\nTotal 2+1=3.\n#### 3"


@pytest.mark.parametrize(
    ("text", "reward", "marked", "last"),
    [
        ("2 + 1 = 3\n#### 3", 1.0, True, True),
        ("#### 3.0", 1.0, True, True),
        (r"\boxed{3}", 1.0, True, True),
        ("The total is 3", 0.0, False, True),  # right, and not in the form that was asked for: told apart
        ("#### 4", 0.0, True, False),
        ("", 0.0, False, False),
    ],
)
def test_format_and_arithmetic_are_told_apart(text, reward, marked, last, small):
    outcome = answered(environment(str(small)), text)
    assert outcome.reward == reward
    assert (outcome.checks["answer_marked"], outcome.checks["last_number_correct"]) == (marked, last)


def test_it_passes_its_own_checks(small):
    require(self_check(environment(str(small)), "test"))


def test_a_malformed_line_is_named(small):
    path = small / "test.jsonl"
    path.write_text(path.read_text().replace("\n", '\n{"question": "x"}\n', 1))
    with pytest.raises(DataError, match=r"test\.jsonl:2"):
        environment(str(small)).tasks("test")
    path.write_text(json.dumps({"question": "x", "answer": "no mark"}) + "\n")
    with pytest.raises(DataError, match="line 1"):
        environment(str(small)).tasks("test")
    with pytest.raises(DataError, match="does not exist"):
        environment("nowhere").tasks("test")


@needs_data
def test_the_real_files():
    env = environment(str(REAL))
    assert {split: len(env.tasks(split)) for split in ("train", "dev", "test")} == {"train": 7093, "dev": 380, "test": 1319}
    require(self_check(env, "dev"))
