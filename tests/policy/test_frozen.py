"""A frozen base is held in what it is multiplied in (on a GPU; tried here on a CPU), and no number changes by it."""

from __future__ import annotations

import pytest
import torch
from policy_doubles import CONFIGS, make_batch, tiny_policy
from torch import nn

from temper.core.errors import ShapeError
from temper.policy.adapters import LoraConfig
from temper.policy.frozen import hold_frozen, widen
from temper.policy.model import Policy
from temper.policy.saved import stored_in_bfloat16
from temper.policy.scalar_head import RewardModel
from temper.train.learner import Learner, OptimConfig

HALF = torch.bfloat16


def released(family: str = "llama", dtype: torch.dtype = HALF, **options) -> Policy:
    """A policy as of a checkpoint of `dtype`."""
    policy = tiny_policy(family, **options)
    with torch.no_grad():
        for weight in policy.model.parameters():
            weight.copy_(weight.to(dtype))
    return policy


def frozen(family: str = "llama") -> Policy:
    """A policy in bfloat16 whose base is frozen and held as on a GPU."""
    policy = released(family, compute_dtype=HALF)
    policy.freeze_base()
    hold_frozen(policy.model, HALF)
    return policy


def dtypes(policy: Policy) -> dict[str, set[torch.dtype]]:
    found: dict[str, set[torch.dtype]] = {"matrices": set(), "others": set()}
    matrices = {id(module.weight) for module in policy.model.modules() if isinstance(module, nn.Linear)}
    for weight in policy.base_parameters().values():
        found["matrices" if id(weight) in matrices else "others"].add(weight.dtype)
    return found


def scores(policy: Policy) -> torch.Tensor:
    return policy.token_logprobs(make_batch([19, 7])).logprobs_B_T


def test_matrices_are_halved_and_the_hash_and_every_score_stay():
    whole, policy = released(compute_dtype=HALF), frozen()
    assert dtypes(policy) == {"matrices": {HALF}, "others": {torch.float32}}
    assert torch.equal(scores(policy), scores(whole))
    assert policy.weights_hash() == whole.weights_hash()
    policy.check_head()


def test_a_head_that_is_the_embedding_stays():
    policy = frozen("qwen3")
    assert policy.head.weight_V_D.dtype is torch.float32
    assert HALF in dtypes(policy)["matrices"]


def test_what_would_be_rounded_stays_and_so_does_a_cpus():
    policy = released(dtype=torch.float32, compute_dtype=HALF)
    hold_frozen(policy.model, HALF)
    assert dtypes(policy)["matrices"] == {torch.float32}
    policy = released(compute_dtype=HALF)
    policy.freeze_base()
    assert dtypes(policy)["matrices"] == {torch.float32}


@pytest.mark.parametrize("dora", [False, True])
def test_adapters_train_in_float32_beside_it_to_the_same_bits(dora):
    found = []
    for policy in (frozen(), released(compute_dtype=HALF)):
        torch.manual_seed(3)
        policy.add_lora("a", LoraConfig(rank=4, dora=dora))
        with torch.no_grad():
            for name, weight in policy.trainable_parameters().items():
                weight.add_(0.05 if name.endswith(".B") else 0.0)
        batch = make_batch([19, 7], adapters=["a", "a"])
        policy.token_logprobs(batch).logprobs_B_T.sum().backward()
        found.append({name: weight.grad for name, weight in policy.trainable_parameters().items()})
    assert all(gradient.dtype is torch.float32 and torch.equal(gradient, found[1][name]) for name, gradient in found[0].items())
    assert any(bool(gradient.any()) for gradient in found[0].values())


def test_a_merge_is_float32_and_undone_to_the_bytes():
    policy = frozen()
    policy.add_lora("a", LoraConfig(rank=4))
    with torch.no_grad():
        for weight in policy.trainable_parameters().values():
            weight.add_(0.01)
    before, kinds = policy.weights_hash(), dtypes(policy)
    layer = next(module for module in policy.model.modules() if hasattr(module, "lora"))
    wanted = layer.pair("a").merged(layer)
    assert policy.merge("a") != before
    assert torch.equal(layer.weight, wanted)
    merged = layer.weight._version
    policy.unmerge()
    assert policy.weights_hash() == before
    assert dtypes(policy) == kinds
    assert layer.weight._version > merged  # what remembers weights by their version sees both changes


def test_quantised_weights_are_not_widened():
    policy = released()
    policy.model.lm_head.weight.requires_grad_(False).data = policy.model.lm_head.weight.data.to(torch.float8_e4m3fn)
    widen(policy.model, but=None)
    assert policy.model.lm_head.weight.dtype is torch.float8_e4m3fn


def test_a_broken_file_beside_the_weights_is_transformers_affair(tmp_path):
    (tmp_path / "extra.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    assert not stored_in_bfloat16(tmp_path)


def test_half_precision_is_never_trained():
    policy = frozen()
    policy.model.requires_grad_(True)
    with pytest.raises(ShapeError, match="half precision"):
        Learner(policy, OptimConfig(), 1)


@pytest.mark.parametrize("family", CONFIGS)
def test_it_is_saved_and_read_as_what_it_was(family, tmp_path):
    policy = frozen(family)
    policy.save(tmp_path / "held")
    hashed = policy.weights_hash()
    assert Policy.load(tmp_path / "held", precision="float32", frozen=True).weights_hash() == hashed
    policy.model.to(HALF).save_pretrained(tmp_path / "half")
    policy.tokenizer.save_pretrained(tmp_path / "half")
    assert stored_in_bfloat16(tmp_path / "half")
    assert not stored_in_bfloat16(tmp_path / "held")
    again, exact = Policy.load(tmp_path / "half", precision="float32"), released(family)
    assert {weight.dtype for weight in again.model.parameters()} == {torch.float32}
    assert torch.equal(scores(again), scores(exact))  # buffers included: what the model makes of its own is float32


def test_a_checkpoint_in_half_is_widened_but_for_its_matrices():
    policy = released()
    policy.model.to(HALF)
    widen(policy.model, but=HALF)
    assert dtypes(policy) == {"matrices": {HALF}, "others": {torch.float32}}
    widen(policy.model, but=None)
    assert dtypes(policy) == {"matrices": {torch.float32}, "others": {torch.float32}}


def test_a_reward_model_made_of_it_trains_float32():
    policy = frozen()
    judge = RewardModel(policy)
    assert {weight.dtype for weight in judge.trainable_parameters().values()} == {torch.float32}
    assert dtypes(policy)["matrices"] == {HALF}


def test_a_reference_made_of_it_scores_alike():
    policy = frozen()
    assert torch.equal(scores(policy.clone_reference()), scores(policy))
