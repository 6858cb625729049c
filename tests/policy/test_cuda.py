"""What only a GPU can show: kernels as they run, bfloat16 with float32 masters, the variable-length kernel, four bits for real."""

from __future__ import annotations

import copy
import random
from pathlib import Path

import pytest
import torch
from policy_doubles import CONFIGS, tiny_policy
from test_triton_kernels import LAYERS, close, expected_of, inputs_of_layers, tiles_of_logits

from temper.data.batch import collate
from temper.data.sequence import Sequence
from temper.policy import attention, kernels, varlen
from temper.policy.adapters import LoraConfig
from temper.policy.model import Policy
from temper.policy.tiles import softmax_
from temper.train.learner import Learner, OptimConfig

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
CUDA, HALF = "cuda", torch.bfloat16
ROUNDING = 3e-2  # of a gradient's norm: some layers of bfloat16 products
KINDS = ("padded", "packed", "shared")


@pytest.fixture
def dense_is_refused(monkeypatch):
    """No mask of positions by positions is made; how often the variable-length kernel ran."""
    ran, kernel = [], varlen.attention

    def refuse(*_):
        raise AssertionError("a dense mask was made")

    def count(*inputs):
        ran.append(1)
        return kernel(*inputs)

    monkeypatch.setattr(attention.Seen, "dense", refuse)
    monkeypatch.setattr(varlen, "attention", count)
    return ran


def on_gpu(family: str, **options) -> Policy:
    policy = tiny_policy(family)
    return Policy(copy.deepcopy(policy.model).to(CUDA), policy.tokenizer, compute_dtype=HALF, **options)


def rows(adapters: tuple[str | None, ...] = (None,)) -> list[Sequence]:
    """Three prompts with two answers each, lengths from 3 to 60, in turn through the adapters."""
    rng = random.Random(0)
    made = []
    for number, length in enumerate((50, 24, 3)):
        prompt = [rng.randrange(4, 61) for _ in range(length)]
        for _ in range(2):
            answer = [rng.randrange(4, 61) for _ in range(rng.randint(2, 12))]
            made.append(Sequence([*prompt, *answer], [0.0] * length + [1.0] * len(answer), adapter=adapters[len(made) % len(adapters)], group=str(number)))
    return made


def run(policy: Policy, kind: str, made: list[Sequence]) -> dict[str, torch.Tensor]:
    batch = collate(made, 1, kind).to(policy.device)
    scores = policy.token_logprobs(batch).logprobs_B_T
    (-scores.sum()).backward()
    found = {name: weight.grad.cpu() for name, weight in policy.model.named_parameters() if weight.grad is not None}
    policy.model.zero_grad()
    return {"scores": scores.detach().cpu()} | found


