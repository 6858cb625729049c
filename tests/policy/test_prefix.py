"""Packed rows and rows that share a beginning against rows one by one: same losses, same gradients; and who must be padded."""

from __future__ import annotations

import dataclasses
import logging
import random
import re

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from temper.data.batch import Batch, collate
from temper.data.layout import Span, lay_out
from temper.data.sequence import Sequence
from temper.policy import attention, blocks, losses, varlen
from temper.policy.adapters import LoraConfig
from temper.policy.attention import Seen
from temper.policy.model import Policy
from temper.policy.scalar_head import RewardModel
from temper.train import credit, preference, reward, rl
from tests.checkpoints import FAMILIES, tiny_checkpoint, tiny_tokenizer

KINDS = ("padded", "packed", "shared")
PLACES = {"out": "o", "base": "b"}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return {family: str(tiny_checkpoint(family, tmp_path_factory.mktemp(family))) for family in FAMILIES}


def load(path: str, *, window: int | None = None) -> Policy:
    """A policy whose logits have something to lose; with `window`, one whose layers see that many tokens."""
    policy = Policy.load(path, precision="float32", device="cpu", verify=False)
    if window is not None:
        config = AutoConfig.from_pretrained(path, sliding_window=window)
        torch.manual_seed(0)
        policy = Policy(AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval(), policy.tokenizer)
    with torch.no_grad():
        for weight in policy.model.parameters():
            weight.mul_(3.0) if weight.ndim == 2 else None
    return policy


def tokens(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(10, 400) for _ in range(count)]


def answers(prompts: list[list[int]], each: int, *, seed: int = 0, **streams) -> list[Sequence]:
    """`each` answers to every prompt, of 2 to 12 tokens; `streams` are drawn in [-1, 0) where something is trained."""
    rng = random.Random(seed)
    rows = []
    for number, prompt in enumerate(prompts):
        for _ in range(each):
            answer = tokens(rng, rng.randint(2, 12))
            drawn = {name: [0.0] * len(prompt) + [-rng.random() for _ in answer] for name, wanted in streams.items() if wanted}
            rows.append(Sequence([*prompt, *answer], [0.0] * len(prompt) + [1.0] * len(answer), group=str(number), record=str(number), **drawn))
    return rows


def prompts(seed: int = 0, *, system: int = 0) -> list[list[int]]:
    """Three prompts of 70, 24 and 3 tokens after a common start of `system` tokens; the last is too short to share."""
    rng = random.Random(seed)
    start = tokens(rng, system)
    return [[*start, *tokens(rng, length)] for length in (70, 24, 3)]


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    found = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    return found


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Equal to 1e-5 of each gradient's size."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5 * max(1.0, float(value.abs().max())), msg=lambda text, name=name: f"{name}: {text}")


def compare(model: torch.nn.Module, loss, batches: dict[str, list[Batch]]) -> None:
    """`loss` of each entry of `batches` and its gradients are those of the first."""
    expected = None
    for name, parts in batches.items():
        total = sum(loss(part).total for part in parts)
        total.backward()
        found = float(total.detach()), gradients(model)
        if expected is None:
            expected = found
        assert found[0] == pytest.approx(expected[0], rel=1e-5, abs=1e-5), name
        same(found[1], expected[1])


def collated(rows: list[Sequence], unit: int) -> dict[str, list[Batch]]:
    """`unit` rows at a time (one by one), and all in one batch of each kind."""
    apart = {"one by one": [collate(rows[at : at + unit], 0) for at in range(0, len(rows), unit)]}
    return apart | {kind: [collate(rows, 0, kind)] for kind in KINDS}


@pytest.mark.parametrize("family", FAMILIES)
def test_fine_tuning_is_the_same_in_every_layout(family, checkpoints):
    policy = load(checkpoints[family])
    batches = collated(answers(prompts(system=20), 2), 1)
    assert batches["packed"][0].layout is not None
    assert batches["shared"][0].work.positions < batches["packed"][0].work.positions < batches["padded"][0].work.positions
    compare(policy.model, policy.cross_entropy, batches)


@pytest.mark.parametrize("family", FAMILIES)
def test_pairs_are_the_same_in_every_layout(family, checkpoints):
    policy = load(checkpoints[family])
    cfg = preference.Config(**PLACES, data="d", sft_mix=0.3)
    rows = answers(prompts(), 2, ref_logprobs=True)
    compare(policy.model, lambda batch: preference.pair_loss(policy, batch, cfg), collated(rows, 2))


