"""DPO as one loop over the rooms, with a twist: pairs whose margin is already wide are left out of the step.

    python recipes/dpo.py --base runs/demo/sft/model --data runs/demo/data/preference --out runs/my-dpo

Copy it and change the loss. `--data` is a manifest folder of records with a `preference`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from temper.core.progress import track
from temper.core.storage import whole_folder
from temper.data.batch import Batch, collate
from temper.data.sequence import load_manifest, preference_sequences
from temper.policy.losses import LossOut, dpo, sum_logprobs
from temper.policy.model import Policy
from temper.train.learner import Learner, OptimConfig
from temper.train.stage import say_cut

BETA, PAIRS_PER_STEP, MAX_TOKENS, WIDE = 0.1, 16, 768, 5.0


def main(base: str, data: str, out: str, epochs: int = 1, lr: float = 5e-5) -> dict[str, float]:
    """Train `base` on the pairs in `data`, against itself as it starts; return the last metrics."""
    policy = Policy.load(base)
    policy.template.require()
    reference = policy.clone_reference()
    _, records = load_manifest(Path(data))
    pairs = [preference_sequences(record, policy.template, MAX_TOKENS) for record in records]
    say_cut([row for pair in pairs for row in pair], MAX_TOKENS)
    steps = epochs * -(-len(pairs) // PAIRS_PER_STEP)
    learner = Learner(policy, OptimConfig(lr=lr, weight_decay=0.0), steps)
    order = learner.stream("pairs")

    def answers(scorer: Policy, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """log π of each chosen and each rejected answer; rows alternate."""
        sums_B = sum_logprobs(scorer.token_logprobs(batch).logprobs_B_T, batch.mask_B_T)
        return sums_B[0::2], sums_B[1::2]

    def loss(batch: Batch) -> LossOut:
        """DPO of the pairs whose margin is not wide yet; those that are count in the denominator and pull no more."""
        with torch.no_grad():
            ref_chosen_P, ref_rejected_P = answers(reference, batch)
        chosen_P, rejected_P = answers(policy, batch)
        narrow_P = (chosen_P - ref_chosen_P - rejected_P + ref_rejected_P).detach() < WIDE / BETA
        out = dpo(chosen_P[narrow_P], rejected_P[narrow_P], ref_chosen_P[narrow_P], ref_rejected_P[narrow_P], beta=BETA)
        return LossOut(out.total, torch.tensor(len(chosen_P)), out.sums | {"narrow": narrow_P.sum()})

    metrics: dict[str, float] = {}
    for step in track(range(steps), "dpo"):
        if step * PAIRS_PER_STEP % len(pairs) < PAIRS_PER_STEP:
            order.shuffle(pairs)
        first = step * PAIRS_PER_STEP % len(pairs)
        rows = [row for pair in pairs[first : first + PAIRS_PER_STEP] for row in pair]
        batches = [collate(rows[at : at + 8], policy.template.pad_id, policy.kind()) for at in range(0, len(rows), 8)]
        metrics = learner.forward_backward(batches, loss, lambda batch: batch.tokens_B_T.shape[0] / 2) | learner.optim_step()
        print(f"step {learner.step}/{steps}  loss {metrics['loss']:.3f}  margin {metrics['margin']:.3f}  narrow {metrics['narrow']:.2f}")
    with whole_folder(Path(out) / "model") as folder:
        policy.save(folder)
    return metrics


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("base", "data", "out"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--lr", type=float, default=5e-5)
    print(main(**vars(parser.parse_args())))
