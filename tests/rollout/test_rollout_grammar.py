"""Constrained output is valid, canonical, and in the template's own call format."""

from __future__ import annotations

import json

import jsonschema
import pytest

from temper.core.errors import ConfigError
from temper.core.records import Message, ToolCall, ToolSpec
from temper.rollout.engine import Engine, Request
from temper.rollout.grammar import CallFormat, Grammar

BUDGET = ToolSpec(
    name="query_budget",
    parameters={
        "type": "object",
        "properties": {"quarter": {"enum": ["Q1", "Q2"]}, "year": {"type": "integer", "minimum": 2020, "maximum": 2024}, "net": {"type": "boolean"}},
        "required": ["quarter", "year"],
        "additionalProperties": False,
    },
)
BALANCE = ToolSpec(
    name="get_balance",
    parameters={"type": "object", "properties": {"account": {"enum": ["cash", "bank"]}}, "required": ["account"], "additionalProperties": False},
)
SCHEMA = BUDGET.parameters
CALL = ToolCall(name="query_budget", arguments={"quarter": "Q1", "year": 2023}, id="callabc12")
TURNS = {
    "qwen3": ['<tool_call>\n{"name": "query_budget", "arguments": {"quarter": "Q1", "year": 2023}}\n</tool_call>'],
    "llama": ['{"name": "query_budget", "parameters": {"quarter": "Q1", "year": 2023}}'],
    "mistral": ['[TOOL_CALLS] [{"name": "query_budget", "arguments": {"quarter": "Q1", "year": 2023}, "id": "callabc12"}]'],
}


def walk(policy, grammar: Grammar, ids: list[int]) -> tuple[int, bool]:
    """How many of the tokens a grammar takes, and whether the turn may end there."""
    matcher = Engine(policy).grammars.start(grammar)
    taken = matcher.try_consume_tokens(ids)
    return taken, taken == len(ids) and matcher.is_accepting()


def ids_of(policy, text: str) -> list[int]:
    return policy.tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("family", TURNS)
def test_what_the_template_renders_for_training_is_what_the_grammar_takes(family, policy_of):
    policy = policy_of(family)
    user = Message(role="user", content="?")
    supervised = policy.template.supervise((user, Message(role="assistant", tool_calls=(CALL,))), (BUDGET, BALANCE))
    trained = [token for token, kept in zip(supervised.tokens, supervised.mask, strict=True) if kept]
    *turn, end = trained
    matcher = Engine(policy).grammars.start(Grammar.tool_call([BUDGET, BALANCE]))
    assert matcher.try_consume_tokens(turn) == len(turn)
    assert matcher.is_accepting()
    assert end in policy.template.stop_ids
    assert matcher.consume_token(end)
    assert matcher.is_stopped()
    assert not matcher.is_error()


@pytest.mark.parametrize("family", TURNS)
def test_calls_are_held_to_name_and_schema_and_text_stays_free(family, policy_of):
    policy, grammar = policy_of(family), Grammar.tool_call([BUDGET, BALANCE])
    for turn in TURNS[family]:
        assert walk(policy, grammar, ids_of(policy, turn))[1]
        for wrong in (turn.replace("Q1", "Q5"), turn.replace("query_budget", "query_money"), turn.replace("2023", "1999"), turn.replace(", \"year\": 2023", "")):
            assert not walk(policy, grammar, ids_of(policy, wrong))[1], wrong
        assert not walk(policy, grammar, ids_of(policy, turn[:-3]))[1]
    assert walk(policy, grammar, ids_of(policy, "The budget is 42."))[1]
    assert not walk(policy, grammar, [])[1]  # an empty answer is none
    assert not walk(policy, Grammar.tool_call([BALANCE], text=False), ids_of(policy, "The budget is 42."))[1]


def test_text_before_a_call_and_a_second_call_after_it(policy_of):
    policy, grammar = policy_of("qwen3"), Grammar.tool_call([BUDGET, BALANCE])
    second = '\n<tool_call>\n{"name": "get_balance", "arguments": {"account": "cash"}}\n</tool_call>'
    assert walk(policy, grammar, ids_of(policy, TURNS["qwen3"][0] + second))[1]
    assert not walk(policy, grammar, ids_of(policy, "Let me see. " + TURNS["qwen3"][0]))[1]  # text cannot smuggle in an unchecked call


