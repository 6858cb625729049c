"""What the tests of several processes run: the same functions here, on one process, and under torchrun, on two."""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from torch import Tensor  # noqa: E402

from temper.train import load_stage, parallel, preference, sft, stage  # noqa: E402
from temper.train.learner import Count, Learner, Loss, loss_weight  # noqa: E402
from temper.train.preference import collate_pairs, count_pairs, pair_loss, pairs_of, with_reference  # noqa: E402

SMALL = {"precision": "float32", "device": "cpu", "tokens_per_batch": 128, "optim": {"lr": 1e-2}}
LORA = {"lora": {"rank": 4}}


class Stop(Exception):
    """Ends a run right after a checkpoint."""


def fine_tuning(keys: dict) -> tuple[Learner, list, Loss, Count]:
    """A learner of SFT, the batches of three steps, the loss and the count."""
    cfg = sft.Config(out="nowhere", tokens_per_step=160, steps=3, **SMALL, **keys)
    policy = stage.prepare(cfg)
    rows = sft.sequences(stage.load_records(cfg.data)[1], policy, cfg)
    plan = stage.plan_steps([len(row.tokens) for row in rows], cfg)
    steps = [[sft.collate([rows[row] for row in micro], policy.template.pad_id) for micro in step] for step in plan]
    learner = Learner(policy, cfg.optim, len(plan))
    if cfg.hold_unseen:
        stage.hold_unseen(learner, rows)
    return learner, steps, policy.cross_entropy, loss_weight


def measure(learner: Learner, steps: list, loss: Loss, count: Count) -> dict[str, Tensor]:
    """Losses and norms of every step, the gradient of the first before it is clipped, and the weights at the end, all whole."""
    found: dict[str, Tensor] = {}
    for number, batches in enumerate(steps):
        metrics = learner.forward_backward(batches, loss, count)
        if number == 0:
            found |= {f"gradient {name}": whole(weight.grad) for name, weight in learner.parameters.items() if weight.grad is not None}
        metrics |= learner.optim_step()
        found |= {f"{name} {number}": torch.tensor(float(metrics[name])) for name in ("loss", "grad_norm", "tokens", "supervised")}
    return found | {f"weight {name}": whole(weight.detach()) for name, weight in learner.parameters.items()}


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).clone().contiguous()


def preferences(base: str, data: str, folder: Path) -> tuple[Learner, list, Loss, Count]:
    """A learner of DPO, the batches of three steps, the loss and the count of pairs."""
    cfg = preference.Config(out=str(folder), base=base, data=data, pairs_per_step=5, steps=3, **SMALL)
    run, policy = stage.open_run(cfg, "preference", {}), stage.prepare(cfg)
    pairs = with_reference(pairs_of(stage.load_records(cfg.data)[1], policy.template, cfg.max_tokens), policy, cfg, run)
    plan = stage.plan_steps(preference.lengths(pairs), cfg, rows_of_step=cfg.pairs_per_step)
    steps = [[collate_pairs([pairs[pair] for pair in micro], policy.template) for micro in step] for step in plan]
    return Learner(policy, cfg.optim, len(plan)), steps, lambda batch: pair_loss(policy, batch, cfg), count_pairs


def measured(base: str, rows: str, pairs: str, folder: Path) -> dict[str, dict[str, Tensor]]:
    """Every case by name."""
    return {
        "sft": measure(*fine_tuning({"base": base, "data": rows, "hold_unseen": True})),
        "sft lora": measure(*fine_tuning({"base": base, "data": rows, **LORA})),
        "sft recomputed": measure(*fine_tuning({"base": base, "data": rows, "recompute": True})),
        "preference": measure(*preferences(base, pairs, folder)),
    }


def run_stage(name: str, keys: dict, stop_at: int | None = None) -> dict | None:
    """Run a stage; with `stop_at`, end as if killed right after that step's checkpoint."""
    module = load_stage(name)

    def stopping(run, learner, cfg, **options) -> None:
        stage.keep(run, learner, cfg, **options)
        if learner.step == stop_at:
            raise Stop

    module.keep = stopping
    try:
        return module.run(module.Config(**keys))
    except Stop:
        return None
    finally:
        module.keep = stage.keep


def main(task: str) -> None:
    """What torchrun starts: `task` is a JSON file with what to do, in order."""
    torch.set_num_threads(1)
    asked = json.loads(Path(task).read_text())
    parallel.join("cpu")
    if "measure" in asked:
        for name, found in measured(*asked["measure"][:3], Path(asked["measure"][3])).items():
            if parallel.rank() == 0:
                save_file(found, Path(asked["measure"][3]) / f"{name}.safetensors")
    for name, keys, stop_at in asked.get("stages", []):
        run_stage(name, keys, stop_at)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
