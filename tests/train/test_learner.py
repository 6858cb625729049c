"""The learner's arithmetic by hand, its denominator, and its checkpoint."""

from __future__ import annotations

import math

import pytest
import torch
from worlds import conversations

from temper.core.errors import DataError, IntegrityError, ShapeError
from temper.data.batch import collate
from temper.data.sequence import Sequence, to_sequence
from temper.policy import hardware
from temper.policy.adapters import LoraConfig
from temper.policy.losses import LossOut
from temper.policy.model import Policy
from temper.train import checkpoint
from temper.train.cost import Cost, kept_bytes
from temper.train.learner import DivergedError, Learner, OptimConfig, decay_groups, rows
from temper.train.stage import StageConfig, load_policy


@pytest.fixture
def policy(base) -> Policy:
    return Policy.load(base, precision="float32")


@pytest.fixture
def examples(policy) -> list[Sequence]:
    return [to_sequence(record, policy.template, 128) for record in conversations(6)]


def gradients(policy: Policy) -> dict[str, torch.Tensor]:
    found = {name: weight.grad.clone() for name, weight in policy.model.named_parameters() if weight.grad is not None}
    policy.model.zero_grad()
    return found


def in_batches(examples: list[Sequence], size: int, pad: int) -> list:
    return [collate(examples[at : at + size], pad) for at in range(0, len(examples), size)]


def test_rates_of_ten_steps_by_hand() -> None:
    linear = OptimConfig(lr=1.0, warmup_share=0.2, schedule="linear", final_share=0.3)
    # two steps of warm-up, then 1 − 0.7·k/7 for k = 0 … 7
    assert [round(linear.rate(step, 10), 6) for step in range(10)] == [0.5, 1.0, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3]
    cosine = OptimConfig(lr=2.0, warmup_share=0.0, schedule="cosine", final_share=0.0)
    assert [round(cosine.rate(step, 3), 6) for step in range(3)] == [2.0, 1.0, 0.0]
    constant = OptimConfig(lr=0.5, warmup_share=0.0, schedule="constant")
    assert {constant.rate(step, 7) for step in range(7)} == {0.5}
    assert OptimConfig(lr=1.0).rate(0, 1) == 1.0  # a single step is not lost to the warm-up


@pytest.mark.parametrize("weighting", ["token", "sequence"])
def test_size_and_order_of_micro_batches_change_no_gradient(policy, examples, weighting) -> None:
    """Rows of unequal length: a mean of micro-batch means would weigh their tokens differently."""
    if weighting == "sequence":
        examples = [Sequence(row.tokens, [weight / sum(row.weights) for weight in row.weights]) for row in examples]
    assert len({row.supervised for row in examples}) > 1
    learner = Learner(policy, OptimConfig(), 10)
    seen = []
    for size, order in ((6, 1), (2, 1), (1, -1)):
        metrics = learner.forward_backward(in_batches(examples[::order], size, policy.template.pad_id), policy.cross_entropy)
        seen.append((metrics["loss"], gradients(policy)))
        learner._pending = None
    for loss, grads in seen[1:]:
        assert loss == pytest.approx(seen[0][0], abs=1e-6)
        for name, gradient in grads.items():
            torch.testing.assert_close(gradient, seen[0][1][name], atol=1e-6, rtol=1e-4)


def test_denominator_is_the_sum_over_all_batches(policy) -> None:
    """Two batches of 1 and 3 trained tokens, each token with loss 2: Σ = 8 over 4, not (2 + 2)/2 by luck of equal means."""
    short, long = Sequence([1, 2], [0.0, 1.0]), Sequence([1, 2, 3, 4], [0.0, 1.0, 1.0, 1.0])
    weight = next(iter(policy.trainable_parameters().values()))

    def loss(batch) -> LossOut:
        each = torch.where(batch.tokens_B_T == 2, 5.0, 1.0).where(batch.mask_B_T, 0.0)  # token 2 costs 5, others 1
        return LossOut(each.sum() + 0.0 * weight.sum(), batch.mask_B_T.sum(), {"fives": (each == 5).sum()})

    metrics = Learner(policy, OptimConfig(), 1).forward_backward([collate([short], 0), collate([long], 0)], loss)
    assert metrics["loss"] == 3.0  # (5 + 5 + 1 + 1)/4; the mean of means would be (5 + 7/3)/2 = 3.67
    assert metrics["fives"] == 0.5
    assert metrics["supervised"] == 4
    assert metrics["tokens"] == 6


