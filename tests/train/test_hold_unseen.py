"""Words that no training row holds keep their embeddings: they are not unlearnt as something to say."""

import pytest
import torch

from temper.data.batch import collate
from temper.data.sequence import Sequence
from temper.policy.model import Policy
from temper.train.learner import Learner, OptimConfig
from temper.train.stage import hold_unseen
from tests.checkpoints import tiny_checkpoint

TOKENS = [20, 21, 22, 23, 24, 25]


@pytest.mark.parametrize("held", [False, True])
def test_only_tokens_of_the_rows_move(tmp_path, held):
    policy = Policy.load(tiny_checkpoint("qwen3", tmp_path / "base"), precision="float32")
    row = Sequence(tokens=TOKENS, weights=[0.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    learner = Learner(policy, OptimConfig(), 1)
    if held:
        hold_unseen(learner, [row])
    table_V_D = policy.model.get_input_embeddings().weight
    before_V_D = table_V_D.detach().clone()
    learner.forward_backward([collate([row], policy.template.pad_id)], policy.cross_entropy)
    learner.optim_step()
    moved = set(torch.nonzero((table_V_D.detach() - before_V_D).abs().sum(1)).flatten().tolist())
    assert set(TOKENS) <= moved
    assert (moved == set(TOKENS)) == held
