"""Supervised fine-tuning as one loop over the rooms, with a twist: short rows first, long ones later.

    python recipes/sft.py --base temper/environments/finops/base --data runs/demo/data/sft --out runs/my-sft

Copy it and change the loop. `--data` is a manifest folder (`temper data admit` writes one). A run that was killed
goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from temper.core.progress import track
from temper.core.run import RunDirectory
from temper.data.batch import collate, plan_units
from temper.data.sequence import load_manifest, to_sequence
from temper.policy.model import Policy
from temper.train.learner import Learner, OptimConfig
from temper.train.stage import checkpoint_hash, resume

MAX_TOKENS, TOKENS_PER_BATCH, ROWS_PER_STEP, CHECKPOINT_EVERY = 768, 8192, 32, 50


def main(base: str, data: str, out: str, steps: int = 200, lr: float = 1e-3) -> dict[str, object]:
    """Train all weights of `base` on the manifest `data` for `steps`; return the path written and the last loss."""
    started = time.monotonic()
    manifest, records = load_manifest(Path(data))
    inputs = {"data": manifest.hash, "base": checkpoint_hash(base)}
    run = RunDirectory.create(Path(out), stage="recipes/sft.py", config={"steps": steps, "lr": lr}, inputs=inputs)
    if run.done:
        return run.result()
    policy = Policy.load(base)
    policy.template.require()
    policy.model.train()
    rows = sorted((to_sequence(record, policy.template, MAX_TOKENS) for record in records), key=lambda row: len(row.tokens))
    learner = Learner(policy, OptimConfig(lr=lr), steps)
    order = learner.stream("rows")  # its state is in every checkpoint, so a resumed run draws the same rows
    metrics: dict[str, float] = {}
    for step in track(range(resume(run, learner), steps), "sft"):
        known = max(ROWS_PER_STEP, round(len(rows) * min(1.0, 0.2 + step / steps)))  # the twist: the pool of rows grows with the steps
        chosen = order.sample(rows[:known], min(ROWS_PER_STEP, len(rows)))
        planned = plan_units([[row] for row in chosen], policy.kind(), TOKENS_PER_BATCH)
        batches = [collate([chosen[row] for row in batch], policy.template.pad_id, policy.kind()) for batch in planned]
        metrics = learner.forward_backward(batches, policy.cross_entropy) | learner.optim_step()
        run.log(learner.step, dict(metrics))
        if learner.step % CHECKPOINT_EVERY == 0:
            run.checkpoint(learner.step, learner.save)
    with run.folder("model") as folder:
        policy.save(folder)
    return run.finish({"model": str(run.path / "model"), "loss": metrics["loss"]}, started)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("base", "data", "out"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--lr", type=float, default=1e-3)
    print(main(**vars(parser.parse_args())))
