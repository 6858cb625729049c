"""The head's softmax as a Triton kernel: right in Triton's interpreter, and compiled for GPUs, both without a GPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from temper.policy import tiles
from temper.policy.tiles import row_kernel, softmax_

ROOT = Path(__file__).resolve().parents[2]

# Triton decides when it is imported whether it interprets, so the kernel's values come from a process of their own.
INTERPRET = """
import sys
import torch
from temper.policy.triton_softmax import softmax_rows_

found = {}
for name, logits in torch.load(sys.argv[1]).items():
    for entropy in (False, True):
        p = logits.clone()
        found[name, entropy] = (p, *softmax_rows_(p, entropy=entropy))
torch.save(found, sys.argv[2])
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
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", INTERPRET, str(folder / "logits.pt"), str(folder / "found.pt")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "found.pt")


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

    from temper.policy.triton_softmax import BLOCK, WARPS, softmax_kernel

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


class OnGpu(torch.Tensor):
    """A tensor that says it lies on a GPU."""

    is_cuda = True


def test_float32_rows_on_a_gpu_go_to_the_kernel_and_everything_else_to_pytorch(monkeypatch):
    seen = []
    monkeypatch.setattr(tiles, "row_kernel", lambda device: lambda logits, entropy: seen.append(logits.shape) or (logits, None))
    rows = torch.randn(2, 3)
    for other in (rows, rows.double().as_subclass(OnGpu), torch.randn(3, 2).T.as_subclass(OnGpu)):
        expected = other.double().softmax(-1)
        softmax_(other)
        torch.testing.assert_close(other.double(), expected, check_dtype=False)
    assert seen == []
    softmax_(rows.as_subclass(OnGpu))
    assert seen == [(2, 3)]


def test_without_triton_a_gpu_takes_pytorchs_operations(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "temper.policy.triton_softmax", None)
    row_kernel.cache_clear()
    logits = torch.randn(2, 3)
    expected = logits.softmax(-1)
    softmax_(logits.as_subclass(OnGpu))
    row_kernel.cache_clear()
    torch.testing.assert_close(logits, expected)
    assert "no Triton kernel for the head" in caplog.text


def test_a_kernel_that_cannot_be_launched_is_not_used(monkeypatch, caplog):
    needs_triton()
    from temper.policy import triton_softmax

    def fail(logits):
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(triton_softmax, "softmax_rows_", fail)
    row_kernel.cache_clear()
    assert row_kernel(torch.device("cpu")) is None
    row_kernel.cache_clear()
    assert "no Triton kernel for the head" in caplog.text
    assert "Failed to find C compiler" in caplog.text
