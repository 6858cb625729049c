"""The engine samples what the model alone would: whatever shares the batch, the cache or the prompt."""

from __future__ import annotations

import random

import pytest
import torch

from temper.core.errors import ConfigError, DataError
from temper.core.records import Sampled
from temper.data.batch import collate
from temper.data.sequence import Sequence
from temper.policy.adapters import LoraConfig
from temper.rollout.engine import Engine, Request, Stats
from temper.rollout.grammar import Grammar
from tests.checkpoints import FAMILIES

CLOSE = 1e-5
NEVER_STOP: frozenset[int] = frozenset()
SCHEMA = {"type": "object", "properties": {"a": {"enum": ["x", "yy"]}, "b": {"type": "boolean"}}, "required": ["a", "b"], "additionalProperties": False}


def apart(first, second) -> float:
    """The largest distance of log-probs; infinite where tokens differ."""
    assert len(first) == len(second)
    if any(one.token_ids != two.token_ids for one, two in zip(first, second, strict=True)):
        return float("inf")
    return max(abs(a - b) for one, two in zip(first, second, strict=True) for a, b in zip(one.logprobs, two.logprobs, strict=True))


def requests_for(policy, prompts, **changes) -> list[Request]:
    rng = random.Random(1)
    return [Request(prompt, rng.randrange(2, 30), seed=number, **changes) for number, prompt in enumerate(prompts)]


def trained_logprobs(policy, sampled, temperature=1.0, adapter=None) -> list[float]:
    """What the learner computes for the sampled tokens."""
    tokens = [*sampled.prompt_ids, *sampled.token_ids]
    weights = [0.0] * len(sampled.prompt_ids) + [1.0] * len(sampled.token_ids)
    support = None if sampled.support is None else [None] * len(sampled.prompt_ids) + list(sampled.support)
    batch = collate([Sequence(tokens, weights, support=support, adapter=adapter, record="r")], policy.template.pad_id)
    with torch.no_grad():
        scores = policy.token_logprobs(batch, temperature=temperature)
    return scores.logprobs_B_T[0, len(sampled.prompt_ids) : len(tokens)].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_batch_equals_rows_alone_and_transformers(family, policy_of, prompts_of):
    policy = policy_of(family)
    requests = requests_for(policy, prompts_of(policy))
    together = Engine(policy, max_rows=5).sample(requests)  # fewer rows than requests: rows join and leave
    alone = [Engine(policy, max_rows=1).sample([request])[0] for request in requests]
    assert apart(together, alone) < CLOSE
    for request, row in zip(requests, together, strict=True):
        made = policy.model.generate(
            torch.tensor([request.prompt_ids]), attention_mask=torch.ones(1, len(request.prompt_ids)), max_new_tokens=request.max_tokens,
            do_sample=False, pad_token_id=0, eos_token_id=sorted(policy.template.stop_ids),
        )  # fmt: skip
        assert tuple(made[0, len(request.prompt_ids) :].tolist()) == row.token_ids


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_the_lean_pass_gives_what_the_model_itself_gives(family, policy_of, prompts_of):
    policy = policy_of(family)
    requests = requests_for(policy, prompts_of(policy), temperature=1.0)
    lean, plain = Engine(policy, max_rows=6), Engine(policy, max_rows=6)
    assert lean.lean is not None
    plain.lean = None
    assert apart(lean.sample(requests), plain.sample(requests)) < CLOSE


def test_a_model_of_another_shape_takes_its_own_pass(policy_of):
    assert Engine(policy_of("gemma")).lean is None  # Gemma scales embeddings and adds one to its norms


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_logprobs_are_those_the_learner_computes(family, temperature, policy_of, prompts_of):
    policy = policy_of(family)
    for row in Engine(policy).sample(requests_for(policy, prompts_of(policy), temperature=temperature)):
        assert row.logprobs == pytest.approx(trained_logprobs(policy, row, temperature), abs=CLOSE)