def test_a_step_is_adamw_with_clipping(policy, examples) -> None:
    """The first AdamW step moves every weight by lr·(sign of its gradient), whatever the clip; the logged norm is the one before it."""
    learner = Learner(policy, OptimConfig(lr=1e-3, warmup_share=0.0, schedule="constant", weight_decay=0.0, clip=1e-2, eps=1e-20), 5)
    before = {name: weight.detach().clone() for name, weight in learner.parameters.items()}
    learner.forward_backward(in_batches(examples, 6, 0), policy.cross_entropy)
    expected = math.sqrt(sum(float(weight.grad.double().square().sum()) for weight in learner.parameters.values()))
    signs = {name: weight.grad.sign() for name, weight in learner.parameters.items()}
    metrics = learner.optim_step()
    assert metrics["grad_norm"] == pytest.approx(expected, rel=1e-5)
    assert metrics["lr"] == 1e-3
    for name, weight in learner.parameters.items():
        torch.testing.assert_close(weight.detach(), before[name] - 1e-3 * signs[name], atol=2e-6, rtol=0)
    assert policy.version == 1


def test_matrices_decay_and_nothing_else(policy) -> None:
    decayed, kept = decay_groups(policy.model, 0.1)
    names = {id(weight): name for name, weight in policy.model.named_parameters()}
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    assert all("proj" in names[id(weight)] for weight in decayed["params"])
    rest = {names[id(weight)] for weight in kept["params"]}
    assert "model.embed_tokens.weight" in rest  # the head is tied to it
    assert all("norm" in name or "embed" in name for name in rest)
    assert len(decayed["params"]) + len(kept["params"]) == len(names)


def test_what_a_step_refuses(policy, examples) -> None:
    learner = Learner(policy, OptimConfig(), 5)
    batches = in_batches(examples, 6, 0)
    with pytest.raises(ShapeError, match="no gradient"):
        learner.optim_step()
    learner.forward_backward(batches, policy.cross_entropy)
    with pytest.raises(ShapeError, match="twice"):
        learner.forward_backward(batches, policy.cross_entropy)
    learner.skip()
    assert learner.step == 1
    nothing = [Sequence([1, 2, 3], [0.0, 0.0, 0.0])]
    with pytest.raises(DataError, match="no supervised token"):
        learner.forward_backward([collate(nothing, 0)], policy.cross_entropy)
    with pytest.raises(DivergedError, match="loss of step 1 is nan"):
        learner.forward_backward(batches, lambda batch: LossOut(policy.cross_entropy(batch).total * math.nan, torch.tensor(1)))
    policy.freeze_base()
    with pytest.raises(DataError, match="nothing to train"):
        Learner(policy, OptimConfig(), 5)


