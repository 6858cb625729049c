"""Sampling by hand-worked numbers, and that what is drawn follows the distribution."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from temper.rollout.sampling import Settings, choose, draw, truncate, uniforms

CPU = torch.device("cpu")
# Probabilities 0.5, 0.25, 0.125, 0.125.
LOGITS = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()


def steps(count: int) -> np.ndarray:
    return np.zeros(count, dtype=np.uint64)


def test_uniforms_are_uniform_and_depend_on_seed_and_step_alone():
    many = uniforms(np.arange(20_000, dtype=np.uint64), np.full(20_000, 3, dtype=np.uint64))
    assert 0 <= many.min() < many.max() < 1
    # Mean 1/2 and variance 1/12, within five standard errors (0.0020 and 0.00053).
    assert many.mean() == pytest.approx(0.5, abs=0.0102)
    assert many.var() == pytest.approx(1 / 12, abs=0.0027)
    along = uniforms(np.full(20_000, 7, dtype=np.uint64), np.arange(20_000, dtype=np.uint64))
    assert abs(np.corrcoef(along[:-1], along[1:])[0, 1]) < 0.035
    assert uniforms(np.array([7], dtype=np.uint64), np.array([5], dtype=np.uint64))[0] == along[5]


def test_the_inverse_of_the_cumulative_distribution():
    # Cumulative: 0.5, 0.75, 0.875, 1. A uniform on a border belongs to the token after it.
    found = draw(LOGITS.expand(5, -1), np.array([0.0, 0.49, 0.5, 0.8, 0.99]))
    assert found.tolist() == [0, 0, 1, 2, 3]


def test_a_token_without_probability_is_never_drawn():
    logprobs = torch.tensor([[-math.inf, 0.0, -math.inf]]).expand(3, -1)
    assert draw(logprobs, np.array([0.0, 0.5, 1 - 2**-53])).tolist() == [1, 1, 1]


def test_frequencies_follow_the_tempered_distribution():
    rows = 8000
    settings = Settings.of([(0.5, 0, 1.0, seed) for seed in range(rows)], CPU)
    chosen = choose(LOGITS.expand(rows, -1), settings, steps(rows))
    # At temperature 0.5 probabilities are squared and renormalised: 16, 4, 1, 1 of 22.
    counts = torch.bincount(chosen.tokens_R, minlength=4) / rows
    assert counts.tolist() == pytest.approx([16 / 22, 4 / 22, 1 / 22, 1 / 22], abs=0.025)
    first = chosen.logprobs_R[chosen.tokens_R == 0][0]
    assert float(first) == pytest.approx(math.log(16 / 22), abs=1e-6)


def test_greedy_takes_the_largest_allowed_logit_with_its_logprob_at_temperature_one():
    settings = Settings.of([(0.0, 0, 1.0, 0), (0.0, 2, 0.1, 0)], CPU)
    allowed = torch.tensor([[True, True, True, True], [False, True, True, False]])
    chosen = choose(LOGITS.expand(2, -1), settings, steps(2), allowed)
    assert chosen.tokens_R.tolist() == [0, 1]
    # The second row is renormalised over 0.25 and 0.125.
    assert chosen.logprobs_R.tolist() == pytest.approx([math.log(0.5), math.log(2 / 3)], abs=1e-6)


@pytest.mark.parametrize(
    ("top_k", "top_p", "kept"),
    [
        (2, 1.0, [0, 1]),
        (0, 0.5, [0]),  # 0.5 alone reaches 0.5
        (0, 0.51, [0, 1]),
        (0, 0.8, [0, 1, 2, 3]),  # two equal tokens at the border are kept together
        (3, 0.6, [0, 1]),  # of 4/7, 2/7, 1/7 the first reaches 0.57, the second 0.86
        (0, 1e-9, [0]),
        (9, 1.0, [0, 1, 2, 3]),
    ],
)
def test_truncation(top_k, top_p, kept):
    settings = Settings.of([(1.0, top_k, top_p, 0)], CPU)
    left = truncate(LOGITS, settings)
    assert (left[0] > -math.inf).nonzero()[:, 0].tolist() == kept


def test_truncation_of_one_row_leaves_the_others_alone():
    settings = Settings.of([(1.0, 1, 1.0, 0), (1.0, 0, 1.0, 0), (0.0, 1, 0.1, 0)], CPU)
    left = truncate(LOGITS.expand(3, -1), settings)
    assert (left > -math.inf).sum(-1).tolist() == [1, 4, 4]
