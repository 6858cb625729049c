"""Whole stages on a GPU: supervised, preference and reinforcement learning, sampler and learner on one device."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from worlds import conversations, manifest, pairs

from temper.policy.adapters import LoraConfig
from temper.train import distill, preference, reward, rl, sft

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
SMALL = {"tokens_per_step": 400, "tokens_per_batch": 256, "device": "cuda"}


def log_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=8)])
def test_supervised(base, tmp_path, lora):
    data = manifest(tmp_path / "rows", conversations(30))
    sft.run(sft.Config(out=str(tmp_path / "out"), base=base, data=data, lora=lora, epochs=4, optim={"lr": 5e-3}, **SMALL))
    losses = [line["loss"] for line in log_of(tmp_path / "out")]
    assert losses[-1] < 0.95 * losses[0]


def test_preference_and_reward(base, tmp_path):
    data = manifest(tmp_path / "rows", pairs(16))
    for module, name in ((preference, "dpo"), (reward, "reward")):
        module.run(module.Config(out=str(tmp_path / name), base=base, data=data, epochs=3, optim={"lr": 2e-3}, **SMALL))
        losses = [line["loss"] for line in log_of(tmp_path / name)]
        assert losses[-1] < losses[0]


def test_reinforcement_ratios_start_at_one_but_for_rounding(base, tmp_path):
    """The sampler's log-probs against the learner's own of the same tokens, both in bfloat16."""
    rl.run(rl.Config(out=str(tmp_path / "rl"), base=base, environment="worlds:say", steps=3, tasks_per_step=4, group=6, optim={"lr": 1e-3}, device="cuda"))
    lines = log_of(tmp_path / "rl")
    assert len(lines) == 3
    assert all(abs(line["ratio"] - 1) < 0.05 for line in lines)
    assert all(0 <= line["mismatch_kl"] < 0.02 for line in lines)


def test_distillation(deep, tmp_path):
    data = manifest(tmp_path / "rows", conversations(20))
    distill.run(distill.Config(out=str(tmp_path / "out"), base=deep, data=data, student={"layers": 2}, epochs=2, optim={"lr": 2e-3}, **SMALL))
    losses = [line["loss"] for line in log_of(tmp_path / "out")]
    assert losses[-1] < losses[0]
