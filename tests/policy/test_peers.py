"""Equality with TRL, function by function: the loss of a peer's trainer is called with the log-probs that ours is given.

Each trainer is stood in for by the few attributes that its loss reads, so that no model, data set or training is needed.
Where the two differ on purpose, the test says so and shows both.
"""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from policy_doubles import make_batch, tiny_policy
from torch import Tensor, tensor

from temper.policy import kl, losses
from temper.policy.head import Head, token_values

trl = pytest.importorskip("trl", reason="TRL is not installed; it comes with the `dev` extra: make install-dev")

P, ROWS, STEPS = 4, 4, 6


class Alone:
    """An accelerator of one process: what is gathered is what was given."""

    device, num_processes, process_index, sync_gradients = torch.device("cpu"), 1, 0, True

    def gather(self, value: Tensor) -> Tensor:
        return value

    def reduce(self, value: Tensor, reduction: str = "sum") -> Tensor:
        return value

    gather_for_metrics = gather


def peer(**attributes) -> SimpleNamespace:
    """What stands in for a trainer."""
    shared = {"accelerator": Alone(), "model": SimpleNamespace(training=True), "aux_loss_enabled": False, "_total_train_tokens": 0, "_tp_size": 1,
              "_metrics": defaultdict(lambda: defaultdict(list))}  # fmt: skip
    return SimpleNamespace(**shared | attributes)


def doubles(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gradient(total: Tensor, leaf: Tensor) -> Tensor:
    return torch.autograd.grad(total, leaf, retain_graph=True)[0]


def same(ours: Tensor, theirs: Tensor, *leaves: Tensor) -> None:
    """Equal in value and in every gradient, in float64."""
    torch.testing.assert_close(ours, theirs.to(ours.dtype), rtol=1e-9, atol=1e-12)
    for leaf in leaves:
        torch.testing.assert_close(gradient(ours, leaf), gradient(theirs, leaf), rtol=1e-9, atol=1e-12)


# --- sampled tokens ---

LENGTHS = tensor([6, 3, 5, 1])
MASK_B_T = torch.arange(STEPS)[None] < LENGTHS[:, None]
OLD_B_T, REF_B_T = (-doubles(ROWS, STEPS, seed=seed).abs() for seed in (1, 2))
ADVANTAGES_B = doubles(ROWS, seed=3)
IMPORTANCE_B_T = doubles(ROWS, STEPS, seed=4).abs()


def grpo_of_trl(logprobs_B_T: Tensor, loss_type: str, *, level: str = "token", beta: float = 0.0, corrected: bool = False, low: float = 0.2, high: float = 0.28) -> Tensor:
    from trl.trainer.grpo_trainer import GRPOTrainer

    trainer = peer(
        _get_per_token_logps_and_entropies=lambda *args, **keys: (logprobs_B_T, torch.zeros_like(logprobs_B_T), None), top_entropy_quantile=1.0,
        off_policy_mask_threshold=None, importance_sampling_level=level, beta=beta, loss_type=loss_type, epsilon_low=low, epsilon_high=high,
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1), use_vllm=corrected, vllm_importance_sampling_correction=corrected,
        current_gradient_accumulation_steps=1, max_completion_length=10, _entropy_bonus_enabled=False,
    )  # fmt: skip
    prompt = torch.ones(ROWS, 1, dtype=torch.long)
    return GRPOTrainer._compute_loss(trainer, None, {
        "prompt_ids": prompt, "prompt_mask": prompt, "completion_ids": torch.ones(ROWS, STEPS, dtype=torch.long), "completion_mask": MASK_B_T.long(),
        "advantages": ADVANTAGES_B, "old_per_token_logps": OLD_B_T, "ref_per_token_logps": REF_B_T, "importance_sampling_ratio": IMPORTANCE_B_T,
        "num_items_in_batch": MASK_B_T.sum(),
    })  # fmt: skip


