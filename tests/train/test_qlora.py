"""QLoRA as a stage runs it: a base in four bits, moments in eight, and a resume to the byte."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from worlds import conversations, manifest

from temper.core.errors import ConfigError
from temper.data.batch import collate
from temper.policy.adapters import LoraConfig
from temper.policy.model import Policy
from temper.train import sft
from temper.train.learner import Learner, OptimConfig
from temper.train.stage import prepare

pytest.importorskip("bitsandbytes")
FAST = {"tokens_per_step": 400, "tokens_per_batch": 256, "precision": "float32"}
WIDE = LoraConfig(rank=64, targets="attention")  # wide enough for moments in eight bits


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return manifest(tmp_path_factory.mktemp("manifest") / "rows", conversations(30))


def config(base: str, data: str, out: str, **keys) -> sft.Config:
    return sft.Config(out=out, base=base, data=data, quantise="nf4", **FAST, **keys)


def test_weights_in_four_bits_are_not_trained_themselves(base, data) -> None:
    with pytest.raises(ConfigError, match="quantise: nf4 without an adapter"):
        prepare(config(base, data, "o"))


def losses_of(done_in) -> list[float]:
    return [json.loads(line)["loss"] for line in (done_in / "metrics.jsonl").read_text().splitlines()]


def test_a_run_learns_as_one_in_full_precision_does_and_says_what_it_stood_on(base, data, tmp_path) -> None:
    quick = {"lora": WIDE, "epochs": 4}
    done = sft.run(config(base, data, str(tmp_path / "a"), optim=OptimConfig(kind="adamw8bit", lr=5e-3), **quick))
    sft.run(sft.Config(out=str(tmp_path / "b"), base=base, data=data, optim=OptimConfig(lr=5e-3), **FAST, **quick))
    packed, full = losses_of(tmp_path / "a"), losses_of(tmp_path / "b")
    fall = full[0] - full[-1]
    assert fall > 0.1
    assert packed[0] != full[0]
    for one, other in zip(packed, full, strict=True):
        assert one == pytest.approx(other, abs=0.25 * fall)  # at a rate at which training is stable
    identity = json.loads((tmp_path / "a" / "adapter" / "temper.json").read_text())
    assert identity["quantised"] == "nf4"
    policy = Policy.load(base, precision="float32")
    assert identity["base_hash"] != policy.weights_hash()
    policy.quantise("nf4")
    assert identity["base_hash"] == policy.weights_hash()
    policy.load_adapter("a", done["adapter"])


def test_a_learner_with_moments_in_eight_bits_goes_on_to_the_byte(base, data, tmp_path) -> None:
    def learner() -> Learner:
        policy = prepare(config(base, data, "o", lora=WIDE))
        return Learner(policy, OptimConfig(kind="adamw8bit"), total_steps=6)

    def train(trained: Learner, steps: int) -> None:
        rows = sft.sequences(conversations(4), trained.policy, config(base, data, "o"))
        batch = replace(collate(rows, trained.policy.template.pad_id), adapters=["adapter"] * len(rows))
        for _ in range(steps):
            trained.forward_backward([batch], trained.policy.cross_entropy)
            trained.optim_step()

    whole, broken = learner(), learner()
    train(whole, 5)
    train(broken, 2)
    (tmp_path / "at").mkdir()
    broken.save(tmp_path / "at")
    again = learner()
    again.load(tmp_path / "at")
    train(again, 3)
    assert any(value.dtype is torch.uint8 for state in again.optimizer.state.values() for value in state.values())
    for name, weight in whole.parameters.items():
        assert torch.equal(weight, again.parameters[name]), name
