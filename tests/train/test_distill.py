"""Distillation: how the student is made, what is refused, and that it comes nearer to its teacher."""

from __future__ import annotations

import json

import pytest
import torch
from checkpoints import tiny_checkpoint
from worlds import conversations, manifest

from temper.core.errors import ConfigError, DataError
from temper.policy.model import Policy
from temper.train import distill
from temper.train.student import count_parameters, make_student, pick_layers

FAST = {"tokens_per_step": 400, "tokens_per_batch": 256, "optim": {"lr": 3e-3}, "precision": "float32"}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return manifest(tmp_path_factory.mktemp("manifest") / "rows", conversations(40))


def test_layers_are_picked_evenly() -> None:
    assert pick_layers(6, 2) == [0, 5]
    assert pick_layers(6, 3) == [0, 2, 5]
    assert pick_layers(6, 6) == [0, 1, 2, 3, 4, 5]
    assert pick_layers(6, 1) == [0]
    with pytest.raises(ConfigError, match="7 layers of a teacher that has 6"):
        pick_layers(6, 7)


def test_a_student_of_all_layers_is_its_teacher_and_of_some_has_their_weights(deep) -> None:
    teacher = Policy.load(deep, precision="float32")
    assert make_student(teacher, layers=6).weights_hash() == teacher.weights_hash()
    student = make_student(teacher, layers=2)
    small, large = student.base_parameters(), teacher.base_parameters()
    assert torch.equal(small["model.layers.1.self_attn.q_proj.weight"], large["model.layers.5.self_attn.q_proj.weight"])
    assert torch.equal(small["model.embed_tokens.weight"], large["model.embed_tokens.weight"])
    assert student.model.config.num_hidden_layers == len(student.model.config.layer_types) == 2
    assert torch.equal(make_student(teacher, take=(2, 3)).base_parameters()["model.layers.0.mlp.up_proj.weight"], large["model.layers.2.mlp.up_proj.weight"])
    with pytest.raises(ConfigError, match="layers 0 to 5"):
        make_student(teacher, take=(6,))


def test_narrowing_keeps_the_strong_neurons(deep) -> None:
    """Where all but the kept neurons write nothing, the narrow student says the very same."""
    teacher = Policy.load(deep, precision="float32")
    with torch.no_grad():
        for layer in teacher.model.model.layers:
            layer.mlp.down_proj.weight[:, 16:] = 0.0
    student = make_student(teacher, layers=6, intermediate=16)
    tokens = torch.arange(1, 9)[None]
    torch.testing.assert_close(student.model(tokens).logits, teacher.model(tokens).logits, atol=1e-5, rtol=1e-5)
    assert count_parameters(student.model) < count_parameters(teacher.model)
    with pytest.raises(ConfigError, match="gated MLP"):
        make_student(teacher, layers=2, intermediate=4096)


