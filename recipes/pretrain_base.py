"""Pretrain the tiny base model of the demo on plain text of its domain, from random weights.

    python recipes/pretrain_base.py --out temper/environments/finops/base --compile

Writes a transformers checkpoint (Qwen3 architecture, bfloat16), its tokenizer, and `training.json` with the data
manifest (generator, seed, documents, tokens, hash), the seed, the cost and the final loss. The base continues text;
it has seen no chat markup, no tool call and no JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from temper.core.hashing import hash_text, stream_seed
from temper.core.progress import track
from temper.core.storage import whole_folder
from temper.data.golden import write_card
from temper.data.tokenizer import SPECIAL_TOKENS, train_tokenizer
from temper.environments.finops.corpus import COPYING, DRILLED, SELECTING, WRITERS, Writer, documents
from temper.environments.finops.demonstrations import sample_formats

SEED = 20260
VOCABULARY, HELD_OUT = 2048, 400
BLOCK = 256


@dataclass(frozen=True)
class Part:
    """One part of the training: what is read, in rows of how many tokens, for how long, how fast, by which optimizer.

    In `nested_share` of the steps only the first and the last layer work, so that these two are a small model of their
    own: what a student is later made of (LayerDrop, Fan et al. 2019).
    """

    writers: dict[str, tuple[Writer, int]]
    documents: int
    rows: int
    width: int
    steps: int
    learning_rate: float
    long_share: float  # the last share of the steps, on rows twice as long
    muon: bool = False  # matrices by Muon (Jordan et al. 2024) instead of AdamW
    nested_share: float = 0.0


PARTS = (  # the domain's text; the same with practice in copying, in small batches; drills, which nothing but copying solves; and choosing
    Part(WRITERS, 120_000, 24, 256, 1600, 2e-3, 0.25),
    Part(COPYING, 40_000, 24, 128, 1700, 1.5e-3, 0.1),
    Part(DRILLED, 60_000, 12, 256, 3000, 1.5e-3, 0.25, muon=True, nested_share=0.25),
    Part(SELECTING, 20_000, 12, 256, 700, 8e-4, 0.1, muon=True, nested_share=0.25),
)


def architecture(tokenizer: PreTrainedTokenizerFast) -> Qwen3Config:
    """About five million parameters: 6 layers of width 256 with tied embeddings."""
    return Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=256, num_hidden_layers=6, intermediate_size=768, num_attention_heads=4, num_key_value_heads=2,
        head_dim=64, tie_word_embeddings=True, max_position_embeddings=2048, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer trained on plain text and on rendered conversations, so that markup and JSON cost few tokens."""
    template = train_tokenizer([], len(SPECIAL_TOKENS) + 256)
    rendered = []
    for record in sample_formats(SEED, 1500):
        messages = [
            {
                "role": m.role,
                "content": m.content,
                "tool_calls": [{"function": c.model_dump(include={"name", "arguments"})} for c in m.tool_calls],
            }
            for m in record.messages
        ]
        text = template.apply_chat_template(messages, tools=[tool.openai() for tool in record.tools], tokenize=False)
        rendered += [piece for piece in re.split("|".join(map(re.escape, SPECIAL_TOKENS)), text) if piece]
    return train_tokenizer([*documents(SEED + 1, 6000), *rendered], VOCABULARY)


