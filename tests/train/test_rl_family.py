"""The GRPO family as credit plus routing: every loss, credit and correction that a config can name, and what each refuses."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
import worlds
from test_rl import FAST, config, episode, log_of
from worlds import SayEnvironment

from temper.core.errors import ConfigError
from temper.core.records import Message, Outcome
from temper.data.batch import collate
from temper.policy.kl import k3
from temper.policy.model import Policy
from temper.rollout.engine import Engine
from temper.rollout.episodes import collect
from temper.train import rl
from temper.train.credit import AGGREGATIONS, LOSSES, credited, decoupled, guide_of, policy_loss
from temper.train.learner import Learner, OptimConfig


class Shown(SayEnvironment):
    """`say` with a demonstration for every task."""

    def tasks(self, split, limit=None):
        return [task.model_copy(update={"demonstration": (Message(role="assistant", content="the sales"),)}) for task in super().tasks(split, limit)]


@pytest.fixture(scope="module")
def sampled(base):
    """A policy, and episodes of three of its tasks with rewards that differ."""
    policy = Policy.load(base, precision="float32")
    groups = collect(Engine(policy), SayEnvironment(), SayEnvironment().tasks("train")[:3], group=4, temperature=0.7, seed=1)
    return policy, [[record.model_copy(update={"outcome": Outcome(reward=float(place))}) for place, record in enumerate(group)] for group in groups]


def keys_of(loss: str) -> dict:
    return {"loss": loss, "guidance": loss == "luffy", "temperature": 0.7, "aggregation": "sequence", "tis_cap": 2.0, "entropy_bonus": 0.01, "kl": 0.1}


def rows_of(policy, groups, cfg):
    guides = [guide_of(Shown(), task, policy.template, 64) for task in Shown().tasks("train")[:3]] if cfg.guidance else []
    return credited(groups, cfg, guides)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_the_cut_into_micro_batches_changes_no_gradient(sampled, loss, aggregation) -> None:
    """One batch, or each row by itself: the denominator is counted over the whole step."""
    policy, groups = sampled
    cfg = config(**keys_of(loss) | {"aggregation": aggregation})
    rows = rows_of(policy, groups, cfg)
    assert len(rows) == (15 if loss == "luffy" else 12)
    reference = Policy.load(policy.path, precision="float32")
    with torch.no_grad():
        reference.model.get_input_embeddings().weight.mul_(1.02)
    gradients = []
    for batches in ([rows], [[row] for row in rows]):
        learner = Learner(policy, OptimConfig(clip=None), 1)
        made = [collate(batch, policy.template.pad_id) for batch in batches]
        learner.forward_backward(made, policy_loss(policy, reference, cfg), AGGREGATIONS[aggregation][1])
        gradients.append({name: weight.grad.clone() for name, weight in learner.parameters.items() if weight.grad is not None})
        for weight in learner.parameters.values():
            weight.grad = None
    scale = max(float(value.abs().max()) for value in gradients[0].values())
    assert scale > 1e-4
    for name, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], value, atol=1e-5 * scale, rtol=1e-4, msg=name)


DAPO = {"clip_high": 0.28, "aggregation": "token", "resample": 2, "overlong": {"limit": 6, "buffer": 2, "penalty": 0.2}}


@pytest.mark.parametrize(
    "keys",
    [
        {"loss": "gspo", "aggregation": "sequence"},
        {"loss": "cispo", "tis_cap": 2.0, "tis_level": "sequence", "tis_treatment": "mask"},
        {"advantage": "reinforce_pp", "group": 1, "tasks_per_step": 8, "steps": 24},
        {"advantage": "reinforce_pp_baseline", "kl": 0.01, "kl_target": 0.5},
        DAPO,
        {"loss": "luffy", "guidance": True, "environment": "test_rl_family:Shown"},
        {"minibatches": 2, "tis_cap": 2.0},
    ],
    ids=["gspo", "cispo", "reinforce_pp", "baseline", "dapo", "luffy", "two-steps"],
)
def test_reward_rises(base, tmp_path, keys) -> None:
    rl.run(rl.Config(**{"out": str(tmp_path / "rl"), "base": base, "steps": 16, **FAST, **keys}))
    log = log_of(tmp_path / "rl")
    missed = [1 - row["reward"] for row in log]
    assert sum(missed[-3:]) < 0.5 * sum(missed[:3])
    assert all({"mismatch", "mismatch_kl"} <= row.keys() for row in log if row["trained_rows"])  # logged whatever corrects for it
    if "kl_target" in keys:
        first, *_, last = (row["kl_coefficient"] for row in log if row["trained_rows"])  # a step in which every group agrees has none
        assert last != first == 0.01
    if "guidance" in keys:
        assert {row["cut_guides"] for row in log} == {0}


def test_a_batch_of_single_samples_is_credited_across_its_tasks() -> None:
    """REINFORCE++: rewards 1, 0, 0.5 of three tasks: mean ½, std ½."""
    rows = credited([[episode(1.0, 2)], [episode(0.0, 2)], [episode(0.5, 2)]], config(advantage="reinforce_pp", group=1))
    assert [row.advantages[-1] for row in rows] == pytest.approx([1.0, -1.0, 0.0])
    assert credited([[episode(1.0, 2)], [episode(1.0, 2)]], config(advantage="reinforce_pp", group=1)) == []


def test_an_episode_without_a_sampled_token_is_no_row_and_counts_in_no_denominator() -> None:
    """It sways the mean of its group (its reward was judged), and nothing else."""
    silent = episode(0.0, 2).model_copy(update={"sampled": ()})
    rows = credited([[episode(1.0, 2), episode(0.0, 4), silent]], config(advantage="dr_grpo", aggregation="sequence"))
    assert [row.advantages[-1] for row in rows] == pytest.approx([2 / 3, -1 / 3])
    assert AGGREGATIONS["sequence"][1](collate(rows, 0)) == 2


def test_overlong_episodes_lose_reward_before_they_are_credited() -> None:
    """Limit 6, buffer 4, penalty ½: 2 tokens lose nothing, 4 lose ¼, 6 and more lose ½. An absent reward stays absent."""
    cfg = config(advantage="dr_grpo", overlong={"limit": 6, "buffer": 4, "penalty": 0.5})
    rows = credited([[episode(1.0, 2), episode(1.0, 4), episode(1.0, 9), episode(None, 9)]], cfg)
    assert [row.advantages[-1] for row in rows] == pytest.approx([0.25, 0.0, -0.25])  # 1, ¾, ½ around ¾


def test_groups_without_signal_are_replaced_up_to_a_bound(monkeypatch) -> None:
    """Two of three groups agree; the first further round finds one that does not, the second none: one stays missing."""
    tasks = SayEnvironment().tasks("train")
    good, flat = [episode(1.0, 2), episode(0.0, 2)], [episode(1.0, 2), episode(1.0, 2)]
    rounds = [[flat, good], [flat]]
    asked = []
    monkeypatch.setattr(rl, "sample", lambda engine, environment, chosen, cfg, *stream: asked.append((len(chosen), stream)) or rounds[len(asked) - 1])
    cfg = config(tasks_per_step=3, resample=2)
    kept, groups, found = rl.resampled(None, None, tasks[:3], [good, flat, flat], tasks, cfg, step=5)
    assert asked == [(2, ("episodes", 5, 0)), (1, ("episodes", 5, 1))]
    assert (len(kept), groups) == (2, [good, good])
    assert found == {"resampled_tasks": 3, "groups_missing": 1}
    asked.clear()
    rl.resampled(None, None, tasks[:3], [good, good, good], tasks, cfg, step=6)
    assert asked == []  # nothing to replace


def test_a_demonstration_is_one_more_sample_whose_log_probs_nobody_knows(sampled) -> None:
    policy, _ = sampled
    task = Shown().tasks("train")[0]
    guide = guide_of(Shown(), task, policy.template, 64)
    trained = [token for token, weight in zip(guide.row.tokens, guide.row.weights, strict=True) if weight]
    assert policy.template.parse(trained).content == "the sales"
    assert guide.reward == 1.0  # as the environment's own verifier sees it
    assert [math.isnan(value) for value in guide.row.old_logprobs] == [bool(weight) for weight in guide.row.weights]
    # every own episode fails: without the guide the group would teach nothing. Rewards 0, 0, 1: the guide gets 2/√3
    rows = credited([[episode(0.0, 2), episode(0.0, 2)]], config(loss="luffy", guidance=True), [guide])
    assert [max(row.advantages, key=abs) for row in rows] == pytest.approx([-1 / 3**0.5, -1 / 3**0.5, 2 / 3**0.5])
    cut = guide_of(Shown(), task, policy.template, guide.row.weights.index(1.0))
    assert cut.reward is None  # nothing of it is left to learn from
    assert (guide.row.cut, cut.row.cut) == (0, len(guide.row.tokens) - guide.row.weights.index(1.0))
    with pytest.raises(ConfigError, match="has no demonstration"):
        guide_of(SayEnvironment(), SayEnvironment().tasks("train")[0], policy.template, 64)


def test_guided_tokens_are_no_mismatch_and_enter_no_kl(sampled) -> None:
    policy, groups = sampled
    cfg = config(**keys_of("luffy") | {"tis_cap": None, "kl": 1.0})
    rows = rows_of(policy, groups, cfg)
    out = policy_loss(policy, policy.clone_reference(), cfg)(collate(rows, policy.template.pad_id))
    assert out.total.isfinite()
    assert float(out.sums["mismatch"] / out.count) < 1e-5
    assert float(out.sums["kl"]) == pytest.approx(0.0, abs=1e-5)
    assert int(out.sums["guided"]) == sum(math.isnan(value) for row in rows for value in row.old_logprobs)


@pytest.mark.parametrize("parts", [1, 2])
def test_what_only_own_tokens_have_is_a_mean_over_own_tokens(sampled, parts) -> None:
    """Nothing has moved, so every own token's ratio is 1, however many demonstrated tokens the step holds."""
    policy, groups = sampled
    cfg = config(**keys_of("luffy") | {"tis_cap": None, "kl": 0.0, "entropy_bonus": 0.0, "aggregation": "token", "minibatches": parts})
    rows = rows_of(policy, groups, cfg)
    found = rl.update(Learner(policy, OptimConfig(lr=1e-30), parts), None, rows, cfg)
    guides = [row for row in rows if any(map(math.isnan, row.old_logprobs))]
    guided = sum(row.supervised for row in guides)
    assert found["guided"] == pytest.approx(guided / sum(row.supervised for row in rows))
    assert found["ratio"] == pytest.approx(1.0, abs=1e-5)
    batch = collate(guides, policy.template.pad_id)
    with torch.no_grad():
        said_B_T = policy.token_logprobs(batch, temperature=0.7).logprobs_B_T.exp().where(batch.mask_B_T, 0.0)
    assert found["guided_probability"] == pytest.approx(float(said_B_T.sum()) / guided, rel=1e-4)


