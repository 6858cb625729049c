"""Episodes: tools really run, tokens in and tokens out, failures stay with the task they happened in."""

from __future__ import annotations

import json

import pytest
import torch

from temper.core.errors import DataError
from temper.core.records import Message, Outcome, Sampled, ToolCall, ToolSpec
from temper.data.batch import collate
from temper.data.sequence import episode_sequence
from temper.rollout.engine import Engine
from temper.rollout.environment import Task
from temper.rollout.episodes import collect
from temper.rollout.tools import Tool, Toolbox, ToolFailure

LOOKUP = ToolSpec(name="lookup", parameters={"type": "object", "properties": {"key": {"enum": ["a", "b"]}}, "required": ["key"], "additionalProperties": False})


class Ledger:
    """Counts what happens to it."""

    def __init__(self, environment, task) -> None:
        self.environment, self.closed, self.calls = environment, False, 0
        self.box = Toolbox([Tool(LOOKUP, self.lookup)])

    def lookup(self, key):
        self.calls += 1
        if self.environment.fault is not None:
            raise self.environment.fault
        return {"value": self.calls}

    def call(self, call):
        return self.box.call(call)

    def close(self):
        assert not self.closed
        self.closed = True


class World:
    """Three tasks that want a lookup and an answer."""

    name, version, licence, privacy = "world", "world-1", "CC0-1.0", "public"

    def __init__(self, fault=None, broken_task=None, verify=None) -> None:
        self.fault, self.broken_task, self.sessions, self._verify = fault, broken_task, [], verify

    def tasks(self, split, limit=None):
        return [
            Task(
                id=f"world/{number}", messages=(Message(role="user", content=f"Look up key a for case {number}."),), tools=(LOOKUP,),
                slice="lookup", split=split, cluster=f"c{number}", tenant="t", max_turns=3, max_tokens=40,
            )
            for number in range(3)
        ]  # fmt: skip

    def open(self, task):
        if task.id == self.broken_task:
            raise DataError("the ledger of this task is gone")
        self.sessions.append(Ledger(self, task))
        return self.sessions[-1]

    def verify(self, task, turns, session):
        if self._verify is not None:
            return self._verify(task, turns, session)
        return Outcome(reward=float(bool(session.calls)), checks={"looked_up": bool(session.calls)}, detail={"turns": len(turns)})


class Scripted:
    """Samples what it is told, through the real template: turn n of every episode is `script[n]`."""

    def __init__(self, policy, script, finish="stop") -> None:
        self.policy, self.script, self.finish, self.batches = policy, script, finish, []

    def sample(self, requests):
        self.batches.append(requests)
        turn = len(self.batches) - 1
        ids = self.policy.tokenizer.encode(self.script[turn], add_special_tokens=False)
        if self.finish == "stop":
            ids.append(min(self.policy.template.stop_ids))
        return [
            Sampled(prompt_ids=tuple(r.prompt_ids), token_ids=tuple(ids), logprobs=(0.0,) * len(ids), finish_reason=self.finish, temperature=r.temperature)
            for r in requests
        ]


def call_text(key: str) -> str:
    return f'<tool_call>\n{{"name": "lookup", "arguments": {{"key": "{key}"}}}}\n</tool_call>'


def test_a_tool_call_runs_and_its_result_is_appended_to_the_very_tokens(policy_of):
    policy, world = policy_of("qwen3"), World()
    engine = Scripted(policy, [call_text("a"), "The value is 1."])
    groups = collect(engine, world, world.tasks("dev"))
    assert [len(group) for group in groups] == [1, 1, 1]
    record = groups[0][0]
    assert [message.role for message in record.messages] == ["user", "assistant", "tool", "assistant"]
    assert record.messages[2].content == '{"value": 1}'
    assert record.messages[2].tool_call_id == record.messages[1].tool_calls[0].id
    first, second = record.sampled
    assert second.prompt_ids[: len(first.prompt_ids) + len(first.token_ids)] == first.prompt_ids + first.token_ids
    # The whole is what training would render: the same tokens, from the same messages.
    supervised = policy.template.supervise(record.messages, record.tools)
    assert list(second.prompt_ids + second.token_ids) == supervised.tokens[: len(second.prompt_ids) + len(second.token_ids)]
    assert record.outcome == Outcome(reward=1.0, checks={"looked_up": True}, detail={"turns": 3})
    assert all(session.closed for session in world.sessions)


