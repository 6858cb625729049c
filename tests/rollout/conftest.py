"""Tiny policies of four families, loaded once; weights are scaled up so that greedy choices are clear and varied."""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path

import pytest
import torch

from temper.policy.model import Policy
from tests.checkpoints import tiny_checkpoint


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """These models are too small to share: on a busy machine a second thread only waits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def policy_of(tmp_path_factory: pytest.TempPathFactory):
    """`policy_of("qwen3")`: one policy a family and test session; a test that changes it must put it back."""
    folder: Path = tmp_path_factory.mktemp("rollout")

    @cache
    def load(family: str) -> Policy:
        policy = Policy.load(tiny_checkpoint(family, folder / family), precision="float32")
        with torch.no_grad():
            for weight in policy.model.parameters():
                if weight.ndim == 2:
                    weight.mul_(5)
        return policy

    return load


@pytest.fixture
def prompts_of():
    """`prompts_of(policy, count)`: random prompts of 3 to 60 tokens, some equal, some sharing a prefix."""

    def make(policy: Policy, count: int = 14) -> list[list[int]]:
        rng, size = random.Random(0), len(policy.tokenizer)
        prompts = [[rng.randrange(20, size) for _ in range(rng.randrange(3, 60))] for _ in range(count)]
        prompts[4] = list(prompts[3])
        prompts[7] = prompts[3] + prompts[7]
        prompts[8] = prompts[7][:30] + prompts[8]
        return prompts

    return make