def logprobs() -> Tensor:
    return (OLD_B_T + doubles(ROWS, STEPS, seed=5, scale=0.4)).requires_grad_()


SHARES = {"token": (1.0, lambda: MASK_B_T.sum()), "sequence": (1 / LENGTHS[:, None].double(), lambda: ROWS), "constant": (0.1, lambda: ROWS)}


@pytest.mark.parametrize(("loss_type", "aggregation"), [("dapo", "token"), ("bnpo", "token"), ("grpo", "sequence"), ("dr_grpo", "constant")])
@pytest.mark.parametrize("corrected", [False, True])
def test_the_grpo_family(loss_type, aggregation, corrected) -> None:
    logprobs_B_T, (share, count) = logprobs(), SHARES[aggregation]
    ours = losses.clipped_pg(
        logprobs_B_T, OLD_B_T, ADVANTAGES_B[:, None].expand(ROWS, STEPS), MASK_B_T, clip_low=0.2, clip_high=0.28,
        weights_B_T=torch.as_tensor(share, dtype=torch.float64).expand(ROWS, STEPS), importance_B_T=IMPORTANCE_B_T if corrected else None,
    )  # fmt: skip
    assert int(ours.sums["clipped"]) > 0
    same(ours.total / count(), grpo_of_trl(logprobs_B_T, loss_type, corrected=corrected), logprobs_B_T)


def test_gspo() -> None:
    logprobs_B_T = logprobs()
    ours = losses.gspo(logprobs_B_T, OLD_B_T, ADVANTAGES_B[:, None].expand(ROWS, STEPS), MASK_B_T, clip_low=0.01, clip_high=0.02,
                       weights_B_T=(1 / LENGTHS[:, None].double()).expand(ROWS, STEPS))  # fmt: skip
    assert 0 < int(ours.sums["clipped"]) < int(MASK_B_T.sum())
    same(ours.total / ROWS, grpo_of_trl(logprobs_B_T, "grpo", level="sequence", low=0.01, high=0.02), logprobs_B_T)


def test_cispo() -> None:
    """TRL's `epsilon_high` is the cap itself."""
    logprobs_B_T = logprobs()
    ours = losses.cispo(logprobs_B_T, OLD_B_T, ADVANTAGES_B[:, None].expand(ROWS, STEPS), MASK_B_T, cap=1.1)
    same(ours.total / MASK_B_T.sum(), grpo_of_trl(logprobs_B_T, "cispo", high=1.1), logprobs_B_T)


def test_the_kl_penalty_has_trls_value_and_not_its_gradient() -> None:
    """TRL descends k3 as it stands: that is the gradient of KL(π_ref ‖ π). Ours is that of KL(π ‖ π_ref): see test_kl.py."""
    logprobs_B_T = logprobs()
    theirs = grpo_of_trl(logprobs_B_T, "dapo", beta=1.0) - grpo_of_trl(logprobs_B_T, "dapo")
    ours = kl.kl_penalty(logprobs_B_T, REF_B_T, MASK_B_T).total / MASK_B_T.sum()
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    plain = kl.k3(logprobs_B_T, REF_B_T).where(MASK_B_T, 0.0).sum() / MASK_B_T.sum()
    torch.testing.assert_close(gradient(plain, logprobs_B_T), gradient(theirs, logprobs_B_T), rtol=1e-9, atol=1e-12)
    assert float((gradient(ours, logprobs_B_T) - gradient(theirs, logprobs_B_T)).abs().max()) > 1e-2


# --- answers ---

ANSWERS = MASK_B_T[:, 1:]
REF_CHOSEN, REF_REJECTED = doubles(P, seed=6, scale=3) - 5, doubles(P, seed=7, scale=3) - 5


def outputs(logprobs_B_T: Tensor) -> SimpleNamespace:
    """What TRL's fused head gives: zero where nothing is supervised."""
    zeros = torch.zeros_like(logprobs_B_T)
    return SimpleNamespace(log_probs=logprobs_B_T, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool(), log_sum_sq_probs=zeros)


