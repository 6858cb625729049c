"""One tiny checkpoint for the whole room's tests, and a single thread: the machine has few cores."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from checkpoints import tiny_checkpoint  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> str:
    return str(tiny_checkpoint("qwen3", tmp_path_factory.mktemp("qwen3") / "base"))


@pytest.fixture(scope="session")
def deep(tmp_path_factory) -> str:
    """The same family with six layers: a teacher that a two-layer student can be cut from."""
    import checkpoints

    before = checkpoints.SIZES["num_hidden_layers"]
    checkpoints.SIZES["num_hidden_layers"] = 6
    try:
        return str(tiny_checkpoint("qwen3", tmp_path_factory.mktemp("deep") / "base", seed=3))
    finally:
        checkpoints.SIZES["num_hidden_layers"] = before
