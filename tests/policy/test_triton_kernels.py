"""The Triton kernels: right in Triton's interpreter, and compiled for GPUs, both without a GPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from temper.policy import kernels, layers, tiles
from temper.policy.tiles import softmax_

ROOT = Path(__file__).resolve().parents[2]

# Triton decides when it is imported whether it interprets, so the kernel's values come from a process of their own.
INTERPRET = """
import sys
import torch
from temper.policy import triton_kernels as kernels

found = {}
for name, logits in torch.load(sys.argv[1]).items():
    for entropy in (False, True):
        p = logits.clone()
        found[name, entropy] = (p, *kernels.softmax_rows_(p, entropy=entropy))
torch.save(found, sys.argv[2])

made = {}
for name, (x, weight, grad, offset, out) in torch.load(sys.argv[3])["norms"].items():
    y, r = kernels.norm_rows(x, weight, 1e-6, offset, out)
    made[name] = (y, *kernels.norm_rows_backward(grad, x, weight, r, offset, need_weight=True))
    assert torch.equal(made[name][1], kernels.norm_rows_backward(grad, x, weight, r, offset, need_weight=False)[0])
for name, (gate, up, grad) in torch.load(sys.argv[3])["gates"].items():
    made[name] = (kernels.gate(gate, up), *kernels.gate_backward(gate, up, grad))
for name, (x, cos, sin, grad) in torch.load(sys.argv[3])["rotations"].items():
    made[name] = (kernels.rotate(x, cos, sin), kernels.rotate(grad, cos, sin, back=True))
