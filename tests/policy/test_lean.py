"""The lean forward against transformers' own: same scores, same gradients, no worse in bfloat16, and nothing left behind."""

from __future__ import annotations

import pytest
import torch
from policy_doubles import CONFIGS, make_batch, tiny_policy
from torch.nn import functional as F

from temper.policy import attention, blocks, lean
from temper.policy.products import prefer_onednn, times_transposed

LENGTHS = [130, 70, 33]


def setting(seed: int, rows: int, heads: int, key_heads: int, positions: int, size: int):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((rows, positions, heads, size), (rows, positions, key_heads, size), (rows, positions, key_heads, size))
    return [torch.randn(shape, generator=generator).transpose(1, 2) for shape in shapes], torch.randn(shapes[0], generator=generator)


@pytest.mark.parametrize(("heads", "key_heads", "positions"), [(4, 2, 150), (4, 4, 64), (6, 1, 65), (2, 2, 1), (8, 2, 7)])
@pytest.mark.parametrize("keep", [True, False])
def test_blocks_attend_like_the_whole(heads, key_heads, positions, keep, monkeypatch):
    monkeypatch.setattr(blocks, "QUERIES", 48)  # several blocks a row
    monkeypatch.setattr(blocks, "LARGEST_SCORES", 4096)  # several batches of one shape
    monkeypatch.setattr(blocks, "KEPT_BYTES", blocks.KEPT_BYTES if keep else 0)
    attention.causal.cache_clear()
    inputs, grad = setting(0, 3, heads, key_heads, positions, 8)
    found_in, exact_in = [[item.detach().clone().to(dtype).requires_grad_() for item in inputs] for dtype in (torch.float32, torch.float64)]
    found, _ = attention.attention(torch.nn.Module(), *found_in, None, scaling=0.3)
    exact = F.scaled_dot_product_attention(*exact_in, is_causal=True, enable_gqa=True, scale=0.3).transpose(1, 2)
    torch.testing.assert_close(found.double(), exact, atol=1e-5, rtol=1e-5)
    found.backward(grad)
    exact.backward(grad.double())
    for one, other in zip(found_in, exact_in, strict=True):
        torch.testing.assert_close(one.grad.double(), other.grad, atol=1e-5, rtol=1e-4)


def test_capped_scores_are_not_left_uncapped():
    """transformers' sdpa refuses what it cannot compute; so do the blocks, in place of computing something else."""
    (query, key, value), _ = setting(1, 2, 4, 2, 9, 8)
    with pytest.raises(ValueError, match="softcap"):
        attention.attention(torch.nn.Module(), query, key, value, None, scaling=0.3, softcap=30.0)


def test_what_is_more_than_causal_goes_to_transformers_own():
    (query, key, value), _ = setting(1, 2, 4, 2, 9, 8)
    module = torch.nn.Module()
    module.num_key_value_groups = 2
    mask = torch.ones(2, 1, 9, 9, dtype=torch.bool).tril().triu(-2)  # a window of three
    found, _ = attention.attention(module, query, key, value, mask, scaling=0.3)
    wide = [item.repeat_interleave(2, 1) for item in (key, value)]
    torch.testing.assert_close(found, F.scaled_dot_product_attention(query, *wide, attn_mask=mask, scale=0.3).transpose(1, 2))


@pytest.mark.parametrize("family", CONFIGS)
def test_every_norm_of_every_family_is_recognised(family):
    policy = tiny_policy(family)
    norms = {path for path, module in policy.model.named_modules() if type(module).__name__.endswith("RMSNorm")}
    assert len(policy.lean.norms) == len(norms) > 0
    assert {offset for _, _, offset, _ in policy.lean.norms} == ({1.0} if family.startswith("gemma") else {0.0})


