"""The product of an adapted layer against autograd's own, by finite differences, and in what it keeps."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from temper.policy.linear import Update, linear

OUT, IN, RANK, ROWS, LENGTH = 5, 4, 3, 2, 3


def parts(dtype=torch.float64, bias=True):
    torch.manual_seed(0)
    layer = nn.Linear(IN, OUT, bias=bias, dtype=dtype)
    x = torch.randn(ROWS, LENGTH, IN, dtype=dtype, requires_grad=True)
    A, B = (torch.randn(*shape, dtype=dtype, requires_grad=True) for shape in ((RANK, IN), (OUT, RANK)))
    return layer, x, A, B


FOREIGN = torch.tensor([[False, True, False], [True, True, True]])


@pytest.mark.parametrize("foreign", [None, FOREIGN], ids=["one adapter", "mixed"])
@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_the_gradients_are_those_of_finite_differences(foreign, dropped, frozen):
    layer, x, A, B = parts()
    z = torch.randn_like(x, requires_grad=True) if dropped else None
    layer.requires_grad_(not frozen)

    def product(x, A, B, *rest):
        return linear(layer, x, Update(A, B, 1.5, rest[0] if dropped else None, foreign))

    inputs = (x, A, B, *([z] if dropped else []), *([] if frozen else layer.parameters()))
    assert torch.autograd.gradcheck(product, inputs)


@pytest.mark.parametrize("foreign", [None, FOREIGN])
def test_it_is_the_formula_written_out(foreign):
    layer, x, A, B = parts()
    inner = F.linear(x, A)
    if foreign is not None:
        inner = inner.masked_fill(foreign[:, None], 0.0)
    expected = layer(x) + 1.5 * F.linear(inner, B)
    torch.testing.assert_close(linear(layer, x, Update(A, B, 1.5, None, foreign)), expected)
    assert torch.equal(linear(layer, x), layer(x))


def test_a_foreign_column_that_is_not_finite_harms_no_row_and_no_gradient():
    layer, x, A, B = parts()
    with torch.no_grad():
        A[1] = float("nan")
    out = linear(layer, x, Update(A, B, 1.0, None, FOREIGN))
    out.sum().backward()
    assert bool(out.isfinite().all())
    assert bool(B.grad.isfinite().all())
    assert bool(A.grad.isfinite().all())
    torch.testing.assert_close(A.grad[1], torch.zeros(IN, dtype=torch.float64))


def test_a_frozen_weight_gets_no_gradient_and_autocast_gives_its_dtype():
    layer, x, A, B = parts(torch.float32)
    layer.requires_grad_(False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = linear(layer, x, Update(A, B, 1.0))
    assert out.dtype is torch.bfloat16
    out.float().sum().backward()
    assert layer.weight.grad is None
    assert (x.grad.dtype, A.grad.dtype, B.grad.dtype) == (torch.float32,) * 3
    exact = linear(layer, x, Update(A, B, 1.0))
    torch.testing.assert_close(out.float(), exact, atol=0.05, rtol=0.05)
