from __future__ import annotations

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from policy_doubles import make_batch, tiny_checkpoint, tiny_policy
from transformers import AutoModelForCausalLM

from temper.core.errors import ConfigError, DataError, IntegrityError, ShapeError
from temper.core.storage import FILES, read_json, write_json
from temper.policy.adapters import LoraConfig
from temper.policy.lora_linear import LoraLinear, Route, drop
from temper.policy.model import Policy

LENGTHS = [9, 5, 7, 3]
TENANTS = ("bank_a", "retail_b", "saas_c")


def with_adapters(family: str = "qwen3", names=TENANTS, **options) -> Policy:
    """A policy with adapters that really change something; B starts at zero, so it is filled at random."""
    policy = tiny_policy(family)
    for rank, name in enumerate(names, start=2):
        policy.add_lora(name, LoraConfig(**{"rank": 2 * rank, "alpha": 8.0} | options))
        with torch.no_grad():
            for path, weight in policy.model.named_parameters():
                if f".lora.{name}.B" in path:
                    weight.normal_(std=0.2)
    return policy


def logits(policy: Policy, batch, names) -> torch.Tensor:
    with policy.use(names), torch.no_grad():
        return policy.model(batch.tokens_B_T).logits


def test_a_fresh_adapter_changes_no_bit_of_the_scores():
    policy, batch = tiny_policy(), make_batch(LENGTHS)
    before = policy.token_logprobs(batch).logprobs_B_T
    policy.add_lora("fresh", LoraConfig(rank=4))
    batch.adapters = ["fresh"] * 4
    assert torch.equal(policy.token_logprobs(batch).logprobs_B_T, before)


def test_each_row_of_a_mixed_batch_gets_what_its_adapter_alone_gives_it():
    policy, batch = with_adapters(), make_batch([9] * 5)
    names = ["saas_c", None, "bank_a", "retail_b", "bank_a"]
    mixed = logits(policy, batch, names)
    for row, name in enumerate(names):
        alone = logits(policy, batch, [name] * 5)[row]
        torch.testing.assert_close(mixed[row], alone, atol=1e-5, rtol=1e-5)
    assert float((logits(policy, batch, ["bank_a"] * 5) - logits(policy, batch, [None] * 5)).abs().max()) > 0.1


def test_the_gradient_of_a_mixed_batch_reaches_each_adapter_from_its_own_rows_only():
    policy, batch = with_adapters(), make_batch([7, 7, 7, 7])

    def gradients(names, mask_B):
        policy.model.zero_grad()
        batch.adapters = names
        scores = policy.token_logprobs(batch)
        (-scores.logprobs_B_T * torch.tensor(mask_B)[:, None]).sum().backward()
        return {name: weight.grad.clone() for name, weight in policy.trainable_parameters().items() if weight.grad is not None}

    mixed = gradients(["bank_a", "retail_b", "bank_a", None], [1.0, 1.0, 1.0, 1.0])
    alone = gradients(["bank_a"] * 4, [1.0, 0.0, 1.0, 0.0])
    bank = [name for name in mixed if ".lora.bank_a." in name]
    assert len(bank) == 2 * 7 * 2
    for name in bank:
        torch.testing.assert_close(mixed[name], alone[name], atol=1e-4, rtol=1e-4)
    assert all(float(mixed[name].abs().max()) > 0 for name in mixed if ".lora.retail_b.B" in name)
    assert not any(".lora.saas_c." in name for name in mixed)


def test_stacked_factors_follow_the_weights():
    policy, batch = with_adapters(), make_batch([5, 5])
    names = ["bank_a", "retail_b"]
    before = logits(policy, batch, names)
    with torch.no_grad():
        for path, weight in policy.model.named_parameters():
            if ".lora.bank_a." in path:
                weight.mul_(2.0)
    after = logits(policy, batch, names)
    assert float((after[0] - before[0]).abs().max()) > 0.01
    assert torch.equal(after[1], before[1])


def test_only_the_adapter_is_trained_and_the_weights_hash_is_that_of_the_base():
    policy = tiny_policy()
    base_hash, count = policy.weights_hash(), len(policy.base_parameters())
    policy.add_lora("bank_a", LoraConfig(rank=2))
    assert all(".lora.bank_a." in name for name in policy.trainable_parameters())
    assert (policy.weights_hash(), len(policy.base_parameters())) == (base_hash, count)


@pytest.mark.parametrize(
    ("targets", "layers"),
    [
        ("all", 14),
        ("attention", 8),
        ("mlp", 6),
        (("q_proj", "v_proj"), 4),
        (r"model\.layers\.0\..*", 7),
        (("model.layers.1.mlp.up_proj",), 1),
    ],
)
def test_targets_choose_layers_and_never_the_head(targets, layers):
    policy = tiny_policy("llama")
    policy.add_lora("a", LoraConfig(rank=2, targets=targets))
    assert sum(isinstance(module, LoraLinear) for module in policy.model.modules()) == layers
    assert not isinstance(policy.model.get_output_embeddings(), LoraLinear)


