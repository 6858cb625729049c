"""TRL's side, at its strongest: float32 on a CPU, bfloat16 on a GPU, no checkpointing, no NaN filter, one of the variants below.

Runs in an environment of its own, where temper is not installed. What TRL samples itself (GRPO, distillation) is
replaced by the fixed answers of the rows, so that only the update is measured.
"""

from __future__ import annotations

import gc
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForSequenceClassification, TrainerCallback
from trl import (
    DistillationConfig,
    DistillationTrainer,
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)
from trl.trainer import dpo_trainer
from worker import serve
from workloads import BETA, CHECK_STEPS, CLIP, GROUP, MODELS, PAD, RANK, Workload, by_name, check_rows, rows_of, size

KINDS = {
    "sft": (SFTTrainer, SFTConfig),
    "dpo": (DPOTrainer, DPOConfig),
    "grpo": (GRPOTrainer, GRPOConfig),
    "reward": (RewardTrainer, RewardConfig),
    "distill": (DistillationTrainer, DistillationConfig),
}


class Peer:
    """One workload on TRL in one variant: `grouped` (rows stand by length) or `bfd` (packed), each with what is added by `+`:

    `liger` (Liger's kernels of norm, rotation and MLP), `flex` (FlexAttention), `compile` (torch.compile; on a GPU layer by
    layer, for any length), `onednn` (float32 products as temper sends them).
    """

    def __init__(self, job: dict[str, Any]) -> None:
        torch.set_num_threads(job["threads"])
        self.job, self.cuda = job, job["device"].startswith("cuda")
        self.workload: Workload = by_name([job["workload"]], job["device"], tiny=job["tiny"], changed=job["changed"])[0]
        self.folder = Path(job["models"]) / self.workload.model
        self.variant: set[str] = set(job["variant"].split("+"))
        if "onednn" in self.variant:
            torch.backends.mkldnn.matmul.fp32_precision = "bf16"  # as temper sends float32 products to oneDNN
        if self.cuda:
            os.environ |= {"ACCELERATE_DYNAMO_USE_DYNAMIC": "true", "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": "true"}

    def check(self) -> list[float]:
        """The losses of CHECK_STEPS steps on the check rows, which make one batch. Nothing is compiled for so few."""
        rows = check_rows(self.workload)
        trainer = self.trainer(rows, width=len(rows), accumulate=1, compiled=False)
        found: list[float] = []
        inner = trainer.training_step

        def training_step(*args: Any, **options: Any) -> torch.Tensor:
            loss = inner(*args, **options)
            found.append(float(loss))
            return loss

        trainer.training_step = training_step
        trainer.args.num_train_epochs = CHECK_STEPS
        trainer.train()
        return found

    def load(self) -> dict[str, float]:
        """The trainer; DPO computes its reference in there, once."""
        started = time.perf_counter()
        width, accumulate = self.workload.peer_rows, self.workload.step_rows // self.workload.peer_rows
        if "bfd" in self.variant:
            of_step = self.packed_rows_of_step()
            width = min(of_step, self.packed_rows_of_batch())
            accumulate = max(1, round(of_step / width))
        self.made = self.trainer(rows_of(self.workload), width=width, accumulate=accumulate, compiled="compile" in self.variant)
        return {"reference_s": self.made.reference_s, "trainer_s": time.perf_counter() - started}

    def warm(self) -> dict[str, float]:
        """One step, compilation included: the shortest rows; on a GPU the longest, in the largest micro-batch that it can hold."""
        if not self.cuda:
            return {"warm_s": self.train(max_steps=1)}
        every, args = self.made.train_dataset, self.made.args
        count = min(len(every), args.per_device_train_batch_size * args.gradient_accumulation_steps)
        longest = range(count) if "bfd" in self.variant else range(len(every) - count, len(every))
        self.made.train_dataset = every.select(longest)
        while not (seconds := self.fits()):
            self.halve()
        self.made.train_dataset = every
        return {"warm_s": seconds, "micro_batch": args.per_device_train_batch_size}

    def fits(self) -> float:
        """Seconds of a step, 0 where memory does not suffice. Raises torch.OutOfMemoryError where no smaller micro-batch is left."""
        try:
            return self.train(max_steps=1)
        except torch.OutOfMemoryError:
            if self.made.args.per_device_train_batch_size == 1:
                raise
            return 0.0

    def halve(self) -> None:
        """Micro-batches of half as many rows, twice as many a step."""
        args = self.made.args
        args.per_device_train_batch_size //= 2
        args.gradient_accumulation_steps *= 2
        self.made._train_batch_size = args.per_device_train_batch_size
        self.made.model.zero_grad()
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()

    def measured(self) -> float:
        """One epoch."""
        return self.train(max_steps=-1)

    def train(self, max_steps: int) -> float:
        """Seconds from the first batch to the end of the last step; setting up is TRL's own and not counted."""
        self.made.args.max_steps = max_steps
        self.made.train()
        return self.made.clock.seconds

    # --- trainers ---

    def packed_rows_of_step(self) -> int:
        """How many packed rows hold as many tokens as an optimizer step of the other variants."""
        tokens = sum(map(size, rows_of(self.workload))) * self.workload.step_rows / self.workload.rows
        return max(1, round(tokens / self.workload.lengths[1]))

    def packed_rows_of_batch(self) -> int:
        """How many packed rows make a micro-batch: the collator lays them into one row. FlexAttention skips what a dense mask
        would compute, so that only without it one at a time is cheapest."""
        return max(1, self.workload.tokens_per_batch // self.workload.lengths[1]) if "flex" in self.variant else 1

    def trainer(self, rows: list[dict[str, Any]], *, width: int, accumulate: int, compiled: bool) -> Any:
        """A fresh trainer on `rows` in their order, `width` rows a micro-batch."""
        torch.manual_seed(0)
        kind = self.workload.kind
        make, config = KINDS[kind]
        args = config(**self.arguments(width * (GROUP if kind == "grpo" else 1), accumulate), torch_compile=compiled, **self.special(kind))
        options: dict[str, Any] = {"peft_config": _lora()} if self.workload.lora and kind != "reward" else {}
        if kind == "grpo":
            options["reward_funcs"] = lambda completions, **_: [0.0] * len(completions)
        if kind == "distill":
            options["teacher_model"] = self.model(Path(self.job["models"]) / str(self.workload.teacher))
        tokenizer = AutoTokenizer.from_pretrained(self.folder)
        clock = Clock(self.cuda)
        made = timed(make, rows)(
            model=self.scalar_model() if kind == "reward" else self.model(self.folder), args=args, train_dataset=Dataset.from_list(_columns(kind, rows)),
            processing_class=tokenizer, callbacks=[clock], **options,
        )  # fmt: skip
        if self.workload.lora:  # the same adapter as the other side; its B is zero, so a reference already computed stands
            set_peft_model_state_dict(made.model, load_file(self.folder / "adapter" / "adapter_model.safetensors"))
        made.clock = clock
        return made

    def model(self, folder: Path) -> Any:
        """A causal model from its checkpoint."""
        attention = "flex_attention" if "flex" in self.variant else "sdpa"
        dtype = torch.bfloat16 if self.cuda and self.workload.lora else torch.float32
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=attention, device_map=self.job["device"])

    def scalar_model(self) -> Any:
        """The same decoder with the scalar head that both sides load."""
        model = LlamaForSequenceClassification.from_pretrained(self.folder, num_labels=1, dtype=torch.float32)
        with torch.no_grad():
            model.score.weight.copy_(load_file(self.folder / "score.safetensors")["weight"])
        return model

    def arguments(self, width: int, accumulate: int) -> dict[str, Any]:
        """What every trainer is given."""
        return {
            "output_dir": tempfile.mkdtemp(prefix="bench-peer-"),
            "per_device_train_batch_size": width, "gradient_accumulation_steps": accumulate, "num_train_epochs": 1,
            "learning_rate": self.workload.rate, "lr_scheduler_type": "constant", "warmup_steps": 0, "weight_decay": 0.0, "max_grad_norm": 1.0,
            "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8, "optim": "adamw_torch_fused",
            "bf16": self.cuda, "gradient_checkpointing": False, "use_cpu": not self.cuda,
            "use_liger_kernel": "liger" in self.variant, "dataloader_num_workers": 2 if self.cuda else 0,
            "logging_nan_inf_filter": False, "logging_strategy": "no", "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
            "dataloader_pin_memory": self.cuda, "seed": 0,
        }  # fmt: skip

    def special(self, kind: str) -> dict[str, Any]:
        """What one trainer is given."""
        sequential = {"train_sampling_strategy": "sequential"}
        if kind == "sft" and "bfd" in self.variant:
            return {"packing": True, "packing_strategy": "bfd", "max_length": self.workload.lengths[1], "shuffle_dataset": False, **sequential}
        return {
            "sft": {"max_length": None, "shuffle_dataset": False, **sequential},
            "dpo": {"beta": BETA, "precompute_ref_log_probs": True, "precompute_ref_batch_size": self.workload.peer_rows, "max_length": None, **sequential},
            "reward": {"max_length": None, **sequential},
            "grpo": {"num_generations": GROUP, "beta": 0.0, "epsilon": CLIP, "epsilon_high": CLIP, "loss_type": "dapo", "temperature": 1.0, "shuffle_dataset": False},
            "distill": {"beta": 1.0, "temperature": 1.0, "shuffle_dataset": False},
        }[kind]  # fmt: skip


