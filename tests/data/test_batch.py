"""Batches: padding, packing with isolation, and plans by token budget."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from temper.core.errors import DataError, ShapeError
from temper.data.batch import collate, pack, plan_batches
from temper.data.sequence import Sequence
from tests.checkpoints import tiny_checkpoint


def row(*tokens: int, **fields) -> Sequence:
    """Trains all but the first token."""
    return Sequence(tokens=list(tokens), weights=[0.0] + [1.0] * (len(tokens) - 1), **fields)


def test_rows_are_padded_on_the_right():
    batch = collate([row(5, 6, 7), row(8, 9)], pad_id=0)
    assert batch.tokens_B_T.tolist() == [[5, 6, 7], [8, 9, 0]]
    assert batch.attention_B_T.tolist() == [[True, True, True], [True, True, False]]
    assert batch.positions_B_T.tolist() == [[0, 1, 2], [0, 1, 2]]
    assert batch.weights_B_T.tolist() == [[0, 1, 1], [0, 1, 0]]
    assert batch.mask_B_T.tolist() == [[False, True, True], [False, True, False]]
    assert (batch.tokens_real, batch.adapters, batch.segments_B_T) == (5, [None, None], None)
    assert batch.tokens_B_T.dtype == torch.long
    assert batch.weights_B_T.dtype == torch.float32


def test_the_mask_is_not_the_attention():
    """A pad token inside a row is real, and a token that is not trained is still seen."""
    batch = collate([Sequence(tokens=[0, 0, 3], weights=[0.0, 0.0, 1.0])], pad_id=0)
    assert batch.attention_B_T.all()
    assert batch.mask_B_T.tolist() == [[False, False, True]]


def test_streams_and_support_are_aligned():
    first = row(1, 2, 3, advantages=[0, 0.5, 0.5], old_logprobs=[0, -1, -2], support=[None, (2, 4), None], adapter="a", group="g")
    second = row(4, 5, advantages=[0, -1], old_logprobs=[0, -3], adapter="b", group="h")
    batch = collate([first, second], pad_id=9)
    assert batch.advantages_B_T.tolist() == [[0, 0.5, 0.5], [0, -1, 0]]
    assert batch.old_logprobs_B_T.tolist() == [[0, -1, -2], [0, -3, 0]]
    assert batch.ref_logprobs_B_T is None
    assert batch.support == [[None, (2, 4), None], [None, None, None]]
    assert (batch.adapters, batch.groups) == (["a", "b"], ["g", "h"])
    moved = batch.to("cpu")
    assert moved.support == batch.support
    assert torch.equal(moved.tokens_B_T, batch.tokens_B_T)


def test_streams_that_do_not_fit_are_refused():
    with pytest.raises(ShapeError, match="2 tokens and 1 advantages"):
        collate([row(1, 2, advantages=[0.0])], 0)
    with pytest.raises(ShapeError, match="1 of 2 sequences have no old_logprobs"):
        collate([row(1, 2, old_logprobs=[0, -1]), row(1, 2)], 0)
    with pytest.raises(ShapeError, match="trains its first token"):
        collate([Sequence(tokens=[1, 2], weights=[1.0, 1.0])], 0)
    with pytest.raises(DataError, match="no rows"):
        collate([], 0)


def test_packing_lays_sequences_side_by_side():
    """Room for 5: the sequence of 3 and that of 2 share a row; the other adapter has its own."""
    batch = pack([row(1, 2), row(3, 4, 5), row(6, 7, adapter="x")], pad_id=0, row_tokens=5)
    assert batch.tokens_B_T.tolist() == [[1, 2, 3, 4, 5], [6, 7, 0, 0, 0]]
    assert batch.positions_B_T.tolist() == [[0, 1, 0, 1, 2], [0, 1, 0, 1, 2]]
    assert batch.segments_B_T.tolist() == [[0, 0, 1, 1, 1], [0, 0, -1, -1, -1]]
    assert batch.weights_B_T.tolist() == [[0, 1, 0, 1, 1], [0, 1, 0, 0, 0]]
    assert batch.adapters == [None, "x"]
    assert pack([row(*range(1, 9)), row(1, 2)], 0, row_tokens=4).tokens_B_T.shape == (2, 8)


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "gemma"])
def test_packed_sequences_see_only_themselves(family, tmp_path):
    """Packed, padded and one by one give the same log-probs to 1e-5; every family through plain transformers."""
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint(family, tmp_path)).eval()
    rng = random.Random(3)
    rows = [row(*(rng.randrange(10, 200) for _ in range(length))) for length in (7, 12, 5, 9)]

    def logprobs(batch):
        with torch.no_grad():
            logits_B_T_V = model(input_ids=batch.tokens_B_T, position_ids=batch.positions_B_T, use_cache=False).logits[:, :-1]
        found_B_T = logits_B_T_V.log_softmax(-1).gather(-1, batch.tokens_B_T[:, 1:, None]).squeeze(-1)
        return found_B_T[batch.mask_B_T[:, 1:]].sort().values

    alone = torch.cat([logprobs(collate([each], 0)) for each in rows]).sort().values
    torch.testing.assert_close(logprobs(collate(rows, 0)), alone, atol=1e-5, rtol=0)
    packed = pack(rows, 0, row_tokens=18)
    assert packed.tokens_B_T.shape[0] < len(rows)
    torch.testing.assert_close(logprobs(packed), alone, atol=1e-5, rtol=0)


@given(st.lists(st.integers(1, 60), max_size=40), st.integers(1, 128), st.integers(0, 5))
@settings(max_examples=100, deadline=None)
def test_a_plan_holds_every_row_once_and_keeps_the_budget(lengths, budget, seed):
    plan = plan_batches(lengths, budget, random.Random(seed))
    assert sorted(number for batch in plan for number in batch) == list(range(len(lengths)))
    for batch in plan:
        assert len(batch) == 1 or max(lengths[number] for number in batch) * len(batch) <= budget
    assert plan == plan_batches(lengths, budget, random.Random(seed))


def test_rows_of_like_length_share_a_batch():
    """A budget of 300: the three short rows take 3·12, the three long ones 3·100; the next row would be too much for either."""
    lengths = [10, 100, 11, 90, 12, 95]
    assert sorted(map(sorted, plan_batches(lengths, 300, random.Random(0)))) == [[0, 2, 4], [1, 3, 5]]
    assert plan_batches(lengths, 299) == [[0, 2, 4], [3, 5], [1]]
    with pytest.raises(DataError, match="token budget is 0"):
        plan_batches(lengths, 0)