def test_the_mismatch_of_a_guided_step_is_that_of_own_tokens(sampled) -> None:
    """The sampler says 0.5 nats less for every own token: ½ a token, whether it is measured with the first update or before it."""
    policy, groups = sampled
    for keys in ({"tis_cap": None}, {"tis_cap": 2.0}):
        cfg = config(**keys_of("luffy") | {"kl": 0.0, "entropy_bonus": 0.0, "minibatches": 2} | keys)
        rows = [dataclasses.replace(row, old_logprobs=[old - 0.5 * (weight != 0) for old, weight in zip(row.old_logprobs, row.weights, strict=True)])
                for row in rows_of(policy, groups, cfg)]  # fmt: skip
        found = rl.update(Learner(policy, OptimConfig(lr=1e-30), 2), None, rows, cfg)
        assert found["mismatch"] == pytest.approx(0.5, abs=1e-4)


def test_for_several_steps_the_clip_holds_to_the_learner_and_the_weight_corrects_for_the_sampler(sampled) -> None:
    """The sampler says 0.5 nats less for every token: weights e^½, capped at 1.2, once; and the ratio starts at 1."""
    policy, groups = sampled
    cfg = config(**keys_of("clipped") | {"minibatches": 2, "tis_cap": 1.2, "kl": 0.0})
    rows = rows_of(policy, groups, cfg)
    shifted = [dataclasses.replace(row, old_logprobs=[old - 0.5 * (weight != 0) for old, weight in zip(row.old_logprobs, row.weights, strict=True)]) for row in rows]
    made, found = decoupled(policy, shifted, cfg)
    for before, after in zip(rows, made, strict=True):
        assert after.old_logprobs == pytest.approx(before.old_logprobs, abs=1e-4)  # the learner's are the true sampler's
        assert after.advantages == pytest.approx([1.2 * value for value in before.advantages], rel=1e-5)
    assert found["mismatch"] == pytest.approx(0.5, abs=1e-4)
    assert found["tis_weight"] == pytest.approx(1.2, rel=1e-5)
    out = policy_loss(policy, None, cfg)(collate(made, policy.template.pad_id))
    assert float(out.sums["ratio"] / out.count) == pytest.approx(1.0, abs=1e-5)
    assert "tis_weight" not in out.sums  # it stands in the advantages already


