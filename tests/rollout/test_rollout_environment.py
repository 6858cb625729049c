"""An environment is checked against itself before anyone trains on it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from temper.core.errors import ConfigError, DataError
from temper.core.records import Message, Outcome, ToolCall, ToolSpec
from temper.environments import ENVIRONMENTS, load_environment
from temper.rollout.environment import PlainSession, Task, replay, require, self_check
from temper.rollout.tools import Tool, Toolbox

ADD = ToolSpec(name="add", parameters={"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}, "required": ["a", "b"]})


class Sums:
    """Sums to be worked out with a tool; `judge` decides what is accepted."""

    name, version = "sums", "sums-1"

    def __init__(self, judge=None, count=40, result='{"sum": %d}', ids="sums/%d") -> None:
        self.judge = judge or (lambda task, text: text == str(task.answer["sum"]))
        self.count, self.result, self.ids = count, result, ids

    def tasks(self, split, limit=None):
        return [self.task(split, number) for number in range(self.count)][:limit]

    def task(self, split, number):
        call = ToolCall(name="add", arguments={"a": number, "b": 100}, id="c")
        total = number + 100
        return Task(
            id=self.ids % number if "%" in self.ids else self.ids, messages=(Message(role="user", content=f"What is {number} plus 100?"),),
            tools=(ADD,), slice="add", split=split, answer={"sum": total},
            demonstration=(
                Message(role="assistant", tool_calls=(call,)), Message(role="tool", content=self.result % total, tool_call_id="c"),
                Message(role="assistant", content=str(total)),
            ),
        )  # fmt: skip

    def open(self, task):
        session = Toolbox([Tool(ADD, lambda a, b: {"sum": a + b})])
        session.close = lambda: None  # type: ignore[attr-defined]
        return session

    def verify(self, task, turns, session):
        text = turns[-1].content if turns else ""
        return Outcome(reward=float(self.judge(task, text)), checks={"right": self.judge(task, text)})


def failed(environment) -> dict[str, str]:
    return {finding.rule: finding.reason for finding in self_check(environment) if finding.status == "fail"}


def test_a_sound_environment_passes_and_its_tools_really_run():
    assert failed(Sums()) == {}
    require(self_check(Sums()))
    outcome, differences = replay(Sums(), Sums().task("dev", 3), Sums().task("dev", 3).demonstration)
    assert (outcome.reward, differences) == (1.0, [])


@pytest.mark.parametrize(
    ("environment", "rule", "told"),
    [
        (Sums(judge=lambda task, text: False), "accepts its own gold answers", "reward 0.0, failed ['right']"),
        (Sums(judge=lambda task, text: True), "refuses an empty answer", "sums/0"),
        (Sums(judge=lambda task, text: str(task.answer["sum"]) in text or "know" in text), "refuses the constant answer \"I don't know.\"", "40 of 40"),
        (Sums(judge=lambda task, text: "plus" in text or text == str(task.answer["sum"])), "refuses the prompt as an answer", "40 of 40"),
        (Sums(result='{"total": %d}'), "gold tool results are what the tools return", '{"sum": 100}'),
        (Sums(ids="same"), "task ids are unique", "stands 40 times"),
    ],
)
def test_a_hole_is_found(environment, rule, told):
    assert told in failed(environment)[rule]
    with pytest.raises(DataError, match="does not pass its own checks"):
        require(self_check(environment))


def test_an_outcome_that_changes_from_run_to_run_is_found():
    flips = iter(range(10_000))
    assert "gives equal outcomes for equal episodes" in failed(Sums(judge=lambda task, text: bool(text.isdigit() and next(flips) % 4 < 2)))


def test_no_tasks_is_a_fault_and_no_demonstration_is_unknown():
    assert "has tasks" in failed(Sums(count=0))

    class Silent(Sums):
        def task(self, split, number):
            return super().task(split, number).model_copy(update={"demonstration": ()})

    statuses = {finding.rule: finding.status for finding in self_check(Silent())}
    assert statuses["accepts its own gold answers"] == "unknown"


def test_a_plain_session_offers_nothing():
    assert "no tools" in json.loads(PlainSession().call(ToolCall(name="x", arguments={})))["error"]


def test_environments_are_found_by_name_dotted_name_and_file(tmp_path):
    assert set(ENVIRONMENTS) == {"finops", "gsm8k", "tatqa"}
    assert load_environment("finops").name == "finops"
    assert load_environment("temper.environments.finops:environment", seed=3).version.endswith("seed-3")
    (tmp_path / "mine.py").write_text("class E:\n    name = 'mine'\n\ndef make(size=1):\n    e = E()\n    e.version = f'v{size}'\n    return e\n")
    assert load_environment(f"{tmp_path}/mine.py:make", size=4).version == "v4"


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("finop", {}, "did you mean 'finops'"),
        ("chess", {}, "use one of finops, gsm8k, tatqa"),
        ("no_such_package.module:make", {}, "cannot be imported"),
        ("temper.environments.finops:factory", {}, "has no 'factory'"),
        ("missing/file.py:make", {}, "does not exist"),
        ("finops", {"sede": 1}, "unexpected keyword argument 'sede'"),
    ],
)
def test_an_environment_that_cannot_be_made_says_why(name, options, told):
    with pytest.raises(ConfigError, match=told):
        load_environment(name, **options)


def test_the_example_in_the_docs_runs_and_passes_its_own_checks(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "environments.md").read_text()
    assert len(page.splitlines()) <= 60
    example, check = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (tmp_path / "my_env.py").write_text(example)
    shop = load_environment(f"{tmp_path}/my_env.py:Shop")
    names = {"Shop": lambda: shop}
    exec(check, names)
    assert failed(shop) == {}
