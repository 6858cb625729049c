"""What is measured: models, rows and steps, in plain Python that both environments can read.

A workload fixes everything that two learners must share: weights, rows, their order, the rows of each optimizer
step and the objective. Rows stand in rising order of length, as length grouping would put them, so that both sides
take the very same optimizer steps, and the step that warms up is the cheapest.
"""

from __future__ import annotations

import math
import random
from dataclasses import asdict, dataclass, replace
from typing import Any

PAD, EOS, FIRST_TOKEN = 0, 1, 4  # ids below FIRST_TOKEN are special
BETA, CLIP, GROUP, RANK = 0.1, 0.2, 8, 16  # DPO's beta, GRPO's clip, answers of one prompt, LoRA's rank
CHECK_ROWS, CHECK_STEPS = 4, 2  # both sides train these and must say the same losses
RATE = 1e-3  # learning rate, constant; AdamW without decay, gradients clipped to 1
GENTLE = 2e-5  # where a step at RATE would take the loss to zero, so that the second one would tell nothing


@dataclass(frozen=True)
class Architecture:
    """A Llama by its sizes."""

    width: int
    layers: int
    heads: int
    kv_heads: int
    inner: int
    vocab: int

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.width // self.heads

    @property
    def body(self) -> int:
        """Weights of the matrices between embeddings and head."""
        attention = self.width * self.head_size * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (attention + self.mlp)

    @property
    def mlp(self) -> int:
        """Weights of one layer's MLP."""
        return 3 * self.width * self.inner

    @property
    def mlp_adapters(self) -> int:
        """Weights of LoRA of rank RANK on one layer's MLP."""
        return RANK * 3 * (self.width + self.inner)

    @property
    def adapters(self) -> int:
        """Weights of LoRA of rank RANK on every linear layer but the head."""
        q, kv = self.heads * self.head_size, self.kv_heads * self.head_size
        shapes = [(self.width, q), (self.width, kv), (self.width, kv), (q, self.width), *[(self.width, self.inner)] * 3]
        return self.layers * RANK * sum(one + other for one, other in shapes)


MODELS = {
    "d256-v32k": Architecture(256, 8, 4, 4, 688, 32768),
    "d256-v8k": Architecture(256, 8, 4, 4, 688, 8192),
    "d256-l4-v32k": Architecture(256, 4, 4, 4, 688, 32768),
    "d512-v32k": Architecture(512, 12, 8, 8, 1376, 32768),
    "tiny": Architecture(64, 2, 2, 2, 128, 1024),
    "0.5b": Architecture(896, 24, 14, 2, 4864, 151936),
    "1.5b": Architecture(1536, 28, 12, 2, 8960, 151936),
    "8b": Architecture(4096, 32, 32, 8, 14336, 128256),
}


@dataclass(frozen=True)
class Workload:
    """`rows` of one measured pass, `step_rows` of one optimizer step, `peer_rows` of the peer's micro-batch.

    A row is a conversation (sft, distill), a pair (dpo, reward) or a prompt with its GROUP answers (grpo).
    `tokens_per_batch` is the padded size of our micro-batch. Targets are those of the issue that asked for this table.
    """

    name: str
    title: str
    kind: str
    model: str
    rows: int
    step_rows: int
    peer_rows: int
    lora: bool = False
    teacher: str | None = None
    lengths: tuple[int, int] = (32, 512)
    answers: tuple[int, int] = (16, 96)
    tokens_per_batch: int = 2048
    rate: float = RATE
    target_ratio: float | None = None
    target_share: float | None = None

    @property
    def unit(self) -> str:
        """What speed is counted in."""
        return {"sft": "tokens", "distill": "tokens", "dpo": "pairs", "reward": "pairs", "grpo": "answers"}[self.kind]