@pytest.mark.parametrize("restricted", [{"top_k": 5}, {"top_p": 0.8}, {"top_k": 7, "top_p": 0.9}, {"grammar": Grammar.json_schema(SCHEMA)}])
def test_restricted_sampling_is_ratio_one_over_its_support(restricted, policy_of, prompts_of):
    policy = policy_of("qwen3")
    rows = Engine(policy).sample(requests_for(policy, prompts_of(policy), temperature=1.0, keep_support=True, **restricted))
    for row in rows:
        assert row.support is not None
        for token, allowed in zip(row.token_ids, row.support, strict=True):
            assert allowed is None or (-1 - token not in allowed if allowed[0] < 0 else token in allowed)
        assert row.logprobs == pytest.approx(trained_logprobs(policy, row), abs=CLOSE)
    # Without the support the ratio is off by the mass that was cut away: the test above could fail.
    unrestricted = [row.model_copy(update={"support": None}) for row in rows]
    assert max(abs(a - b) for row in unrestricted for a, b in zip(row.logprobs, trained_logprobs(policy, row), strict=True)) > 0.1


def test_a_support_is_the_shorter_of_what_was_allowed_and_what_was_not(policy_of):
    """Inside a JSON string a grammar allows nearly every token: listed, one token would take as many numbers as a vocabulary has."""
    policy = policy_of("qwen3")
    request = Request(policy.tokenizer.encode("Say it."), 40, 1.0, seed=3, grammar=Grammar.json_schema({"type": "string"}), keep_support=True)
    (row,) = Engine(policy).sample([request])
    vocabulary = policy.model.config.get_text_config().vocab_size
    assert row.support is not None
    listed, left_out = ([allowed for allowed in row.support if allowed and (allowed[0] < 0) == negative] for negative in (False, True))
    assert listed  # the opening quote
    assert left_out  # the inside
    assert max(len(allowed) for allowed in listed + left_out) <= vocabulary / 2
    assert all(-vocabulary <= number < 0 for allowed in left_out for number in allowed)
    back = Sampled.model_validate_json(row.model_dump_json())
    assert back == row
    assert back.logprobs == pytest.approx(trained_logprobs(policy, back), abs=CLOSE)


def test_what_a_row_draws_does_not_depend_on_its_neighbours_or_order(policy_of, prompts_of):
    policy = policy_of("qwen3")
    requests = requests_for(policy, prompts_of(policy), temperature=1.0)
    first = Engine(policy, max_rows=4).sample(requests)
    backwards = Engine(policy, max_rows=9).sample(requests[::-1])[::-1]
    assert apart(first, backwards) < CLOSE
    reseeded = [Request(r.prompt_ids, r.max_tokens, 1.0, seed=r.seed + 1000) for r in requests]
    assert apart(first, Engine(policy).sample(reseeded)) == float("inf")


def test_a_mixed_adapter_batch_gives_each_row_what_its_adapter_alone_gives(policy_of, prompts_of):
    policy = policy_of("qwen3")
    names = ["one", "two", None]
    try:
        for name in names[:2]:
            policy.add_lora(name, LoraConfig(rank=4))
            torch.manual_seed(len(name))
            with torch.no_grad():
                for path, weight in policy.model.named_parameters():
                    if f".{name}.B" in path:
                        weight.normal_(std=0.1)
        plain = requests_for(policy, prompts_of(policy), temperature=1.0)
        mixed = [Request(r.prompt_ids, r.max_tokens, 1.0, seed=r.seed, adapter=names[n % 3]) for n, r in enumerate(plain)]
        together = Engine(policy, max_rows=6).sample(mixed)
        alone = [Engine(policy).sample([request])[0] for request in mixed]
        assert apart(together, alone) < CLOSE
        assert [row.adapter for row in together] == [request.adapter for request in mixed]
        assert apart(together, Engine(policy).sample(plain)) == float("inf")  # the adapters do something
        for row in together:
            assert row.logprobs == pytest.approx(trained_logprobs(policy, row, adapter=row.adapter), abs=CLOSE)
        # Equal prompts of two adapters share no keys and values, although their tokens are the same.
        prompt = plain[7].prompt_ids
        engine = Engine(policy, keep_prefixes=True)
        pair = [Request(prompt, 8, adapter="one"), Request(prompt, 8, adapter="two")]
        assert apart(engine.sample(pair), [Engine(policy).sample([request])[0] for request in pair]) < CLOSE
        assert engine.stats.reused_tokens == 0
        with pytest.raises(ConfigError, match="three"):
            engine.sample([Request(prompt, 4, adapter="three")])
    finally:
        for name in list(policy.adapters()):
            policy.remove_adapter(name)


