"""Duplicates: exact by a hash of the normalised messages, near by MinHash verified with the true Jaccard index."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pydantic import Field, model_validator

from temper.core.config import Config
from temper.core.hashing import hash_value
from temper.core.records import Message, Record, Role
from temper.firewall.text import Grams, mix, ngrams, tidy, word_hash

LEAST_RECALL = 0.9
BLOCK = 1 << 18  # n-grams hashed at a time: the scratch arrays stay in cache


class NearDuplicates(Config):
    """When two records say nearly the same: Jaccard index of their word n-grams at or above `threshold`.

    `roles` are the turns compared: each role by itself with `apart` (the same table with another question and
    answer is no repetition), else all as one text. Bands of rows decide which pairs are looked at: a pair of similarity s is
    found with probability 1 - (1 - s^rows)^bands (0.92 at 0.8 for 14 bands of 8; Leskovec et al., Mining of
    Massive Datasets, 3.4), and settings that find fewer than 0.9 of the pairs at the threshold are refused.
    """

    threshold: float = Field(0.8, gt=0, le=1)
    shingle: int = Field(5, ge=1)
    bands: int = Field(14, ge=1)
    rows: int = Field(8, ge=1)
    roles: tuple[Role, ...] = Field(("user", "assistant"), min_length=1)
    apart: bool = True

    def recall(self, similarity: float) -> float:
        """The probability that a pair of this similarity is looked at."""
        return float(1 - (1 - similarity**self.rows) ** self.bands)

    @model_validator(mode="after")
    def _finds_enough(self) -> NearDuplicates:
        if self.recall(self.threshold) < LEAST_RECALL:
            found = f"{self.bands} bands of {self.rows} find only {self.recall(self.threshold):.0%} of pairs at {self.threshold}"
            raise ValueError(f"{found}; use more bands or fewer rows, for example bands=28 rows=4")
        return self


def content_hash(record: Record) -> str:
    """The hash of what is said in a record: roles, texts and calls; not ids, provenance or white space."""
    pair = record.preference
    sides = [[spoken(message) for message in side] for side in ((pair.chosen, pair.rejected) if pair else ())]
    return hash_value([[spoken(message) for message in record.messages], sides])


def spoken(message: Message) -> list[object]:
    """What a message says: role, texts and calls, whatever its ids and white space."""
    calls = [[call.name, tidy(call.arguments) if isinstance(call.arguments, str) else call.arguments] for call in message.tool_calls]
    return [message.role, tidy(message.content), tidy(message.reasoning or ""), calls]


def near_duplicates(texts: Sequence[Sequence[str]], rule: NearDuplicates) -> list[tuple[int, float] | None]:
    """For each record, the earlier *kept* one it nearly repeats and their Jaccard index; None where it is kept.

    `texts` holds, for each role, what each record says in it. Records are taken in order, and one that is itself
    refused stands in nobody's way. A record without words is kept.
    """
    parts = [ngrams(role, rule.shingle, keep_short=True) for role in texts]
    whole = together(parts)
    signatures_D_H = minhash(whole, rule.bands * rule.rows)
    keys_D_B = band_keys(signatures_D_H, rule.bands)
    alike = Alike(parts if rule.apart else [whole])
    filled_D = np.diff(whole.starts_D1) > 0
    # Four standard deviations below the threshold: a candidate whose signature agrees less is not worth the true index.
    worth = rule.threshold - 4 * np.sqrt(rule.threshold * (1 - rule.threshold) / signatures_D_H.shape[1])
    buckets: list[dict[int, list[int]]] = [{} for _ in range(rule.bands)]
    found: list[tuple[int, float] | None] = [None] * len(filled_D)
    for number, keys in enumerate(keys_D_B.tolist()):
        if not filled_D[number]:
            continue
        candidates = {other for bucket, key in zip(buckets, keys, strict=True) for other in bucket.get(key, ())}
        if candidates:
            ordered = np.array(sorted(candidates))
            agreement = (signatures_D_H[ordered] == signatures_D_H[number]).mean(axis=1)
            close = ordered[agreement >= worth].tolist()
            scored = ((other, alike(number, other, rule.threshold)) for other in close)
            found[number] = next((hit for hit in scored if hit[1] >= rule.threshold), None)
        if found[number] is None:
            for bucket, key in zip(buckets, keys, strict=True):
                bucket.setdefault(key, []).append(number)
    return found


class Alike:
    """The true Jaccard index of two records: the least over the parts that either of them has."""

    def __init__(self, parts: Sequence[Grams]) -> None:
        self.parts = parts
        self.sets: list[dict[int, set[int]]] = [{} for _ in parts]

    def _set(self, part: int, record: int) -> set[int]:
        known = self.sets[part]
        if record not in known:
            known[record] = set(self.parts[part].of(record).tolist())
        return known[record]

    def __call__(self, left: int, right: int, threshold: float) -> float:
        """The index, or any value below `threshold` as soon as one part is below it."""
        least = 1.0
        for part in range(len(self.parts)):
            one, other = self._set(part, left), self._set(part, right)
            if one or other:
                # |A and B| is at most the smaller set, so sizes alone rule most pairs out.
                small, large = sorted((len(one), len(other)))
                index = jaccard(one, other) if small >= threshold * large else 0.0
                least = min(least, index)
            if least < threshold:
                return least
        return least


def together(parts: Sequence[Grams]) -> Grams:
    """The n-grams of every part of each record as one set; equal words in two parts stay apart."""
    hashes = [mix(part.hashes_N + np.uint64(word_hash(f"part {index}"))) for index, part in enumerate(parts)]
    owners_N = np.concatenate([part.owners_N for part in parts])
    order = np.argsort(owners_N, kind="stable")
    counts_D = sum(np.diff(part.starts_D1) for part in parts)
    return Grams(np.concatenate(hashes)[order], np.concatenate([[0], np.cumsum(counts_D)]))


def jaccard(left: set[int], right: set[int]) -> float:
    """|A and B| / |A or B|; two empty sets share nothing."""
    shared = len(left & right)
    union = len(left) + len(right) - shared
    return shared / union if union else 0.0


def minhash(grams: Grams, count: int) -> np.ndarray:
    """Each document's `count` minimum hashes (Broder 1997), as [documents, count]; all ones where it has no n-gram.

    The hash functions are x -> high 32 bits of (a x + b) mod 2^64 with odd a (Dietzfelbinger et al. 1997).
    """
    documents = len(grams.starts_D1) - 1
    signatures_D_H = np.full((documents, count), 0xFFFFFFFF, dtype=np.uint32)
    factors_H = np.array([word_hash(f"factor {index}") | 1 for index in range(count)], dtype=np.uint64)
    shifts_H = np.array([word_hash(f"shift {index}") for index in range(count)], dtype=np.uint64)
    filled_D = np.flatnonzero(np.diff(grams.starts_D1))
    position = 0
    while position < len(filled_D):
        start = grams.starts_D1[filled_D[position]]
        stop = max(position + 1, int(np.searchsorted(grams.starts_D1[filled_D], start + BLOCK)))
        chosen = filled_D[position:stop]
        block_N = grams.hashes_N[start : grams.starts_D1[chosen[-1] + 1]]
        offsets = grams.starts_D1[chosen] - start
        for index in range(count):
            hashed_N = ((block_N * factors_H[index] + shifts_H[index]) >> np.uint64(32)).astype(np.uint32)
            signatures_D_H[chosen, index] = np.minimum.reduceat(hashed_N, offsets)
        position = stop
    return signatures_D_H


def band_keys(signatures_D_H: np.ndarray, bands: int) -> np.ndarray:
    """One 64-bit key for each band of each signature, as [documents, bands]."""
    rows = signatures_D_H.shape[1] // bands
    banded = signatures_D_H.reshape(len(signatures_D_H), bands, rows).astype(np.uint64)
    keys_D_B = np.zeros((len(signatures_D_H), bands), dtype=np.uint64)
    for row in range(rows):
        keys_D_B = mix(keys_D_B * np.uint64(0x9E3779B97F4A7C15) + banded[:, :, row])
    return keys_D_B