def apart(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max(float((found[name] - value).norm() / value.norm().clamp(min=1e-6)) for name, value in expected.items())


@pytest.mark.parametrize("name", LAYERS)
def test_a_layers_kernel_as_it_runs(name):
    found = kernels.built(torch.device(CUDA, 0))
    assert found is not None
    group = {"norm": "norms", "gate": "gates", "rotation": "rotations"}[name.partition("-")[0]]
    inputs = [item.to(CUDA) if isinstance(item, torch.Tensor) else item for item in inputs_of_layers()[group][name]]
    if group == "norms":
        x, weight, grad, offset, out = inputs
        y, r = found.norm_rows(x, weight, 1e-6, offset, out)
        made = (y, *found.norm_rows_backward(grad, x, weight, r, offset, need_weight=True))
    elif group == "gates":
        made = (found.gate(*inputs[:2]), *found.gate_backward(*inputs))
    else:
        x, cos, sin, grad = inputs
        made = (found.rotate(x, cos, sin), found.rotate(grad, cos, sin, back=True))
    for one, exact in zip(made, expected_of(name, double=True), strict=True):
        close(one.cpu(), exact, HALF if "half" in name or "bfloat16" in name else torch.float32, float(exact.abs().max()))


@pytest.mark.parametrize("name", list(tiles_of_logits()))
def test_the_softmax_kernel_as_it_runs(name):
    exact = tiles_of_logits()[name].double()
    logits = exact.float().to(CUDA)
    logz, entropy = softmax_(logits, entropy=True)
    torch.testing.assert_close(logits.cpu().double(), exact.softmax(-1), atol=1e-7, rtol=1e-5)
    torch.testing.assert_close(logz.cpu().double(), exact.logsumexp(-1), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(entropy.cpu().double(), torch.special.entr(exact.softmax(-1)).sum(-1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_on_a_gpu_is_float32_on_a_cpu_but_for_rounding(family, kind, dense_is_refused):
    policy = on_gpu(family)
    if family == "gemma2":  # its scores are capped, which no kernel for packed rows does
        assert policy.kind(kind) == "padded"
        return
    assert policy.kind(kind) == kind, policy.padded_because
    dense_is_refused.clear()
    assert apart(run(policy, kind, rows()), run(tiny_policy(family), kind, rows())) < 2 * ROUNDING
    assert len(dense_is_refused) == (0 if kind == "padded" else 2)


@pytest.mark.parametrize("recompute", [False, True])
def test_adapters_of_a_mixed_batch_train_packed_as_they_do_padded(recompute, dense_is_refused):
    policy = on_gpu("llama")
    policy.recompute = recompute
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        policy.add_lora(name, LoraConfig(rank=4))
    with torch.no_grad():
        for name, weight in policy.trainable_parameters().items():
            weight.add_(0.05 if name.endswith(".B") else 0.0)
    expected = run(policy, "padded", rows(("a", "b", None)))
    for kind in ("packed", "shared"):
        assert apart(run(policy, kind, rows(("a", "b", None))), expected) < ROUNDING


def test_full_training_keeps_float32_masters_and_a_resume_goes_on(tmp_path):
    policy = on_gpu("llama")
    batch = collate(rows(), 1, "packed")
    learner = Learner(policy, OptimConfig(lr=3e-3, warmup_share=0.0, schedule="constant"), 20)
    losses = []
    for step in range(20):
        losses.append(learner.forward_backward([batch], policy.cross_entropy)["loss"])
        learner.optim_step()
        if step == 9:
            learner.save(tmp_path)
    assert losses[-1] < 0.5 * losses[0]
    assert {weight.dtype for weight in policy.model.parameters()} == {torch.float32}
    again = on_gpu("llama")
    resumed = Learner(again, OptimConfig(lr=3e-3, warmup_share=0.0, schedule="constant"), 20)
    resumed.load(tmp_path)
    assert resumed.forward_backward([batch], again.cross_entropy)["loss"] == pytest.approx(losses[10], rel=1e-2)


@pytest.mark.parametrize("kind", ["adamw", "paged_adamw8bit"])
def test_four_bits_train_with_paged_moments(kind, caplog):
    pytest.importorskip("bitsandbytes")
    policy = on_gpu("llama")
    policy.quantise("nf4")
    policy.add_lora("a", LoraConfig(rank=64))
    learner = Learner(policy, OptimConfig(kind=kind, lr=5e-3, warmup_share=0.0, schedule="constant"), 20)
    batch, losses = collate(rows(("a",)), 1, "packed"), []
    for _ in range(20):
        losses.append(learner.forward_backward([batch], policy.cross_entropy)["loss"])
        learner.optim_step()
    assert losses[-1] < 0.6 * losses[0]
    assert "pages on CUDA only" not in caplog.text


def test_packing_in_four_bits_is_what_a_cpu_packs():
    pytest.importorskip("bitsandbytes")
    from temper.policy.quantised import dense

    one, other = on_gpu("llama"), tiny_policy("llama")
    for policy in (one, other):
        policy.quantise("nf4")
    layer = "model.layers.0.mlp.up_proj"
    torch.testing.assert_close(dense(one.model.get_submodule(layer), torch.float32).cpu(), dense(other.model.get_submodule(layer), torch.float32), rtol=1e-4, atol=1e-5)


def test_the_embedded_base_loads_halved_and_says_what_a_cpu_says():
    base = Path(__file__).parents[2] / "temper" / "environments" / "finops" / "base"
    policy, exact = Policy.load(base, device=CUDA), Policy.load(base, device="cpu", precision="float32")
    assert policy.compute_dtype is HALF
    policy.freeze_base()
    read = Policy.load(base, device=CUDA, frozen=True)
    for one in (policy, read):
        assert one.model.model.layers[0].mlp.up_proj.weight.dtype is HALF
        assert one.model.get_input_embeddings().weight.dtype is torch.float32
        assert one.weights_hash() == exact.weights_hash()
    rng = random.Random(1)
    made = [Sequence(tokens := [rng.randrange(10, 2000) for _ in range(length)], [0.0] * 5 + [1.0] * (len(tokens) - 5)) for length in (300, 41, 7)]
    batch = collate(made, 0, "packed")
    with torch.no_grad():
        found, expected = policy.token_logprobs(batch.to(CUDA)).logprobs_B_T.cpu(), exact.token_logprobs(batch).logprobs_B_T
    assert float((found - expected).norm() / expected.norm()) < ROUNDING