CPU = [
    Workload("sft_full", "SFT, full, d256 L8, V 32,768", "sft", "d256-v32k", 32, 16, 8, target_ratio=5, target_share=0.65),
    Workload("sft_lora", "SFT, LoRA r16, d256 L8, V 32,768", "sft", "d256-v32k", 32, 16, 8, lora=True, target_ratio=8, target_share=0.55),
    Workload("sft_full_v8k", "SFT, full, d256 L8, V 8,192", "sft", "d256-v8k", 64, 16, 8, target_ratio=2.2, target_share=0.65),
    Workload("sft_lora_v8k", "SFT, LoRA r16, d256 L8, V 8,192", "sft", "d256-v8k", 64, 16, 8, lora=True, target_ratio=2.2, target_share=0.65),
    Workload("sft_full_d512", "SFT, full, d512 L12, V 32,768", "sft", "d512-v32k", 16, 16, 8, tokens_per_batch=1024, target_ratio=2, target_share=0.70),
    Workload("dpo", "DPO, LoRA r16, d256 L8, V 32,768", "dpo", "d256-v32k", 16, 8, 4, lora=True, lengths=(64, 256), target_ratio=8, target_share=0.5),
    Workload("grpo", "GRPO update, LoRA r16, G=8, 128 + 128 tokens", "grpo", "d256-v32k", 4, 2, 1, lora=True, lengths=(128, 128), answers=(128, 128), target_ratio=6, target_share=0.5),
    Workload("reward", "reward model, full, d256 L8", "reward", "d256-v32k", 64, 16, 8, lengths=(64, 256), target_ratio=3, target_share=0.5),
    Workload("distill", "distillation, L8 into L4, d256, V 32,768", "distill", "d256-l4-v32k", 32, 16, 8, teacher="d256-v32k", target_ratio=3, target_share=0.5),
]  # fmt: skip

CUDA = [
    Workload("sft_full_0.5b", "SFT, full, 0.5B, packed", "sft", "0.5b", 256, 64, 16, lengths=(64, 2048), tokens_per_batch=16384),
    Workload("sft_lora_1.5b", "SFT, LoRA r16, 1.5B, packed", "sft", "1.5b", 256, 64, 8, lora=True, lengths=(64, 2048), tokens_per_batch=16384, target_ratio=1.3, target_share=0.5),
    Workload("sft_lora_8b", "SFT, LoRA r16, 8B, packed", "sft", "8b", 64, 32, 4, lora=True, lengths=(64, 2048), tokens_per_batch=8192, target_ratio=1.3, target_share=0.5),
    Workload("dpo_1.5b", "DPO, LoRA r16, 1.5B", "dpo", "1.5b", 128, 32, 4, lora=True, lengths=(256, 1024), answers=(64, 512), tokens_per_batch=16384, rate=GENTLE, target_ratio=1.3, target_share=0.5),
    Workload("dpo_8b", "DPO, LoRA r16, 8B", "dpo", "8b", 32, 16, 2, lora=True, lengths=(256, 1024), answers=(64, 512), tokens_per_batch=8192, rate=GENTLE, target_ratio=1.3, target_share=0.5),
]  # fmt: skip

CHANGEABLE = {"rows", "step_rows", "peer_rows", "tokens_per_batch"}
SUPERVISED = 0.4  # share of an SFT row that is trained: its end


def rows_of(workload: Workload) -> list[dict[str, Any]]:
    """The rows of one pass, shortest first: a function of the workload alone."""
    rng = random.Random(f"{workload.kind}-{workload.lengths}-{workload.answers}-{MODELS[workload.model].vocab}")
    make = {"sft": _conversation, "distill": _conversation, "dpo": _pair, "reward": _pair, "grpo": _group}[workload.kind]
    return sorted((make(rng, workload) for _ in range(workload.rows)), key=size)