def answers(seed: int) -> tuple[Tensor, Tensor]:
    """Log-probs of P answers, zero beyond each one's end; and the mask as TRL has it, one position longer."""
    values = (-doubles(P, STEPS - 1, seed=seed).abs()).where(ANSWERS | (torch.arange(STEPS - 1) == 0), 0.0).requires_grad_()
    mask = torch.cat([torch.zeros(P, 1, dtype=torch.bool), ANSWERS | (torch.arange(STEPS - 1) == 0)], 1)
    return values, mask


def dpo_of_trl(loss_type: str, beta: float, chosen: tuple[Tensor, Tensor], rejected: tuple[Tensor, Tensor]) -> Tensor:
    from trl.trainer.dpo_trainer import DPOTrainer

    trainer = peer(ld_alpha=None, precompute_ref_logps=True, f_divergence_type="reverse_kl", loss_types=[loss_type], loss_weights=[1.0], beta=beta,
                   label_smoothing=0.0, use_weighting=False)  # fmt: skip
    mask = torch.cat([chosen[1], rejected[1]]).long()
    inputs = {"input_ids": torch.ones_like(mask), "attention_mask": torch.ones_like(mask), "completion_mask": mask,
              "ref_chosen_logps": REF_CHOSEN, "ref_rejected_logps": REF_REJECTED}  # fmt: skip
    return DPOTrainer._compute_loss(trainer, lambda **keys: outputs(torch.cat([chosen[0], rejected[0]])), inputs, False)


@pytest.mark.parametrize(("loss_type", "name", "mean"), [("sigmoid", "dpo", False), ("sigmoid_norm", "dpo", True), ("ipo", "ipo", True)])
def test_dpo_and_ipo(loss_type, name, mean) -> None:
    """TRL's IPO takes means over the answer, as the config's `length_normalised` does; the paper's formula takes sums."""
    chosen, rejected = answers(8), answers(9)
    lengths = [mask.sum(-1) if mean else torch.ones(P) for _, mask in (chosen, rejected)]
    used = [values.sum(-1) / length for values, length in zip((chosen[0], rejected[0], REF_CHOSEN[:, None], REF_REJECTED[:, None]), lengths * 2, strict=True)]
    ours = getattr(losses, name)(*used, beta=0.3)
    same(ours.total / P, dpo_of_trl(loss_type, 0.3, chosen, rejected), chosen[0], rejected[0])


@pytest.mark.parametrize("shift", [4.0, -40.0])
def test_kto(shift) -> None:
    """A reference point above zero, and one that is cut at zero."""
    from trl.trainer.kto_trainer import KTOTrainer

    values, mask = answers(10)
    good_B, foils = tensor([True, False, True, False]), doubles(P, seed=11)
    trainer = peer(_compute_kl_logps=lambda model, batch: foils + shift, precompute_ref_logps=True, calculate_KL=True, loss_type="kto", beta=0.2,
                   desirable_weight=1.0, undesirable_weight=1.4)  # fmt: skip
    batch = {"input_ids": torch.ones_like(mask).long(), "attention_mask": torch.ones_like(mask).long(), "completion_mask": mask.long(), "label": good_B,
             "ref_logps": REF_CHOSEN, "ref_KL_logps": foils}  # fmt: skip
    theirs = KTOTrainer._compute_loss(trainer, lambda **keys: outputs(values), batch, False)
    ours = losses.kto(values.sum(-1) - REF_CHOSEN, good_B, tensor(shift, dtype=torch.float64), beta=0.2, weight_bad=1.4)
    same(ours.total / P, theirs, values)


def test_orpo() -> None:
    """TRL computes it in float32."""
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer

    chosen_P, rejected_P = (-doubles(P, seed=seed).abs() - 0.05 for seed in (12, 13))
    log_sigmoid, *_, log_odds = ORPOTrainer.odds_ratio_loss(peer(beta=0.4), chosen_P, rejected_P)
    ours = losses.orpo(chosen_P, rejected_P, beta=0.4)
    torch.testing.assert_close(ours.total, (-chosen_P - log_sigmoid).sum(), rtol=1e-6, atol=1e-6)
    assert float(ours.sums["log_odds"] / P) == pytest.approx(float(log_odds), rel=1e-5)


