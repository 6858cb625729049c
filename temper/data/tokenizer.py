"""Training a byte-level BPE tokenizer for a small model of one's own."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = (
    "<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>",
)  # fmt: skip

# A capitalised word is one piece without the space before it, so that a name in a sentence and the same name in
# JSON quotes are the same tokens: a small model copies it. Each digit stands alone; runs of punctuation may merge.
PIECES = r" ?[a-z]+|[A-Z]+[a-z]*|[0-9]|[^A-Za-z0-9]+"


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of `vocab_size` entries with ChatML and tool tokens.

    `<|im_end|>` is the end token (what a chat turn stops on), `<|endoftext|>` parts documents, and `<|pad|>` is
    a token of its own, so that masking the padding never masks an end. The chat template is `chatml.jinja`.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PIECES), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=list(SPECIAL_TOKENS), initial_alphabet=alphabet, show_progress=False),
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|pad|>", clean_up_tokenization_spaces=False
    )
    template = Path(__file__).with_name("chatml.jinja")
    fast.chat_template = template.read_text()
    return fast
