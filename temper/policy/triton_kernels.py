"""Triton kernels for what PyTorch does on a GPU in many passes over memory: softmax of the head, norms, rotations, gates.

Each reads its input once or twice and writes its output once, in float32 whatever the dtypes. Imported only where a
tensor lies on CUDA, because it needs `triton`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096  # logits read at once by a program, 16 a thread: a common size, not a measured one
WARPS = 8
FLAT_BLOCK = 2048  # numbers of a gate that one program takes
WIDEST = 16384  # a norm keeps its whole row in registers
NORM_PROGRAMS = 512  # that share the rows of a norm's backward: each sums its part of the weight's gradient
LOWEST = tl.constexpr(-1e38)  # below every logit and finite: -inf - -inf would be NaN in a block that allows nothing


def trial(device: torch.device) -> None:
    """Run every kernel once; what is raised says why Triton cannot be used here."""
    softmax_rows_(torch.zeros(1, 16, device=device))
    for dtype, width in ((torch.float32, 16), (torch.bfloat16, 4096)):
        row_1_D = torch.zeros(1, width, device=device, dtype=dtype)
        _, r_1 = norm_rows(row_1_D, row_1_D[0], 1e-6, 0.0, dtype)
        norm_rows_backward(row_1_D, row_1_D, row_1_D[0], r_1, 0.0, need_weight=True)
        gate_backward(row_1_D, row_1_D, gate(row_1_D, row_1_D))
        rotate(row_1_D[:, :16].view(1, 1, 1, 16), row_1_D[:, :16][None], row_1_D[:, :16][None])


# --- the head ---


@triton.jit
def softmax_kernel(logits_R_V, logz_R, entropy_R, vocab, BLOCK: tl.constexpr):
    """One row: a running maximum, Σ exp and Σ exp·(s - max) while it is read, then its probabilities where it stood.

    The sums of what was read before a new maximum are moved to it (Milakov & Gimelshein 2018, algorithm 3):
    Σ e becomes k Σ e, and Σ e·(s - max) becomes k (Σ e·(s - max) + (max - max') Σ e), with k = exp(max - max').
    H = log Σ e - Σ e·(s - max) / Σ e, which is log Z - Σ p·s without the difference of two large numbers.
    """
    row = tl.program_id(0).to(tl.int64)  # rows · vocabulary may exceed 2^31
    logits_V = logits_R_V + row * vocab
    column_B = tl.arange(0, BLOCK)
    largest = tl.full((), LOWEST, tl.float32)
    sum_B = tl.zeros((BLOCK,), tl.float32)  # added up over the block at the end: sums of few terms, and one reduction
    weighted_B = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocab, BLOCK):
        s_B = tl.load(logits_V + start + column_B, mask=start + column_B < vocab, other=-float("inf"))
        before = largest
        largest = tl.maximum(before, tl.max(s_B, axis=0))
        keep = tl.exp(before - largest)
        e_B = tl.exp(s_B - largest)
        if entropy_R is not None:
            # p = 0 counts 0, also where s is -inf
            own_B = tl.where(e_B > 0, e_B * (s_B - largest), 0.0)
            weighted_B = keep * (weighted_B + (before - largest) * sum_B) + own_B
        sum_B = keep * sum_B + e_B
    total = tl.sum(sum_B, axis=0)
    tl.store(logz_R + row, largest + tl.log(total))
    if entropy_R is not None:
        tl.store(entropy_R + row, tl.log(total) - tl.sum(weighted_B, axis=0) / total)
    for start in range(0, vocab, BLOCK):
        inside_B = start + column_B < vocab
        s_B = tl.load(logits_V + start + column_B, mask=inside_B)
        tl.store(logits_V + start + column_B, tl.exp(s_B - largest) / total, mask=inside_B)


def softmax_rows_(logits_R_V: Tensor, *, entropy: bool = False) -> tuple[Tensor, Tensor | None]:
    """Float32 logits in contiguous rows become probabilities in place; log Z [R], and the entropy [R] where asked."""
    rows, vocab = logits_R_V.shape
    logz_R = logits_R_V.new_empty(rows)
    entropy_R = torch.empty_like(logz_R) if entropy else None
    with torch.cuda.device_of(logits_R_V):  # Triton launches on the current device, which need not be the tensor's
        softmax_kernel[(rows,)](logits_R_V, logz_R, entropy_R, vocab, BLOCK=BLOCK, num_warps=WARPS)
    return logz_R, entropy_R


# --- norms: y = x·r·(w + offset), r = 1/√(mean x² + ε) ---


@triton.jit
def norm_kernel(x_N_D, weight_D, y_N_D, r_N, width, eps, offset, BLOCK: tl.constexpr):
    """One row."""
    row, column_B = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside_B = column_B < width
    x_B = tl.load(x_N_D + row * width + column_B, mask=inside_B, other=0.0).to(tl.float32)
    weight_B = tl.load(weight_D + column_B, mask=inside_B, other=0.0).to(tl.float32) + offset
    r = 1.0 / tl.sqrt(tl.sum(x_B * x_B, axis=0) / width + eps)
    tl.store(r_N + row, r)
    tl.store(y_N_D + row * width + column_B, x_B * r * weight_B, mask=inside_B)


@triton.jit
def norm_backward_kernel(
    grad_N_D, x_N_D, weight_D, r_N, dx_N_D, dweight_P_D, rows, width, offset, BLOCK: tl.constexpr, NEED_WEIGHT: tl.constexpr
):
    """Every P-th row: dx = r·(g·w - x̂·mean(g·w·x̂)), and the program's own Σ g·x̂."""
    program, programs, column_B = tl.program_id(0), tl.num_programs(0), tl.arange(0, BLOCK)
    inside_B = column_B < width
    weight_B = tl.load(weight_D + column_B, mask=inside_B, other=0.0).to(tl.float32) + offset
    dweight_B = tl.zeros((BLOCK,), tl.float32)
    for turn in range(tl.cdiv(rows, programs)):
        row = turn * programs + program
        at_B = row.to(tl.int64) * width + column_B
        here_B = inside_B & (row < rows)
        r = tl.load(r_N + row, mask=row < rows, other=0.0)
        grad_B = tl.load(grad_N_D + at_B, mask=here_B, other=0.0).to(tl.float32)
        normed_B = tl.load(x_N_D + at_B, mask=here_B, other=0.0).to(tl.float32) * r
        weighted_B = grad_B * weight_B
        mean = tl.sum(weighted_B * normed_B, axis=0) / width
        tl.store(dx_N_D + at_B, r * (weighted_B - normed_B * mean), mask=here_B)
        if NEED_WEIGHT:
            dweight_B += grad_B * normed_B
    if NEED_WEIGHT:
        tl.store(dweight_P_D + program * width + column_B, dweight_B, mask=inside_B)


def norm_rows(x: Tensor, weight_D: Tensor, eps: float, offset: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(y of x's shape in `dtype`, r [N] in float32) for contiguous rows of at most WIDEST numbers."""
    width = x.shape[-1]
    y, r_N = torch.empty_like(x, dtype=dtype), torch.empty(x.numel() // width, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(width)
    with torch.cuda.device_of(x):
        norm_kernel[(len(r_N),)](x, weight_D, y, r_N, width, eps, offset, BLOCK=block, num_warps=warps(block))
    return y, r_N


def norm_rows_backward(
    grad: Tensor, x: Tensor, weight_D: Tensor, r_N: Tensor, offset: float, *, need_weight: bool
) -> tuple[Tensor, Tensor | None]:
    """(dx in x's dtype, dw [D] in float32 where needed); `grad` and `x` contiguous. Sums in an order that never changes."""
    width, programs = x.shape[-1], min(NORM_PROGRAMS, len(r_N))
    dx = torch.empty_like(x)
    dweight_P_D = torch.empty(programs, width, dtype=torch.float32, device=x.device) if need_weight else None
    block = triton.next_power_of_2(width)
    with torch.cuda.device_of(x):
        norm_backward_kernel[(programs,)](grad, x, weight_D, r_N, dx, dweight_P_D, len(r_N), width, offset,
                                          BLOCK=block, NEED_WEIGHT=need_weight, num_warps=warps(block))  # fmt: skip
    return dx, None if dweight_P_D is None else dweight_P_D.sum(0)


def warps(block: int) -> int:
    """Warps of a program that holds `block` numbers: 16 a thread, as far as there are warps."""
    return max(1, min(16, block // 512))


# --- gates: y = silu(g)·u ---


@triton.jit
def gate_kernel(gate_N, up_N, y_N, count, BLOCK: tl.constexpr):
    """BLOCK numbers."""
    at_B = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    gate_B = tl.load(gate_N + at_B, mask=at_B < count, other=0.0).to(tl.float32)
    up_B = tl.load(up_N + at_B, mask=at_B < count, other=0.0).to(tl.float32)
    tl.store(y_N + at_B, gate_B * tl.sigmoid(gate_B) * up_B, mask=at_B < count)


@triton.jit
def gate_backward_kernel(gate_N, up_N, grad_N, dgate_N, dup_N, count, BLOCK: tl.constexpr):
    """BLOCK numbers: dg = dy·u·σ(1 + g(1 - σ)), du = dy·g·σ."""
    at_B = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    gate_B = tl.load(gate_N + at_B, mask=at_B < count, other=0.0).to(tl.float32)
    up_B = tl.load(up_N + at_B, mask=at_B < count, other=0.0).to(tl.float32)
    grad_B = tl.load(grad_N + at_B, mask=at_B < count, other=0.0).to(tl.float32)
    s_B = tl.sigmoid(gate_B)
    tl.store(dgate_N + at_B, grad_B * up_B * s_B * (1.0 + gate_B * (1.0 - s_B)), mask=at_B < count)
    tl.store(dup_N + at_B, grad_B * gate_B * s_B, mask=at_B < count)


def gate(gate_N: Tensor, up_N: Tensor) -> Tensor:
    """silu(gate)·up, contiguous, of any shape and dtype."""
    y_N = torch.empty_like(gate_N)
    with torch.cuda.device_of(gate_N):
        gate_kernel[(triton.cdiv(y_N.numel(), FLAT_BLOCK),)](gate_N, up_N, y_N, y_N.numel(), BLOCK=FLAT_BLOCK)
    return y_N


def gate_backward(gate_N: Tensor, up_N: Tensor, grad_N: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of `gate` by both, in their dtypes."""
    dgate_N, dup_N = torch.empty_like(gate_N), torch.empty_like(up_N)
    with torch.cuda.device_of(gate_N):
        gate_backward_kernel[(triton.cdiv(gate_N.numel(), FLAT_BLOCK),)](gate_N, up_N, grad_N, dgate_N, dup_N, gate_N.numel(), BLOCK=FLAT_BLOCK)
    return dgate_N, dup_N


# --- rotary positions: halves (a, b) become (a·cos - b·sin, b·cos + a·sin) ---


@triton.jit
def rotate_kernel(
    x, cos, sin, y, heads, positions, angles, half, step_row, step_head, step_position,
    HEADS: tl.constexpr, HALF: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """All heads at one position of one row; `BACK` is the transposed rotation, which the gradient takes."""
    place = tl.program_id(0).to(tl.int64)  # row · positions + position
    head_H, column_C = tl.arange(0, HEADS)[:, None].to(tl.int64), tl.arange(0, HALF)[None]
    inside_C = column_C < half
    inside_H_C = (head_H < heads) & inside_C
    angle_C = (place % angles) * 2 * half + column_C
    cos1, cos2 = tl.load(cos + angle_C, mask=inside_C), tl.load(cos + angle_C + half, mask=inside_C)
    sin1, sin2 = tl.load(sin + angle_C, mask=inside_C), tl.load(sin + angle_C + half, mask=inside_C)
    at = x + place // positions * step_row + place % positions * step_position + head_H * step_head + column_C
    a, b = tl.load(at, mask=inside_H_C).to(tl.float32), tl.load(at + half, mask=inside_H_C).to(tl.float32)
    cos1, cos2, sin1, sin2 = cos1.to(tl.float32), cos2.to(tl.float32), sin1.to(tl.float32), sin2.to(tl.float32)
    to = y + (place * heads + head_H) * 2 * half + column_C
    if BACK:
        tl.store(to, a * cos1 + b * sin2, mask=inside_H_C)
        tl.store(to + half, b * cos2 - a * sin1, mask=inside_H_C)
    else:
        tl.store(to, a * cos1 - b * sin1, mask=inside_H_C)
        tl.store(to + half, b * cos2 + a * sin2, mask=inside_H_C)


def rotate(x_R_H_L_C: Tensor, cos_R_L_C: Tensor, sin_R_L_C: Tensor, *, back: bool = False) -> Tensor:
    """x turned by its positions' angles, in x's dtype; laid out as [R, L, H, C] and seen as [R, H, L, C].

    `cos` and `sin` are contiguous and may have one row for all; numbers of a head of `x` stand side by side.
    """
    rows, heads, positions, size = x_R_H_L_C.shape
    y_R_L_H_C = x_R_H_L_C.new_empty(rows, positions, heads, size)
    step_row, step_head, step_position, _ = x_R_H_L_C.stride()
    with torch.cuda.device_of(x_R_H_L_C):
        rotate_kernel[(rows * positions,)](
            x_R_H_L_C, cos_R_L_C, sin_R_L_C, y_R_L_H_C, heads, positions, cos_R_L_C.numel() // size, size // 2, step_row, step_head, step_position,
            HEADS=triton.next_power_of_2(heads), HALF=triton.next_power_of_2(size // 2), BACK=back,
        )  # fmt: skip
    return y_R_L_H_C.transpose(1, 2)
