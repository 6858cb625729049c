"""The last MLP runs where its output is read; there, and in every gradient, nothing changes."""

from __future__ import annotations

import pytest
import torch
from test_prefix import answers, checkpoints, gradients, load, prompts, same  # noqa: F401  (the fixture)

from temper.data.batch import collate
from temper.policy.adapters import LoraConfig
from temper.policy.last_layer import last_mlp
from tests.checkpoints import FAMILIES


def rows_seen(mlp: torch.nn.Module) -> list[int]:
    """How many positions every product of the MLP's first matrix had, as they come."""
    seen: list[int] = []
    mlp.gate_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].numel() // inputs[0].shape[-1]))
    return seen


@pytest.mark.parametrize("kind", ["padded", "shared"])
@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_and_gradients_are_those_of_a_whole_pass(family, kind, checkpoints):  # noqa: F811
    policy = load(checkpoints[family])
    batch = collate(answers(prompts(system=20), 3), 0, kind)
    at_N = batch.mask_B_T.flatten().nonzero().squeeze(1) - 1  # in a shared layout all answers of a prompt read its end
    computed_N = at_N if batch.layout is None else batch.layout.at_B_T.flatten()[at_N]
    assert kind == "padded" or len(computed_N.unique()) < len(computed_N)
    whole_N_D = policy.computed(batch, batch.layout).flatten(0, 1)[computed_N]
    towards_N_D = torch.randn(whole_N_D.shape, generator=torch.Generator().manual_seed(0))
    (whole_N_D * towards_N_D).sum().backward()
    expected = gradients(policy.model)
    seen = rows_seen(policy.lean.last_mlp)
    found_N_D = policy.hidden_at(batch, at_N)
    (found_N_D * towards_N_D).sum().backward()
    assert seen[-1] == len(computed_N.unique())  # what came before tried whether rows may be packed
    torch.testing.assert_close(found_N_D, whole_N_D, rtol=1e-5, atol=1e-5)
    same(gradients(policy.model), expected)


def test_rows_of_several_adapters_stay_rows(checkpoints):  # noqa: F811
    """A mixed batch is routed row by row, so its last MLP sees all of them; with one adapter it sees what is read."""
    policy = load(checkpoints["qwen3"])
    for name in ("a", "b"):
        policy.add_lora(name, LoraConfig(rank=2))
    seen = rows_seen(policy.lean.last_mlp)
    rows = answers(prompts(), 1)
    for names, expected in ((["a", "b", "a"], None), (["a", "a", "a"], sum(row.supervised for row in rows))):
        batch = collate([row.__class__(**{**row.__dict__, "adapter": name}) for row, name in zip(rows, names, strict=True)], 0)
        policy.token_logprobs(batch)
        assert seen.pop() == (batch.tokens_B_T.numel() if expected is None else expected)


def test_a_form_that_is_not_known_runs_everywhere():
    """Experts, and decoders whose blocks stand elsewhere, are left alone."""
    assert last_mlp(torch.nn.Linear(2, 2)) is None
    block = torch.nn.Module()
    block.mlp = torch.nn.Linear(2, 2)
    decoder = torch.nn.Module()
    decoder.layers = torch.nn.ModuleList([block])
    assert last_mlp(decoder) is None
