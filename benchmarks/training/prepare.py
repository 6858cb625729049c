"""Write what both sides load: random weights saved once, a tokenizer of as many words, an adapter, a scalar head.

    python benchmarks/training/prepare.py FOLDER MODEL [MODEL …]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from workloads import EOS, FIRST_TOKEN, MODELS, PAD, RANK, Architecture

LARGE = 1 << 29  # weights: above this a model is made and saved in bfloat16, on the GPU where there is one
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def main() -> None:
    """Prepare every model named, where it is not there yet."""
    root = Path(sys.argv[1])
    for name in sys.argv[2:]:
        wanted, folder = json.dumps(asdict(MODELS[name]) | {"rank": RANK}), root / name
        done = folder / "prepared.json"
        if not done.is_file() or done.read_text() != wanted:
            prepare(MODELS[name], folder)
            done.write_text(wanted)


def prepare(sizes: Architecture, folder: Path) -> None:
    """`folder`: the model; `folder/adapter`: LoRA on all linear layers; `folder/score.safetensors`: a scalar head."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=sizes.vocab, hidden_size=sizes.width, intermediate_size=sizes.inner, num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads, num_key_value_heads=sizes.kv_heads, max_position_embeddings=4096, tie_word_embeddings=False,
        pad_token_id=PAD, eos_token_id=EOS, bos_token_id=None, attention_dropout=0.0,
    )  # fmt: skip
    large = sizes.body + 2 * sizes.width * sizes.vocab > LARGE
    with torch.device("cuda" if large and torch.cuda.is_available() else "cpu"), default_dtype(torch.bfloat16 if large else torch.float32):
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer(sizes.vocab).save_pretrained(folder)
    save_file({"weight": torch.randn(1, sizes.width) * 0.05}, folder / "score.safetensors")
    adapted = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM"))
    adapted.save_pretrained(folder / "adapter", save_embedding_layers=False)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Inside the block new weights have `dtype`."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def tokenizer(vocab: int) -> PreTrainedTokenizerFast:
    """Words w4 … by number, so that any list of ids is a text."""
    special = ["<|pad|>", "<|im_end|>", "<|im_start|>", "<unk>"]
    words = {word: number for number, word in enumerate(special)} | {f"w{number}": number for number in range(FIRST_TOKEN, vocab)}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token=special[PAD], eos_token=special[EOS], unk_token="<unk>", chat_template=CHATML
    )


if __name__ == "__main__":
    main()