@pytest.mark.parametrize("family", FAMILIES)
def test_groups_are_the_same_in_every_layout(family, checkpoints):
    policy = load(checkpoints[family])
    cfg = rl.Config(**PLACES, environment="e", kl=0.1)
    rows = answers(prompts(), 4, advantages=True, old_logprobs=True)
    loss = credit.policy_loss(policy, policy.clone_reference(), cfg)
    compare(policy.model, loss, collated(rows, 1))


@pytest.mark.parametrize("family", FAMILIES)
def test_rewards_are_read_at_the_last_token_of_each_branch(family, checkpoints):
    judge = RewardModel(load(checkpoints[family]))
    torch.nn.init.normal_(judge.model.score.weight, generator=torch.Generator().manual_seed(0))
    cfg = reward.Config(**PLACES, data="d")
    compare(judge.model, lambda batch: reward.reward_loss(judge, batch, cfg), collated(answers(prompts(), 2), 2))


@pytest.mark.parametrize("family", ["mistral"])
@pytest.mark.parametrize("window", [1, 8, 30, 64, 200])
def test_a_sliding_window_goes_across_the_seam_of_a_shared_prompt(family, window, checkpoints):
    """A prompt of 90 tokens: windows that end in the branch, in the prompt, at a block's edge, before everything."""
    policy = load(checkpoints[family], window=window)
    assert policy.kind() == "shared"
    compare(policy.model, policy.cross_entropy, collated(answers(prompts(system=20), 2), 1))


def test_every_adapter_of_a_batch_has_a_row_of_its_own(checkpoints):
    policy = load(checkpoints["qwen3"])
    for name in ("a", "b"):
        policy.add_lora(name, LoraConfig(rank=3))
    with torch.no_grad():
        for number, weight in enumerate(policy.trainable_parameters().values()):
            weight.normal_(std=0.05, generator=torch.Generator().manual_seed(number))
    rows = [dataclasses.replace(row, adapter=adapter) for row, adapter in zip(answers(prompts(), 4), ["a", None, "b", "a"] * 3, strict=True)]
    batches = collated(rows, 1)
    assert batches["shared"][0].layout.adapters == ["a", None, "b"]
    compare(policy.model, policy.cross_entropy, batches)


def test_the_order_of_branches_and_what_stands_in_the_padding_change_nothing(checkpoints):
    policy = load(checkpoints["llama"])
    rows = answers(prompts(), 4, old_logprobs=True)
    order = random.Random(1).sample(range(len(rows)), len(rows))
    expected_B_T = policy.token_logprobs(collate(rows, 0, "shared")).logprobs_B_T
    found_B_T = policy.token_logprobs(collate([rows[at] for at in order], 0, "shared")).logprobs_B_T
    torch.testing.assert_close(found_B_T, expected_B_T[order], atol=1e-5, rtol=1e-5)
    batch = collate(rows, 0, "shared")
    batch.old_logprobs_B_T[~batch.mask_B_T] = float("nan")
    batch.tokens_B_T[~batch.attention_B_T] = 300
    advantages_B_T = torch.ones_like(batch.weights_B_T).where(batch.mask_B_T, float("nan"))
    total = losses.clipped_pg(policy.token_logprobs(batch).logprobs_B_T, batch.old_logprobs_B_T, advantages_B_T, batch.mask_B_T).total
    total.backward()
    assert torch.isfinite(total)
    assert all(torch.isfinite(gradient).all() for gradient in gradients(policy.model).values())


def test_garbage_in_the_padding_of_a_layout_reaches_nothing(checkpoints):
    """Two adapters of unequal length: the shorter row is padded; NaN in the embedding of its padding stays there."""
    policy = load(checkpoints["llama"])
    policy.add_lora("a", LoraConfig(rank=2))
    long, short = answers(prompts(), 1)[:2]
    rows = [dataclasses.replace(long, adapter="a"), dataclasses.replace(short, adapter="a"), short]
    expected_B_T = policy.token_logprobs(collate(rows, 1, "shared")).logprobs_B_T
    with torch.no_grad():
        policy.model.get_input_embeddings().weight[1] = float("nan")
    batch = collate(rows, 1, "shared")
    assert 1 in batch.layout.tokens_R_L
    assert torch.equal(policy.token_logprobs(batch).logprobs_B_T, expected_B_T)


def test_what_is_recomputed_sees_what_it_saw(checkpoints):
    policy = load(checkpoints["mistral"], window=30)
    batch = collate(answers(prompts(system=20), 2), 0, "shared")
    policy.cross_entropy(batch).total.backward()
    expected = gradients(policy.model)
    policy.recompute = True
    policy.cross_entropy(batch).total.backward()
    found = gradients(policy.model)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def spans() -> tuple[Span, ...]:
    """A system prompt of 70 tokens, a prompt after it with two branches, another branch of the system prompt, a row alone."""
    return (Span(0, 0, 70), Span(0, 70, 90, ((0, 70),)), Span(0, 90, 99, ((0, 90),)), Span(0, 99, 103, ((0, 90),)), Span(0, 103, 180, ((0, 70),)), Span(1, 0, 68))