def test_simpo() -> None:
    """TRL's `simpo_gamma` is the margin itself, as in `losses.simpo`; the config's gamma is in units of beta, as in the paper's table."""
    from trl.experimental.cpo.cpo_trainer import CPOTrainer

    chosen_P, rejected_P = (doubles(P, seed=seed).requires_grad_() for seed in (14, 15))
    found, *_ = CPOTrainer.cpo_loss(peer(alpha=0.0, beta=2.0, loss_type="simpo", simpo_gamma=0.7, label_smoothing=0.0), chosen_P, rejected_P)
    same(losses.simpo(chosen_P, rejected_P, beta=2.0, gamma=0.7).total, found.sum(), chosen_P, rejected_P)


def test_bradley_terry_with_margins_and_centring() -> None:
    from trl.trainer.reward_trainer import RewardTrainer

    rewards, margins = doubles(2 * P, 1, seed=16).requires_grad_(), doubles(P, seed=17).abs()
    inputs = {"input_ids": torch.ones(2 * P, 3), "attention_mask": torch.ones(2 * P, 3), "margin": margins}
    trainer = peer(args=SimpleNamespace(center_rewards_coefficient=0.05))
    theirs = RewardTrainer.compute_loss(trainer, lambda **keys: SimpleNamespace(logits=rewards), inputs)
    ours = losses.bradley_terry(rewards[:P, 0], rewards[P:, 0], margin_P=margins, centre=0.05)
    same(ours.total / P, theirs, rewards)


# --- distributions ---


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_generalised_jsd(beta, temperature) -> None:
    """Both ends are the plain divergences, in TRL as here."""
    from trl.experimental.gkd.gkd_trainer import GKDTrainer

    student, teacher = doubles(1, 5, 11, seed=18, scale=2).requires_grad_(), doubles(1, 5, 11, seed=19, scale=2)
    theirs = GKDTrainer.generalized_jsd_loss(student, teacher, beta=beta, temperature=temperature, reduction="sum")
    ours = losses.jsd((student[0] / temperature).log_softmax(-1), (teacher[0] / temperature).log_softmax(-1), beta=beta)
    same(ours.sum(), theirs, student)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_distillation_through_the_head(beta) -> None:
    """The whole path from hidden states, at a temperature, against the peer's tiled one."""
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    student, teacher, batch = tiny_policy(seed=1), tiny_policy(seed=2), make_batch([9, 5], seed=3)
    at_N, hidden_N_D, _ = student.supervised(batch)
    with torch.no_grad():
        _, taught_N_D, _ = teacher.supervised(batch)
    everything = torch.ones(1, len(at_N))
    theirs, _, _ = _chunked_divergence_loss(hidden_N_D[None], taught_N_D[None], student.head.weight_V_D, teacher.head.weight_V_D, everything, beta, 1, temperature=1.7)
    ours = student.divergence(batch, teacher, lambda s, t: losses.jsd(s, t, beta=beta), temperature=1.7).total
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_log_probs_and_entropy_at_a_temperature() -> None:
    from trl.trainer.utils import entropy_from_logits, selective_log_softmax

    hidden_N_D, weight_V_D, targets_N = doubles(7, 16, seed=20), doubles(40, 16, seed=21), torch.arange(7)
    found = token_values(hidden_N_D, Head(weight_V_D), targets_N, temperature=0.6, entropy=True)
    logits_N_V = hidden_N_D @ weight_V_D.T / 0.6
    torch.testing.assert_close(found.logprobs_N, selective_log_softmax(logits_N_V, targets_N), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.entropy_N, entropy_from_logits(logits_N_V), rtol=1e-9, atol=1e-9)
