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
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from temper.core.hashing import hash_text, stream_seed
from temper.core.progress import track
from temper.core.storage import whole_folder
from temper.data.tokenizer import SPECIAL_TOKENS, train_tokenizer
from temper.environments.finops.corpus import WRITERS, documents
from temper.environments.finops.demonstrations import sample_formats

SEED = 20260
VOCABULARY, DOCUMENTS, HELD_OUT = 2048, 120_000, 400
BLOCK, ROWS, LEARNING_RATE, LONG_SHARE, STEPS = 256, 24, 2e-3, 0.25, 1600


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


def tokenised(tokenizer: PreTrainedTokenizerFast, count: int) -> tuple[np.ndarray, str]:
    """Every document's tokens in one stream, parted by <|endoftext|>, and the hash of the text."""
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    pieces, digest = [], ""
    for texts in track([list(chunk) for chunk in np.array_split(list(documents(SEED, count)), max(1, count // 2000))], "tokenising"):
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


def train(model: Qwen3ForCausalLM, stream: np.ndarray, steps: int, compiled: bool) -> dict[str, float]:
    """Train for `steps`; the last part on blocks twice as long. Returns tokens, steps and seconds."""
    rng = np.random.default_rng(stream_seed(SEED, "blocks"))
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95), fused=True)
    forward = torch.compile(loss_of, dynamic=False) if compiled else loss_of
    started, tokens = time.monotonic(), 0
    for step in track(range(steps), "pretraining", steps):
        progress = step / steps
        width, rows = (BLOCK * 2, ROWS // 2) if progress > 1 - LONG_SHARE else (BLOCK, ROWS)
        starts = rng.integers(0, len(stream) - width - 1, size=rows)
        batch = torch.from_numpy(np.stack([stream[at : at + width + 1] for at in starts]))
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * rate(progress)
        loss = forward(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        tokens += rows * width
        if step % 50 == 0:
            print(f"step {step}, loss {loss.item():.3f}, {tokens / (time.monotonic() - started):.0f} tokens/s", flush=True)
    return {"steps": steps, "tokens": tokens, "seconds": round(time.monotonic() - started, 1)}


@torch.inference_mode()
def held_out_loss(model: Qwen3ForCausalLM, stream: np.ndarray) -> float:
    """Nats a token on documents that were not trained on."""
    usable = len(stream) // (BLOCK + 1) * (BLOCK + 1)
    rows = torch.from_numpy(stream[:usable].reshape(-1, BLOCK + 1))
    return sum(loss_of(model, part).item() * len(part) for part in rows.split(32)) / len(rows)


def main() -> None:
    """Tokenizer, corpus, training, checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--documents", type=int, default=DOCUMENTS)
    parser.add_argument("--compile", action="store_true", help="torch.compile: 1.8 times the speed, needs a C++ compiler")
    options = parser.parse_args()
    torch.manual_seed(stream_seed(SEED, "weights"))
    tokenizer = make_tokenizer()
    stream, digest = tokenised(tokenizer, options.documents)
    cut = int(len(stream) * HELD_OUT / options.documents)
    model = Qwen3ForCausalLM(architecture(tokenizer))
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(stream):,} tokens of text", flush=True)
    cost = train(model, stream[cut:], options.steps, options.compile)
    loss = held_out_loss(model, stream[:cut])
    record = {
        "seed": SEED, "final_loss_nats_per_token": round(loss, 4), "cost": cost | {"threads": torch.get_num_threads(), "cores": os.cpu_count()},
        "data": {"generator": "temper.environments.finops.corpus", "kinds": {name: weight for name, (_, weight) in WRITERS.items()},
                 "documents": options.documents, "held_out_documents": HELD_OUT, "tokens": len(stream), "sha256": digest},
        "licence": "Apache-2.0", "torch": torch.__version__,
    }  # fmt: skip
    with whole_folder(options.out) as folder:
        model.to(torch.bfloat16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