def tokenised(tokenizer: PreTrainedTokenizerFast, number: int) -> tuple[np.ndarray, str]:
    """The documents of a part in one stream of tokens, parted by <|endoftext|>, and the hash of their text."""
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    pieces, digest = [], ""
    for texts in track([list(chunk) for chunk in np.array_split(list(documents(SEED + 10 * number, PARTS[number].documents, PARTS[number].writers)), max(1, PARTS[number].documents // 2000))], "tokenising"):
        digest = hash_text(digest + "\0".join(texts))
        for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]:
            pieces.append(np.array([*ids, end], dtype=np.int32))
    return np.concatenate(pieces), digest


def loss_of(model: Qwen3ForCausalLM, rows_B_T: torch.Tensor) -> torch.Tensor:
    """Mean next-token cross-entropy in nats."""
    with torch.autocast("cpu", torch.bfloat16):
        hidden_B_T_D = model.model(input_ids=rows_B_T[:, :-1], use_cache=False).last_hidden_state
        logits_B_T_V = F.linear(hidden_B_T_D, model.lm_head.weight)
    return F.cross_entropy(logits_B_T_V.float().flatten(0, 1), rows_B_T[:, 1:].flatten().long())


def rate(progress: float) -> float:
    """Warm-up over 3% of the steps, then a cosine to 2% of the peak."""
    return min(progress / 0.03, 1.0) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def optimizers(model: Qwen3ForCausalLM, part: Part) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or Muon for the layers' matrices and AdamW for embeddings and norms."""
    inner = [weight for name, weight in model.named_parameters() if weight.ndim >= 2 and not (part.muon and "embed" in name)]
    chosen = {id(weight) for weight in inner}
    outer = [weight for weight in model.parameters() if id(weight) not in chosen]
    adamw = {"lr": part.learning_rate, "betas": (0.9, 0.95), "fused": True}
    if part.muon:
        muon = torch.optim.Muon(inner, lr=part.learning_rate, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
        return [muon, torch.optim.AdamW(outer, weight_decay=0.0, **adamw)]
    return [torch.optim.AdamW([{"params": inner, "weight_decay": 0.1}, {"params": outer, "weight_decay": 0.0}], **adamw)]


@contextmanager
def ends_only(model: Qwen3ForCausalLM) -> Iterator[None]:
    """Inside the block the model is its first and its last layer alone."""
    layers, total = model.model.layers, model.config.num_hidden_layers
    model.model.layers, model.config.num_hidden_layers = torch.nn.ModuleList([layers[0], layers[-1]]), 2
    try:
        yield
    finally:
        model.model.layers, model.config.num_hidden_layers = layers, total


def train(model: Qwen3ForCausalLM, stream: np.ndarray, part: Part, options: argparse.Namespace) -> dict[str, float]:
    """Train one part. Returns tokens, steps and seconds."""
    rng = np.random.default_rng(stream_seed(SEED, "blocks"))
    steppers = optimizers(model, part)
    # two functions, so that the whole model and its ends are compiled apart
    whole, ends = (torch.compile(partial(loss_of), dynamic=False) if options.compile else loss_of for _ in range(2))
    started, tokens = time.monotonic(), 0
    for step in track(range(part.steps), "pretraining", part.steps):
        progress = step / part.steps
        width, rows = (part.width * 2, part.rows // 2) if progress > 1 - part.long_share else (part.width, part.rows)
        starts = rng.integers(0, len(stream) - width - 1, size=rows)
        batch = torch.from_numpy(np.stack([stream[at : at + width + 1] for at in starts]))
        nested = rng.random() < part.nested_share
        with ends_only(model) if nested else nullcontext():
            loss = (ends if nested else whole)(model, batch)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for stepper in steppers:
            for group in stepper.param_groups:
                group["lr"] = part.learning_rate * rate(progress)
            stepper.step()
            stepper.zero_grad(set_to_none=True)
        tokens += rows * width
        if step % 50 == 0:
            print(f"step {step}, loss {loss.item():.3f}{' (ends)' if nested else ''}, {tokens / (time.monotonic() - started):.0f} tokens/s", flush=True)
        if options.snapshots and step and step % options.snapshots == 0:
            model.save_pretrained(options.out.with_name(f"{options.out.name}-{step}"))
    return {"steps": part.steps, "tokens": tokens, "seconds": round(time.monotonic() - started, 1)}


@torch.inference_mode()
def held_out_loss(model: Qwen3ForCausalLM, stream: np.ndarray) -> float:
    """Nats a token on documents that were not trained on."""
    usable = len(stream) // (BLOCK + 1) * (BLOCK + 1)
    rows = torch.from_numpy(stream[:usable].reshape(-1, BLOCK + 1))
    return sum(loss_of(model, part).item() * len(part) for part in rows.split(32)) / len(rows)


def main() -> None:
    """Tokenizer, corpus, training part by part, checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--init", type=Path, help="the checkpoint that the parts before --part left")
    parser.add_argument("--part", type=int, default=0, help="the part to begin with")
    parser.add_argument("--compile", action="store_true", help="torch.compile: 1.8 times the speed, needs a C++ compiler")
    parser.add_argument("--snapshots", type=int, default=0, help="steps between checkpoints beside --out, to look at on the way")
    options = parser.parse_args()
    torch.manual_seed(stream_seed(SEED, "weights"))
    if options.init:
        tokenizer = AutoTokenizer.from_pretrained(options.init)
        model = Qwen3ForCausalLM.from_pretrained(options.init, dtype=torch.float32)
        done = json.loads((options.init / "training.json").read_text())["parts"]
    else:
        tokenizer, done = make_tokenizer(), []
        model = Qwen3ForCausalLM(architecture(tokenizer))
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    for number in range(options.part, len(PARTS)):
        part = PARTS[number]
        stream, digest = tokenised(tokenizer, number)
        cut = int(len(stream) * HELD_OUT / part.documents)
        cost = train(model, stream[cut:], part, options)
        data = {
            "generator": "temper.environments.finops.corpus", "kinds": {name: weight for name, (_, weight) in part.writers.items()},
            "documents": part.documents, "held_out_documents": HELD_OUT, "tokens": len(stream), "sha256": digest,
        }  # fmt: skip
        cost |= {"threads": torch.get_num_threads(), "cores": os.cpu_count() or 0}
        done.append({"final_loss_nats_per_token": round(held_out_loss(model, stream[:cut]), 4), "cost": cost, "data": data})
    record = {"seed": SEED, "parts": done, "licence": "Apache-2.0", "torch": torch.__version__}
    with whole_folder(options.out) as folder:
        model.to(torch.bfloat16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_card(tokenizer, folder)
        (folder / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