@pytest.mark.parametrize("window", [None, 1, 7, 64, 65, 80, 500])
@pytest.mark.parametrize(("heads", "key_heads", "value_size"), [(4, 2, 8), (2, 2, 5)])
@pytest.mark.parametrize(("keep", "queries"), [(True, 256), (True, 32), (False, 32)])
def test_blocks_of_a_tree_attend_like_a_dense_mask_in_float64(window, heads, key_heads, value_size, keep, queries, monkeypatch):
    monkeypatch.setattr(blocks, "KEPT_BYTES", blocks.KEPT_BYTES if keep else 0)
    monkeypatch.setattr(blocks, "QUERIES", queries)
    generator = torch.Generator().manual_seed(0)
    seen = Seen(spans(), window)
    shapes = ((2, 180, heads, 8), (2, 180, key_heads, 8), (2, 180, key_heads, value_size))
    inputs = [torch.randn(shape, generator=generator).transpose(1, 2) for shape in shapes]
    real_B_T = torch.zeros(2, 180, dtype=torch.bool)
    for span in seen.spans:
        real_B_T[span.row, span.start : span.end] = True
    grad = torch.randn(2, 180, heads, value_size, generator=generator)
    found_in, exact_in = [[item.detach().clone().to(dtype).requires_grad_() for item in inputs] for dtype in (torch.float32, torch.float64)]
    found, _ = attention.attention(torch.nn.Module(), *found_in, seen, scaling=0.3)
    query, key, value = exact_in
    scores = 0.3 * query @ key.repeat_interleave(heads // key_heads, 1).mT
    weights = scores.masked_fill(~seen.dense(2, 180, torch.device("cpu")), -torch.inf).softmax(-1)
    exact = (weights @ value.repeat_interleave(heads // key_heads, 1)).transpose(1, 2).where(real_B_T[:, :, None, None], 0.0)
    torch.testing.assert_close(found.double(), exact, atol=1e-5, rtol=1e-5)
    found.backward(grad)
    exact.backward(grad.double())
    for one, other in zip(found_in, exact_in, strict=True):
        torch.testing.assert_close(one.grad.double(), other.grad, atol=1e-5, rtol=1e-4)


def test_what_a_tree_sees_by_hand():
    """A prompt of two tokens, branches of two and one, a window of two: the first token of a branch sees the prompt's last."""
    seen = Seen((Span(0, 0, 2), Span(0, 2, 4, ((0, 2),)), Span(0, 4, 5, ((0, 2),))), 2).dense(1, 5, torch.device("cpu"))
    assert seen[0, 0].int().tolist() == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 1, 1, 0], [0, 1, 0, 0, 1]]


def test_the_runs_of_the_variable_length_kernel_see_what_the_mask_says():
    """The kernel by hand: each run of queries aligned at the end of its run of keys."""
    made = spans()
    ready = varlen.Paths(made).on(2, 180, torch.device("cpu"))
    assert ready.repeated
    sees = torch.zeros(360, 360, dtype=torch.bool)
    for run in range(len(made)):
        queries, keys = (at[ends[run] : ends[run + 1]] for at, ends in ((ready.at_queries, ready.query_ends), (ready.at_keys, ready.key_ends)))
        for number, query in enumerate(queries):
            sees[query, keys[: len(keys) - len(queries) + number + 1]] = True
    dense = Seen(made, None).dense(2, 180, torch.device("cpu"))[:, 0]
    covered = ready.at_queries
    assert torch.equal(sees[covered], torch.block_diag(*dense.int()).bool()[covered])
    assert (ready.longest_queries, ready.longest_keys) == (77, 147)


def test_rows_without_padding_or_sharing_are_what_the_kernel_takes():
    ready = varlen.Paths([Span(0, 0, 3), Span(0, 3, 8), Span(1, 0, 8)]).on(2, 8, torch.device("cpu"))
    assert (ready.at_queries, ready.at_keys, ready.repeated) == (None, None, False)
    assert ready.query_ends.tolist() == ready.key_ends.tolist() == [0, 3, 8, 16]
    padded = varlen.Paths([Span(0, 0, 3), Span(1, 0, 8)]).on(2, 8, torch.device("cpu"))
    assert padded.at_queries.tolist() == padded.at_keys.tolist() == [0, 1, 2, *range(8, 16)]


def test_a_gathered_keys_gradient_is_the_sum_of_its_places():
    """Place 1 is taken three times: in bfloat16 1 + 1/256 + 1/256 would stay 1, in float32 it becomes 1 + 1/128."""
    x = torch.zeros(3, 1, dtype=torch.bfloat16, requires_grad=True)
    at, grad = torch.tensor([1, 0, 1, 1]), torch.tensor([[1.0], [5.0], [1 / 256], [1 / 256]], dtype=torch.bfloat16)
    varlen._Gathered.apply(x, at, True).backward(grad)
    assert x.grad.flatten().tolist() == [5.0, 1 + 1 / 128, 0.0]
    x.grad = None
    varlen._Gathered.apply(x, at[:2], False).backward(grad[:2])
    assert x.grad.flatten().tolist() == [5.0, 1.0, 0.0]


def test_dropout_of_attention_pads_while_training_and_is_never_lost(checkpoints, caplog):
    policy = load(checkpoints["llama"])
    policy.model.config.attention_dropout = 0.1
    assert policy.kind() == "shared"
    policy.model.train()
    with caplog.at_level(logging.INFO, logger="temper.policy"):
        assert policy.kind() == "padded"
    assert "attention_dropout is 0.1" in caplog.text
    batch = collate(answers(prompts(), 2), 0, "shared")
    torch.manual_seed(0)
    expected_B_T = policy.token_logprobs(dataclasses.replace(batch, layout=None)).logprobs_B_T
    torch.manual_seed(0)
    assert torch.equal(policy.token_logprobs(batch).logprobs_B_T, expected_B_T)  # a layout it cannot follow is not followed


RECURRENT = {
    "mamba": ({"state_size": 4, "num_hidden_layers": 2, "hidden_size": 32}, "not sdpa|attend through"),
    "qwen3_next": (
        {"num_hidden_layers": 4, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 64, "num_experts": 2,
             "num_experts_per_tok": 1, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "linear_num_value_heads": 2, "linear_num_key_heads": 2,
             "linear_key_head_dim": 16, "linear_value_head_dim": 16}, "layers of type linear_attention"),
}  # fmt: skip


@pytest.mark.parametrize("family", RECURRENT)
def test_a_model_with_a_state_is_padded_and_the_log_says_why(family, caplog):
    options, reason = RECURRENT[family]
    tokenizer = tiny_tokenizer("qwen3")
    config = AutoConfig.for_model(family, vocab_size=len(tokenizer), **options)
    torch.manual_seed(0)
    policy = Policy(AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval(), tokenizer)
    with caplog.at_level(logging.INFO, logger="temper.policy"):
        assert policy.kind() == "padded"
    assert "rows are padded, one sequence each" in caplog.text
    assert re.search(reason, caplog.text)
    rows = answers(prompts(), 2)
    found = policy.token_logprobs(collate(rows, 0, "shared")).logprobs_B_T
    assert torch.equal(found, policy.token_logprobs(collate(rows, 0)).logprobs_B_T)


def test_a_layer_that_leaks_is_found_by_trying(checkpoints):
    """Nothing in the config tells: one layer adds the token before, as a convolution over the row would."""
    policy = load(checkpoints["llama"])
    layer = policy.model.model.layers[1]
    before = type(layer.mlp).forward
    layer.mlp.forward = lambda x: before(layer.mlp, x) + torch.nn.functional.pad(x, (0, 0, 1, 0))[:, :-1]
    assert "differ from rows alone" in policy.padded_because
    assert policy.kind() == "padded"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_shares_beginnings(family, checkpoints):
    assert load(checkpoints[family]).kind() == "shared"


def test_a_layout_is_lean():
    """Two rows that share 20 of 22 tokens: 24 places; positions of both branches go on at 20; the first token after is predicted at 19."""
    beginning = list(range(20))
    layout = lay_out([[*beginning, 30, 31], [*beginning, 40, 41]], [None, None], 0, share=True)
    assert layout.tokens_R_L.tolist() == [[*beginning, 30, 31, 40, 41]]
    assert layout.positions_R_L.tolist() == [[*range(20), 20, 21, 20, 21]]
    assert layout.at_B_T.tolist() == [[*range(22)], [*range(20), 22, 23]]
    assert layout.spans == (Span(0, 0, 20), Span(0, 20, 22, ((0, 20),)), Span(0, 22, 24, ((0, 20),)))


@pytest.mark.parametrize("length", [600, 2400])
def test_the_masks_of_a_long_sequence_grow_with_it_and_not_with_its_square(length):
    """Keys before a block's own queries are seen by all of them: they need no mask."""
    plan = blocks.Plan([Span(0, 0, length)], 1, length, 2, 2, None)
    assert sum(batch.hidden_n_Q_H.numel() for batch in plan.batches) <= 1.3 * length * blocks.QUERIES
