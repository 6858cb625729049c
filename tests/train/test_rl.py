"""Reinforcement learning: credit by hand, token in and token out, and what is watched."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import worlds
from worlds import WORDS, SayEnvironment, provenance

from temper.core.errors import ConfigError, DataError
from temper.core.records import Message, Outcome, Record, Sampled
from temper.data.batch import collate
from temper.policy.model import Policy
from temper.rollout.engine import Engine
from temper.rollout.episodes import collect
from temper.train import ppo, rl
from temper.train.credit import AGGREGATIONS, credited, policy_loss
from temper.train.episodes import over_parts
from temper.train.learner import Learner, OptimConfig, loss_weight
from temper.train.probes import hacking_probes, summarise

FAST = {"tasks_per_step": 4, "group": 6, "precision": "float32", "optim": {"lr": 1e-2, "schedule": "constant"}, "environment": "worlds:say"}


def config(**keys) -> rl.Config:
    return rl.Config(**{"out": "o", "base": "b", "environment": "worlds:say", **keys})


def episode(reward: float | None, tokens: int, text: str = "done", **checks: bool) -> Record:
    turn = Sampled(prompt_ids=(1, 2), token_ids=tuple(range(3, 3 + tokens)), logprobs=(-0.5,) * tokens, finish_reason="stop")
    return Record(
        messages=(Message(role="user", content="?"), Message(role="assistant", content=text)), provenance=provenance(), sampled=(turn,),
        outcome=Outcome(reward=reward, checks=checks),
    )  # fmt: skip


def log_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_credit_lands_on_sampled_tokens_of_groups_that_differ() -> None:
    """Group 1: rewards 1 and 0, mean 0.5. Group 2 agrees and teaches nothing. Group 3 has one unjudged episode."""
    groups = [[episode(1.0, 2), episode(0.0, 4)], [episode(1.0, 3), episode(1.0, 3)], [episode(None, 3), episode(0.0, 3), episode(3.0, 3)]]
    found = credited(groups, config(advantage="dr_grpo"))
    assert [row.advantages for row in found] == [
        [0, 0, 0.5, 0.5], [0, 0, -0.5, -0.5, -0.5, -0.5], [0, 0, -1.5, -1.5, -1.5], [0, 0, 1.5, 1.5, 1.5],
    ]  # fmt: skip
    assert found[0].old_logprobs == [0, 0, -0.5, -0.5]
    halved = credited(groups[:1], config(advantage="rloo"))
    assert [row.advantages[-1] for row in halved] == [1.0, -1.0]  # 1 − 0 and 0 − 1: each against the other
    scaled = credited(groups[:1], config(advantage="grpo"))
    assert scaled[0].advantages[-1] == pytest.approx(0.5 / 0.5**0.5)  # the spread of (1, 0) with n−1 is √0.5
    with pytest.raises(ConfigError, match="no advantage 'gae'"):
        credited(groups, config(advantage="gae"))


def test_aggregations_by_hand() -> None:
    """Episodes of 2 and 4 tokens: token 1/6 each; sequence 1/4 and 1/8; constant with L = 8: 1/16 each."""
    group = [[episode(1.0, 2), episode(0.0, 4)]]
    shares = {}
    for name in AGGREGATIONS:
        found = credited(group, config(aggregation=name, max_tokens=8))
        denominator = AGGREGATIONS[name][1](collate(found, 0))
        shares[name] = [row.weights[-1] / denominator for row in found]
    assert shares["token"] == pytest.approx([1 / 6, 1 / 6])
    assert shares["sequence"] == pytest.approx([1 / 4, 1 / 8])
    assert shares["constant"] == pytest.approx([1 / 16, 1 / 16])


def test_a_constant_divisor_does_not_move_with_how_many_groups_agree() -> None:
    """Of three groups of two only one differs, and one episode was not judged: the divisor is 5 episodes of L = 8, as in Dr. GRPO."""
    groups = [[episode(1.0, 2), episode(0.0, 4)], [episode(1.0, 3), episode(1.0, 3)], [episode(None, 3), episode(0.0, 3)]]
    found = credited(groups, config(aggregation="constant", max_tokens=8))
    assert [row.weights[-1] / AGGREGATIONS["constant"][1](collate(found, 0)) for row in found] == pytest.approx([1 / 40, 1 / 40])


def test_summary_by_hand() -> None:
    memory: dict = {}
    records = [[episode(1.0, 2, procedure=False), episode(0.0, 4, procedure=True)], [episode(0.5, 3, procedure=True), episode(None, 3)]]
    found = summarise(records, ("procedure",), memory)
    assert found["reward"] == 0.5
    assert found["solved"] == pytest.approx(1 / 3)
    assert found["unjudged"] == 0.25
    assert found["varied_groups"] == 0.5
    assert found["unearned_reward"] == pytest.approx(1.0 / 1.5)
    assert (found["length"], found["length_drift"]) == (3.0, 0.0)
    longer = summarise([[episode(1.0, 6), episode(1.0, 6)]], (), memory)
    assert longer["length_drift"] == 1.0  # twice the first batch's
    nothing = summarise([[episode(None, 1)]], (), {})
    assert nothing["reward"] is None  # absent is not zero
    assert nothing["solved"] is None


def test_probes_find_a_verifier_that_any_answer_pleases() -> None:
    """`say` pays for the letter e: the constant 'Yes' earns everything, and so does the policy's habit on foreign tasks."""
    environment = SayEnvironment()
    tasks = environment.tasks("train")[:3]
    found = hacking_probes(environment, tasks, [[episode(1.0, 1, "the")], [episode(1.0, 1, "the")], [episode(0.0, 1, "no")]])
    assert found == {"probe_empty": 0.0, "probe_constant": 1.0, "probe_common": 1.0}
    strict = hacking_probes(environment, tasks, [[episode(0.0, 1, "no")], [episode(0.0, 1, "no")], [episode(1.0, 1, "the")]])
    assert strict["probe_common"] == 0.0