@pytest.mark.parametrize("adapter", [False, True])
def test_a_loaded_checkpoint_goes_on_to_the_bit(base, examples, tmp_path, adapter) -> None:
    """Three steps, save, two more; then load and the same two: equal bytes, dropout and named streams included."""

    def fresh() -> Learner:
        policy = Policy.load(base, precision="float32")
        if adapter:
            policy.freeze_base()
            policy.add_lora("a", LoraConfig(rank=2, dropout=0.5))
        policy.model.train()
        return Learner(policy, OptimConfig(lr=1e-2), 5, seed=7)

    def step(learner: Learner) -> None:
        chosen = learner.stream("rows").sample(examples, 3)
        named = [Sequence(row.tokens, row.weights, adapter="a" if adapter else None) for row in chosen]
        learner.forward_backward([collate(named, 0)], learner.policy.cross_entropy)
        learner.optim_step()

    first = fresh()
    for _ in range(3):
        step(first)
    first.memory["length"] = 12.5
    (tmp_path / "saved").mkdir()
    first.save(tmp_path / "saved")
    for _ in range(2):
        step(first)
    second = fresh()
    second.load(tmp_path / "saved")
    assert (second.step, second.policy.version, second.memory) == (3, 3, {"length": 12.5})
    for _ in range(2):
        step(second)
    for name, weight in first.parameters.items():
        assert torch.equal(weight, second.parameters[name]), name
    assert first.stream("rows").random() == second.stream("rows").random()


def test_moments_come_back_to_where_their_weights_are(policy, examples, tmp_path) -> None:
    """Files are read on the CPU. Weights on another device (here one without memory) have all their moments there."""
    learner = Learner(policy, OptimConfig(), 5)
    learner.forward_backward([collate(examples[:2], 0)], policy.cross_entropy)
    learner.optim_step()
    learner.save(tmp_path)
    elsewhere = {name: torch.nn.Parameter(weight.detach().to("meta")) for name, weight in learner.parameters.items()}
    _, moments = checkpoint.read(tmp_path, elsewhere, 5)
    assert {name.rpartition("|")[2] for name in moments} == {"step", "exp_avg", "exp_avg_sq"}
    assert {value.device.type for value in moments.values()} == {"meta"}


def test_a_checkpoint_of_another_run_is_refused(base, policy, tmp_path) -> None:
    Learner(policy, OptimConfig(), 5).save(tmp_path)
    with pytest.raises(IntegrityError, match="5 steps against 6"):
        Learner(policy, OptimConfig(), 6).load(tmp_path)
    policy.freeze_base()
    policy.add_lora("a", LoraConfig(rank=2))
    with pytest.raises(IntegrityError, match="another run"):
        Learner(policy, OptimConfig(), 5).load(tmp_path)


def test_operations_by_hand(policy) -> None:
    """Tiny Qwen3: per layer q 64·64, k and v 64·32 each, o 64·64, MLP 3·64·128; two layers; head 64·V, tied and so trained."""
    cost = Cost.of(policy)
    assert cost.body == cost.body_trained == 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
    assert cost.head == 64 * policy.model.config.vocab_size
    # a token costs 2 operations a weight forward, 4 backward; a supervised one the same in the last MLP and in the head
    batch = collate([Sequence([1, 2, 3], [0.0, 0.0, 1.0])], 0)
    attention = 3 * 4 * 2 * 64 * (3 * 4 / 2)
    assert cost.last_mlp == cost.last_mlp_trained == 3 * 64 * 128
    assert cost.flops(batch) == 3 * 6 * cost.body - 2 * 6 * 3 * 64 * 128 + 6 * 64 * policy.model.config.vocab_size + attention
    policy.freeze_base()
    policy.add_lora("a", LoraConfig(rank=2, targets=("q_proj",)))
    frozen = Cost.of(policy)
    added = 2 * 2 * (64 + 64)
    assert (frozen.body, frozen.body_trained) == (cost.body + added, added)
    assert frozen.of_counts(1, 1, 0) == 4 * (cost.body + added) + 2 * added + 4 * cost.head
    assert frozen.of_counts(1, 0, 0) == 4 * (cost.body - cost.last_mlp + added) + 2 * added


