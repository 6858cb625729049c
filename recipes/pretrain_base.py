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
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from temper.core.hashing import hash_text, stream_seed
from temper.core.progress import track
from temper.core.storage import whole_folder
from temper.data.tokenizer import SPECIAL_TOKENS, train_tokenizer
from temper.environments.finops.corpus import COPYING, WRITERS, Writer, documents
from temper.environments.finops.demonstrations import sample_formats

SEED = 20260
VOCABULARY, HELD_OUT = 2048, 400
BLOCK = 256


@dataclass(frozen=True)
class Part:
    """One part of the training: what is read, in rows of how many tokens, for how long, how fast."""

    writers: dict[str, tuple[Writer, int]]
    documents: int
    rows: int
    width: int
    steps: int
    learning_rate: float
    long_share: float  # the last share of the steps, on rows twice as long


PARTS = (  # the domain's text; then the same with much practice in copying, in small batches
    Part(WRITERS, 120_000, 24, 256, 1600, 2e-3, 0.25),
    Part(COPYING, 40_000, 24, 128, 1700, 1.5e-3, 0.1),
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
        hidden_B_T_D = model.model(input_ids=rows_B_T[:, :-1]).last_hidden_state
        logits_B_T_V = F.linear(hidden_B_T_D, model.lm_head.weight)
    return F.cross_entropy(logits_B_T_V.float().flatten(0, 1), rows_B_T[:, 1:].flatten().long())


def rate(progress: float) -> float:
    """Warm-up over 3% of the steps, then a cosine to 2% of the peak."""
    return min(progress / 0.03, 1.0) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def train(model: Qwen3ForCausalLM, stream: np.ndarray, part: Part, compiled: bool) -> dict[str, float]:
    """Train one part. Returns tokens, steps and seconds."""
    rng = np.random.default_rng(stream_seed(SEED, "blocks"))
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=part.learning_rate, betas=(0.9, 0.95), fused=True)
    forward = torch.compile(loss_of, dynamic=False) if compiled else loss_of
    started, tokens = time.monotonic(), 0
    for step in track(range(part.steps), "pretraining", part.steps):
        progress = step / part.steps
        width, rows = (part.width * 2, part.rows // 2) if progress > 1 - part.long_share else (part.width, part.rows)
        starts = rng.integers(0, len(stream) - width - 1, size=rows)
        batch = torch.from_numpy(np.stack([stream[at : at + width + 1] for at in starts]))
        for group in optimizer.param_groups:
            group["lr"] = part.learning_rate * rate(progress)
        loss = forward(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        tokens += rows * width
        if step % 50 == 0:
            print(f"step {step}, loss {loss.item():.3f}, {tokens / (time.monotonic() - started):.0f} tokens/s", flush=True)
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
        cost = train(model, stream[cut:], part, options.compile)
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
        (folder / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
