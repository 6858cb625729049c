"""Tiny models, tokenizers and batches for the tests of this room."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from temper.policy.model import Policy

VOCAB = 61
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
CONFIGS = {
    "llama": lambda: LlamaConfig(**SIZES, tie_word_embeddings=False),
    "qwen3": lambda: Qwen3Config(**SIZES, tie_word_embeddings=True),
    "mistral": lambda: MistralConfig(**SIZES, sliding_window=8),
    "gemma2": lambda: Gemma2Config(**SIZES, query_pre_attn_scalar=16, sliding_window=8, final_logit_softcapping=5.0),
    "gemma3": lambda: Gemma3TextConfig(**SIZES, query_pre_attn_scalar=16, sliding_window=8),
}


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {"<|endoftext|>": 0, "<|pad|>": 1, "<|im_end|>": 2, "<unk>": 3} | {f"w{number}": number for number in range(4, VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|pad|>", unk_token="<unk>")
    fast.chat_template = "{% for m in messages %}{{ m.content }} <|im_end|> {% endfor %}"
    return fast


def tiny_policy(family: str = "qwen3", seed: int = 0, **options) -> Policy:
    """A tiny policy whose logits are spread widely enough to have something to lose."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[family](), dtype=torch.float32).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(4.0) if weight.ndim == 2 else weight.add_(0.1 * torch.randn_like(weight))
    return Policy(model, tiny_tokenizer(), **options)


def tiny_checkpoint(folder: Path, family: str = "qwen3") -> Path:
    tiny_policy(family).save(folder)
    return folder


def make_batch(
    lengths: list[int], *, supervised: float = 0.4, seed: int = 0, width: int | None = None, adapters=None, vocab: int = VOCAB
) -> SimpleNamespace:
    """Right-padded random rows; a token is supervised with probability `supervised`, the last always."""
    generator = torch.Generator().manual_seed(seed)
    width = width or max(lengths)
    tokens_B_T = torch.full((len(lengths), width), 1)
    weights_B_T = torch.zeros(len(lengths), width)
    attention_B_T = torch.zeros(len(lengths), width, dtype=torch.bool)
    positions_B_T = torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        tokens_B_T[row, :length] = torch.randint(4, vocab, (length,), generator=generator)
        weights_B_T[row, 1:length] = (torch.rand(length - 1, generator=generator) < supervised).float()
        weights_B_T[row, length - 1] = 1.0
        attention_B_T[row, :length] = True
        positions_B_T[row, :length] = torch.arange(length)
    return SimpleNamespace(
        tokens_B_T=tokens_B_T,
        weights_B_T=weights_B_T,
        attention_B_T=attention_B_T,
        positions_B_T=positions_B_T,
        mask_B_T=weights_B_T != 0,
        adapters=adapters or [None] * len(lengths),
        support=None,
        layout=None,
    )


def stock_logprobs(policy: Policy, batch: SimpleNamespace, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """(log-probs, entropy) at every position but the first, by transformers' own logits over the whole vocabulary."""
    logits_B_T_V = policy.model(input_ids=batch.tokens_B_T, attention_mask=batch.attention_B_T.long()).logits.double() / temperature
    logp_B_T_V = logits_B_T_V.log_softmax(-1)
    entropy_B_T = -(logp_B_T_V.exp() * logp_B_T_V).sum(-1)
    logprobs_B_T = logp_B_T_V[:, :-1].gather(-1, batch.tokens_B_T[:, 1:, None]).squeeze(-1)
    first = torch.zeros(len(batch.tokens_B_T), 1, dtype=torch.float64)
    return torch.cat([first, logprobs_B_T], 1), torch.cat([first, entropy_B_T[:, :-1]], 1)