def test_sampler_and_learner_agree_and_ratio_is_one_before_the_update(base) -> None:
    policy = Policy.load(base, precision="float32")
    cfg = config(temperature=0.7, aggregation="sequence")
    groups = collect(Engine(policy), SayEnvironment(), SayEnvironment().tasks("train")[:3], group=4, temperature=0.7, seed=1)
    batch = collate(credited(groups, cfg), policy.template.pad_id)
    out = policy_loss(policy, None, cfg)(batch)
    assert float(out.sums["mismatch"] / out.count) < 1e-5
    assert float(out.sums["ratio"] / out.count) == pytest.approx(1.0, abs=1e-5)
    assert float(out.sums["clipped"]) == 0
    other = policy_loss(policy, None, cfg.model_copy(update={"temperature": 1.0}))(batch)
    assert float(other.sums["mismatch"] / other.count) > 1e-2  # the wrong temperature would have shown
    kept = policy_loss(policy, policy.clone_reference(), cfg.model_copy(update={"kl": 1.0}))(batch)
    assert float(kept.sums["kl"]) == pytest.approx(0.0, abs=1e-6)
    capped = policy_loss(policy, None, cfg.model_copy(update={"tis_cap": 2.0}))(batch)
    assert float(capped.total.detach()) == pytest.approx(float(out.total.detach()), abs=1e-4)
    assert loss_weight(batch) == pytest.approx(len(batch.tokens_B_T))


def test_under_a_grammar_the_learner_scores_the_distribution_that_was_sampled(base) -> None:
    """The support travels with the row: with it sampler and learner agree; without it the ratio would be one of masses."""
    policy, cfg = Policy.load(base, precision="float32"), config(constrained=True)
    schema = {"type": "object", "properties": {"word": {"enum": list(WORDS)}}, "required": ["word"], "additionalProperties": False}
    tasks = [task.model_copy(update={"response_schema": schema, "max_tokens": 24}) for task in SayEnvironment().tasks("train")[:3]]
    groups = collect(Engine(policy), SayEnvironment(), tasks, group=3, temperature=1.0, seed=1, constrained=True)
    ranked = [[record.model_copy(update={"outcome": Outcome(reward=float(place))}) for place, record in enumerate(group)] for group in groups]
    batch = collate(credited(ranked, cfg), policy.template.pad_id)
    assert batch.support is not None
    out = policy_loss(policy, None, cfg)(batch)
    assert float(out.sums["mismatch"] / out.count) < 1e-5
    free = policy_loss(policy, None, cfg)(dataclasses.replace(batch, support=None))
    assert float(free.sums["mismatch"] / free.count) > 1.0


@pytest.mark.parametrize("keys", [{}, {"advantage": "rloo", "aggregation": "constant", "max_tokens": 16}])
def test_reward_rises(base, tmp_path, keys) -> None:
    result = rl.run(rl.Config(out=str(tmp_path / "rl"), base=base, steps=16, **FAST, **keys))
    log = log_of(tmp_path / "rl")
    assert sum(row["reward"] for row in log[-3:]) > sum(row["reward"] for row in log[:3]) + 0.5
    assert {"length_drift", "unearned_reward", "mismatch", "mismatch_kl", "sample_s", "update_s", "varied_groups"} <= log[0].keys()
    assert {"probe_empty", "probe_constant", "probe_common"} <= log[0].keys()
    assert set(result) >= {"model", "hash", "metrics"}
    assert (tmp_path / "rl/episodes/step-000000.jsonl").is_file()


