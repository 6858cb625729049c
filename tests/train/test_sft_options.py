"""SFT's two options that are off by default: z-loss and NEFTune. They reach the loss, and leave the measured one alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from worlds import conversations, manifest

from temper.data.batch import collate
from temper.policy.losses import sft_cross_entropy
from temper.policy.model import Policy
from temper.train import sft

FAST = {"tokens_per_step": 10_000, "tokens_per_batch": 10_000, "steps": 1, "optim": {"lr": 1e-9}, "precision": "float32"}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return manifest(tmp_path_factory.mktemp("manifest") / "rows", conversations(8))


def first_step(base: str, data: str, out: Path, **keys) -> dict:
    sft.run(sft.Config(**{"out": str(out), "base": base, "data": data, "dev": data, **FAST, **keys}))
    return json.loads((out / "metrics.jsonl").read_text().splitlines()[0])


def test_z_loss_adds_its_share_of_the_squared_log_partition(base, data, tmp_path) -> None:
    plain, with_z = first_step(base, data, tmp_path / "plain"), first_step(base, data, tmp_path / "z", z_loss=0.01)
    policy = Policy.load(base, precision="float32")
    batch = collate(sft.sequences(sft.load_records(data)[1], policy, sft.Config(out="o", base=base, data=data)), policy.template.pad_id)
    with torch.no_grad():
        scores = policy.token_logprobs(batch)
    expected = sft_cross_entropy(scores.logprobs_B_T, batch.weights_B_T, batch.mask_B_T, logz_B_T=scores.logz_B_T, z_loss=0.01)
    assert with_z["loss"] == pytest.approx(float(expected.total / expected.count), rel=1e-4)
    assert with_z["loss"] > plain["loss"] + 0.01
    assert with_z["dev_loss"] == pytest.approx(plain["dev_loss"], rel=1e-5)


def test_noise_is_in_training_alone_and_a_resumed_run_draws_the_same(base, data, tmp_path) -> None:
    plain, noisy, again = (first_step(base, data, tmp_path / name, neftune=alpha) for name, alpha in (("plain", 0.0), ("noisy", 300.0), ("again", 300.0)))
    assert abs(noisy["loss"] - plain["loss"]) > 1e-4
    assert noisy["loss"] == again["loss"]
    assert noisy["dev_loss"] == pytest.approx(plain["dev_loss"], rel=1e-5)