def test_the_price_of_recomputing_is_said_and_the_choice_changes_no_gradient(base, examples, capsys) -> None:
    """A full step is 2 + 4 operations a weight and token, so a second forward adds a third; with a frozen base 2 + 2, so a half."""
    seen = []
    for recompute in (False, True):
        policy = Policy.load(base, precision="float32")
        policy.recompute = recompute
        learner = Learner(policy, OptimConfig(), 5)
        learner.forward_backward(in_batches(examples, 3, 0), policy.cross_entropy)
        seen.append(gradients(policy))
    assert all(torch.equal(seen[0][name], seen[1][name]) for name in seen[0])
    said = capsys.readouterr().err
    assert said.count("recompute:") == 1
    assert "recompute: 33% more operations outside the head; the layers keep " in said
    assert kept_bytes(policy, recompute=True) < kept_bytes(policy, recompute=False) / 3
    # with recompute two layers keep their inputs, 64 floats a position each, and the last norm its own; the rest is small change
    assert 2 * 64 * 4 <= kept_bytes(policy, recompute=True) < 6 * 64 * 4
    policy.freeze_base()
    policy.add_lora("a", LoraConfig(rank=1, targets=("q_proj",)))
    assert Cost.of(policy).recomputed_share == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(("asked", "units", "said"), [
    ("auto", True, "products in bfloat16 (this processor multiplies bfloat16), what is trained and its moments in float32"),
    ("auto", False, "products in float32 (this processor has no bfloat16 units), what is trained and its moments in float32"),
    ("float32", True, "products in float32 (asked for)"),
])  # fmt: skip
def test_the_precision_follows_the_hardware_and_is_said(base, examples, monkeypatch, capsys, asked, units, said) -> None:
    """bfloat16 is what products are done in; what is trained, and its moments, stay float32."""
    monkeypatch.setattr(hardware, "has_bfloat16_units", lambda: units)
    policy = load_policy(StageConfig(out="nowhere", base=base, device="cpu", precision=asked))
    assert said in capsys.readouterr().err
    learner = Learner(policy, OptimConfig(), 5)
    learner.forward_backward(in_batches(examples, 6, 0), policy.cross_entropy)
    learner.optim_step()
    held = [*learner.parameters.values(), *(value for state in learner.optimizer.state.values() for value in state.values())]
    assert {value.dtype for value in held} == {torch.float32}


def test_rows_count_rows() -> None:
    assert rows(collate([Sequence([1, 2], [0.0, 1.0]), Sequence([1, 2, 3], [0.0, 1.0, 1.0])], 0)) == 2


def test_a_try_that_failed_leaves_nothing_for_the_next(policy, examples) -> None:
    """The second micro-batch fails, as for want of memory; tried again, the gradient is that of one try."""
    batches, learner, calls = in_batches(examples, 2, policy.template.pad_id), Learner(policy, OptimConfig(), 10), []

    def failing(batch) -> LossOut:
        calls.append(batch)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return policy.cross_entropy(batch)

    with pytest.raises(RuntimeError, match="out of memory"):
        learner.forward_backward(batches, failing)
    learner.forward_backward(batches, failing)
    again = gradients(policy)
    fresh = Learner(policy, OptimConfig(), 10)
    fresh.forward_backward(batches, policy.cross_entropy)
    assert all(torch.equal(again[name], gradient) for name, gradient in gradients(policy).items())


def test_loading_forgets_what_was_under_way(policy, examples, tmp_path) -> None:
    """A gradient that nobody stepped on, and moments that a checkpoint from before the first step does not have."""
    batches, learner = in_batches(examples, 6, policy.template.pad_id), Learner(policy, OptimConfig(), 10)
    (tmp_path / "start").mkdir()
    learner.save(tmp_path / "start")
    learner.forward_backward(batches, policy.cross_entropy)
    expected = learner.optim_step()["grad_norm"], {name: weight.detach().clone() for name, weight in policy.model.named_parameters()}
    learner.forward_backward(batches, policy.cross_entropy)
    learner.load(tmp_path / "start")
    learner.forward_backward(batches, policy.cross_entropy)
    assert learner.optim_step()["grad_norm"] == expected[0]
    assert all(torch.equal(weight, expected[1][name]) for name, weight in policy.model.named_parameters())
