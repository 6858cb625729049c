"""Text as the firewall compares it: normalised words, and hashes of their n-grams, for many documents at once."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from temper.core.hashing import canonical_json
from temper.core.records import Message, Record

# Scripts written without spaces count one character as one word.
UNSPACED = re.compile(r"([぀-ヿ㐀-䶿一-鿿豈-﫿])")
WORD = re.compile(r"\w+")
SPLITMIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


def words(text: str) -> list[str]:
    """The words of `text`, case-folded and in Unicode's compatibility form; punctuation separates and is dropped."""
    if not text.isascii():
        text = UNSPACED.sub(r" \1 ", unicodedata.normalize("NFKC", text))
    return WORD.findall(text.casefold())


def tidy(text: str) -> str:
    """`text` in Unicode's compatibility form with runs of white space as one space; nothing else changes."""
    return " ".join((text if text.isascii() else unicodedata.normalize("NFKC", text)).split())


def turns(record: Record) -> tuple[Message, ...]:
    """Every message of a record, a preference's two answers included."""
    pair = record.preference
    return record.messages + (pair.chosen + pair.rejected if pair else ())


def said(messages: Iterable[Message], roles: Sequence[str]) -> str:
    """What `roles` said, one message a line, with reasoning and tool calls."""
    parts = []
    for message in messages:
        if message.role in roles:
            calls = [f"{call.name} {canonical_json(call.arguments)}" for call in message.tool_calls]
            parts.append(" ".join(part for part in (message.reasoning or "", message.content, *calls) if part))
    return "\n".join(parts)


@dataclass(frozen=True)
class Grams:
    """N-grams of many documents: `hashes_N` document by document, and where each document's start (`starts_D1`)."""

    hashes_N: np.ndarray
    starts_D1: np.ndarray

    def of(self, document: int) -> np.ndarray:
        """The distinct n-gram hashes of one document, sorted."""
        return np.unique(self.hashes_N[self.starts_D1[document] : self.starts_D1[document + 1]])

    @property
    def owners_N(self) -> np.ndarray:
        """The document of each n-gram."""
        return np.repeat(np.arange(len(self.starts_D1) - 1), np.diff(self.starts_D1))


def ngrams(texts: Sequence[str], size: int, *, keep_short: bool) -> Grams:
    """The word n-grams of every text, as 64-bit hashes that are the same on every machine.

    A text of fewer than `size` words has, with `keep_short`, one n-gram that is the whole text, else none.
    """
    seen: dict[str, int] = {}
    ids: list[int] = []
    counts = np.zeros(len(texts), dtype=np.int64)  # n-grams of each document
    lengths = np.zeros(len(texts), dtype=np.int64)  # words of each document, padding included
    for number, text in enumerate(texts):
        found = words(text)
        if not found or (len(found) < size and not keep_short):
            continue
        ids.extend([seen.setdefault(word, len(seen) + 1) for word in found])
        ids.extend([0] * (size - len(found)))
        lengths[number] = max(len(found), size)
        counts[number] = lengths[number] - size + 1
    starts_D1 = np.concatenate([[0], np.cumsum(counts)])
    if not ids:
        return Grams(np.zeros(0, dtype=np.uint64), starts_D1)
    table = np.array([0, *(word_hash(word) for word in seen)], dtype=np.uint64)
    hashes_W = table[np.array(ids, dtype=np.int64)]
    positions_N = np.arange(starts_D1[-1]) + np.repeat(np.cumsum(lengths) - lengths - starts_D1[:-1], counts)
    total_N = np.zeros(len(positions_N), dtype=np.uint64)
    for offset in range(size):
        total_N += hashes_W[positions_N + offset] * np.uint64(word_hash(f"place {offset}") | 1)
    return Grams(mix(total_N), starts_D1)


def word_hash(word: str) -> int:
    """64 bits of a word's BLAKE2b hash."""
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "big")


def mix(values: np.ndarray) -> np.ndarray:
    """Splitmix64's finaliser (Steele et al. 2014): spreads every input bit over the output."""
    values = (values ^ (values >> np.uint64(30))) * SPLITMIX[0]
    values = (values ^ (values >> np.uint64(27))) * SPLITMIX[1]
    return values ^ (values >> np.uint64(31))
