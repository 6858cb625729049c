"""PPO: where rewards land, what stands in for the rest of a cut episode, two learners in one checkpoint, and that it learns."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from test_rl import FAST, episode, log_of

from temper.core.errors import ConfigError
from temper.core.records import Message, ToolCall
from temper.data.batch import collate
from temper.policy.model import Policy
from temper.policy.scalar_head import RewardModel
from temper.train import ppo
from temper.train.learner import Learner, OptimConfig

# six tokens an answer belong to the task `say`: nearly all of its episodes run into them
FAST = FAST | {"at_cut": "judge", "group": 2, "tasks_per_step": 8, "critic_optim": {"lr": 1e-2, "schedule": "constant"}}


def config(**keys) -> ppo.Config:
    return ppo.Config(**{"out": "o", "base": "b", "environment": "worlds:say", **keys})


class Oracle:
    """A critic that expects 0.5 before every token, and 2 of what follows the last."""

    def __init__(self, like: RewardModel) -> None:
        self.template, self.device, self.kind = like.template, like.device, like.kind

    def values(self, batch):
        return torch.where(batch.mask_B_T, 0.5, 0.0)

    def scores(self, batch, at_N):
        return torch.full(at_N.shape, 2.0)


@pytest.fixture(scope="module")
def critic(base) -> RewardModel:
    return RewardModel(Policy.load(base, precision="float32"))


def cut(record):
    return record.model_copy(update={"sampled": tuple(turn.model_copy(update={"finish_reason": "length"}) for turn in record.sampled)})


def test_the_reward_stands_at_the_last_token_and_a_broken_off_episode_is_bootstrapped(critic) -> None:
    """V = ½ everywhere, γ = λ = 1. Ended with reward 1: returns 1, advantages ½. Broken off: 2 is expected, whatever was judged."""
    records = [episode(1.0, 2), cut(episode(-7.0, 3)), episode(None, 2)]
    rows, found = ppo.credited(records, Oracle(critic), None, config(lam=1.0, whiten=False))
    assert [row.advantages for row in rows] == [[0, 0, 0.5, 0.5], [0, 0, 1.5, 1.5, 1.5]]  # the one without a reward is no row
    assert [row.targets for row in rows] == [[0, 0, 1, 1], [0, 0, 2, 2, 2]]
    assert [row.values for row in rows] == [[0, 0, 0.5, 0.5], [0, 0, 0.5, 0.5, 0.5]]
    assert found["cut_episodes"] == 0.5
    assert found["return"] == pytest.approx((1 + 1 + 2 + 2 + 2) / 5)
    # λ = 0: one step. Ended: ½ − ½ = 0, then 1 − ½. Cut off: 0, 0, 2 − ½
    rows, _ = ppo.credited(records, Oracle(critic), None, config(lam=0.0, whiten=False))
    assert [row.advantages for row in rows] == [[0, 0, 0, 0.5], [0, 0, 0, 0, 1.5]]
    # a limit that belongs to the task: the judged reward, and nothing beside it
    rows, _ = ppo.credited(records, Oracle(critic), None, config(lam=1.0, whiten=False, at_cut="judge"))
    assert rows[1].targets == [0, 0, -7, -7, -7]


def test_an_episode_that_ran_out_of_turns_was_cut() -> None:
    ended = episode(1.0, 2)
    calling = Message(role="assistant", tool_calls=(ToolCall(name="look", arguments={}, id="c"),))
    assert not ppo.was_cut(ended)
    assert ppo.was_cut(ended.model_copy(update={"messages": (*ended.messages[:1], calling)}))
    assert ppo.was_cut(cut(ended))
    # the reason decides, not the last token: the limit may fall right behind an end token (2)
    stopped = ended.sampled[0].model_copy(update={"token_ids": (2,), "logprobs": (-0.5,)})
    assert ppo.was_cut(cut(ended.model_copy(update={"sampled": (stopped,)})))
    assert not ppo.was_cut(ended.model_copy(update={"sampled": (stopped,)}))


def test_whitening_is_over_the_real_tokens_of_all_episodes(critic) -> None:
    """Raw advantages ½, ½ | 1½, 1½, 1½: mean 1.1, spread √0.24."""
    rows, _ = ppo.credited([episode(1.0, 2), cut(episode(0.0, 3))], Oracle(critic), None, config(lam=1.0))
    assert rows[0].advantages == pytest.approx([0, 0, -0.6 / 0.24**0.5, -0.6 / 0.24**0.5], rel=1e-5)
    assert rows[1].advantages[2:] == pytest.approx([0.4 / 0.24**0.5] * 3, rel=1e-5)


def test_the_kl_is_paid_token_by_token_in_the_reward(critic, base) -> None:
    """β = 0.5; the reference finds the tokens less likely than the sampler (−0.5 each): every token pays ½·k1."""
    reference, cfg = Policy.load(base, precision="float32"), config(lam=1.0, whiten=False, kl=0.5)
    record = episode(1.0, 2)
    row = ppo.credited([record], Oracle(critic), None, cfg)[0][0]
    with torch.no_grad():
        known = reference.token_logprobs(collate([dataclasses.replace(row, values=None, targets=None)], 0)).logprobs_B_T[0, 2:].tolist()
    k1 = [-0.5 - value for value in known]
    (paid,), found = ppo.credited([record], Oracle(critic), reference, cfg)
    assert paid.targets[2:] == pytest.approx([1 - 0.5 * sum(k1), 1 - 0.5 * k1[1]], rel=1e-5)
    assert found["kl_episode"] == pytest.approx(sum(k1), rel=1e-5)
    (free,), _ = ppo.credited([record], Oracle(critic), reference, cfg.model_copy(update={"kl_in": "loss"}))
    assert free.targets[2:] == [1.0, 1.0]


def test_a_value_is_read_before_its_token(critic) -> None:
    """It may not know the token it judges: another token there changes nothing, another one before it does."""
    torch.nn.init.normal_(critic.model.score.weight, generator=torch.Generator().manual_seed(0))
    row = ppo.episode_row(episode(1.0, 3), config())
    at = len(row.tokens) - 1
    other = {place: dataclasses.replace(row, tokens=[*row.tokens[:place], 50, *row.tokens[place + 1 :]]) for place in (at, at - 1)}
    with torch.no_grad():
        found = critic.values(collate([row, other[at], other[at - 1]], 0))
    assert found[0, at] == found[1, at]
    assert found[0, at] != found[2, at]
    assert found.where(collate([row] * 3, 0).mask_B_T, 0.0).equal(found)
    torch.nn.init.zeros_(critic.model.score.weight)


def test_the_cut_into_micro_batches_changes_no_gradient_of_the_critic(critic) -> None:
    rows, _ = ppo.credited([episode(1.0, 2), cut(episode(0.0, 3)), episode(0.5, 5)], Oracle(critic), None, config())
    rows = [dataclasses.replace(row, adapter=None) for row in rows]
    gradients = []
    for batches in ([rows], [[row] for row in rows]):
        learner = Learner(critic, OptimConfig(clip=None), 1)
        learner.forward_backward([collate(batch, 0) for batch in batches], ppo.value_loss(critic, config()))
        gradients.append(critic.model.score.weight.grad.clone())
        for weight in learner.parameters.values():
            weight.grad = None
    assert float(gradients[0].abs().max()) > 1e-3
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "keys",
    [
        {"passes": 2, "minibatches": 2},
        {"kl": 0.02, "kl_target": 1.0, "tis_cap": 2.0},
        {"kl": 0.02, "kl_in": "loss", "passes": 2, "tis_cap": 2.0},
    ],
    ids=["passes", "kl-in-reward", "kl-in-loss"],
)
def test_reward_rises_and_the_critic_learns_to_foresee(base, tmp_path, keys) -> None:
    ppo.run(ppo.Config(**{"out": str(tmp_path / "ppo"), "base": base, "steps": 16, **FAST, **keys}))
    log = log_of(tmp_path / "ppo")
    missed = [1 - row["reward"] for row in log]
    assert sum(missed[-3:]) < 0.6 * sum(missed[:3])
    assert log[0]["value"] == 0.0  # the head starts at zero
    assert abs(log[-1]["value"] - log[-1]["return"]) < 0.5 * log[0]["return"]
    assert {"explained_variance", "critic_loss", "critic_value_clipped", "cut_episodes", "mismatch", "entropy", "clipped"} <= log[-1].keys()
    if "kl_target" in keys:
        assert log[-1]["kl_coefficient"] != log[0]["kl_coefficient"] == 0.02

def test_an_adapter_is_trained_once_the_critic_is_warm(base, tmp_path) -> None:
    """The critic is a model of its own without adapters; in its warm-up the policy stays where it is."""
    cfg = ppo.Config(**{"out": str(tmp_path / "ppo"), "base": base, "steps": 3, "lora": {"rank": 4, "alpha": 64}, "critic_warmup": 1, **FAST})
    result = ppo.run(cfg)
    first, *later = log_of(tmp_path / "ppo")
    assert "loss" not in first
    assert first["critic_loss"] > 0
    assert all(row["mismatch"] < 1e-5 for row in later)
    policy = Policy.load(base, precision="float32")
    policy.load_adapter("adapter", result["adapter"])
    assert max(float(weight.detach().abs().max()) for name, weight in policy.model.named_parameters() if name.endswith(".B")) > 1e-3


def test_bootstrapping_does_not_feed_on_itself(base, tmp_path) -> None:
    """Every episode of `say` is broken off sooner or later; were its reward paid beside the expectation, values would grow without bound."""
    ppo.run(ppo.Config(**{"out": str(tmp_path / "ppo"), "base": base, "steps": 16, **FAST, "at_cut": "bootstrap", "passes": 2, "minibatches": 2}))
    log = log_of(tmp_path / "ppo")
    assert max(row["cut_episodes"] for row in log) > 0.5
    assert max(abs(row["value"]) for row in log) < 1.5


def test_a_broken_run_ends_with_the_bytes_of_an_unbroken_one(base, tmp_path, monkeypatch) -> None:
    keys = FAST | {"steps": 4, "passes": 2, "checkpoint_every": 2, "kl": 0.02, "kl_target": 1.0}
    whole = ppo.run(ppo.Config(out=str(tmp_path / "whole"), base=base, **keys))
    real, count = ppo.summarise, []

    def killed(*args):
        count.append(1)
        if len(count) == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(ppo, "summarise", killed)
    cfg = ppo.Config(out=str(tmp_path / "broken"), base=base, **keys)
    with pytest.raises(KeyboardInterrupt):
        ppo.run(cfg)
    monkeypatch.undo()
    assert ppo.run(cfg)["hash"] == whole["hash"]
    kept = ("critic_loss", "kl_coefficient", "loss", "value")
    assert [[row[name] for name in kept] for row in log_of(tmp_path / "broken")] == [[row[name] for name in kept] for row in log_of(tmp_path / "whole")]


def test_a_critic_may_start_as_a_reward_model(base, tmp_path) -> None:
    judge = RewardModel(Policy.load(base, precision="float32"))
    torch.nn.init.constant_(judge.model.score.weight, 0.01)
    judge.save(tmp_path / "judge")
    ppo.run(ppo.Config(**{"out": str(tmp_path / "ppo"), "base": base, "steps": 1, "critic": str(tmp_path / "judge"), **FAST}))
    assert log_of(tmp_path / "ppo")[0]["value"] != 0.0


def test_a_critic_that_was_a_reward_model_recomputes_as_the_policy_does(base, tmp_path) -> None:
    RewardModel(Policy.load(base, precision="float32")).save(tmp_path / "judge")
    for critic in (None, str(tmp_path / "judge")):
        cfg = ppo.Config(**{"out": "o", "base": base, "recompute": True, "critic": critic, **FAST})
        assert ppo.prepare_critic(cfg).policy.recompute


def test_estimate(base) -> None:
    found = ppo.estimate(ppo.Config(**{"out": "o", "base": base, "steps": 5, **FAST}))
    assert found.steps == 5
    assert "policy and critic" in found.seconds_from
    assert found.optimizer_mb == pytest.approx(2 * 12 * found.parameters / 2**20, abs=0.11)  # gradient and two moments of each, four bytes a number


def test_a_step_of_several_updates_is_logged_whole(base, tmp_path) -> None:
    """At rates that move nothing, two updates on halves of the episodes say what one on all of them says."""
    still = {"optim": {"lr": 1e-30}, "critic_optim": {"lr": 1e-30}, "steps": 1}
    for parts in (1, 2):
        ppo.run(ppo.Config(**{"out": str(tmp_path / str(parts)), "base": base, **FAST, **still, "minibatches": parts}))
    one, two = (log_of(tmp_path / str(parts))[0] for parts in (1, 2))
    for name in ("loss", "entropy", "ratio", "tokens", "supervised", "critic_loss", "critic_value_clipped"):
        assert two[name] == pytest.approx(one[name], abs=1e-4), name


def test_a_critic_of_another_template_is_refused(base, tmp_path) -> None:
    judge = RewardModel(Policy.load(base, precision="float32"))
    judge.policy.tokenizer.chat_template = judge.policy.tokenizer.chat_template.replace("assistant", "helper")
    judge.policy.__dict__.pop("template", None)
    judge.save(tmp_path / "judge")
    with pytest.raises(ConfigError, match="has another tokenizer or template"):
        ppo.run(config(out=str(tmp_path / "out"), base=base, critic=str(tmp_path / "judge"), steps=1, **FAST))
