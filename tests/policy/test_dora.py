"""DoRA: the identity at the start, hand-worked numbers, mixed batches, merging, and PEFT's own."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from policy_doubles import make_batch, tiny_checkpoint, tiny_policy
from test_adapters import LENGTHS, logits
from torch import nn
from transformers import AutoModelForCausalLM

from temper.policy.adapters import LoraConfig
from temper.policy.lora_linear import LoraLinear, Pair, Router
from temper.policy.model import Policy


def with_dora(family: str = "qwen3", names=("dora",), **options) -> Policy:
    """A policy with DoRA adapters whose direction and length both differ from the base's."""
    policy = tiny_policy(family)
    for rank, name in enumerate(names, start=2):
        policy.add_lora(name, LoraConfig(**{"rank": 2 * rank, "alpha": 8.0, "dora": True} | options))
        with torch.no_grad():
            for path, weight in policy.model.named_parameters():
                if f".lora.{name}.B" in path:
                    weight.normal_(std=0.2)
                if f".lora.{name}.m" in path:
                    weight.mul_(torch.empty_like(weight).uniform_(0.7, 1.4))
    return policy


def test_a_fresh_dora_adapter_changes_no_bit_of_the_scores():
    policy, batch = tiny_policy(), make_batch(LENGTHS)
    before = policy.token_logprobs(batch).logprobs_B_T
    policy.add_lora("fresh", LoraConfig(rank=4, dora=True))
    for adapters in (["fresh"] * 4, ["fresh", None, "fresh", None]):
        batch.adapters = adapters
        assert torch.equal(policy.token_logprobs(batch).logprobs_B_T, before)


def worked_layer() -> LoraLinear:
    """W = [[3, 0], [0, 1]], s·B A = [[0, 4], [0, 0]] (s = 2), m = [10, 1], b = [1, -1]."""
    layer = LoraLinear(nn.Linear(2, 2), Router())
    layer.requires_grad_(False)
    pair = Pair(layer, rank=1, scaling=2.0, dropout=0.0, dora=True)
    layer.lora["a"] = pair
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[3.0, 0.0], [0.0, 1.0]]))
        layer.bias.copy_(torch.tensor([1.0, -1.0]))
        pair.A.copy_(torch.tensor([[0.0, 1.0]]))
        pair.B.copy_(torch.tensor([[2.0], [0.0]]))
        pair.m.copy_(torch.tensor([10.0, 1.0]))
    return layer


def test_by_hand():
    layer = worked_layer()
    x = torch.tensor([[1.0, 2.0]])
    with layer.router.use(["a"], torch.device("cpu")):
        # rows of W + s·B A are [3, 4] of length 5 and [0, 1] of length 1: scales 2 and 1; 2·(3 + 8) + 1 and 2 - 1
        torch.testing.assert_close(layer(x), torch.tensor([[23.0, 1.0]]))
        layer(x).sum().backward()
    # the length is held constant: dm = (W + s·B A)x / length, dB = s·scale·A x
    torch.testing.assert_close(layer.pair("a").m.grad, torch.tensor([11 / 5, 2.0]))
    torch.testing.assert_close(layer.pair("a").B.grad, torch.tensor([[2 * 2 * 2.0], [2 * 1 * 2.0]]))
    torch.testing.assert_close(layer.pair("a").merged(layer), torch.tensor([[6.0, 8.0], [0.0, 1.0]]))


def test_a_row_of_zeros_stays_zero():
    layer = nn.Linear(3, 2)
    with torch.no_grad():
        layer.weight[0] = 0.0
    pair = Pair(layer, rank=1, scaling=1.0, dropout=0.0, dora=True)
    assert bool(pair.row_scale(layer).isfinite().all())


@pytest.mark.parametrize("targets", ["all", "attention"])
def test_each_row_of_a_mixed_batch_gets_what_its_adapter_alone_gives_it(targets):
    policy, batch = with_dora(names=("one", "two"), targets=targets), make_batch([9] * 5)
    policy.add_lora("plain", LoraConfig(rank=3))
    with torch.no_grad():
        for path, weight in policy.model.named_parameters():
            if ".lora.plain.B" in path:
                weight.normal_(std=0.2)
    names = ["two", None, "plain", "one", "two"]
    mixed = logits(policy, batch, names)
    for row, name in enumerate(names):
        torch.testing.assert_close(mixed[row], logits(policy, batch, [name] * 5)[row], atol=1e-5, rtol=1e-5)


