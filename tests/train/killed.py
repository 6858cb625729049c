"""What the kill tests run in a process of its own: one stage on one thread, killed from outside at any moment."""

from __future__ import annotations

import torch

from temper.train import distill, load_stage


def work(stage: str, keys: dict) -> None:
    """Run `stage` with a single thread; of distillation, with a student larger than temper would take."""
    torch.set_num_threads(1)
    distill.LARGEST_SHARE = 0.8
    module = load_stage(stage)
    module.run(module.Config(**keys))