torch.save(made, sys.argv[4])
"""


def needs_triton():
    return pytest.importorskip(
        "triton", reason="triton is not installed: it has wheels for Linux on x86_64, where make install-dev takes it"
    )


def tiles_of_logits() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    found = {f"normal-{vocab}": torch.randn(3, vocab) for vocab in (1, 7, 1000, 32768 + 3)}
    for name, value in (("1e30", -1e30), ("inf", -torch.inf)):
        logits = 3 * torch.randn(4, 10_000)
        logits[0, 5:] = value  # five tokens are allowed, all in the first block
        logits[1, :9_000] = value  # two whole blocks allow nothing
        logits[2, 1:] = value  # one token: its probability is 1 and the entropy 0
        logits[3, ::2] = value
        found[f"forbidden-{name}"] = logits
    found["huge"] = 1e4 * torch.randn(3, 5_000).clamp(-1, 1)
    found["huge-rising"] = torch.linspace(-1e4, 1e4, 10_000).repeat(2, 1)  # every block has a new maximum
    found["equal"] = torch.full((2, 8192), -1e4)  # the entropy is log 8192
    found["no rows"] = torch.empty(0, 7)
    return found


NAMES = list(tiles_of_logits())


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    needs_triton()
    folder = tmp_path_factory.mktemp("interpreted")
    torch.save(tiles_of_logits(), folder / "logits.pt")
    torch.save(inputs_of_layers(), folder / "layers.pt")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", INTERPRET, *(str(folder / f"{name}.pt") for name in ("logits", "found", "layers", "made"))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "found.pt") | torch.load(folder / "made.pt")


def inputs_of_layers() -> dict[str, dict[str, tuple]]:
    """Widths that are no power of two, more rows than programs, bfloat16 beside float32, heads seen across positions."""
    torch.manual_seed(1)
    half = torch.bfloat16
    norms = {
        "norm-float32": (2 * torch.randn(5, 24), torch.rand(24), torch.randn(5, 24), 0.0, torch.float32),
        "norm-gemma": (torch.randn(3, 7, 100), torch.randn(100), torch.randn(3, 7, 100), 1.0, torch.float32),
        "norm-bfloat16": (torch.randn(520, 16), torch.rand(16), torch.randn(520, 16).to(half), 0.0, half),
        "norm-half-in": (torch.randn(4, 2048).to(half), torch.rand(2048).to(half), torch.randn(4, 2048), 0.0, torch.float32),
    }
    gates = {
        "gate-float32": tuple(3 * torch.randn(3, 7, 111) for _ in range(3)),
        "gate-bfloat16": tuple(torch.randn(5, 600).to(half) for _ in range(3)),
        "gate-far": (torch.tensor([-200.0, -20.0, 0.0, 20.0, 200.0]), torch.ones(5), torch.ones(5)),
    }
    angles = torch.randn(2, 9, 12)
    rotations = {
        "rotation-rows": (torch.randn(2, 9, 3, 12).transpose(1, 2), angles.cos(), angles.sin(), torch.randn(2, 3, 9, 12)),
        "rotation-one": (torch.randn(2, 9, 5, 12).transpose(1, 2), angles[:1].cos(), torch.randn(1, 9, 12), torch.randn(2, 9, 5, 12).transpose(1, 2)),
        "rotation-bfloat16": (torch.randn(2, 4, 9, 12).to(half), angles.cos(), angles.sin(), torch.randn(2, 4, 9, 12).to(half)),
    }
    return {"norms": norms, "gates": gates, "rotations": rotations}


LAYERS = [name for group in inputs_of_layers().values() for name in group]


def expected_of(name: str, *, double: bool) -> tuple[torch.Tensor, ...]:
    """Result and gradients by autograd of the formula in float64, or by the functions that run on a CPU."""
    group = {"norm": "norms", "gate": "gates", "rotation": "rotations"}[name.partition("-")[0]]
    inputs = inputs_of_layers()[group][name]
    if group == "norms":
        x, weight, grad, offset, out = inputs
        leaves = [item.double() if double else item.clone() for item in (x, weight)]
        leaves = [item.requires_grad_() for item in leaves]
        y = leaves[0] * (leaves[0].square().mean(-1, keepdim=True) + 1e-6).rsqrt() * (leaves[1] + offset) if double else layers.rms_norm(*leaves, 1e-6, offset, out)
    elif group == "gates":
        gate, up, grad = inputs
        leaves = [(item.double() if double else item.clone()).requires_grad_() for item in (gate, up)]
        y = torch.nn.functional.silu(leaves[0]) * leaves[1] if double else layers.gate(*leaves)
    else:
        x, cos, sin, grad = inputs
        leaves = [(x.double() if double else x.clone()).requires_grad_()]
        a, b = leaves[0].chunk(2, -1)
        y = leaves[0] * cos[:, None] + torch.cat((-b, a), -1) * sin[:, None] if double else layers.rotate(leaves[0], cos, sin)
    y.backward(grad.to(y.dtype))
    return (y.detach(), *(leaf.grad for leaf in leaves))


def close(found: torch.Tensor, expected: torch.Tensor, rounding: torch.dtype, largest: float = 1.0) -> None:
    """Equal to a few roundings of `rounding`; a sum of many terms to that of the largest."""
    error = {torch.float32: 2e-6, torch.bfloat16: 1.6e-2}[rounding]
    torch.testing.assert_close(found.double(), expected.double(), rtol=error, atol=error * largest)


@pytest.mark.parametrize("name", LAYERS)
def test_a_layers_kernel_agrees_with_float64(interpreted, name):
    expected = expected_of(name, double=True)
    assert len(interpreted[name]) == len(expected)
    for found, exact in zip(interpreted[name], expected, strict=True):
        close(found, exact, found.dtype if name.endswith("32") else torch.bfloat16 if "half" in name or "bfloat16" in name else torch.float32,
              float(exact.abs().max()))  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_on_a_cpu_agrees_with_float64(name):
    for found, exact in zip(expected_of(name, double=False), expected_of(name, double=True), strict=True):
        close(found, exact, torch.bfloat16 if "half" in name or "bfloat16" in name else torch.float32, float(exact.abs().max()))


def test_layers_by_hand(interpreted):
    """silu(0) = 0 with slope 1/2; far to the left the gate is shut, far to the right it is the identity. A rotation keeps lengths."""
    y, dgate, dup = interpreted["gate-far"]
    assert y.tolist() == pytest.approx([0, -20 / (1 + 2.718281828**20), 0, 20, 200], abs=1e-6)
    assert dgate.tolist() == pytest.approx([0, 0, 0.5, 1, 1], abs=1e-6)
    assert dup.tolist() == y.tolist()
    x, turned = inputs_of_layers()["rotations"]["rotation-rows"][0], interpreted["rotation-rows"][0]
    assert turned.shape == x.shape
    x_of, r = inputs_of_layers()["norms"]["norm-float32"][:2]
    torch.testing.assert_close(interpreted["norm-float32"][0], x_of / x_of.square().mean(-1, keepdim=True).sqrt() * r, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_the_kernel_agrees_with_float64(interpreted, name, entropy):
    exact = tiles_of_logits()[name].double()
    p, logz, found = interpreted[name, entropy]
    expected = exact.softmax(-1)
    torch.testing.assert_close(p.double(), expected, atol=1e-7, rtol=1e-6)
    torch.testing.assert_close(logz.double(), exact.logsumexp(-1), atol=1e-6, rtol=1e-6)
    assert (found is not None) == entropy
    if entropy:
        torch.testing.assert_close(found.double(), torch.special.entr(expected).sum(-1), atol=1e-6, rtol=1e-6)


def test_by_hand(interpreted):
    """The only token allowed has p = 1, log Z is its logit and H = 0; among 8,192 equal ones H = log 8192 = 9.010913."""
    p, logz, entropy = interpreted["forbidden-inf", True]
    assert (p[2, 0].item(), p[2, 1:].max().item(), entropy[2].item()) == (1.0, 0.0, 0.0)
    assert logz[2] == tiles_of_logits()["forbidden-inf"][2, 0]
    assert interpreted["equal", True][2].tolist() == pytest.approx([9.010913] * 2, abs=1e-6)


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("capability", [80, 90])
def test_the_kernel_compiles_for_gpus(capability, entropy, tmp_path, monkeypatch):
    triton = needs_triton()
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from temper.policy.triton_kernels import BLOCK, WARPS, softmax_kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # compiled here and now, not found from an earlier run
    signature = {"logits_R_V": "*fp32", "logz_R": "*fp32", "entropy_R": "*fp32", "vocab": "i32", "BLOCK": "constexpr"}
    constants = {"BLOCK": BLOCK}
    if not entropy:  # as a launch with None
        signature["entropy_R"], constants["entropy_R"] = "constexpr", None
    source = ASTSource(fn=softmax_kernel, signature=signature, constexprs=constants)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": WARPS})
    assert f".target sm_{capability}" in made.asm["ptx"]
    assert re.search(r"arith\.muli .* : i64", made.asm["ttir"])  # where a row begins is counted in 64 bits
    assert made.asm["cubin"].startswith(b"\x7fELF")


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", ["norm_kernel", "norm_backward_kernel", "gate_kernel", "gate_backward_kernel", "rotate_kernel"])
def test_a_layers_kernel_compiles_for_gpus(capability, name, tmp_path, monkeypatch):
    triton = needs_triton()
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from temper.policy import triton_kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = getattr(triton_kernels, name)
    constants = {"BLOCK": 4096, "HEADS": 32, "HALF": 64, "BACK": True, "NEED_WEIGHT": True}
    numbers = {"eps": "fp32", "offset": "fp32", **dict.fromkeys(("width", "rows", "count", "heads", "positions", "angles", "half", "step_row", "step_head", "step_position"), "i32")}
    wide = {"r_N", "dweight_P_D", "weight_D", "cos", "sin"}
    signature = {argument: "constexpr" if argument in constants else numbers.get(argument, "*fp32" if argument in wide else "*bf16") for argument in kernel.arg_names}
    made = triton.compile(ASTSource(fn=kernel, signature=signature, constexprs={key: value for key, value in constants.items() if key in signature}),
                          target=GPUTarget("cuda", capability, 32), options={"num_warps": 8})  # fmt: skip
    assert f".target sm_{capability}" in made.asm["ptx"]
    assert re.search(r"arith\.muli .* : i64|arith\.muli .* : tensor<.*i64>", made.asm["ttir"])


class OnGpu(torch.Tensor):
    """A tensor that says it lies on a GPU."""

    is_cuda = True


@pytest.fixture
def asked_anew():
    kernels.built.cache_clear()
    yield
    kernels.built.cache_clear()


def test_float32_rows_on_a_gpu_go_to_the_kernel_and_everything_else_to_pytorch(monkeypatch):
    seen = []

    class Kernels:
        @staticmethod
        def softmax_rows_(logits, entropy):
            seen.append(logits.shape)
            return logits, None

    monkeypatch.setattr(kernels, "built", lambda device: Kernels)
    rows = torch.randn(2, 3)
    for other in (rows, rows.double().as_subclass(OnGpu), torch.randn(3, 2).T.as_subclass(OnGpu)):
        expected = other.double().softmax(-1)
        softmax_(other)
        torch.testing.assert_close(other.double(), expected, check_dtype=False)
    assert seen == []
    softmax_(rows.as_subclass(OnGpu))
    assert seen == [(2, 3)]


@pytest.mark.usefixtures("asked_anew")
def test_without_triton_a_gpu_takes_pytorchs_operations(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "temper.policy.triton_kernels", None)
    monkeypatch.delattr("temper.policy.triton_kernels", raising=False)
    logits = torch.randn(2, 3)
    expected = logits.softmax(-1)
    softmax_(logits.as_subclass(OnGpu))
    torch.testing.assert_close(logits, expected)
    assert "no Triton kernels" in caplog.text


@pytest.mark.usefixtures("asked_anew")
def test_kernels_that_cannot_be_launched_are_not_used(monkeypatch, caplog):
    needs_triton()
    from temper.policy import triton_kernels

    def fail(device):
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(triton_kernels, "trial", fail)
    assert kernels.built(torch.device("cpu")) is None
    assert "no Triton kernels" in caplog.text
    assert "Failed to find C compiler" in caplog.text
    assert tiles.softmax_(torch.zeros(1, 2))[0].tolist() == pytest.approx([0.693147], abs=1e-6)
