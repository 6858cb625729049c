"""Divergences of a student's from a teacher's log-probabilities, rows [N, V] in, one value a row out [N]."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from temper.core.errors import ConfigError
from temper.policy.losses.out import same_shape
from temper.policy.losses.pairs import log_one_minus_exp


def forward_kl(student_N_V: Tensor, teacher_N_V: Tensor) -> Tensor:
    """KL(teacher ‖ student) = Σ p_T (log p_T - log p_S): the student must cover all that the teacher does.

    Its gradient is that of cross-entropy against soft targets (Hinton et al. 2015).

    >>> student, teacher = tensor([[0.5, 0.5]]).log(), tensor([[1.0, 0.0]]).log()
    >>> number(forward_kl(student, teacher))  # 1·ln(1/½)
    0.6931
    """
    same_shape(student_N_V=student_N_V, teacher_N_V=teacher_N_V)
    return kl_rows(teacher_N_V, student_N_V)


def reverse_kl(student_N_V: Tensor, teacher_N_V: Tensor) -> Tensor:
    """KL(student ‖ teacher): the student drops what it cannot cover (MiniLLM, Gu et al. 2023, eq. 1).

    >>> student, teacher = tensor([[1.0, 0.0]]).log(), tensor([[0.25, 0.75]]).log()
    >>> number(reverse_kl(student, teacher))  # 1·ln(1/¼)
    1.3863
    """
    same_shape(student_N_V=student_N_V, teacher_N_V=teacher_N_V)
    return kl_rows(student_N_V, teacher_N_V)


def jsd(student_N_V: Tensor, teacher_N_V: Tensor, *, beta: float) -> Tensor:
    """Generalised JSD of GKD (Agarwal et al. 2024, eq. 1), β weighting the teacher in mixture and sum:

        β·KL(teacher ‖ M) + (1-β)·KL(student ‖ M),   M = β·teacher + (1-β)·student

    The formula is zero at β = 0 and at β = 1, whatever the student does. Divided by β(1-β) it tends to
    KL(teacher ‖ student) for β → 0 and to KL(student ‖ teacher) for β → 1; these are what the ends return here.

    >>> student, teacher = tensor([[0.5, 0.5]]).log(), tensor([[1.0, 0.0]]).log()
    >>> number(jsd(student, teacher, beta=0.25))  # M = (5/8, 3/8): ¼·ln(8/5) + ¾·(½·ln(4/5) + ½·ln(4/3))
    0.1417
    """
    if not 0 <= beta <= 1:
        raise ConfigError(
            f"beta is {beta}", why="it is the teacher's share of a mixture", do="choose it between 0 (forward KL) and 1 (reverse KL)"
        )
    if beta in (0, 1):
        return reverse_kl(student_N_V, teacher_N_V) if beta else forward_kl(student_N_V, teacher_N_V)
    same_shape(student_N_V=student_N_V, teacher_N_V=teacher_N_V)
    mixture_N_V = torch.logaddexp(teacher_N_V + math.log(beta), student_N_V + math.log1p(-beta))
    return beta * kl_rows(teacher_N_V, mixture_N_V) + (1 - beta) * kl_rows(student_N_V, mixture_N_V)


def top_k(student_N_V: Tensor, teacher_N_V: Tensor, *, k: int, measure: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """`measure` over the teacher's K likeliest tokens and 'any other': what a teacher served as top-K log-probs can teach.

    It never exceeds the measure of the whole rows (data processing inequality). Without the tail the student could
    put its mass on what the list leaves out, and the divergence could fall below zero.

    >>> student, teacher = tensor([[0.25, 0.25, 0.5]]).log(), tensor([[0.5, 0.25, 0.25]]).log()
    >>> number(top_k(student, teacher, k=1, measure=forward_kl))  # (½, ½) from (¼, ¾): ½·ln 2 + ½·ln(2/3)
    0.1438
    """
    ids_N_K = teacher_N_V.topk(min(k, teacher_N_V.shape[-1] - 1)).indices
    return measure(with_tail(student_N_V, ids_N_K), with_tail(teacher_N_V, ids_N_K))


def kl_rows(p_N_V: Tensor, q_N_V: Tensor) -> Tensor:
    """Σ p (log p - log q) of each row of log-probabilities; what p excludes (-inf) adds nothing."""
    possible_N_V = p_N_V > -math.inf
    p_N_V, q_N_V = p_N_V.where(possible_N_V, 0.0), q_N_V.where(possible_N_V, 0.0)
    return (p_N_V.exp() * (p_N_V - q_N_V)).where(possible_N_V, 0.0).sum(-1)


def with_tail(logprobs_N_V: Tensor, ids_N_K: Tensor) -> Tensor:
    """Log-probabilities of K tokens and of 'any other', [N, K+1]."""
    return add_tail(logprobs_N_V.gather(-1, ids_N_K))


def add_tail(logprobs_N_K: Tensor) -> Tensor:
    """`logprobs_N_K` of the whole vocabulary's distribution, and the log of what they leave over."""
    taken_N_1 = logprobs_N_K.logsumexp(-1, keepdim=True)
    return torch.cat([logprobs_N_K, log_one_minus_exp(taken_N_1)], -1)
