"""What a training row looks like: its text in pieces, trained or only read, and its counts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from temper.core.records import Noun
from temper.data.sequence import Sequence

Span = tuple[str, bool]  # a piece of text, and whether it is trained


class Counts(Noun):
    """What a set of rows holds. `share` is the part of tokens that is trained."""

    rows: int
    tokens: int
    supervised: int
    longest: int
    fewest_supervised: int
    share: float


def token_spans(sequence: Sequence, tokenizer: Any) -> list[Span]:
    """Each token's text with its mask. Bytes of one letter that are spread over tokens show as �."""
    texts = tokenizer.batch_decode([[token] for token in sequence.tokens], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return list(zip(texts, (weight != 0 for weight in sequence.weights), strict=True))


def text_spans(sequence: Sequence, tokenizer: Any) -> list[Span]:
    """The row's text in stretches of equal mask, each decoded whole."""
    runs: list[tuple[list[int], bool]] = []
    for token, weight in zip(sequence.tokens, sequence.weights, strict=True):
        if not runs or runs[-1][1] != (weight != 0):
            runs.append(([], weight != 0))
        runs[-1][0].append(token)
    return [(tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False), trained) for tokens, trained in runs]


def counts(sequences: Iterable[Sequence]) -> Counts:
    """The counts of some rows."""
    rows = list(sequences)
    lengths, trained = [len(row.tokens) for row in rows], [row.supervised for row in rows]
    return Counts(
        rows=len(rows), tokens=sum(lengths), supervised=sum(trained), longest=max(lengths, default=0), fewest_supervised=min(trained, default=0),
        share=sum(trained) / sum(lengths) if rows else 0.0,
    )  # fmt: skip


def difference(first: list[int], second: list[int], tokenizer: Any, around: int = 4) -> list[str]:
    """Where two token rows part, token by token: one line a token, `=` shared, `-` only first, `+` only second."""
    import difflib

    lines: list[str] = []
    matcher = difflib.SequenceMatcher(a=first, b=second, autojunk=False)
    for group in matcher.get_grouped_opcodes(around):
        for kind, start, stop, other_start, other_stop in group:
            if kind == "equal":
                lines += [f"= {at:5d} {token:6d} {tokenizer.decode([token])!r}" for at, token in enumerate(first[start:stop], start)]
                continue
            lines += [f"- {at:5d} {token:6d} {tokenizer.decode([token])!r}" for at, token in enumerate(first[start:stop], start)]
            lines += [
                f"+ {at:5d} {token:6d} {tokenizer.decode([token])!r}"
                for at, token in enumerate(second[other_start:other_stop], other_start)
            ]
    return lines