def check_rows(workload: Workload) -> list[dict[str, Any]]:
    """The rows of one optimizer step on which both sides must agree: spread over all lengths."""
    rows = rows_of(workload)
    count = min(CHECK_ROWS, workload.peer_rows)
    return [rows[(at + 1) * len(rows) // (count + 1)] for at in range(count)]


def size(row: dict[str, Any]) -> int:
    """Tokens of a row's longest sequence."""
    if "tokens" in row:
        return len(row["tokens"])
    return len(row["prompt"]) + max(len(answer) for answer in row["answers"])


def _tokens(rng: random.Random, workload: Workload, count: int) -> list[int]:
    return [rng.randrange(FIRST_TOKEN, MODELS[workload.model].vocab) for _ in range(count)]


def _conversation(rng: random.Random, workload: Workload) -> dict[str, Any]:
    """Tokens of which the last SUPERVISED share is trained."""
    tokens = _tokens(rng, workload, rng.randint(*workload.lengths))
    return {"tokens": tokens, "trained_from": round((1 - SUPERVISED) * len(tokens))}


def _pair(rng: random.Random, workload: Workload) -> dict[str, Any]:
    """A prompt and two answers, the better one first, each with an end token."""
    prompt = _tokens(rng, workload, rng.randint(*workload.lengths))
    return {"prompt": prompt, "answers": [[*_tokens(rng, workload, rng.randint(*workload.answers) - 1), EOS] for _ in range(2)]}


def _group(rng: random.Random, workload: Workload) -> dict[str, Any]:
    """A prompt and GROUP answers with their advantages, and the log-probs they are taken to have been sampled at.

    Those lie around log(1/V), where those of a random model lie, so that ratios differ from one and some are clipped.
    """
    length = rng.randint(*workload.lengths)
    prompt, answers = _tokens(rng, workload, length), [_tokens(rng, workload, length) for _ in range(GROUP)]
    credit = [rng.gauss(0, 1) for _ in answers]
    mean = sum(credit) / GROUP
    even = -math.log(MODELS[workload.model].vocab)
    sampled = [[even + rng.gauss(0, 0.1) for _ in answer] for answer in answers]
    return {"prompt": prompt, "answers": answers, "advantages": [item - mean for item in credit], "old_logprobs": sampled}


@dataclass(frozen=True)
class Size:
    """What one pass holds and needs: units (see Workload.unit), real tokens with every shared prompt once, operations."""

    units: float
    tokens: int
    operations: float
    reference_operations: float


def measure(workload: Workload) -> Size:
    """Count one pass: only what the objective needs, so no padding, no prompt twice, no position that nobody reads in
    the head and in the last layer's MLP.

    A weight and token cost two operations forward, two for the gradient of the input, two for that of the weight where
    it is trained; a pair of positions that attend costs 4·width forward in each layer and twice that backward.
    """
    model, rows = MODELS[workload.model], rows_of(workload)
    tokens = sum(_unique(row) for row in rows)
    heads = 0 if workload.kind == "reward" else sum(_trained(row) for row in rows)
    pairs = sum(_attended(row) for row in rows)
    unread = tokens - (2 * len(rows) if workload.kind == "reward" else heads)
    trained = 4 * model.body + 6 * model.adapters if workload.lora else 6 * model.body
    trained_mlp = 4 * model.mlp + 6 * model.mlp_adapters if workload.lora else 6 * model.mlp
    forward = 2 * (model.body * tokens - model.mlp * unread) + _attention(model, pairs) + 2 * model.width * model.vocab * heads
    step = trained * tokens - trained_mlp * unread + 3 * _attention(model, pairs) + (4 if workload.lora else 6) * model.width * model.vocab * heads
    if workload.teacher:
        teacher = MODELS[workload.teacher]
        step += 2 * (teacher.body * tokens - teacher.mlp * unread) + _attention(teacher, pairs) + 2 * teacher.width * teacher.vocab * heads
    units = {"tokens": tokens, "pairs": len(rows), "answers": len(rows) * GROUP}[workload.unit]
    return Size(units, tokens, step, forward if workload.kind == "dpo" else 0.0)


def _attention(model: Architecture, pairs: float) -> float:
    return 4 * model.layers * model.heads * model.head_size * pairs


def _unique(row: dict[str, Any]) -> int:
    return len(row["tokens"]) if "tokens" in row else len(row["prompt"]) + sum(map(len, row["answers"]))


def _trained(row: dict[str, Any]) -> int:
    return len(row["tokens"]) - row["trained_from"] if "tokens" in row else sum(map(len, row["answers"]))


def _attended(row: dict[str, Any]) -> float:
    if "tokens" in row:
        return len(row["tokens"]) * (len(row["tokens"]) + 1) / 2
    prompt = len(row["prompt"])
    return prompt * (prompt + 1) / 2 + sum(len(answer) * (prompt + (len(answer) + 1) / 2) for answer in row["answers"])


def by_name(names: list[str], device: str, *, tiny: bool = False, changed: dict[str, int] | None = None) -> list[Workload]:
    """The workloads named, else all of a device. `tiny` puts a tiny model under each, to try the harness itself; `changed`
    are other numbers for their fields (rows, peer_rows, tokens_per_batch).

    Raises SystemExit naming one that is not there, or a field that cannot be changed.
    """
    every = {workload.name: workload for workload in CPU + CUDA}
    if unknown := [name for name in names if name not in every]:
        raise SystemExit(f"error: there is no workload {unknown[0]!r}\n  do:  choose from {', '.join(every)}")
    found = [every[name] for name in names] or (CUDA if device.startswith("cuda") else CPU)
    if tiny:
        found = [replace(workload, model="tiny", teacher=workload.teacher and "tiny") for workload in found]
    if fixed := set(changed or {}) - CHANGEABLE:
        raise SystemExit(f"error: {min(fixed)!r} cannot be changed\n  do:  choose from {', '.join(sorted(CHANGEABLE))}")
    return [replace(workload, **(changed or {})) for workload in found]  # type: ignore[arg-type]


def described(workload: Workload) -> dict[str, Any]:
    """The workload as JSON, with its model's sizes."""
    return asdict(workload) | {"architecture": asdict(MODELS[workload.model])}
