"""From logits to tokens for many rows at once; what a row draws depends on its own seed alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

NEVER = float("-inf")


def uniforms(seeds: NDArray[np.uint64], steps: NDArray[np.uint64]) -> NDArray[np.float64]:
    """One uniform in [0, 1) for each (seed, step): two rounds of SplitMix64 (Steele, Lea & Flood 2014), 53 bits kept.

    A counter takes the place of a generator's state, so neighbours and order cannot matter.
    """
    with np.errstate(over="ignore"):
        mixed = _splitmix(_splitmix(seeds) + steps * np.uint64(0x9E3779B97F4A7C15))
    return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _splitmix(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = state + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@dataclass(frozen=True)
class Settings:
    """How each row of a batch is sampled. Temperature 0 is greedy."""

    temperature_R: Tensor
    top_k_R: Tensor
    top_p_R: Tensor
    seeds_R: NDArray[np.uint64]
    greedy_R: Tensor
    any_sampled: bool
    any_truncated: bool

    @classmethod
    def of(cls, rows: list[tuple[float, int, float, int]], device: torch.device) -> Settings:
        """From (temperature, top-k, top-p, seed) a row."""
        temperature_R, top_k_R, top_p_R = (torch.tensor([row[i] for row in rows], dtype=torch.float32, device=device) for i in range(3))
        seeds_R = np.array([row[3] & (2**64 - 1) for row in rows], dtype=np.uint64)
        greedy_R = temperature_R == 0
        truncated = ~greedy_R & ((top_k_R > 0) | (top_p_R < 1))
        sampled = bool((~greedy_R).any())
        return cls(temperature_R.where(~greedy_R, 1.0), top_k_R, top_p_R, seeds_R, greedy_R, sampled, bool(truncated.any()))


@dataclass(frozen=True)
class Chosen:
    """A token a row, its log-prob in the distribution really sampled, and the logits of that distribution."""

    tokens_R: Tensor
    logprobs_R: Tensor
    logits_R_V: Tensor


def choose(logits_R_V: Tensor, settings: Settings, steps_R: NDArray[np.uint64], allowed_R_V: Tensor | None = None) -> Chosen:
    """Sample one token a row from softmax(logits / temperature) over what grammar, top-k and top-p allow.

    A greedy row takes the largest allowed logit; its log-prob is the one at temperature 1.
    """
    logits_R_V = logits_R_V.float()
    if allowed_R_V is not None:
        logits_R_V = logits_R_V.where(allowed_R_V, NEVER)
    if settings.any_sampled:
        logits_R_V = logits_R_V / settings.temperature_R[:, None]
    if settings.any_truncated:
        logits_R_V = truncate(logits_R_V, settings)
    tokens_R = logits_R_V.argmax(-1)
    logprobs_R_V = torch.log_softmax(logits_R_V, -1)
    if settings.any_sampled:
        drawn_R = draw(logprobs_R_V, uniforms(settings.seeds_R, steps_R))
        tokens_R = torch.where(settings.greedy_R, tokens_R, drawn_R)
    return Chosen(tokens_R, logprobs_R_V.gather(1, tokens_R[:, None])[:, 0], logits_R_V)


def draw(logprobs_R_V: Tensor, uniforms_R: NDArray[np.float64]) -> Tensor:
    """The inverse of each row's cumulative distribution at its uniform; a token of probability 0 is never drawn."""
    cumulative_R_V = logprobs_R_V.exp().double().cumsum(-1)
    point_R_1 = torch.from_numpy(uniforms_R).to(cumulative_R_V.device)[:, None] * cumulative_R_V[:, -1:]
    return torch.searchsorted(cumulative_R_V, point_R_1, right=True)[:, 0].clamp(max=logprobs_R_V.shape[1] - 1)


def truncate(logits_R_V: Tensor, settings: Settings) -> Tensor:
    """Keep the top-k logits, then the fewest tokens whose probability reaches top-p (Holtzman et al. 2020); ties are kept."""
    sorted_R_V, _ = logits_R_V.sort(-1, descending=True)
    vocabulary = logits_R_V.shape[1]
    ranks_V = torch.arange(vocabulary, device=logits_R_V.device)
    limit_R = settings.top_k_R.where((settings.top_k_R > 0) & ~settings.greedy_R, float(vocabulary))
    sorted_R_V = sorted_R_V.where(ranks_V < limit_R[:, None], NEVER)
    before_R_V = sorted_R_V.softmax(-1).cumsum(-1).roll(1, -1)
    before_R_V[:, 0] = 0.0
    kept_R_V = (before_R_V < settings.top_p_R[:, None]) | (settings.top_p_R >= 1)[:, None] | settings.greedy_R[:, None]
    kept_R_V[:, 0] = True
    lowest_R = sorted_R_V.where(kept_R_V & (sorted_R_V > NEVER), float("inf")).amin(-1)
    return logits_R_V.where(logits_R_V >= lowest_R[:, None], NEVER)