def test_too_large_a_student_and_another_tokenizer_are_refused(deep, data, tmp_path) -> None:
    with pytest.raises(ConfigError, match="at most 50%"):
        distill.run(distill.Config(out=str(tmp_path / "o"), base=deep, data=data, student={"layers": 5}, **FAST))
    llama = tiny_checkpoint("llama", tmp_path / "llama")
    with pytest.raises(DataError, match="different tokenizers") as refused:
        distill.run(distill.Config(out=str(tmp_path / "o"), base=deep, data=data, student={"checkpoint": str(llama)}, **FAST))
    assert "sft on text that the teacher wrote" in refused.value.do
    for keys in ({"student": {}, "data": data}, {"student": {"layers": 2}}, {"student": {"layers": 2}, "on_policy": True}):
        with pytest.raises(ValueError, match=r"give|needs"):
            distill.Config(out="o", base=deep, **keys)


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd"])
def test_the_student_comes_nearer(deep, data, tmp_path, name) -> None:
    cfg = distill.Config(out=str(tmp_path / "d"), base=deep, data=data, dev=data, student={"layers": 2, "intermediate": 32}, divergence=name, epochs=4, **FAST)
    result = distill.run(cfg)
    log = [json.loads(line) for line in (tmp_path / "d/metrics.jsonl").read_text().splitlines()]
    assert 0 < log[-1]["dev_divergence"] < 0.7 * log[0]["loss"]
    assert result["data"]["rows"] == 40
    assert result["student_parameters"] <= 0.5 * result["teacher_parameters"]
    assert count_parameters(Policy.load(result["model"]).model) == result["student_parameters"]
    assert distill.run(cfg) == json.loads(json.dumps(result))


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_the_top_k_of_the_teacher_and_its_tail_teach_too(deep, data, tmp_path, divergence) -> None:
    """What is shown of the teacher, 20 tokens and what is left over, is learnt; it says less than the whole does."""
    keys = {"base": deep, "data": data, "student": {"layers": 2, "intermediate": 32}, "divergence": divergence, **FAST}
    whole = distill.Config(out=str(tmp_path / "whole"), **keys)
    cfg = whole.model_copy(update={"out": str(tmp_path / "d"), "top_k": 20, "epochs": 4.0})
    teacher, student = distill.prepare(whole)
    before = distill.mean_divergence(student, teacher, whole.model_copy(update={"dev": data}))
    shown = distill.mean_divergence(student, teacher, cfg.model_copy(update={"dev": data}))
    assert 0 < shown < before  # coarser: data processing
    taught = Policy.load(distill.run(cfg)["model"], precision="float32")
    assert distill.mean_divergence(taught, teacher, cfg.model_copy(update={"dev": data})) < 0.7 * shown


def test_temperature_softens_both(deep, data) -> None:
    """At T = 2 the divergence of one row equals that of both models' logits halved."""
    cfg = distill.Config(out="o", base=deep, data=data, student={"layers": 2}, temperature=2.0, **FAST)
    teacher, student = distill.prepare(cfg)
    student.model.eval()
    batch = distill.batched(distill.rows_of(distill.load_records(data)[1][:1], student.template, 64), student, cfg)[0]
    found = float(student.divergence(batch, teacher, distill.measure_of(cfg), temperature=2.0).total.detach())
    with torch.no_grad():
        soft = [(model.model(batch.tokens_B_T).logits.double() / 2).log_softmax(-1)[:, :-1][batch.mask_B_T[:, 1:]] for model in (teacher, student)]
    assert found == pytest.approx(float((soft[0].exp() * (soft[0] - soft[1])).sum()), rel=1e-4)


def test_on_policy_teaches_what_the_student_samples(deep, tmp_path) -> None:
    keys = {"student": {"layers": 2, "intermediate": 32}, "on_policy": True, "environment": "worlds:say", "divergence": "reverse_kl", "tasks_per_step": 8}
    cfg = distill.Config(out=str(tmp_path / "d"), base=deep, steps=12, **keys, **FAST)
    distill.run(cfg)
    log = [json.loads(line) for line in (tmp_path / "d/metrics.jsonl").read_text().splitlines()]
    assert log[-1]["loss"] < log[0]["loss"]
    assert log[0]["supervised"] <= 8 * 6  # tasks times max_tokens: prompts are not taught


def test_estimates(deep, data) -> None:
    found = distill.estimate(distill.Config(out="o", base=deep, data=data, student={"layers": 2, "intermediate": 32}, **FAST))
    assert found.rows == 40
    assert found.parameters == found.trained


def test_a_step_in_which_nobody_said_anything_is_counted_and_changes_nothing(deep, tmp_path, monkeypatch) -> None:
    sampled = distill.sampled
    monkeypatch.setattr(distill, "sampled", lambda *args: [] if args[-1] == 0 else sampled(*args))
    keys = {"base": deep, "student": {"layers": 2}, "steps": 2, "tasks_per_step": 4, "on_policy": True, "environment": "worlds:say", "tokens_per_batch": 256}
    monkeypatch.setattr(distill, "LARGEST_SHARE", 0.8)
    result = distill.run(distill.Config(out=str(tmp_path / "out"), precision="float32", **keys))
    logged = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert result["steps"] == 2
    assert ["loss" in line for line in logged] == [False, True]
