"""Batches: padding, packing with isolation, and plans by token budget."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from temper.core.errors import DataError, ShapeError
from temper.data.batch import collate, plan_batches, plan_packed, plan_units
from temper.data.layout import Span, Work, lay_out, positions_of
from temper.data.sequence import Sequence


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
    assert (batch.tokens_real, batch.adapters, batch.layout) == (5, [None, None], None)
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
    """Rows of 2 and 3 share a row of the layout; the other adapter has its own; streams stay one sequence a row."""
    batch = collate([row(1, 2), row(3, 4, 5), row(6, 7, adapter="x")], 0, "packed")
    assert batch.tokens_B_T.tolist() == [[1, 2, 0], [3, 4, 5], [6, 7, 0]]
    assert batch.adapters == [None, None, "x"]
    assert batch.layout is None  # two rows of five are more than three of three
    batch = collate([row(1, 2), row(3, 4, 5, 6, 7, 8), row(9, 1)], 0, "packed")
    layout = batch.layout
    assert layout.tokens_R_L.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8, 9, 1]]
    assert layout.positions_R_L.tolist() == [[0, 1, 0, 1, 2, 3, 4, 5, 0, 1]]
    assert layout.at_B_T.tolist() == [[0, 1, 0, 0, 0, 0], [2, 3, 4, 5, 6, 7], [8, 9, 0, 0, 0, 0]]
    assert layout.spans == (Span(0, 0, 2), Span(0, 2, 8), Span(0, 8, 10))
    assert (batch.tokens_real, batch.work) == (10, Work(10, 3 + 21 + 3, 10))
    assert batch.to("cpu").layout.spans == layout.spans
    with_padding = collate([row(1, 2), row(3, 4, 5, 6, 7, 8), row(9, 1)], 0)
    assert (with_padding.layout, with_padding.work) == (None, Work(10, 27, 18))


def test_adapters_do_not_share_a_row():
    layout = lay_out([[1, 2], [3, 4, 5], [6, 7]], [None, "x", None], 9, share=True)
    assert layout.tokens_R_L.tolist() == [[1, 2, 6, 7], [3, 4, 5, 9]]
    assert layout.at_B_T.tolist() == [[0, 1, 0], [4, 5, 6], [2, 3, 0]]
    assert layout.adapters == [None, "x"]


def test_equal_rows_are_laid_once_and_a_row_may_be_another_s_beginning():
    """Twenty tokens, the same again, and five more after them: 25 places."""
    short, long = list(range(20)), list(range(25))
    layout = lay_out([short, long, short], [None] * 3, 0, share=True)
    assert layout.tokens_R_L.tolist() == [long]
    assert layout.at_B_T.tolist() == [[*short, 0, 0, 0, 0, 0], long, [*short, 0, 0, 0, 0, 0]]
    assert layout.spans == (Span(0, 0, 20), Span(0, 20, 25, ((0, 20),)))


def test_what_is_shared_is_a_tree():
    """A system prompt of 20 before two prompts of 18 with two answers each, and before a row of 21 more.

    The prompts begin with the same 2 tokens, too few to be laid apart: each keeps its own. 20 + 2·18 + 4·3 + 21 places.
    """
    system, first, second = list(range(20)), [50, 51, *range(60, 76)], [50, 51, *range(80, 96)]
    rows = [[*system, *prompt, *answer] for prompt in (first, second) for answer in ([1, 2, 3], [4, 5, 6])] + [[*system, *range(70, 91)]]
    assert positions_of(rows, "shared") == 20 + 2 * 18 + 4 * 3 + 21
    assert (positions_of(rows, "packed"), positions_of([*rows, [1]], "padded")) == (5 * 41, 6 * 41)
    spans = lay_out(rows, [None] * 5, 0, share=True).spans
    assert spans[:3] == (Span(0, 0, 20), Span(0, 20, 38, ((0, 20),)), Span(0, 38, 41, ((0, 38),)))
    assert spans[4] == Span(0, 44, 62, ((0, 20),))
    assert spans[6:] == (Span(0, 65, 68, ((0, 20), (44, 62))), Span(0, 68, 89, ((0, 20),)))


tokens = st.lists(st.integers(0, 2), min_size=1, max_size=60)


@given(st.lists(st.tuples(st.integers(0, 3), tokens), min_size=1, max_size=8), st.booleans(), st.data())
@settings(max_examples=200, deadline=None)
def test_every_row_can_be_read_back_from_its_layout(drawn, share, data):
    """Whatever begins alike: each row's tokens and positions stand where the layout says, and each token sees just its own past."""
    beginnings = [data.draw(tokens) * 2 for _ in range(4)]
    rows = [[*beginnings[which], *rest] for which, rest in drawn]
    layout = lay_out(rows, [None] * len(rows), 0, share=share)
    (flat,), (positions,) = layout.tokens_R_L.tolist(), layout.positions_R_L.tolist()
    seen = {}
    for span in layout.spans:
        path = [place for start, end in span.path for place in range(start, end)]
        for place in range(span.start, span.end):
            seen[place] = [*path, *range(span.start, place + 1)]
    assert sorted(seen) == list(range(len(flat)))
    for number, expected in enumerate(rows):
        at = layout.at_B_T[number, : len(expected)].tolist()
        assert [flat[place] for place in at] == expected
        assert [positions[place] for place in at] == list(range(len(expected)))
        assert all(seen[place] == at[: position + 1] for position, place in enumerate(at))
    assert len(flat) == positions_of(rows, "shared" if share else "packed")


