"""A base in four bits: the levels, the product, adapters beside it, merging, and bitsandbytes' and PEFT's own."""

from __future__ import annotations

import sys

import policy_doubles
import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from policy_doubles import make_batch, tiny_checkpoint, tiny_policy
from scipy.stats import norm
from test_adapters import LENGTHS, logits
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from temper.core.errors import ConfigError, MissingDependency
from temper.policy import adapters, quantised
from temper.policy.adapters import LoraConfig
from temper.policy.linear import QuantisedLinear
from temper.policy.merging import Merge
from temper.policy.model import Policy

# Dettmers et al. 2023, appendix E
NF4 = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
       -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
       0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]  # fmt: skip


def test_without_the_library_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    quantised.bitsandbytes.cache_clear()
    with pytest.raises(MissingDependency, match=r"quantise: nf4 needs bitsandbytes(.|\n)*temper\[quantised\]"):
        tiny_policy().quantise("nf4")
    quantised.bitsandbytes.cache_clear()


bnb = pytest.importorskip("bitsandbytes")


def test_the_levels_are_those_of_the_paper_and_the_quantiles_they_stand_for():
    levels = quantised._levels(torch.device("cpu"))
    torch.testing.assert_close(levels, torch.tensor(NF4), atol=1e-7, rtol=0)
    # section 3: quantiles of the normal distribution, eight to the right of zero and seven to the left, divided by the largest
    end = 0.9677083
    right, left = (norm.ppf([end + (0.5 - end) * at / count for at in range(count)]) for count in (8, 7))
    built = sorted([*-left, 0.0, *right])
    torch.testing.assert_close(levels.double(), torch.tensor(built) / max(built), atol=2e-4, rtol=0)


@pytest.mark.parametrize("width", [64, 96, 34], ids=["whole blocks", "blocks across rows", "a last block that is not full"])
def test_each_weight_is_the_nearest_level_of_its_block(width):
    torch.manual_seed(0)
    layer = nn.Linear(width, 64)
    weight = layer.weight.detach().clone()
    packed = QuantisedLinear(layer)
    found = quantised.dense(packed, torch.float32).view(-1, 64)
    blocks = weight.view(-1, 64)
    largest = blocks.abs().amax(1, keepdim=True)
    nearest = ((blocks / largest)[..., None] - torch.tensor(NF4)).abs().argmin(-1)
    # the second quantisation: the block's magnitude is off by a few parts in a hundred at most
    ratio = found.abs().amax(1, keepdim=True) / largest
    assert float((ratio - 1).abs().max()) < 0.02
    torch.testing.assert_close(found, torch.tensor(NF4)[nearest] * largest * ratio, atol=1e-6, rtol=1e-5)
    held = sum(p.numel() * p.element_size() for name, p in packed.named_parameters() if name != "bias")
    assert held <= weight.numel() * (1 / 2 + 1 / 64 + 4 / 64 / 256) + 8