def test_rslora_scales_by_the_root_of_the_rank():
    assert LoraConfig(rank=16, alpha=32).scaling == 2.0
    assert LoraConfig(rank=16, alpha=32, rslora=True).scaling == 8.0


def test_dropout_acts_in_training_only():
    policy, batch = with_adapters(names=("bank_a",), dropout=0.5), make_batch([9])
    batch.adapters = ["bank_a"]
    still = [policy.token_logprobs(batch).logprobs_B_T for _ in range(2)]
    policy.model.train()
    moving = [policy.token_logprobs(batch).logprobs_B_T for _ in range(2)]
    assert torch.equal(*still)
    assert not torch.equal(*moving)


def test_in_a_mixed_batch_each_row_has_the_dropout_of_its_own_adapter():
    policy, batch = with_adapters(names=("bank_a",), dropout=0.5), make_batch([9, 9])
    policy.add_lora("still", LoraConfig(rank=3))
    with torch.no_grad():
        for path, weight in policy.model.named_parameters():
            if ".lora.still.B" in path:
                weight.normal_(std=0.2)
    policy.model.train()
    first, second = (logits(policy, batch, ["bank_a", "still"]) for _ in range(2))
    assert float((first[0] - second[0]).abs().max()) > 0.01
    torch.testing.assert_close(first[1], second[1], atol=1e-6, rtol=0)
    torch.testing.assert_close(first[1], logits(policy, batch, ["still", "still"])[1], atol=1e-5, rtol=1e-5)


def fixed_rate(x, route_slots, p):
    """The mean and the share of zeros that dropout leaves of ones."""
    out = drop(x, Route(("a", "b"), torch.tensor(route_slots)), p)
    return [(float(row.mean()), float((row == 0).float().mean())) for row in out]


def test_dropout_keeps_the_mean_of_every_row():
    torch.manual_seed(0)
    (mean, zeros), (whole, none) = fixed_rate(torch.ones(2, 50_000), [0, 1], [(0, 0.25), (1, 0.0)])
    assert (whole, none) == (1.0, 0.0)
    assert mean == pytest.approx(1.0, abs=0.02)
    assert zeros == pytest.approx(0.25, abs=0.01)


@pytest.mark.parametrize("family", ["qwen3", "llama"])
@pytest.mark.parametrize("rslora", [False, True])
def test_peft_loads_what_we_save_with_equal_logits(tmp_path, family, rslora):
    policy, batch = with_adapters(family, names=("bank_a",), rslora=rslora, targets="attention"), make_batch(LENGTHS)
    policy.save(tmp_path / "base")
    policy.save_adapter("bank_a", tmp_path / "adapter")
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), str(tmp_path / "adapter")).eval()
    ours = logits(policy, batch, ["bank_a"] * 4)
    torch.testing.assert_close(peft(batch.tokens_B_T).logits, ours, atol=1e-4, rtol=1e-4)
    assert float((logits(policy, batch, [None] * 4) - ours).abs().max()) > 0.05
    assert read_json(tmp_path / "adapter" / "adapter_config.json")["target_modules"] == ["k_proj", "o_proj", "q_proj", "v_proj"]