def test_a_norm_of_another_formula_is_left_alone():
    class OddRMSNorm(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.eps = torch.nn.Parameter(torch.rand(8)), 1e-6

        def forward(self, x):
            return x / x.abs().mean(-1, keepdim=True) * self.weight

    module = OddRMSNorm()
    assert lean.formula(module, module.weight, module.eps) is None


@pytest.mark.parametrize("family", CONFIGS)
def test_gates_and_rotations_of_every_family_are_told_from_others(family):
    """Gemma's gates are GELUs and stay; every family here turns halves."""
    decoder = tiny_policy(family).model.get_decoder()
    assert len(lean.gates(decoder)) == (0 if family.startswith("gemma") else 2)
    assert len(lean.take_over_rotations(decoder)) == 1


def test_a_rotation_of_pairs_is_another_one():
    from transformers.models.cohere import modeling_cohere
    from transformers.models.glm import modeling_glm

    assert not lean.is_rotation(modeling_cohere.apply_rotary_pos_emb)
    assert not lean.is_rotation(modeling_glm.apply_rotary_pos_emb)
    assert not lean.is_rotation(None)


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_a_part_of_a_head_is_turned_by_the_models_own_function(share):
    """Phi-3's turns whole heads or their first channels, as the config says; a probe of whole heads cannot tell."""
    from transformers import Phi3Config, Phi3Model
    from transformers.models.phi3 import modeling_phi3

    torch.manual_seed(0)
    config = Phi3Config(vocab_size=61, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0,
                        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": share})  # fmt: skip
    model, tokens = Phi3Model(config).eval(), torch.arange(12)[None]
    expected = model(tokens).last_hidden_state
    assert lean.take_over_rotations(model) == [modeling_phi3]
    turned = []
    given = modeling_phi3.apply_rotary_pos_emb.given
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modeling_phi3.apply_rotary_pos_emb, "given", lambda *inputs: turned.append(1) or given(*inputs))
        with lean.turning():
            found = model(tokens).last_hidden_state
        assert len(turned) == (2 if share < 1 else 0)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        model(tokens)  # outside the block it is the model's own
        assert len(turned) == (4 if share < 1 else 2)


def test_threads_of_one_family_do_not_turn_for_each_other():
    from threading import Thread

    from transformers.models.llama import modeling_llama

    lean.take_over_rotations(tiny_policy("llama").model.get_decoder())
    seen = []
    with lean.turning():
        thread = Thread(target=lambda: seen.append(lean._turning.get()))
        thread.start()
        thread.join()
    assert seen == [False]
    lean.take_over_rotations(tiny_policy("llama").model.get_decoder())
    assert not isinstance(modeling_llama.apply_rotary_pos_emb.given, lean.Dispatch)  # one dispatcher, however many models


def test_a_gate_that_adds_or_wants_more_is_another_one():
    class Odd(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = (torch.nn.Linear(8, 8) for _ in range(3))

        def forward(self, x):
            return self.down_proj(F.silu(self.gate_proj(x)) * (self.up_proj(x) + 1))

    class Wants(Odd):
        def forward(self, x, experts):
            return x

    class Clamped(Odd):
        def forward(self, x):
            return self.down_proj(F.silu(self.gate_proj(x).clamp(max=10.0)) * self.up_proj(x))

    class Drops(Odd):
        def forward(self, x):
            return F.dropout(self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x)), 0.1, self.training)

    for other in (Odd(), Wants(), Clamped(), Drops(), Drops().eval()):
        assert not lean.is_silu_gate(other)


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("recompute", [False, True])
def test_scores_and_gradients_with_gates_and_rotations_are_those_of_the_stock_forward(family, recompute):
    fused, stock = tiny_policy(family), tiny_policy(family)
    decoder = fused.model.get_decoder()
    fused.lean.gates, fused.lean.rotations, fused.recompute = lean.gates(decoder), lean.take_over_rotations(decoder), recompute
    stock.lean.norms, stock.lean.config = [], None
    found, expected = run(fused), run(stock)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=2e-5 * float(value.abs().max()) + 1e-7, msg=name)
    assert not any("forward" in module.__dict__ for module in fused.model.modules())


@pytest.mark.parametrize("family", CONFIGS)
def test_scores_and_gradients_are_those_of_the_stock_forward(family, monkeypatch):
    found = run(tiny_policy(family))
    stock = tiny_policy(family)
    stock.lean.norms, stock.lean.config = [], None
    expected = run(stock)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=2e-5 * float(value.abs().max()) + 1e-7, msg=name)


def test_in_bfloat16_it_is_no_further_from_float32_than_the_stock_forward():
    exact, rounded, stock = tiny_policy(), tiny_policy(compute_dtype=torch.bfloat16), tiny_policy(compute_dtype=torch.bfloat16)
    stock.lean.norms, stock.lean.config = [], None
    of_exact, of_rounded, of_stock = (run(policy) for policy in (exact, rounded, stock))

    def distance(values):
        return sum(float((values[name] - of_exact[name]).norm() / of_exact[name].norm()) for name in of_exact) / len(of_exact)

    assert 0 < distance(of_rounded) < 1.2 * distance(of_stock)


def run(policy) -> dict[str, torch.Tensor]:
    """The log-probs and all gradients of one batch."""
    scores = policy.token_logprobs(make_batch(LENGTHS))
    (-scores.logprobs_B_T.sum()).backward()
    return {"logprobs": scores.logprobs_B_T.detach()} | {name: weight.grad for name, weight in policy.model.named_parameters()}


def test_the_model_is_left_as_it_was_even_after_an_error():
    policy = tiny_policy()
    batch = make_batch([9])
    batch.tokens_B_T[0, 0] = 10_000  # outside the embedding
    with pytest.raises(IndexError):
        policy.token_logprobs(batch)
    assert policy.model.config._attn_implementation == "sdpa"
    assert not any("forward" in module.__dict__ for module in policy.model.modules())


def test_a_reference_runs_on_its_own_norms():
    policy, batch = tiny_policy(), make_batch([9])
    reference, before = policy.clone_reference(), policy.token_logprobs(batch).logprobs_B_T
    with torch.no_grad():
        policy.model.model.norm.weight.mul_(3.0)
    assert torch.equal(reference.token_logprobs(batch).logprobs_B_T, before)


def test_float32_products_stay_float32_whichever_library_multiplies():
    prefer_onednn()
    left, right = (
        torch.randn(300, 200, generator=torch.Generator().manual_seed(0)),
        torch.randn(100, 200, generator=torch.Generator().manual_seed(1)),
    )
    exact = left.double() @ right.double().T
    for found in (times_transposed(left, right), left @ right.T, F.linear(left, right), torch.bmm(left[None], right.T[None])[0]):
        assert float((found - exact).abs().max() / exact.abs().max()) < 1e-6