def test_the_product_and_its_gradient_are_those_of_the_unpacked_weight_and_of_the_library():
    torch.manual_seed(0)
    layer = nn.Linear(64, 32)
    theirs = bnb.nn.Linear4bit(64, 32, quant_type="nf4", compute_dtype=torch.float32)
    theirs.weight = bnb.nn.Params4bit(layer.weight.detach().clone(), requires_grad=False, quant_type="nf4", module=theirs)
    theirs.bias = nn.Parameter(layer.bias.detach().clone())
    theirs = theirs.to("cpu")
    ours = QuantisedLinear(layer)
    x, g = torch.randn(3, 5, 64, requires_grad=True), torch.randn(3, 5, 32)
    plain = F.linear(x, quantised.dense(ours, torch.float32), ours.bias)
    for expected in (plain, theirs(x)):
        torch.testing.assert_close(ours(x), expected, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(*(torch.autograd.grad(y, x, g, retain_graph=True)[0] for y in (ours(x), expected)), atol=1e-6, rtol=1e-6)
    trained = ours(x)
    with torch.no_grad():
        assert torch.equal(ours.eval()(x), trained)  # sampling sees the matrix that training saw


def packed_policy(family: str = "qwen3", names=("a", "b"), **options) -> Policy:
    policy = tiny_policy(family)
    policy.quantise("nf4")
    for rank, name in enumerate(names, start=2):
        policy.add_lora(name, LoraConfig(**{"rank": 2 * rank, "alpha": 8.0} | options))
        with torch.no_grad():
            for path, weight in policy.model.named_parameters():
                if f".lora.{name}.B" in path:
                    weight.normal_(std=0.2)
    return policy


def test_quantising_changes_the_hash_keeps_the_head_and_is_done_once_and_first(tmp_path):
    policy = tiny_policy()
    dense_hash = policy.weights_hash()
    policy.quantise("nf4")
    assert policy.packed
    assert policy.weights_hash() != dense_hash
    assert policy.head.weight_V_D.dtype is torch.float32
    assert sum(isinstance(module, QuantisedLinear) for module in policy.model.modules()) == 14
    assert not policy.trainable_parameters()
    with pytest.raises(ConfigError, match="came too late"):
        policy.quantise("nf4")
    with pytest.raises(ConfigError, match="four bits is not saved"):
        policy.save(tmp_path / "model")


@pytest.mark.parametrize("dora", [False, True])
def test_each_row_of_a_mixed_batch_gets_what_its_adapter_alone_gives_it(dora):
    policy, batch = packed_policy(dora=dora), make_batch([9] * 4)
    names = ["b", None, "a", "b"]
    mixed = logits(policy, batch, names)
    for row, name in enumerate(names):
        torch.testing.assert_close(mixed[row], logits(policy, batch, [name] * 4)[row], atol=1e-5, rtol=1e-5)


def test_training_an_adapter_moves_nothing_else_and_reaches_its_reference():
    policy, batch = packed_policy(names=("a",)), make_batch(LENGTHS, adapters=["a"] * 4)
    base, reference = policy.weights_hash(), policy.clone_reference()
    policy.model.train()
    optimizer = torch.optim.AdamW(policy.trainable_parameters().values(), lr=1e-2)
    losses = []
    for _ in range(8):
        loss = policy.cross_entropy(batch).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
    assert policy.weights_hash() == base == reference.weights_hash()
    assert float(reference.cross_entropy(batch).total) == pytest.approx(losses[0], rel=1e-5)


def test_merging_into_four_bits_says_how_far_it_missed_and_is_undone_to_the_byte(caplog):
    policy, batch = packed_policy(names=("a",)), make_batch(LENGTHS)
    base, before = policy.weights_hash(), logits(policy, batch, [None] * 4)
    merge = Merge(policy.model, "a")
    assert 0.01 < merge.error < 10
    assert f"{merge.error:.3g} times what the adapter itself changed" in caplog.text
    assert policy.weights_hash() != base
    merge.undo()
    assert policy.weights_hash() == base
    assert torch.equal(logits(policy, batch, [None] * 4), before)


def test_merging_into_float32_misses_by_rounding_alone_and_warns_of_nothing(caplog):
    policy = tiny_policy()
    policy.add_lora("a", LoraConfig(rank=4))
    assert Merge(policy.model, "a").error == 0.0
    assert not caplog.records


def test_the_error_of_a_merge_is_the_distance_from_what_was_wanted():
    policy = packed_policy(names=("a",))
    missed = changed = 0.0
    for layer in adapters.layers_of(policy.model, "a").values():
        wanted, before = layer.pair("a").merged(layer), quantised.dense(layer, torch.float32)
        rounded = QuantisedLinear(nn.Linear(layer.in_features, layer.out_features))
        quantised.repack_(rounded, wanted)
        missed += float((quantised.dense(rounded, torch.float32) - wanted).square().sum())
        changed += float((wanted - before).square().sum())
    assert Merge(policy.model, "a").error == pytest.approx((missed / changed) ** 0.5, rel=1e-3)


@pytest.fixture
def whole_blocks(monkeypatch):
    """Widths that are multiples of 64: for others bitsandbytes' own layer unpacks wrongly on a CPU, and so does PEFT's beside it."""
    monkeypatch.setitem(policy_doubles.SIZES, "intermediate_size", 128)


def their_base(folder) -> nn.Module:
    """The same base as transformers quantises it. In training mode: for inference bitsandbytes multiplies in bfloat16."""
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32, device_map="cpu").train()


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.usefixtures("whole_blocks")
def test_peft_loads_what_we_trained_beside_it_with_equal_logits(tmp_path, dora):
    base, batch = tiny_checkpoint(tmp_path / "base", "llama"), make_batch(LENGTHS)
    policy = Policy.load(base, precision="float32")
    policy.quantise("nf4")
    policy.add_lora("a", LoraConfig(rank=4, alpha=8.0, dora=dora))
    with torch.no_grad():
        for path, weight in policy.model.named_parameters():
            if path.endswith(".B"):
                weight.normal_(std=0.2)
    policy.save_adapter("a", tmp_path / "adapter")
    peft = PeftModel.from_pretrained(their_base(base), str(tmp_path / "adapter")).train()
    ours = logits(policy, batch, ["a"] * 4)
    torch.testing.assert_close(peft(batch.tokens_B_T).logits, ours, atol=1e-4, rtol=1e-4)
    assert float((logits(policy, batch, [None] * 4) - ours).abs().max()) > 0.05


@pytest.mark.usefixtures("whole_blocks")
def test_we_load_what_peft_saves_with_equal_logits(tmp_path, caplog):
    base, batch = tiny_checkpoint(tmp_path / "base", "llama"), make_batch(LENGTHS)
    config = PeftConfig(r=3, lora_alpha=5, use_rslora=True, target_modules=["q_proj", "up_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    peft = get_peft_model(their_base(base), config).train()
    peft.save_pretrained(tmp_path / "adapter")
    policy = Policy.load(base, precision="float32")
    policy.quantise("nf4")
    policy.load_adapter("theirs", tmp_path / "adapter")
    torch.testing.assert_close(logits(policy, batch, ["theirs"] * 4), peft(batch.tokens_B_T).logits, atol=1e-4, rtol=1e-4)
    policy.save_adapter("theirs", tmp_path / "ours")
    dense = Policy.load(base, precision="float32")
    dense.load_adapter("x", tmp_path / "ours")
    assert "was trained on base" in caplog.text
