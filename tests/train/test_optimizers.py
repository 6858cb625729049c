"""Optimizers with eight-bit moments: near AdamW, their state is tensors, and what is kept of a weight sees it change."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from temper.core.errors import MissingDependency
from temper.policy import quantised
from temper.train.optimizers import bytes_of, make_optimizer

OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8}


def test_without_the_library_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    quantised.bitsandbytes.cache_clear()
    with pytest.raises(MissingDependency, match=r"optim.kind: adamw8bit needs bitsandbytes(.|\n)*temper\[quantised\]"):
        make_optimizer("adamw8bit", [{"params": [nn.Parameter(torch.ones(2))], "weight_decay": 0.0}], **OPTIONS)
    quantised.bitsandbytes.cache_clear()


def steps(kind: str, count: int, *, resumed_after: int | None = None) -> tuple[torch.Tensor, torch.optim.Optimizer]:
    """A matrix of 8,192 numbers that learns to be 1 from noisy gradients; optionally its state goes through copies."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(64, 128))
    optimizer = make_optimizer(kind, [{"params": [weight], "weight_decay": 0.01}], **OPTIONS)
    for step in range(count):
        if step == resumed_after:
            kept = {name: value.detach().clone() for name, value in optimizer.state[weight].items()}
            optimizer = make_optimizer(kind, [{"params": [weight], "weight_decay": 0.01}], **OPTIONS)
            for name, value in kept.items():
                optimizer.state[weight][name] = value
        weight.grad = (weight.detach() - 1) * (1 + 0.1 * torch.randn(64, 128))
        optimizer.step()
    return weight.detach(), optimizer


def test_eight_bit_moments_stay_near_float32_ones_in_a_quarter_of_the_memory():
    pytest.importorskip("bitsandbytes")
    exact, of_exact = steps("adamw", 50)
    near, of_near = steps("adamw8bit", 50)
    start, _ = steps("adamw", 0)
    assert float((near - exact).norm() / (exact - start).norm()) < 0.05

    def held(optimizer):
        (state,) = optimizer.state.values()
        return sum(value.numel() * value.element_size() for value in state.values())

    assert held(of_near) < 0.27 * held(of_exact)


@pytest.mark.parametrize("kind", ["adamw", "adamw8bit"])
def test_the_bytes_that_an_estimate_counts_are_those_that_are_held(kind):
    """A gradient, and moments: of a matrix of 8,193 numbers, in eight bits with 33 scales each, and of a bias, always in float32."""
    if kind != "adamw":
        pytest.importorskip("bitsandbytes")
    weights = [nn.Parameter(torch.randn(3, 2731)), nn.Parameter(torch.randn(128))]
    optimizer = make_optimizer(kind, [{"params": weights, "weight_decay": 0.0}], **OPTIONS)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    moments = [value for state in optimizer.state.values() for name, value in state.items() if name != "step"]
    held = [*moments, *(weight.grad for weight in weights)]
    assert bytes_of(kind, weights) == sum(value.numel() * value.element_size() for value in held)


def test_going_on_from_a_copy_of_the_state_gives_the_same_bytes():
    pytest.importorskip("bitsandbytes")
    whole, optimizer = steps("adamw8bit", 12)
    (state,) = optimizer.state.values()
    assert {name: value.dtype for name, value in state.items()} == {
        "step": torch.int64, "state1": torch.uint8, "state2": torch.uint8, "absmax1": torch.float32, "absmax2": torch.float32,
    }  # fmt: skip
    assert torch.equal(steps("adamw8bit", 12, resumed_after=5)[0], whole)


def test_a_step_counts_as_a_change_of_the_weight():
    pytest.importorskip("bitsandbytes")
    weight = nn.Parameter(torch.randn(64, 128))
    optimizer = make_optimizer("adamw8bit", [{"params": [weight], "weight_decay": 0.0}], **OPTIONS)
    weight.grad, before = torch.ones(64, 128), weight._version
    optimizer.step()
    assert weight._version > before


def test_paging_is_said_to_be_of_cuda_alone(caplog):
    pytest.importorskip("bitsandbytes")
    steps("paged_adamw8bit", 1)
    assert "pages on CUDA only" in caplog.text