@given(st.lists(st.integers(1, 60), max_size=40), st.integers(1, 128), st.integers(0, 5))
@settings(max_examples=100, deadline=None)
def test_a_packed_plan_holds_every_unit_once_and_keeps_the_budget(sizes, budget, seed):
    plan = plan_packed(sizes, budget, random.Random(seed))
    assert sorted(number for batch in plan for number in batch) == list(range(len(sizes)))
    for batch in plan:
        assert len(batch) == 1 or sum(sizes[number] for number in batch) <= budget
    assert plan == plan_packed(sizes, budget, random.Random(seed))


def test_packed_batches_are_even():
    """Sixty tokens in batches of at most 32 are two of 30, not one of 32 and one of 28."""
    plan = plan_packed([10, 20, 10, 20], 32)
    assert [sum([10, 20, 10, 20][number] for number in batch) for batch in plan] == [30, 30]


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


@given(st.lists(st.tuples(st.integers(0, 2), tokens, tokens), min_size=1, max_size=12), st.integers(1, 200), st.integers(0, 3))
@settings(max_examples=100, deadline=None)
def test_a_shared_plan_holds_every_pair_once_and_keeps_the_budget(drawn, budget, seed):
    units = [[row(*[9] * (40 * which + 1), *one), row(*[9] * (40 * which + 1), *other)] for which, one, other in drawn]
    made = plan_units(units, "shared", budget, random.Random(seed))
    assert sorted(number for batch in made for number in batch) == list(range(len(units)))
    for batch in made:
        slack = 15 * 2 * len(batch)  # stretches that were not worth sharing
        assert len(batch) == 1 or positions_of([each.tokens for number in batch for each in units[number]], "shared") <= budget + slack
    assert made == plan_units(units, "shared", budget, random.Random(seed))


def test_rows_that_begin_alike_share_a_batch():
    """Two prompts of 30 with three answers of 5 each: 45 positions a prompt. Two batches of 60 hold a group each, whole."""
    units = [[row(*range(100 * prompt, 100 * prompt + 30), *[answer] * 5)] for answer in (1, 2, 3) for prompt in (1, 2)]
    assert sorted(map(sorted, plan_units(units, "shared", 60))) == [[0, 2, 4], [1, 3, 5]]
    assert plan_units(units, "padded", 105) == [[0, 1, 2], [3, 4, 5]]
    assert sorted(map(len, plan_units(units, "packed", 105))) == [3, 3]