@pytest.mark.parametrize("rslora", [False, True])
def test_we_load_what_peft_saves_with_equal_logits(tmp_path, rslora):
    base, batch = tiny_checkpoint(tmp_path / "base"), make_batch(LENGTHS)
    config = PeftConfig(
        r=3, lora_alpha=5, use_rslora=rslora, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    peft = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).eval()
    peft.save_pretrained(tmp_path / "adapter")
    policy = Policy.load(base, precision="float32")
    policy.load_adapter("theirs", tmp_path / "adapter")
    torch.testing.assert_close(logits(policy, batch, ["theirs"] * 4), peft(batch.tokens_B_T).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("start", ["pissa", "olora", "loftq", "corda"])
def test_an_adapter_that_stands_on_a_changed_base_is_refused(tmp_path, start):
    """These starts take what the factors begin with out of the base, so beside the plain base they are another model."""
    with_adapters().save_adapter("bank_a", tmp_path / "adapter")
    write_json(tmp_path / "adapter" / "adapter_config.json", read_json(tmp_path / "adapter" / "adapter_config.json") | {"init_lora_weights": start})
    (tmp_path / "adapter" / FILES).unlink()  # as another program writes one
    with pytest.raises(DataError, match=f"init_lora_weights='{start}'"):
        tiny_policy().load_adapter("bank_a", tmp_path / "adapter")


def test_an_adapter_comes_back_with_the_same_content_hash_under_any_name(tmp_path):
    policy, fresh = with_adapters(), tiny_policy()
    policy.save_adapter("retail_b", tmp_path / "adapter")
    state = torch.get_rng_state()
    fresh.load_adapter("other", tmp_path / "adapter")
    assert torch.equal(torch.get_rng_state(), state)
    assert fresh.adapter_hash("other") == policy.adapter_hash("retail_b") != policy.adapter_hash("bank_a")
    assert fresh.adapters() == ["other"]
    assert all(".lora.other." in name for name in fresh.trainable_parameters())


def test_merging_equals_the_adapter_and_unmerging_restores_every_byte():
    policy, batch = with_adapters(), make_batch(LENGTHS)
    base_hash, expected = policy.weights_hash(), logits(policy, batch, ["bank_a"] * 4)
    merged_hash = policy.merge("bank_a")
    torch.testing.assert_close(logits(policy, batch, [None] * 4), expected, atol=1e-4, rtol=1e-4)
    assert merged_hash != base_hash
    with pytest.raises(ConfigError, match="is merged into the base"):
        policy.use(["bank_a"])
    with pytest.raises(ConfigError, match="merged already"):
        policy.merge("retail_b")
    policy.unmerge()
    assert policy.weights_hash() == base_hash
    with pytest.raises(ConfigError, match="no adapter is merged"):
        policy.unmerge()


def test_unmerging_weights_that_changed_meanwhile_is_refused():
    policy = with_adapters()
    policy.merge("bank_a")
    with torch.no_grad():
        next(module for module in policy.model.modules() if isinstance(module, LoraLinear)).weight[0, 0] += 1
    with pytest.raises(IntegrityError, match="changed after"):
        policy.unmerge()


def test_a_saved_policy_leaves_its_adapters_out_and_a_reference_keeps_them(tmp_path):
    policy, batch = with_adapters(), make_batch(LENGTHS)
    policy.save(tmp_path / "model")
    assert Policy.load(tmp_path / "model").adapters() == []
    reference, names = policy.clone_reference(), ["bank_a", None, "saas_c", "saas_c"]
    expected = logits(policy, batch, names)
    policy.remove_adapter("bank_a")
    assert torch.equal(logits(reference, batch, names), expected)
    assert policy.adapters() == ["retail_b", "saas_c"]


def test_wrong_names_rows_and_targets_are_refused():
    policy, batch = with_adapters(), make_batch([4, 4])
    with pytest.raises(ConfigError, match=r"no adapter 'bank_z'.*\n.*bank_a, retail_b, saas_c"):
        policy.use(["bank_z", None])
    with pytest.raises(ShapeError, match="2 rows meets a route of 3"):
        logits(policy, batch, ["bank_a", None, "bank_a"])
    with pytest.raises(ConfigError, match="already"):
        policy.add_lora("bank_a", LoraConfig())
    with pytest.raises(ConfigError, match="not a plain name"):
        policy.add_lora("../bank", LoraConfig())
    with pytest.raises(ConfigError, match="select no linear layer"):
        policy.add_lora("b", LoraConfig(targets="query"))


def test_an_adapter_that_does_not_fit_or_is_no_plain_lora_is_refused(tmp_path):
    policy, other = with_adapters(), tiny_policy("gemma2")
    folder = tmp_path / "adapter"
    with pytest.raises(DataError, match=r"adapter_config\.json is missing"):
        policy.load_adapter("x", folder)
    folder.mkdir()
    policy.save_adapter("bank_a", folder)
    config = read_json(folder / "adapter_config.json")
    write_json(folder / "adapter_config.json", config | {"use_dora": True})
    with pytest.raises(DataError, match=r"holds A, B of .*\n.*use_dora is True: it must hold A, B, m"):
        policy.load_adapter("x", folder)
    write_json(folder / "adapter_config.json", config | {"bias": "all"})
    with pytest.raises(DataError, match="bias='all'"):
        policy.load_adapter("x", folder)
    write_json(folder / "adapter_config.json", config | {"lora_alpha": 99})
    with pytest.raises(IntegrityError, match="not the one that was saved"):
        policy.load_adapter("x", folder)
    assert policy.adapters() == sorted(TENANTS)
    write_json(folder / "adapter_config.json", config)
    for layer in other.model.model.layers:
        layer.self_attn.q_proj = torch.nn.Linear(64, 32, bias=False)
    with pytest.raises(DataError, match="does not fit this model"):
        other.load_adapter("x", folder)


def test_an_adapter_with_nan_is_refused_because_it_would_reach_other_rows(tmp_path):
    policy = with_adapters()
    with torch.no_grad():
        next(weight for name, weight in policy.model.named_parameters() if ".lora.bank_a.B" in name)[0, 0] = float("nan")
    policy.save_adapter("bank_a", tmp_path / "adapter")
    with pytest.raises(DataError, match="not finite"):
        policy.load_adapter("x", tmp_path / "adapter")


def test_a_changed_adapter_file_is_refused(tmp_path):
    policy = with_adapters()
    policy.save_adapter("bank_a", tmp_path / "adapter")
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(bytes(content))
    with pytest.raises(IntegrityError, match="differs"):
        policy.load_adapter("x", tmp_path / "adapter")


def test_an_adapter_met_by_another_base_is_named_in_the_log(tmp_path, caplog):
    policy, other = with_adapters(), tiny_policy(seed=1)
    policy.save_adapter("bank_a", tmp_path / "adapter")
    other.load_adapter("x", tmp_path / "adapter")
    assert "was trained on base" in caplog.text
