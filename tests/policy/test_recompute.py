"""Activation checkpointing changes what is kept, and no number: adapters, dropout and lean norms run again as they ran."""

from __future__ import annotations

import pytest
import torch

from temper.core.errors import ShapeError
from temper.data.batch import collate
from temper.data.sequence import Sequence
from temper.policy.adapters import LoraConfig
from temper.policy.model import Policy
from temper.policy.recompute import decoder_layers
from tests.checkpoints import tiny_checkpoint

ROWS = [Sequence(list(range(20, 20 + length)), [0.0] + [1.0] * (length - 1)) for length in (5, 9, 13)]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return str(tiny_checkpoint("llama", tmp_path_factory.mktemp("base") / "llama"))


def kept_and_gradients(base: str, *, recompute: bool, lora: bool, training: bool) -> tuple[int, float, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    policy = Policy.load(base, precision="float32")
    rows = ROWS
    if lora:
        for name in ("a", "b"):
            policy.add_lora(name, LoraConfig(rank=4, dropout=0.3))
        with torch.no_grad():
            for name, weight in policy.trainable_parameters().items():
                weight.normal_(std=0.1) if name.endswith(".B") else None
        # rows of two adapters and one of the base alone: the route must be the same when a layer runs again
        rows = [Sequence(row.tokens, row.weights, adapter=name) for row, name in zip(ROWS, ("a", None, "b"), strict=True)]
    policy.model.train(training)
    policy.recompute = recompute
    torch.manual_seed(1)
    seen, weights = {}, {weight.data_ptr() for weight in policy.model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            seen[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        total = policy.cross_entropy(collate(rows, 0)).total
    total.backward()
    return sum(seen.values()), float(total.detach()), {name: weight.grad for name, weight in policy.model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("lora", [False, True])
def test_recomputed_gradients_are_the_same_to_the_bit(base, lora, training) -> None:
    kept, loss, gradients = kept_and_gradients(base, recompute=False, lora=lora, training=training)
    less, same_loss, same = kept_and_gradients(base, recompute=True, lora=lora, training=training)
    assert same_loss == loss
    assert same.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert torch.equal(same[name], gradient), name
    assert less < kept / 2


def test_a_decoder_without_a_list_of_layers_is_refused(base) -> None:
    policy = Policy.load(base, precision="float32")
    assert len(decoder_layers(policy.model.get_decoder())) == 2
    policy.model.config.num_hidden_layers = 7
    with pytest.raises(ShapeError, match="no list of its 7 layers"):
        decoder_layers(policy.model.get_decoder())