def test_tools_beside_a_schema_leave_a_call_or_the_answer(policy_of):
    policy = policy_of("qwen3")
    grammar = Grammar.tool_call([BALANCE], schema=SCHEMA)
    assert walk(policy, grammar, ids_of(policy, '{"quarter": "Q2", "year": 2021, "net": true}'))[1]
    assert walk(policy, grammar, ids_of(policy, '<tool_call>\n{"name": "get_balance", "arguments": {"account": "bank"}}\n</tool_call>'))[1]
    assert not walk(policy, grammar, ids_of(policy, "The answer is 42."))[1]


@pytest.mark.parametrize("family", ["qwen3", "llama", "mistral", "gemma"])
def test_sampling_under_a_schema_is_always_valid_and_canonical(family, policy_of):
    policy = policy_of(family)
    prompt = ids_of(policy, "Give me JSON.")
    rows = Engine(policy, max_rows=8).sample([Request(prompt, 120, 1.5, seed=seed, grammar=Grammar.json_schema(SCHEMA)) for seed in range(24)])
    texts = {policy.template.parse(row.token_ids).content for row in rows}
    assert all(row.finish_reason == "stop" for row in rows)
    assert len(texts) > 5
    for text in texts:
        value = json.loads(text)
        jsonschema.validate(value, SCHEMA)
        assert text == json.dumps(value)  # one form of white space
        assert list(value) == [key for key in SCHEMA["properties"] if key in value]  # the schema's order


def test_rows_with_and_without_a_grammar_share_a_batch(policy_of):
    policy = policy_of("qwen3")
    prompt = ids_of(policy, "Give me JSON.")
    bound = [Request(prompt, 60, 1.0, seed=seed, grammar=Grammar.json_schema(SCHEMA)) for seed in range(4)]
    free = [Request(prompt, 10, 1.0, seed=seed) for seed in range(4)]
    mixed = Engine(policy).sample([request for pair in zip(bound, free, strict=True) for request in pair])
    assert [row.token_ids for row in mixed[::2]] == [row.token_ids for row in Engine(policy).sample(bound)]
    assert [row.token_ids for row in mixed[1::2]] == [row.token_ids for row in Engine(policy).sample(free)]


def test_a_forced_token_has_logprob_zero(policy_of):
    policy = policy_of("qwen3")
    schema = {"const": "yes"}
    row = Engine(policy).sample([Request(ids_of(policy, "?"), 20, 1.0, grammar=Grammar.json_schema(schema), keep_support=True)])[0]
    assert policy.template.parse(row.token_ids).content == '"yes"'
    assert row.support is not None
    for logprob, allowed in zip(row.logprobs, row.support, strict=True):
        assert allowed is not None
        if len(allowed) == 1:
            assert logprob == pytest.approx(0.0, abs=1e-6)


def test_the_call_format_is_read_off_the_template(policy_of):
    policy = policy_of("llama")
    assert CallFormat.of(policy.template, ["<|eot_id|>", "<|eom_id|>"]).between is None  # Llama 3 takes one call a turn
    with pytest.raises(ConfigError, match="cannot be constrained with this chat template"):
        Engine(policy_of("gemma")).grammars.start(Grammar.tool_call([BUDGET]))


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: Grammar.json_schema({"type": "objekt"}), "no JSON Schema"),
        (lambda: Grammar.json_schema({"type": "string", "pattern": "(?=a)b"}), "cannot be enforced"),
        (lambda: Grammar.json_schema({"not": {"type": "string"}}), "cannot be enforced"),
        (lambda: Grammar.tool_call([]), "at least one tool"),
    ],
)
def test_a_grammar_that_cannot_be_enforced_says_so_before_anything_is_sampled(make, told):
    with pytest.raises(ConfigError, match=told):
        make()


def test_a_finished_answer_is_held_against_the_schema_once_more(policy_of):
    assert Grammar.json_schema(SCHEMA).fault('{"quarter": "Q1", "year": 2023}') is None
    assert "required" in (Grammar.json_schema(SCHEMA).fault('{"quarter": "Q1"}') or "")


def test_grammars_are_equal_by_content_and_keep_the_order_of_keys():
    assert Grammar.json_schema(SCHEMA) == Grammar.json_schema(json.loads(json.dumps(SCHEMA)))
    turned = {**SCHEMA, "properties": dict(reversed(SCHEMA["properties"].items()))}
    assert Grammar.json_schema(SCHEMA) != Grammar.json_schema(turned)
