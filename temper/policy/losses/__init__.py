"""Every objective as a pure function: tensors in, sums and counts out. The step divides.

    tokens           cross-entropy with z-loss                                                   [rows, positions]
    policy_gradient  PPO's clip, GSPO, CISPO, LUFFY; truncated importance sampling               [rows, positions]
    pairs            DPO, IPO, SimPO, ORPO; KTO on single answers                                [pairs] or [rows]
    rewards          Bradley-Terry, step-level process reward, clipped value                     [pairs], [rows, positions]
    distillation     forward and reverse KL, generalised JSD, a teacher's top K and its tail     [rows, vocabulary]

`total` is a sum over tokens (`_B_T`), pairs (`_P`) or rows (`_B`, `_N`), `count` how many there were. Masks are
bool and applied with `where` to what comes in, so that NaN in a masked place reaches neither value nor gradient.
Each docstring gives the formula, its paper, and numbers worked by hand; the tests run those examples.
"""

from temper.policy.losses.distillation import add_tail, forward_kl, jsd, kl_rows, reverse_kl, top_k, with_tail
from temper.policy.losses.out import LARGEST_LOGRATIO, LossOut, same_shape
from temper.policy.losses.pairs import dpo, ipo, kto, log_one_minus_exp, mean_logprobs, orpo, pair_metrics, simpo, sum_logprobs
from temper.policy.losses.policy_gradient import cispo, clipped_pg, gspo, luffy, truncated_importance
from temper.policy.losses.rewards import bradley_terry, clipped_value, process_reward
from temper.policy.losses.tokens import sft_cross_entropy

__all__ = [
    "LARGEST_LOGRATIO", "LossOut", "add_tail", "bradley_terry", "cispo", "clipped_pg", "clipped_value", "dpo", "forward_kl", "gspo", "ipo", "jsd",
    "kl_rows", "kto", "log_one_minus_exp", "luffy", "mean_logprobs", "orpo", "pair_metrics", "process_reward", "reverse_kl", "same_shape",
    "sft_cross_entropy", "simpo", "sum_logprobs", "top_k", "truncated_importance", "with_tail",
]  # fmt: skip
