"""Words that no training row holds keep their embeddings: they are not unlearnt as something to say."""

import pytest
import torch

from temper.data.batch import collate
from temper.data.sequence import Sequence
from temper.policy.model import Policy
from temper.train.stage import hold_unseen
from tests.checkpoints import tiny_checkpoint

TOKENS = [20, 21, 22, 23, 24, 25]


@pytest.mark.parametrize("held", [False, True])
def test_only_tokens_of_the_rows_get_a_gradient(tmp_path, held):
    policy = Policy.load(tiny_checkpoint("qwen3", tmp_path / "base"), precision="float32")
    row = Sequence(tokens=TOKENS, weights=[0.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    if held:
        hold_unseen(policy, [row])
    policy.cross_entropy(collate([row], policy.template.pad_id)).total.backward()
    gradient_V_D = policy.model.get_input_embeddings().weight.grad
    moved = set(torch.nonzero(gradient_V_D.abs().sum(1)).flatten().tolist())
    assert set(TOKENS) <= moved
    assert (moved == set(TOKENS)) == held
