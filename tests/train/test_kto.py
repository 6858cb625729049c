"""KTO: which answers are good, what the reference point is made of, and that it is one for the whole optimizer step."""

from __future__ import annotations

import json
import math

import pytest
import torch
from worlds import conversations, manifest, pairs, provenance

from temper.core.errors import ConfigError, DataError
from temper.core.records import Message, Outcome, Record
from temper.data.batch import collate
from temper.policy.model import Policy
from temper.train import kto, preference
from temper.train.learner import Learner, OptimConfig, rows
from temper.train.stage import load_records

FAST = {"answers_per_step": 16, "tokens_per_batch": 256, "optim": {"lr": 1e-3}, "precision": "float32"}


def config(**keys) -> kto.Config:
    return kto.Config(**{"out": "o", "base": "b", "data": "d", **keys})


def thumbs(count: int) -> list[Record]:
    """Judged conversations: the word repeated is good, anything else is not."""
    return [
        Record(messages=(Message(role="user", content=f"say {n}"), Message(role="assistant", content="the" if n % 3 else "I cannot")), provenance=provenance(),
               outcome=Outcome(reward=float(n % 3 > 0)))
        for n in range(count)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return manifest(tmp_path_factory.mktemp("manifest") / "answers", [*pairs(16), *thumbs(12)])


@pytest.fixture(scope="module")
def policy(base) -> Policy:
    return Policy.load(base, precision="float32")


def test_pairs_give_two_answers_and_a_judged_conversation_gives_one(policy, data) -> None:
    found = kto.answers_of(load_records(data)[1], policy.template, config())
    assert len(found) == 16 * 2 + 12
    assert [kto.is_good(row) for row in found[:4]] == [True, False, True, False]
    assert [kto.is_good(row) for row in found[32:36]] == [False, True, True, False]
    assert sum(map(kto.is_good, kto.answers_of(load_records(data)[1], policy.template, config(good_from=2.0)))) == 16  # of pairs only
    silent = conversations(1)
    with pytest.raises(DataError, match=f"{silent[0].id[:16]} is neither a pair nor judged"):
        kto.answers_of(silent, policy.template, config())


def test_a_mismatched_answer_stands_at_another_prompt_and_every_answer_is_used_once(policy, data) -> None:
    answers = kto.answers_of(load_records(data)[1], policy.template, config())
    foils = kto.mismatched(answers, config())

    def parts(row):
        start = next(at for at, weight in enumerate(row.weights) if weight)
        return tuple(row.tokens[:start]), tuple(row.tokens[start:])

    true = {}
    for row in answers:
        true.setdefault(parts(row)[0], set()).add(parts(row)[1])
    assert [parts(foil)[0] for foil in foils] == [parts(row)[0] for row in answers]
    assert sorted(parts(foil)[1] for foil in foils) == sorted(parts(row)[1] for row in answers)
    owners = [parts(row) for row in answers]
    for foil in foils:
        prompt, answer = parts(foil)
        assert any(answer == other and prompt != own for own, other in owners)
    with pytest.raises(DataError, match="one prompt has 2 of 3 answers"):
        kto.mismatched([answers[0], answers[1], answers[2]], config())


def test_the_reference_point_is_the_mean_log_ratio_of_mismatched_answers_and_never_negative(policy, data) -> None:
    """The reference says 2 nats less than the policy for each whole answer: z₀ = 2; 3 nats more: z₀ = 0."""
    answers = kto.answers_of(load_records(data)[1], policy.template, config())[:8]
    foils = kto.mismatched(answers, config())
    scored = kto.score(foils, policy, config())
    for shift, expected in ((-2.0, 2.0), (3.0, 0.0)):
        known = [
            kto.dataclasses.replace(foil, ref_logprobs=[value + shift / foil.supervised * (weight != 0) for value, weight in zip(own.tolist(), foil.weights, strict=True)])
            for foil, own in zip(foils, scored, strict=True)
        ]
        assert float(kto.reference_point(policy, known, config())) == pytest.approx(expected, abs=1e-4)


def test_at_the_start_every_answer_costs_a_half(base, data, tmp_path) -> None:
    """Policy and reference are one: r = z₀ = 0, and 1 − σ(0) = ½ for good and bad alike."""
    result = kto.run(config(out=str(tmp_path / "kto"), base=base, data=data, epochs=3, beta=0.5, **FAST))
    assert result["data"]["rows"] == result["answers"] == 16 * 2 + 12
    log = [json.loads(line) for line in (tmp_path / "kto/metrics.jsonl").read_text().splitlines()]
    assert log[0]["loss"] == pytest.approx(0.5, abs=1e-4)
    assert log[0]["reference_point"] == pytest.approx(0.0, abs=1e-4)
    assert log[-1]["loss"] < 0.45
    assert log[-1]["reward_good"] > log[-1]["reward_bad"]
    assert (result["answers"], result["good"]) == (44, 24)
    assert kto.run(config(out=str(tmp_path / "kto"), base=base, data=data, epochs=3, beta=0.5, **FAST)) == json.loads(json.dumps(result))


def test_another_checkpoint_is_the_reference_of_an_adapter_by_its_weights_alone(base, data, tmp_path) -> None:
    kto.run(kto.Config(out=str(tmp_path / "kto"), base=base, data=data, reference=base, lora={"rank": 4}, steps=1, **FAST))
    line = json.loads((tmp_path / "kto" / "metrics.jsonl").read_text())
    assert line["loss"] == pytest.approx(0.5, abs=1e-5)
    assert line["reference_point"] == pytest.approx(0.0, abs=1e-4)


def test_rewards_are_per_good_and_per_bad_answer() -> None:
    """Of four answers one is good: 0.25 of reward an answer is 1 a good one; none bad: not measured."""
    assert kto.by_kind({"good": 0.25, "reward_good": 0.25, "reward_bad": 1.5})["reward_good"] == 1.0
    assert kto.by_kind({"good": 0.25, "reward_good": 0.25, "reward_bad": 1.5})["reward_bad"] == 2.0
    assert kto.by_kind({"good": 1.0, "reward_good": 0.25, "reward_bad": 0.0})["reward_bad"] is None


def test_the_cut_into_micro_batches_changes_no_gradient(policy, data) -> None:
    """The reference point is of the whole step, so an answer's gradient does not depend on who shares its micro-batch."""
    cfg = config(beta=0.5, weight_bad=1.3)
    answers = [kto.dataclasses.replace(row, ref_logprobs=[-1.0] * len(row.tokens)) for row in kto.answers_of(load_records(data)[1], policy.template, cfg)[:6]]
    gradients = []
    for batches in ([answers], [[row] for row in answers]):
        learner = Learner(policy, OptimConfig(clip=None), 1)
        made = [collate(batch, policy.template.pad_id) for batch in batches]
        learner.forward_backward(made, kto.partial(kto.answer_loss, policy, cfg, torch.tensor(0.7)), rows)
        gradients.append({name: weight.grad.clone() for name, weight in learner.parameters.items() if weight.grad is not None})
        for weight in learner.parameters.values():
            weight.grad = None
    scale = max(float(value.abs().max()) for value in gradients[0].values())
    assert scale > 1e-5
    for name, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], value, atol=1e-5 * scale, rtol=1e-4, msg=name)


def test_the_pair_stage_points_here(base, data) -> None:
    with pytest.raises(ConfigError, match="kto learns from single answers") as refused:
        preference.run(preference.Config(out="o", base=base, data=data, loss="kto"))
    assert "stage: kto" in refused.value.do
    with pytest.raises(ValueError, match="set reference: start"):
        config(reference="none")


def test_estimate(base, data) -> None:
    found = kto.estimate(config(base=base, data=data, **FAST))
    assert (found.rows, found.steps) == (44, 3)
    assert math.isfinite(found.seconds)