def test_equal_prompts_and_shared_prefixes_are_computed_once(policy_of):
    policy = policy_of("qwen3")
    prompt = list(range(30, 130))
    engine = Engine(policy)
    engine.sample([Request(prompt, 4, 1.0, seed=seed) for seed in range(8)])
    # 99 tokens are prefilled (the last one is fed by the first step), the other seven rows copy them.
    assert (engine.stats.prefilled_tokens, engine.stats.reused_tokens) == (99, 7 * 99)
    engine.stats = Stats()
    engine.sample([Request([*prompt, *range(200, 210)], 4), Request([*prompt, *range(300, 320)], 4)])
    # 109 for the first, and 19 after the 100 shared ones for the second.
    assert (engine.stats.prefilled_tokens, engine.stats.reused_tokens) == (109 + 19, 100)


def test_prefixes_are_kept_between_calls_only_where_asked_and_only_for_the_same_weights(policy_of):
    policy = policy_of("llama")
    request = [Request(list(range(30, 90)), 3)]
    forgetful, keeping = Engine(policy), Engine(policy, keep_prefixes=True)
    for engine in (forgetful, keeping):
        engine.sample(request)
        engine.sample(request)
    assert (forgetful.stats.reused_tokens, keeping.stats.reused_tokens) == (0, 59)
    weight = next(iter(policy.model.get_decoder().layers)).self_attn.v_proj.weight
    before = keeping.sample(request)
    with torch.no_grad():
        weight.mul_(-1)  # as an optimizer step would, in place
    try:
        assert apart(keeping.sample(request), Engine(policy).sample(request)) < CLOSE
        assert apart(before, keeping.sample(request)) > 1e-3
        policy.version += 1
        keeping.stats = Stats()
        assert keeping.sample(request)[0].version == str(policy.version)
        assert keeping.stats.reused_tokens == 0
    finally:
        policy.version -= 1
        with torch.no_grad():
            weight.mul_(-1)


@pytest.mark.parametrize("family", ["qwen3", "gemma"])
def test_a_conversation_equals_its_turns_sampled_one_by_one(family, policy_of, prompts_of):
    policy = policy_of(family)
    requests = requests_for(policy, prompts_of(policy), temperature=1.0)
    added = [[number + 21, number + 22, number + 23] for number in range(len(requests))]

    def following(index, sampled, turn):
        if turn > index % 3:
            return None
        return Request([*sampled.prompt_ids, *sampled.token_ids, *added[index]], 6 + index, 1.0, seed=100 * turn + index)

    turns = [0] * len(requests)

    def reply(index, sampled):
        turns[index] += 1
        return following(index, sampled, turns[index])

    engine = Engine(policy, max_rows=5)
    together = engine.converse(requests, reply)
    for index, request in enumerate(requests):
        one_by_one, turn, following_request = [], 0, request
        while following_request is not None:
            one_by_one.append(Engine(policy, max_rows=1).sample([following_request])[0])
            turn += 1
            following_request = following(index, one_by_one[-1], turn)
        assert apart(together[index], one_by_one) < CLOSE
    # Every later turn reuses what its conversation had; only the last sampled token and what was added is new.
    later = [len(turns) - 1 for turns in together]
    assert engine.stats.prefilled_tokens <= sum(len(r.prompt_ids) for r in requests) + 3 * sum(later)