class Clock(TrainerCallback):
    """Times a training from its first batch to the end of its last optimizer step."""

    def __init__(self, cuda: bool) -> None:
        self.cuda, self.started, self.seconds = cuda, 0.0, 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Start, once what came before is done."""
        self.started = self._now()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """An optimizer step is done."""
        self.seconds = self._now() - self.started

    def _now(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()


def timed(make: Any, rows: list[dict[str, Any]]) -> Any:
    """`make` with its rows taken as they are: no tokenising, no sampling; the time of DPO's reference is kept."""

    class Timed(make):  # type: ignore[misc, valid-type]
        reference_s = 0.0

        def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
            started = time.perf_counter()
            found = super()._precompute_ref_logps(dataset, name, batch_size)
            self.reference_s = time.perf_counter() - started
            return found

    def keep(self: Any, dataset: Dataset, *_: Any) -> Dataset:
        return dataset

    def from_rows(self: Any, inputs: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return sampled([rows[item["row"]] for item in inputs], self.accelerator.device)

    if make is DPOTrainer:
        Timed._prepare_dataset = keep
        dpo_trainer.hash_module = lambda module: ""  # names the file of the reference's log-probs; of 8B it takes a minute
    if make in (GRPOTrainer, DistillationTrainer):
        Timed._generate_and_score_completions = from_rows
    return Timed


def sampled(rows: list[dict[str, Any]], device: torch.device) -> dict[str, torch.Tensor]:
    """The batch that TRL would have made of prompts and sampled answers: prompts padded left, answers right.

    Of a row with several answers its n-th occurrence gives the n-th.
    """
    seen: dict[int, int] = {}
    prompts, answers, credit, old = [], [], [], []
    for row in rows:
        number = seen[id(row)] = seen.get(id(row), -1) + 1
        if "tokens" in row:
            prompts.append(row["tokens"][: row["trained_from"]])
            answers.append(row["tokens"][row["trained_from"] :])
            continue
        prompts.append(row["prompt"])
        answers.append(row["answers"][number % GROUP])
        credit.append(row["advantages"][number % GROUP])
        old.append(row["old_logprobs"][number % GROUP])
    before, after = max(map(len, prompts)), max(map(len, answers))
    made = {
        "prompt_ids": torch.tensor([[PAD] * (before - len(ids)) + ids for ids in prompts]),
        "prompt_mask": torch.tensor([[0] * (before - len(ids)) + [1] * len(ids) for ids in prompts]),
        "completion_ids": torch.tensor([ids + [PAD] * (after - len(ids)) for ids in answers]),
        "completion_mask": torch.tensor([[1] * len(ids) + [0] * (after - len(ids)) for ids in answers]),
        "num_items_in_batch": torch.tensor(float(sum(map(len, answers)))),
    }
    if credit:
        made["advantages"] = torch.tensor(credit)
        made["old_per_token_logps"] = torch.tensor([values + [0.0] * (after - len(values)) for values in old])
    return {name: value.to(device) for name, value in made.items()}


def _columns(kind: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The data set that the trainer of `kind` reads."""
    if kind == "sft":
        return [{"input_ids": row["tokens"], "labels": [-100] * row["trained_from"] + row["tokens"][row["trained_from"] :]} for row in rows]
    if kind == "dpo":
        return [{"prompt_ids": row["prompt"], "chosen_ids": row["answers"][0], "rejected_ids": row["answers"][1]} for row in rows]
    if kind == "reward":
        return [{"chosen_ids": row["prompt"] + row["answers"][0], "rejected_ids": row["prompt"] + row["answers"][1]} for row in rows]
    return [{"prompt": f"w{MODELS['tiny'].vocab}", "row": number} for number in range(len(rows))]


def _lora() -> LoraConfig:
    return LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")


if __name__ == "__main__":
    serve(Peer)
