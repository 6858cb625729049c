"""Does the learner's cost grow linearly with real tokens? From 1e4 to 1e6, on a tiny model.

    python benchmarks/training/linear.py MODELS THREADS DEVICE

Rows of 32 to 512 tokens; planning, collating, every forward, backward and optimizer step count.
"""

from __future__ import annotations

import json
import math
import random
import statistics
import sys
import time
from pathlib import Path

import torch
from workloads import FIRST_TOKEN, MODELS, PAD

from temper.data.batch import collate, plan_units
from temper.data.sequence import Sequence
from temper.policy.model import Policy
from temper.train.cost import synchronise
from temper.train.learner import Learner, OptimConfig

COUNTS = (10_000, 30_000, 100_000, 300_000, 1_000_000)
TOKENS_PER_STEP, TOKENS_PER_BATCH = 8192, 4096


def main() -> None:
    """Print points, slope and fit as JSON."""
    models, threads, device = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(threads)
    policy = Policy.load(models / "tiny", precision="float32" if device == "cpu" else "bfloat16", device=device)
    learner = Learner(policy, OptimConfig(schedule="constant"), 1 << 20)
    train(policy, learner, rows(COUNTS[0] - 1))  # warm, on other rows: the first point too meets shapes that are new to the libraries
    points = []
    for count in COUNTS:
        made = rows(count)
        points.append((sum(len(row.tokens) for row in made), train(policy, learner, made)))
    print(json.dumps(fit(points)))


def rows(tokens: int) -> list[Sequence]:
    """Random rows of about so many tokens together, 40% of each trained."""
    rng, made, total = random.Random(tokens), [], 0
    while total < tokens:
        length = min(rng.randint(32, 512), max(2, tokens - total))
        ids = [rng.randrange(FIRST_TOKEN, MODELS["tiny"].vocab) for _ in range(length)]
        made.append(Sequence(tokens=ids, weights=[0.0] * round(0.6 * length) + [1.0] * (length - round(0.6 * length))))
        total += length
    return made


def train(policy: Policy, learner: Learner, made: list[Sequence]) -> float:
    """Seconds of one pass over these rows."""
    started, step, held = time.perf_counter(), [], 0
    for number, row in enumerate(made):
        step.append(row)
        held += len(row.tokens)
        if held >= TOKENS_PER_STEP or number == len(made) - 1:
            planned = plan_units([[one] for one in step], policy.kind(), TOKENS_PER_BATCH)
            learner.forward_backward([collate([step[at] for at in part], PAD, policy.kind()) for part in planned], policy.cross_entropy)
            learner.optim_step()
            step, held = [], 0
    synchronise(str(policy.device))
    return time.perf_counter() - started


def fit(points: list[tuple[int, float]]) -> dict[str, object]:
    """The power of growth (slope of logarithms), and the straight line through the points with its R²."""
    tokens, seconds = [point[0] for point in points], [point[1] for point in points]
    power, _ = statistics.linear_regression([math.log(value) for value in tokens], [math.log(value) for value in seconds])
    slope, base = statistics.linear_regression(tokens, seconds)
    left = sum((second - base - slope * token) ** 2 for token, second in points)
    spread = sum((second - statistics.mean(seconds)) ** 2 for second in seconds)
    return {"points": points, "power": power, "microseconds_per_token": slope * 1e6, "r2": 1 - left / spread}


if __name__ == "__main__":
    main()