def test_entropy_is_of_the_temperature_that_was_sampled_at(sampled) -> None:
    policy, groups = sampled
    cfg = config(temperature=0.5)
    batch = collate(credited(groups, cfg), policy.template.pad_id)
    found = float(policy_loss(policy, None, cfg)(batch).sums["entropy"])
    with torch.no_grad():
        logp_B_T_V = (policy.model(input_ids=batch.tokens_B_T, attention_mask=batch.attention_B_T.long()).logits.double() / 0.5).log_softmax(-1)
    entropy_B_T = -(logp_B_T_V.exp() * logp_B_T_V).sum(-1)[:, :-1]
    assert found == pytest.approx(float(entropy_B_T[batch.mask_B_T[:, 1:]].sum()), rel=1e-4)
    plain = float(policy_loss(policy, None, cfg.model_copy(update={"entropy_bonus": 0.0}))(batch).total.detach())
    bonus = float(policy_loss(policy, None, cfg.model_copy(update={"entropy_bonus": 0.1}))(batch).total.detach())
    assert bonus == pytest.approx(plain - 0.1 * found, rel=1e-4)


def test_the_kl_of_samples_of_an_older_policy_carries_their_ratio(sampled) -> None:
    """Old log-probs 0.3 below the learner's: every token's k3 counts e^0.3 times."""
    policy, groups = sampled
    cfg = config(temperature=0.7, kl=1.0)
    reference = Policy.load(policy.path, precision="float32")
    with torch.no_grad():
        reference.model.get_input_embeddings().weight.mul_(1.05)
    rows = [dataclasses.replace(row, old_logprobs=[old - 0.3 * (weight != 0) for old, weight in zip(row.old_logprobs, row.weights, strict=True)]) for row in credited(groups, cfg)]
    batch = collate(rows, policy.template.pad_id)
    with torch.no_grad():
        own, other = (model.token_logprobs(batch, temperature=0.7).logprobs_B_T for model in (policy, reference))
        with_kl, without = (policy_loss(policy, model, cfg)(batch).total for model in (reference, None))
    expected = float(k3(own, other)[batch.mask_B_T].sum()) * math.exp(0.3)
    assert float(with_kl - without) == pytest.approx(expected, rel=1e-3)