def test_a_rewritten_history_is_computed_again_where_it_differs(policy_of):
    policy = policy_of("qwen3")
    first = Request(list(range(30, 80)), 5)
    rewritten = Request([*range(30, 50), *range(100, 140)], 5)
    turns = Engine(policy).converse([first], lambda index, sampled: rewritten if len(sampled.prompt_ids) == 50 else None)
    assert apart([turns[0][1]], Engine(policy).sample([rewritten])) < CLOSE


def test_finish_reasons_and_stop_tokens(policy_of):
    policy = policy_of("qwen3")
    prompt = list(range(30, 60))
    free = Engine(policy).sample([Request(prompt, 12, stop_ids=NEVER_STOP)])[0]
    assert free.finish_reason == "length"
    assert len(free.token_ids) == len(free.logprobs) == 12
    stop = free.token_ids[5]
    stopped = Engine(policy).sample([Request(prompt, 12, stop_ids=frozenset([stop]))])[0]
    # The stop token belongs to the turn: it is what is trained. The reason is not guessed from the last id.
    assert stopped.finish_reason == "stop"
    assert stopped.token_ids == free.token_ids[: free.token_ids.index(stop) + 1]
    at_limit = Engine(policy).sample([Request(prompt, len(stopped.token_ids), stop_ids=frozenset([stop]))])[0]
    assert at_limit.finish_reason == "stop"


def test_broken_weights_end_a_row_as_an_error(policy_of):
    policy = policy_of("llama")
    weight = policy.model.get_decoder().norm.weight
    kept = weight.detach().clone()
    engine = Engine(policy)
    with torch.no_grad():
        weight.fill_(float("nan"))
    try:
        row = engine.sample([Request(list(range(30, 40)), 5)])[0]
    finally:
        with torch.no_grad():
            weight.copy_(kept)
    assert (row.finish_reason, row.token_ids) == ("error", ())


def test_sampling_leaves_the_policy_as_it_was(policy_of):
    policy = policy_of("qwen3")
    policy.model.train()
    try:
        Engine(policy).sample([Request([30, 31, 32], 2)])
        assert policy.model.training
    finally:
        policy.model.eval()


@pytest.mark.parametrize(
    ("request_", "told"),
    [
        (Request([], 5), "request 0 has an empty prompt"),
        (Request([30], 0), "asks for 0 tokens"),
        (Request([30] * 2040, 50), "exceed the context of 2048"),
        (Request([30], 5, temperature=-1.0), "temperature -1.0"),
        (Request([30], 5, top_p=0.0), "top_p 0.0"),
    ],
)
def test_a_request_that_cannot_be_sampled_says_why(request_, told, policy_of):
    with pytest.raises(DataError, match=told):
        Engine(policy_of("qwen3")).sample([request_])


def test_models_that_slots_cannot_hold_are_refused(policy_of):
    policy = policy_of("qwen3")
    config = policy.model.config
    kept = config.layer_types
    config.layer_types = ["linear_attention", "full_attention"]
    try:
        with pytest.raises(ConfigError, match="linear_attention"):
            Engine(policy)
    finally:
        config.layer_types = kept


def test_memory_bounds_the_rows(policy_of):
    policy = policy_of("qwen3")
    # A position takes 2 (keys, values) × 2 layers × 2 heads × 16 × 4 bytes = 512 bytes; 100 positions 51,200.
    assert Engine(policy, max_rows=64, memory_bytes=200_000).rows_for(100) == 3
    small = Engine(policy, max_rows=64, memory_bytes=1)
    requests = [Request(list(range(30, 40 + number)), 4) for number in range(3)]
    assert apart(small.sample(requests), Engine(policy).sample(requests)) < CLOSE
    assert small.cache.slots == 1


def test_nothing_to_sample_is_nothing_sampled(policy_of):
    assert Engine(policy_of("qwen3")).sample([]) == []
