from __future__ import annotations

import pytest
import torch
from policy_doubles import make_batch, tiny_policy

from temper.core.errors import DataError, IntegrityError, ShapeError
from temper.policy.losses import bradley_terry
from temper.policy.model import Policy
from temper.policy.scalar_head import RewardModel, last_true


def trained(seed: int = 0) -> RewardModel:
    """A reward model whose head is not zero any more."""
    reward = RewardModel(tiny_policy())
    torch.nn.init.normal_(reward.model.score.weight, generator=torch.Generator().manual_seed(seed))
    return reward


def test_the_reward_is_read_at_the_last_supervised_token():
    reward, batch = trained(), make_batch([9, 5])
    batch.mask_B_T[0, 7:] = False  # a newline that the template writes after the end of the turn
    batch.mask_B_T[0, 6] = True
    with torch.no_grad():
        hidden_B_T_D = reward.policy.model.get_decoder()(batch.tokens_B_T).last_hidden_state
        expected = [float(reward.model.score(hidden_B_T_D[0, 6])), float(reward.model.score(hidden_B_T_D[1, 4]))]
    assert reward.rewards(batch).tolist() == pytest.approx(expected, rel=1e-4)
    batch.mask_B_T[0] = False  # nothing trained: the last real token
    with torch.no_grad():
        assert float(reward.rewards(batch)[0]) == pytest.approx(float(reward.model.score(hidden_B_T_D[0, 8])), rel=1e-4)


def test_padding_changes_no_reward_even_where_the_pad_token_ends_an_answer():
    reward, narrow, wide = trained(), make_batch([9, 5]), make_batch([9, 5], width=30)
    for batch in (narrow, wide):
        batch.tokens_B_T[1, 4] = 1  # the pad id as a real token
    torch.testing.assert_close(reward.rewards(wide), reward.rewards(narrow), atol=1e-5, rtol=1e-5)


def test_rows_of_ids_score_as_in_a_batch_and_in_their_own_order():
    reward, batch = trained(), make_batch([9, 5, 7])
    rows = [batch.tokens_B_T[row, :length].tolist() for row, length in enumerate((9, 5, 7))]
    assert reward.score(rows, rows_at_once=2) == pytest.approx(reward.rewards(batch).tolist(), rel=1e-4)


def test_it_learns_which_answer_is_better_and_leaves_the_policy_alone():
    policy = tiny_policy()
    before = policy.weights_hash()
    reward, chosen, rejected = RewardModel(policy), make_batch([9, 5], seed=1), make_batch([9, 5], seed=2)
    assert reward.rewards(chosen).tolist() == [0.0, 0.0]
    optimizer = torch.optim.SGD(reward.trainable_parameters().values(), lr=0.05)
    for _ in range(5):
        out = bradley_terry(reward.rewards(chosen), reward.rewards(rejected))
        optimizer.zero_grad()
        out.total.backward()
        optimizer.step()
    assert (reward.rewards(chosen) > reward.rewards(rejected)).all()
    assert policy.weights_hash() == before
    assert not any("lm_head" in name for name in reward.trainable_parameters())


def test_a_saved_reward_model_comes_back_whole(tmp_path):
    reward, batch = trained(), make_batch([9, 5])
    reward.save(tmp_path / "reward")
    loaded = RewardModel.load(tmp_path / "reward", precision="float32")
    assert torch.equal(loaded.rewards(batch), reward.rewards(batch))
    assert loaded.weights_hash() == reward.weights_hash() != trained(seed=1).weights_hash()
    head = tmp_path / "reward" / "scalar_head.safetensors"
    content = bytearray(head.read_bytes())
    content[-1] ^= 1
    head.write_bytes(bytes(content))
    with pytest.raises(IntegrityError, match="scalar_head"):
        RewardModel.load(tmp_path / "reward")


def test_a_policy_is_no_reward_model(tmp_path):
    tiny_policy().save(tmp_path / "model")
    with pytest.raises(DataError, match="is not a reward model"):
        RewardModel.load(tmp_path / "model")
    assert Policy.load(tmp_path / "model")


def test_an_empty_row_is_refused():
    assert last_true(torch.tensor([[True, False, True, False]])).tolist() == [2]
    with pytest.raises(ShapeError, match="row 1 has no token"):
        last_true(torch.tensor([[True], [False]]))