def test_the_coefficient_is_adapted_and_remembered(sampled) -> None:
    policy, groups = sampled
    cfg = config(temperature=0.7, kl=0.2, kl_target=1e6, optim={"lr": 1e-9})
    learner = Learner(policy, cfg.optim, 2)
    for wanted in (0.2, 0.2 * 0.98):  # far below the target: a fiftieth less each step
        found = rl.update(learner, policy.clone_reference(), credited(groups, cfg), cfg)
        assert found["kl_coefficient"] == pytest.approx(wanted)
    assert json.loads(json.dumps(learner.memory))["kl"] == pytest.approx(0.2 * 0.98**2)


@pytest.mark.parametrize(
    ("keys", "word"),
    [
        ({"loss": "ppo2"}, "there is no 'ppo2'"),
        ({"tis_level": "row"}, "there is no 'row'"),
        ({"kl_target": 6.0}, "give it a value to start from"),
        ({"group": 1}, "group is 1"),
        ({"advantage": "reinforce_pp", "resample": 1}, "set resample: 0"),
        ({"guidance": True}, "go together"),
        ({"loss": "luffy"}, "go together"),
        ({"loss": "luffy", "guidance": True, "resample": 1}, "the demonstration is for"),
    ],
)
def test_parts_that_do_not_fit_are_refused_by_name(keys, word) -> None:
    with pytest.raises(ValueError, match=word):
        config(**keys)


def test_clips_are_the_papers_unless_the_config_says_otherwise() -> None:
    assert config(loss="gspo").clips == (3e-4, 4e-4)
    assert config(loss="clipped", clip_high=0.5).clips == (0.2, 0.5)
    assert config(loss="cispo").clips[1] == 4.0


def test_dynamic_sampling_measures_the_policy_and_not_the_groups_it_kept(base, tmp_path, monkeypatch) -> None:
    """Every group agrees: nothing can be trained, the reward is what was sampled first, and the bound holds."""
    monkeypatch.setattr(worlds.SayEnvironment, "verify", lambda *args: Outcome(reward=1.0))
    rl.run(rl.Config(out=str(tmp_path / "rl"), base=base, steps=1, resample=2, **FAST))
    (row,) = log_of(Path(tmp_path / "rl"))
    assert (row["reward"], row["trained_rows"], row["resampled_tasks"], row["groups_missing"]) == (1.0, 0, 8, 4)
