"""What the kill test runs in a process of its own: one SFT stage, slow enough to be killed in the middle."""

from __future__ import annotations

import torch

from temper.train import sft


def work(keys: dict) -> None:
    """Run SFT with a single thread."""
    torch.set_num_threads(1)
    sft.run(sft.Config(**keys))
