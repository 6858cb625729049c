"""Tiny randomly initialised checkpoints of four families, each with its own tokenizer and its family's chat-template features.

path = tiny_checkpoint("qwen3", tmp_path / "base")     # a plain transformers folder, in under a second
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)  # fmt: skip

import temper.data

PIECES = r"(?i:'[stmd]|'re|'ve|'ll)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
FAMILIES = ("llama", "qwen3", "mistral", "gemma")
SPECIAL = {
    "llama": (
        "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>",
        "<|finetune_right_pad_id|>",
    ),
    "qwen3": ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    "mistral": ("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
    "gemma": ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"),
}  # fmt: skip
PLAIN_ADDED = {
    "qwen3": ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
}  # added, yet not special: as in Qwen3
ROLES = {
    "llama": {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "pad_token": "<|finetune_right_pad_id|>"},
    "qwen3": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
    "mistral": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"},
    "gemma": {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>"},
}  # fmt: skip
TEXTS = [
    'You are a helpful assistant. {"name": "query_budget", "arguments": {"department": "Marketing", "quarter": "Q3"}}',
    '{"type": "function", "function": {"name": "get_balance", "description": "The balance of an account.", "parameters": {"type": "object"}}}',
    "What is the budget of the sales department in the third quarter? The budget is 120,000 euros, and 30,000 remain.",
    "user assistant system tool model ipython\n\nThe answer is 42. I cannot do that, but I can prepare a draft for approval.",
    "Respond with a JSON for a function call.\n\nCutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n",
] * 3  # fmt: skip
SIZES = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "max_position_embeddings": 2048,
}  # fmt: skip
MODELS = {
    "llama": (LlamaConfig, LlamaForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM), "mistral": (MistralConfig, MistralForCausalLM),
    "gemma": (GemmaConfig, GemmaForCausalLM),
}  # fmt: skip


def template_text(family: str) -> str:
    """The family's chat template. Qwen3's is the history-keeping one that temper ships."""
    if family == "qwen3":
        return (Path(temper.data.__file__).parent / "qwen3.jinja").read_text()
    return (Path(__file__).parent / "data" / "templates" / f"{family}.jinja").read_text()


def byte_level(vocabulary: int, special: tuple[str, ...]) -> Tokenizer:
    """Byte-level BPE over the pieces of Llama 3 and Qwen: a run of line ends is one piece, whatever follows it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PIECES), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False)
    )
    return tokenizer


def sentence_pieces(vocabulary: int, special: tuple[str, ...], *, prefix: bool) -> Tokenizer:
    """BPE over ▁-marked text with byte fallback, as Gemma and (with a space before the first word: `prefix`) Mistral have it."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    alphabet = [chr(code) for code in range(33, 127)] + ["\n", "▁"]
    trainer = trainers.BpeTrainer(vocab_size=vocabulary - 256, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    described = json.loads(tokenizer.to_str())
    vocab = described["model"]["vocab"]
    vocab |= {f"<0x{byte:02X}>": len(vocab) + byte for byte in range(256)}
    described["model"]["byte_fallback"] = True
    tokenizer = Tokenizer.from_str(json.dumps(described))
    if prefix:
        tokenizer.normalizer = None
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return tokenizer


@cache
def trained(family: str) -> str:
    """The family's tokenizer as JSON, trained once a process."""
    bytewise = family in ("llama", "qwen3")
    tokenizer = byte_level(512, SPECIAL[family]) if bytewise else sentence_pieces(768, SPECIAL[family], prefix=family == "mistral")
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in PLAIN_ADDED.get(family, ())])
    return tokenizer.to_str()


def tiny_tokenizer(family: str) -> PreTrainedTokenizerFast:
    """A tokenizer of a few hundred entries with the family's special tokens and chat template."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(trained(family)), clean_up_tokenization_spaces=False, **ROLES[family]
    )
    tokenizer.chat_template = template_text(family)
    return tokenizer


def tiny_checkpoint(family: str, folder: Path, *, seed: int = 0) -> Path:
    """Write a randomly initialised float32 checkpoint of one of FAMILIES into `folder`, as plain transformers would; return `folder`."""
    tokenizer = tiny_tokenizer(family)
    config_class, model_class = MODELS[family]
    config = config_class(
        **SIZES, vocab_size=len(tokenizer), bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=family in ("qwen3", "gemma"),
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = model_class(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Path(folder)
