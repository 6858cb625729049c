"""NEFTune: its size by hand, off by default, and a row's noise level is its own."""

from __future__ import annotations

import pytest
import torch
from policy_doubles import tiny_policy

from temper.data.batch import collate
from temper.data.sequence import Sequence
from temper.policy.noise import neftune


def rows(*lengths: int) -> list[Sequence]:
    return [Sequence(tokens=[4 + at % 50 for at in range(length)], weights=[0.0] + [1.0] * (length - 1)) for length in lengths]


def noise_of(policy, batch, alpha: float) -> torch.Tensor:
    """What is added to the embeddings of the tokens as they are computed."""
    seen = []
    with neftune(policy, batch, alpha):
        table = policy.model.get_input_embeddings()
        handle = table.register_forward_hook(lambda module, inputs, out: seen.append(out - module.weight[inputs[0]] * getattr(module, "embed_scale", 1.0)))
        policy.cross_entropy(batch)
        handle.remove()
    return seen[0].detach()


def test_the_noise_is_uniform_and_as_large_as_the_paper_says() -> None:
    """α = 5, rows of 100 and 25 tokens, width 64: 5/√6400 = 0.0625 and 5/√1600 = 0.125, whatever the padding."""
    policy, batch = tiny_policy(), collate(rows(100, 25), 1)
    policy.model.train()
    found = noise_of(policy, batch, 5.0)
    for row, (length, level) in enumerate(((100, 0.0625), (25, 0.125))):
        values = found[row, :length]
        assert level * 0.98 < float(values.abs().max()) <= level * (1 + 1e-4)
        assert float(values.mean()) == pytest.approx(0.0, abs=0.05 * level)
        assert float(values.std()) == pytest.approx(level / 3**0.5, rel=0.05)


@pytest.mark.parametrize("kind", ["packed", "shared"])
def test_in_a_layout_a_token_has_the_noise_level_of_its_own_row(kind) -> None:
    policy, batch = tiny_policy(), collate([Sequence(tokens=[5 + at % 40 for at in range(100)], weights=[0.0] + [1.0] * 99), *rows(25, 24)], 1, kind)
    assert batch.layout is not None
    policy.model.train()
    found = noise_of(policy, batch, 5.0).flatten(0, 1)
    long, short = (found[batch.layout.at_B_T[row, at]].abs().max() for row, at in ((0, slice(40, 100)), (1, slice(20, 25))))
    assert 0.06 < float(long) <= 0.0626
    assert 0.11 < float(short) <= 0.1251


def test_it_is_off_by_default_in_evaluation_and_after_the_block() -> None:
    policy, batch = tiny_policy(), collate(rows(12), 1)
    plain = policy.cross_entropy(batch).total
    policy.model.train()
    assert not noise_of(policy, batch, 0.0).any()
    with neftune(policy, batch, 5.0):
        assert not torch.equal(policy.cross_entropy(batch).total, plain)
    assert torch.equal(policy.cross_entropy(batch).total, plain)
    policy.model.eval()
    with neftune(policy, batch, 5.0):
        assert torch.equal(policy.cross_entropy(batch).total, plain)


def test_it_is_the_noise_of_transformers_where_nothing_is_padded() -> None:
    from transformers.integrations.neftune import neftune_post_forward_hook

    policy, batch = tiny_policy(), collate(rows(40), 1)
    policy.model.train()
    torch.manual_seed(3)
    ours = noise_of(policy, batch, 5.0)
    table = policy.model.get_input_embeddings()
    table.neftune_noise_alpha = 5.0
    torch.manual_seed(3)
    theirs = neftune_post_forward_hook(table.train(), None, torch.zeros(1, 40, 64))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-3)