def test_a_record_says_where_it_comes_from(policy_of):
    world = World()
    record = collect(Scripted(policy_of("qwen3"), ["No."]), world, world.tasks("test"))[2][0]
    assert (record.task_id, record.slice, record.shape) == ("world/2", "lookup", "episode")
    told = record.provenance
    assert (told.source, told.licence, told.privacy, told.split, told.tenant) == ("episode:world-1", "CC0-1.0", "public", "test", "t")
    assert (told.synthetic, told.generation_depth, told.verifier_version) == (True, 1, "world-1")
    assert told.reward_source
    assert told.generator


@pytest.mark.parametrize(
    ("turn", "told"),
    [
        (call_text("z"), "'z' is not one of"),
        ('<tool_call>\n{"name": "other", "arguments": {}}\n</tool_call>', "unknown tool 'other'"),
        ('<tool_call>\n{"name": "lookup", "arguments": "{broken"}\n</tool_call>', "not a JSON object"),
    ],
)
def test_a_wrong_call_comes_back_as_a_result_and_the_episode_goes_on(turn, told, policy_of):
    world = World()
    record = collect(Scripted(policy_of("qwen3"), [turn, "I could not."]), world, world.tasks("dev")[:1])[0][0]
    assert told in json.loads(record.messages[2].content)["error"]
    assert record.outcome.error is None
    assert record.outcome.reward == 0.0


def test_turns_are_bounded_by_the_task(policy_of):
    world = World()
    record = collect(Scripted(policy_of("qwen3"), [call_text("a")] * 9), world, world.tasks("dev")[:1])[0][0]
    assert len(record.sampled) == 3  # max_turns; the last call is not run, for nobody would read its result
    assert record.outcome.detail == {"turns": 5}


def test_a_turn_cut_short_ends_the_episode_and_is_judged(policy_of):
    world = World()
    record = collect(Scripted(policy_of("qwen3"), [call_text("a")], finish="length"), world, world.tasks("dev")[:1])[0][0]
    assert (len(record.sampled), world.sessions[0].calls, record.outcome.reward) == (1, 0, 0.0)


@pytest.mark.parametrize("fault", [ToolFailure("closed"), OSError("disk")])
def test_a_failing_tool_or_machine_is_data(fault, policy_of):
    world = World(fault=fault)
    records = collect(Scripted(policy_of("qwen3"), [call_text("a"), "Done."]), world, world.tasks("dev"))
    for (record,) in records:
        if isinstance(fault, ToolFailure):
            assert json.loads(record.messages[2].content) == {"error": "closed"}
        else:
            assert record.outcome == Outcome(error="OSError: disk")  # no reward: absent is not zero
    assert all(session.closed for session in world.sessions)


def test_a_task_that_cannot_be_opened_leaves_the_others_alone(policy_of):
    world = World(broken_task="world/1")
    records = [group[0] for group in collect(Scripted(policy_of("qwen3"), ["No."]), world, world.tasks("dev"))]
    assert [record.outcome.error for record in records] == [None, "DataError: the ledger of this task is gone", None]
    assert records[1].outcome.reward is None
    assert records[1].sampled == ()


def test_a_verifier_that_fails_is_data_and_a_bug_in_it_raises(policy_of):
    def fails(task, turns, session):
        raise DataError("no gold for this task")

    def bug(task, turns, session):
        return turns[99]

    record = collect(Scripted(policy_of("qwen3"), ["No."]), World(verify=fails), World().tasks("dev")[:1])[0][0]
    assert record.outcome.error == "DataError: no gold for this task"
    with pytest.raises(IndexError):
        collect(Scripted(policy_of("qwen3"), ["No."]), World(verify=bug), World().tasks("dev")[:1])