def test_an_adapter_is_sampled_from_and_trained(base, tmp_path) -> None:
    """Its log-probs are the sampler's (mismatch), it moves, and the base does not."""
    result = rl.run(rl.Config(out=str(tmp_path / "rl"), base=base, steps=3, adapter="desk", lora={"rank": 4, "alpha": 64}, **FAST))
    assert "model" not in result
    policy = Policy.load(base, precision="float32")
    policy.load_adapter("desk", result["adapter"])
    assert policy.weights_hash() == Policy.load(base).weights_hash()
    assert max(float(weight.detach().abs().max()) for name, weight in policy.model.named_parameters() if name.endswith(".B")) > 1e-3
    log = log_of(tmp_path / "rl")
    assert max(row["mismatch"] for row in log) < 1e-5
    episodes = (tmp_path / "rl/episodes/step-000000.jsonl").read_text().splitlines()
    assert {Record.model_validate_json(line).sampled[0].adapter for line in episodes} == {"desk"}


def test_a_step_in_which_all_groups_agree_changes_nothing(base, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(worlds.SayEnvironment, "verify", lambda *args: Outcome(reward=1.0))
    result = rl.run(rl.Config(out=str(tmp_path / "rl"), base=base, steps=2, minibatches=2, **FAST))
    assert [(row["step"], row["trained_rows"], row["varied_groups"]) for row in log_of(tmp_path / "rl")] == [(2, 0, 0.0), (4, 0, 0.0)]
    assert Policy.load(result["model"]).weights_hash() == Policy.load(base).weights_hash()


def test_an_environment_is_named_and_has_tasks(base, monkeypatch, tmp_path) -> None:
    with pytest.raises(ConfigError, match="no environment 'finop'"):
        rl.run(config(base=base, environment="finop"))
    monkeypatch.setattr(worlds.SayEnvironment, "tasks", lambda *args: [])
    with pytest.raises(DataError, match="no training task"):
        rl.run(config(base=base, out=str(tmp_path / "o")))


@pytest.mark.parametrize("stage", [rl, ppo])
def test_an_episode_that_never_began_is_left_out_of_an_estimate(base, monkeypatch, stage) -> None:
    silent = episode(None, 2).model_copy(update={"sampled": ()})
    monkeypatch.setattr(stage, "sample", lambda *args: [[episode(1.0, 2), silent]])
    assert stage.estimate(stage.Config(out="o", base=base, steps=5, **FAST)).supervised > 0


def test_estimate_samples_and_trains_nothing(base) -> None:
    found = rl.estimate(rl.Config(out="o", base=base, steps=5, **FAST))
    assert (found.rows, found.steps) == (len(WORDS), 5)
    assert "2 tasks sampled" in found.seconds_from
    assert found.tokens > 5 * 4 * 6  # five steps, four tasks, six episodes


def test_the_metrics_of_two_updates_are_those_of_one_step() -> None:
    """30 and 10 supervised tokens: a loss of (30·1 + 10·3)/40; tokens and seconds are added; the sampler is compared before the first."""
    first = {"loss": 1.0, "mismatch": 0.0, "lr": 0.1, "tokens": 60, "positions": 64, "supervised": 30, "step_s": 1.0, "tokens_per_s": 60.0, "limit_share": 0.5}
    second = {"loss": 3.0, "mismatch": 0.4, "lr": 0.2, "tokens": 20, "positions": 32, "supervised": 10, "step_s": 3.0, "tokens_per_s": 7.0, "limit_share": 0.1}
    assert over_parts([first, second]) == pytest.approx(
        {"loss": 1.5, "mismatch": 0.0, "lr": 0.2, "tokens": 80, "positions": 96, "supervised": 40, "step_s": 4.0, "tokens_per_s": 20.0, "limit_share": 0.2}
    )
    assert (over_parts([first]), over_parts([])) == (first, {})


def test_a_step_of_several_updates_is_logged_whole(base) -> None:
    """At a rate that moves nothing, three updates on parts of the episodes say what one on all of them says."""
    policy = Policy.load(base, precision="float32")
    groups = collect(Engine(policy), SayEnvironment(), SayEnvironment().tasks("train")[:3], group=4, temperature=1.0, seed=1)
    rows = credited([[record.model_copy(update={"outcome": Outcome(reward=float(place))}) for place, record in enumerate(group)] for group in groups], config())
    found = [rl.update(Learner(policy, OptimConfig(lr=1e-30), parts), None, rows, config(minibatches=parts)) for parts in (1, 3)]
    assert found[0]["supervised"] == sum(row.supervised for row in rows)
    for name in ("loss", "entropy", "ratio", "clipped", "tokens", "supervised"):
        assert found[1][name] == pytest.approx(found[0][name], abs=1e-5), name
    assert found[1]["tokens_per_s"] == pytest.approx(found[1]["tokens"] / found[1]["step_s"])
