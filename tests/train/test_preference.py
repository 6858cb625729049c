"""Pairs: the reference, the losses by name, the reward model."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from worlds import conversations, manifest, pairs

from temper.core.errors import ConfigError, DataError
from temper.core.records import Outcome
from temper.policy.adapters import LoraConfig
from temper.policy.model import Policy
from temper.policy.scalar_head import RewardModel
from temper.train import preference, reward, sft
from temper.train.learner import Learner, OptimConfig
from temper.train.reference import cache_key, with_reference

FAST = {"pairs_per_step": 8, "tokens_per_batch": 256, "optim": {"lr": 1e-3}, "precision": "float32"}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return manifest(tmp_path_factory.mktemp("manifest") / "pairs", pairs(32))


def log_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_dpo_starts_at_log_two_and_learns(base, data, tmp_path) -> None:
    """At the first step policy and reference are one: margin 0, loss −log σ(0) = log 2, nothing has drifted."""
    result = preference.run(preference.Config(out=str(tmp_path / "dpo"), base=base, data=data, epochs=2, **FAST))
    assert result["data"]["rows"] == 2 * result["pairs"]
    assert 0 < result["data"]["fewest_supervised"] <= result["data"]["supervised"] / result["data"]["rows"]
    first, last = log_of(tmp_path / "dpo")[0], log_of(tmp_path / "dpo")[-1]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert first["margin"] == pytest.approx(0.0, abs=1e-4)
    assert first["kl"] == pytest.approx(0.0, abs=1e-6)
    assert last["margin"] > 0.3
    assert last["accuracy"] == 1.0
    assert last["kl"] > 0.01
    assert last["chosen_drift"] > last["rejected_drift"]
    assert (result["pairs"], result["steps"]) == (32, 8)
    assert last["chosen_length"] < last["rejected_length"]


@pytest.mark.parametrize("name", ["ipo", "simpo", "orpo"])
def test_other_losses_widen_the_margin(base, data, tmp_path, name) -> None:
    keys = {"reference": "start" if name in preference.NEED_REFERENCE else "none", "beta": 0.1 if name == "ipo" else 2.0}
    preference.run(preference.Config(out=str(tmp_path / "out"), base=base, data=data, loss=name, epochs=2, sft_mix=0.1, **keys, **FAST))
    log = log_of(tmp_path / "out")
    assert log[-1]["loss"] < log[0]["loss"]
    assert log[-1]["margin"] > log[0]["margin"]
    assert ("kl" in log[0]) == (name == "ipo")


def test_a_reference_is_refused_or_required_by_name(base, data) -> None:
    with pytest.raises(ConfigError, match="'dpo' needs reference log-probs") as refused:
        preference.run(preference.Config(out="o", base=base, data=data, reference="none"))
    assert "orpo, simpo" in refused.value.do
    with pytest.raises(ConfigError, match="no preference loss 'dppo'"):
        preference.run(preference.Config(out="o", base=base, data=data, loss="dppo"))


    with pytest.raises(ConfigError, match=r"label_smoothing is 0\.1, and loss 'ipo' has none"):
        preference.run(preference.Config(out="o", base=base, data=data, loss="ipo", label_smoothing=0.1))


def test_the_reference_is_the_start_without_dropout_and_computed_once(base, data, tmp_path, monkeypatch) -> None:
    """An adapter with dropout 0.5 that is not the identity: its reference is the adapted policy with dropout off."""
    rows = manifest(tmp_path / "rows", conversations(12))
    lora = LoraConfig(rank=4, dropout=0.5)
    started = sft.run(sft.Config(out=str(tmp_path / "sft"), base=base, data=rows, lora=lora, precision="float32", optim={"lr": 1e-1}))
    cfg = preference.Config(out=str(tmp_path / "dpo"), base=base, data=data, initial_adapter=started["adapter"], **FAST)
    calls = []
    score = preference.score
    monkeypatch.setattr(preference, "score", lambda *args: calls.append(1) or score(*args))
    monkeypatch.setattr(preference, "keep", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        preference.run(cfg)
    monkeypatch.undo()
    monkeypatch.setattr(preference, "score", lambda *args: calls.append(1) or score(*args))
    preference.run(cfg)
    assert calls == [1]  # the second run found the first one's
    policy = Policy.load(base, precision="float32")
    policy.load_adapter("adapter", started["adapter"])
    wanted = preference.pairs_of(sft.load_records(data)[1], policy.template, 1024, "adapter")
    expected = torch.cat(preference.score(wanted, policy, cfg))
    from safetensors.torch import load_file

    (kept,) = (tmp_path / "dpo").glob("reference-*.safetensors")
    torch.testing.assert_close(load_file(kept)["logprobs"], expected, atol=1e-5, rtol=0)
    bare = torch.cat(preference.score([(one, other) for one, other in preference.pairs_of(sft.load_records(data)[1], policy.template, 1024)], policy, cfg))
    assert float((bare - expected).abs().max()) > 1e-2  # "adapter off" would have been another reference


def test_kept_log_probs_serve_every_run_they_hold_for_and_no_other(base, data, tmp_path, monkeypatch) -> None:
    """Another learning rate asks for the same; other rows, other weights or another precision do not."""
    calls = []
    score = preference.score
    monkeypatch.setattr(preference, "score", lambda *args: calls.append(1) or score(*args))

    def run(name: str, **keys):
        return preference.run(preference.Config(**{"out": str(tmp_path / name), "base": base, "data": data, "steps": 1, "reference_cache": str(tmp_path / "kept"), **FAST, **keys}))

    first = run("a")
    run("b", optim={"lr": 2e-3}, beta=0.2)
    assert len(calls) == 1
    run("c", max_tokens=19)  # rows are cut elsewhere
    run("d", base=first["model"])
    run("e", precision="bfloat16")
    assert len(calls) == 4
    (torn, *_) = sorted((tmp_path / "kept").glob("reference-*.safetensors"))
    torn.write_bytes(torn.read_bytes()[:100])
    for name, keys in (("f", {}), ("g", {"max_tokens": 19}), ("h", {"base": first["model"]}), ("i", {"precision": "bfloat16"})):
        run(name, seed=1, **keys)
    assert len(calls) == 5  # the torn one is made again


def test_a_reference_that_has_moved_is_refused(base, data, tmp_path) -> None:
    policy = Policy.load(base, precision="float32")
    pairs_ = preference.pairs_of(sft.load_records(data)[1], policy.template, 1024)
    cfg = preference.Config(out=str(tmp_path), base=base, data=data, **FAST)
    run = preference.open_run(cfg, "preference", {})
    assert preference.with_reference(pairs_, policy, cfg, run)[0][0].ref_logprobs is not None
    policy.version = 3
    with pytest.raises(ConfigError, match="the reference has moved: 3 updates"):
        preference.with_reference(pairs_, policy, cfg, run)


def test_the_reference_is_the_starting_adapter_and_not_the_base(base, data) -> None:
    """Two adapters on one base: their rows have different keys."""
    policy = Policy.load(base, precision="float32")
    policy.add_lora("one", LoraConfig(rank=2))
    policy.add_lora("two", LoraConfig(rank=3))
    records = sft.load_records(data)[1][:2]
    keys = {cache_key([row for pair in preference.pairs_of(records, policy.template, 1024, name) for row in pair], policy) for name in ("one", "two", None)}
    assert len(keys) == 3


def test_another_checkpoint_is_the_reference_of_an_adapter_by_its_weights_alone(base, data, tmp_path) -> None:
    """The reference has no adapter of that name. Of the base itself it is what the fresh adapter starts from: the loss is log 2."""
    cfg = preference.Config(out=str(tmp_path / "dpo"), base=base, data=data, reference=base, lora=LoraConfig(rank=4), steps=1, **FAST)
    preference.run(cfg)
    (line,) = log_of(tmp_path / "dpo")
    assert line["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert line["chosen_drift"] == pytest.approx(0.0, abs=1e-4)


@pytest.mark.parametrize("loss", preference.LOSSES)
def test_the_cut_into_micro_batches_changes_no_gradient(base, data, loss) -> None:
    policy = Policy.load(base, precision="float32")
    cfg = preference.Config(out="o", base=base, data=data, loss=loss, beta=0.5, sft_mix=0.1, **FAST)
    made = [tuple(dataclasses.replace(row, ref_logprobs=[-5.0] * len(row.tokens)) for row in pair)
            for pair in preference.pairs_of(sft.load_records(data)[1][:6], policy.template, 1024)]  # fmt: skip
    gradients = []
    for batches in ([made], [[pair] for pair in made]):
        learner = Learner(policy, OptimConfig(clip=None), 1)
        learner.forward_backward([preference.collate_pairs(batch, policy.template) for batch in batches], lambda batch: preference.pair_loss(policy, batch, cfg), preference.count_pairs)
        gradients.append({name: weight.grad.clone() for name, weight in learner.parameters.items() if weight.grad is not None})
        for weight in learner.parameters.values():
            weight.grad = None
    scale = max(float(value.abs().max()) for value in gradients[0].values())
    for name, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], value, atol=1e-5 * scale, rtol=1e-4, msg=name)


def test_margins_of_pairs_reach_the_loss(base, tmp_path) -> None:
    """The head starts at zero, so a pair costs −ln σ(−m): margins 1 and 3, mean (1.3133 + 3.0486)/2."""
    records = [record.model_copy(update={"outcome": Outcome(detail={"margin": margin})}) for record, margin in zip(pairs(2), (1, 3.0), strict=True)]
    judge = reward.prepare(reward.Config(out="o", base=base, data="d", precision="float32"))
    cfg = reward.Config(out=str(tmp_path / "reward"), base=base, data=manifest(tmp_path / "rows", records), margins=True, steps=1, **FAST)
    reward.run(cfg)
    assert log_of(tmp_path / "reward")[0]["loss"] == pytest.approx((math.log1p(math.e) + math.log1p(math.e**3)) / 2, rel=1e-4)
    batch = preference.collate_pairs(preference.pairs_of(records, judge.template, 1024), judge.template)
    assert float(reward.reward_loss(judge, batch, cfg).total.detach()) == pytest.approx(2 * math.log(2), rel=1e-4)  # measured without
    with pytest.raises(DataError, match="has no margin"):
        reward.run(cfg.model_copy(update={"data": manifest(tmp_path / "bare", pairs(2))}))


def test_label_smoothing_and_length_normalisation_reach_the_loss(base, data) -> None:
    """One pair by hand: chosen −2 over 2 tokens, rejected −6 over 3, reference −3 and −3, β = 0.5."""
    one = lambda value: torch.tensor([value])  # noqa: E731
    scored = preference.Scored(one(-2.0), one(-6.0), one(-3.0), one(-3.0), one(2), one(3))
    log_sigmoid = lambda x: -math.log1p(math.exp(-x))  # noqa: E731
    margin = 0.5 * ((-2 + 3) - (-6 + 3))  # 2
    plain = preference.dpo(scored, preference.Config(out="o", base=base, data=data, beta=0.5))
    assert float(plain.total) == pytest.approx(-log_sigmoid(margin))
    smooth = preference.dpo(scored, preference.Config(out="o", base=base, data=data, beta=0.5, label_smoothing=0.1))
    assert float(smooth.total) == pytest.approx(-0.9 * log_sigmoid(margin) - 0.1 * log_sigmoid(-margin))
    normal = preference.dpo(scored, preference.Config(out="o", base=base, data=data, beta=0.5, length_normalised=True))
    assert float(normal.total) == pytest.approx(-log_sigmoid(0.5 * ((-1 + 1.5) - (-2 + 1))))
    simpo = preference.simpo(scored, preference.Config(out="o", base=base, data=data, loss="simpo", reference="none", beta=2.0, gamma=0.5))
    assert float(simpo.total) == pytest.approx(-log_sigmoid(2 * (-1) - 2 * (-2) - 0.5 * 2))


def test_a_record_without_a_preference_is_named(base, tmp_path) -> None:
    rows = conversations(1)
    with pytest.raises(DataError, match=f"{rows[0].id[:16]}.*has no preference"):
        preference.run(preference.Config(out=str(tmp_path / "o"), base=base, data=manifest(tmp_path / "rows", rows)))


def test_a_reward_model_tells_pairs_apart_and_loads_again(base, data, tmp_path) -> None:
    heldout = manifest(tmp_path / "heldout", pairs(12, seed=9))
    cfg = reward.Config(out=str(tmp_path / "reward"), base=base, data=data, heldout=heldout, epochs=2, **FAST)
    result = reward.run(cfg)
    assert result["data"]["rows"] == 2 * result["pairs"]
    assert result["metrics"]["heldout_accuracy"] == 1.0
    assert result["metrics"]["heldout_pairs"] == 12
    assert log_of(tmp_path / "reward")[0]["accuracy"] == 0.5  # the head starts at zero: every pair is a tie
    judge = RewardModel.load(result["reward_model"], precision="float32")
    chosen, rejected = preference.pairs_of(sft.load_records(heldout)[1], judge.template, 1024)[0]
    scores = judge.score([chosen.tokens, rejected.tokens])
    assert scores[0] > scores[1]
    assert reward.run(cfg) == json.loads(json.dumps(result))


def test_estimates(base, data) -> None:
    found = preference.estimate(preference.Config(out="o", base=base, data=data, **FAST))
    assert (found.rows, found.steps) == (64, 4)
    assert "more forward passes" in found.seconds_from
    assert reward.estimate(reward.Config(out="o", base=base, data=data, **FAST)).steps == 4


@pytest.mark.parametrize("name", ["simpo", "orpo"])
def test_a_loss_without_a_reference_pays_for_none_unless_one_is_named(base, data, tmp_path, name) -> None:
    keys = {"base": base, "data": data, "loss": name, "steps": 1, **FAST}
    preference.run(preference.Config(out=str(tmp_path / "bare"), **keys))
    preference.run(preference.Config(out=str(tmp_path / "watched"), reference="start", **keys))
    assert [bool(list((tmp_path / folder).glob("reference-*"))) for folder in ("bare", "watched")] == [False, True]
    assert ["chosen_drift" in (tmp_path / folder / "metrics.jsonl").read_text() for folder in ("bare", "watched")] == [False, True]


def test_a_reference_of_another_config_is_another_reference(base, data) -> None:
    """Equal weights under another norm give other log-probs; where the weights were read from changes nothing."""
    policy = Policy.load(base, precision="float32")
    rows = [row for pair in preference.pairs_of(sft.load_records(data)[1], policy.template, 1024) for row in pair]
    before = cache_key(rows, policy)
    policy.model.config._name_or_path = "elsewhere"
    assert cache_key(rows, policy) == before
    policy.model.config.rms_norm_eps = 1e-2
    assert cache_key(rows, policy) != before


def test_a_frozen_copy_of_a_trained_policy_may_be_the_reference(base, data, tmp_path) -> None:
    """What iterative DPO needs: the copy stands still, however often its original has moved."""
    policy = Policy.load(base, precision="float32")
    policy.version = 5
    rows = [row for pair in preference.pairs_of(sft.load_records(data)[1], policy.template, 1024) for row in pair]
    zeros = [torch.zeros(len(row.tokens)) for row in rows]
    with pytest.raises(ConfigError, match="has moved: 5 updates"):
        with_reference(rows, policy, tmp_path, lambda asked: zeros)
    assert len(with_reference(rows, policy.clone_reference(), tmp_path, lambda asked: zeros)) == len(rows)


def test_a_fresh_adapter_and_one_to_go_on_from_exclude_each_other(base, data) -> None:
    with pytest.raises(ValueError, match="give `lora` for a fresh adapter or `initial_adapter`"):
        preference.Config(out="o", base=base, data=data, lora={"rank": 2}, initial_adapter="somewhere")


def test_rows_that_lose_their_ends_are_counted_and_said(base, data, tmp_path, capsys) -> None:
    whole = preference.run(preference.Config(out=str(tmp_path / "whole"), base=base, data=data, steps=1, **FAST))
    short = whole["data"]["longest"] - 1
    cut = preference.run(preference.Config(out=str(tmp_path / "cut"), base=base, data=data, steps=1, max_tokens=short, **FAST))
    assert whole["data"]["cut"] == 0 < cut["data"]["cut"]
    assert f"{cut['data']['cut']} of {cut['data']['rows']} rows are longer than max_tokens={short}" in capsys.readouterr().err