def test_a_full_context_ends_the_episode_as_an_error(policy_of):
    world = World()
    task = world.tasks("dev")[0].model_copy(update={"messages": (Message(role="user", content="many words " * 900),)})
    record = collect(Scripted(policy_of("qwen3"), ["No."]), world, [task])[0][0]
    assert "fills the model's context" in (record.outcome.error or "")


@pytest.mark.parametrize("restricted", [{}, {"constrained": True}, {"top_p": 0.8}, {"top_k": 5}, {"constrained": True, "top_p": 0.8}])
def test_groups_with_the_real_engine_can_be_trained_on_with_ratio_one(restricted, policy_of):
    """Whatever restricts the sampler: a row without its support would be scored over the whole vocabulary, at another ratio."""
    policy, world = policy_of("qwen3"), World()
    groups = collect(Engine(policy, max_rows=4), world, world.tasks("dev"), group=3, temperature=1.0, seed=5, **restricted)
    assert [len(group) for group in groups] == [3, 3, 3]
    assert len({record.sampled[0].token_ids for record in groups[0]}) == 3  # the seeds of a group differ
    rows = [episode_sequence(record, 1.0) for group in groups for record in group]
    batch = collate(rows, policy.template.pad_id)
    assert (batch.support is not None) == bool(restricted)
    with torch.no_grad():
        found = policy.token_logprobs(batch).logprobs_B_T
    for number, row in enumerate(rows):
        assert row.old_logprobs is not None
        assert found[number, : len(row.tokens)].tolist() == pytest.approx(row.old_logprobs, abs=1e-5)


def test_equal_seeds_give_equal_episodes_in_other_company(policy_of):
    policy, world = policy_of("qwen3"), World()
    tasks = world.tasks("dev")
    together = collect(Engine(policy, max_rows=2), world, tasks, group=2, temperature=1.0, seed=5)
    alone = collect(Engine(policy), world, tasks[1:2], group=2, temperature=1.0, seed=5)
    assert [record.messages for record in together[1]] == [record.messages for record in alone[0]]
    other = collect(Engine(policy), world, tasks[1:2], group=2, temperature=1.0, seed=6)
    assert [record.messages for record in other[0]] != [record.messages for record in alone[0]]


def test_an_engine_and_a_plain_sampler_give_the_same_episodes(policy_of):
    policy, world = policy_of("qwen3"), World()

    class Plain:
        def __init__(self) -> None:
            self.policy, self.engine = policy, Engine(policy)

        def sample(self, requests):
            return self.engine.sample(requests)

    both = [collect(engine, world, world.tasks("dev"), temperature=1.0, constrained=True) for engine in (Engine(policy), Plain())]
    assert [r.messages for g in both[0] for r in g] == [r.messages for g in both[1] for r in g]


def test_finops_with_the_real_engine_needs_nothing_but_its_name(policy_of):
    from temper.environments import load_environment

    finops = load_environment("finops")
    tasks = finops.tasks("dev", limit=1)
    groups = collect(Engine(policy_of("qwen3")), finops, tasks, constrained=True, temperature=1.0, adapter_of=lambda task: None)
    assert len(groups) == len(tasks)
    assert all(record.outcome.error is None and record.outcome.reward is not None for group in groups for record in group)


def test_a_call_keeps_the_id_that_the_model_wrote(policy_of):
    turn = '[TOOL_CALLS] [{"name": "lookup", "arguments": {"key": "a"}, "id": "abcdefgh1"}]'
    world = World()
    record = collect(Scripted(policy_of("mistral"), [turn, "One."]), world, world.tasks("dev")[:1])[0][0]
    assert record.messages[1].tool_calls == (ToolCall(name="lookup", arguments={"key": "a"}, id="abcdefgh1"),)
    assert record.messages[2].tool_call_id == "abcdefgh1"