def test_gradients_of_a_mixed_batch_are_those_of_the_rows_alone():
    policy, batch = with_dora(names=("one", "two")), make_batch([7, 7, 7])

    def gradients(names, rows):
        policy.model.zero_grad()
        batch.adapters = names
        policy.token_logprobs(batch).logprobs_B_T[rows].sum().backward()
        return {name: weight.grad.clone() for name, weight in policy.trainable_parameters().items() if weight.grad is not None}

    mixed, alone = gradients(["one", "two", None], [0, 1, 2]), gradients(["one"] * 3, [0])
    found = [name for name in mixed if ".lora.one." in name]
    assert len(found) == 3 * 7 * 2
    for name in found:
        torch.testing.assert_close(mixed[name], alone[name], atol=1e-4, rtol=1e-4)


def test_merging_equals_the_adapter_and_unmerging_restores_every_byte():
    policy, batch = with_dora(), make_batch(LENGTHS)
    base_hash, expected = policy.weights_hash(), logits(policy, batch, ["dora"] * 4)
    policy.merge("dora")
    torch.testing.assert_close(logits(policy, batch, [None] * 4), expected, atol=1e-4, rtol=1e-4)
    policy.unmerge()
    assert policy.weights_hash() == base_hash


def test_what_is_kept_between_calls_follows_the_length():
    policy, batch = with_dora(), make_batch([5, 5])
    before = logits(policy, batch, ["dora", None])
    with torch.no_grad():
        for path, weight in policy.model.named_parameters():
            if path.endswith(".m"):
                weight.mul_(1.5)
    after = logits(policy, batch, ["dora", None])
    assert float((after[0] - before[0]).abs().max()) > 0.01
    assert torch.equal(after[1], before[1])


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_peft_loads_what_we_save_with_equal_logits(tmp_path, family):
    policy, batch = with_dora(family, targets=r".*\.(q_proj|down_proj)"), make_batch(LENGTHS)
    policy.save(tmp_path / "base")
    policy.save_adapter("dora", tmp_path / "adapter")
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), str(tmp_path / "adapter")).eval()
    ours = logits(policy, batch, ["dora"] * 4)
    torch.testing.assert_close(peft(batch.tokens_B_T).logits, ours, atol=1e-4, rtol=1e-4)
    assert float((logits(policy, batch, [None] * 4) - ours).abs().max()) > 0.05
    again = Policy.load(tmp_path / "base", precision="float32")
    again.load_adapter("again", tmp_path / "adapter")
    assert again.adapter_hash("again") == policy.adapter_hash("dora")
    assert torch.equal(logits(again, batch, ["again"] * 4), ours)


@pytest.mark.parametrize("rslora", [False, True])
def test_we_load_what_peft_saves_with_equal_logits(tmp_path, rslora):
    base, batch = tiny_checkpoint(tmp_path / "base"), make_batch(LENGTHS)
    config = PeftConfig(
        r=3, lora_alpha=5, use_rslora=rslora, use_dora=True, target_modules=r".*layers\.1\..*_proj", init_lora_weights=False,
        task_type="CAUSAL_LM",
    )  # fmt: skip
    peft = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).eval()
    with torch.no_grad():
        for name, weight in peft.named_parameters():
            if "magnitude" in name:
                weight.mul_(1.3)
    peft.save_pretrained(tmp_path / "adapter")
    policy = Policy.load(base, precision="float32")
    policy.load_adapter("theirs", tmp_path / "adapter")
    torch.testing.assert_close(logits(policy, batch, ["theirs"] * 4), peft(batch.tokens_B_T).logits, atol=1e-4, rtol=1e-4)


def test_training_it_takes_peft_s_own_steps(tmp_path):
    base, batch = tiny_checkpoint(tmp_path / "base", "llama"), make_batch(LENGTHS)
    policy = Policy.load(base, precision="float32")
    policy.add_lora("dora", LoraConfig(rank=4, alpha=8.0, dora=True))
    policy.save_adapter("dora", tmp_path / "adapter")
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "adapter"), is_trainable=True)
    theirs = torch.optim.SGD([weight for weight in peft.parameters() if weight.requires_grad], lr=0.05)
    ours = torch.optim.SGD(policy.trainable_parameters().values(), lr=0.05)
    batch.adapters = ["dora"] * 4
    targets = batch.tokens_B_T[:, 1:].where(batch.mask_B_T[:, 1:], -100)
    for _ in range(3):
        found = -policy.token_logprobs(batch).logprobs_B_T.sum()
        expected = nn.functional.cross_entropy(peft(batch.tokens_B_T).logits[:, :-1].flatten(0, 1), targets.flatten(), reduction="sum")
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-5)
        for optimizer, loss in ((ours, found), (theirs, expected)):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
