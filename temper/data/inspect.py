"""What a training row looks like: its text in pieces, trained or only read, and its counts."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from collections.abc import Sequence as Rows
from dataclasses import dataclass, replace
from typing import Any

from temper.core.records import Noun
from temper.data.sequence import Sequence

Span = tuple[str, bool]  # a piece of text, and whether it is trained


class Counts(Noun):
    """What a set of rows holds. `share` is the part of tokens that is trained; `cut` rows lost their ends to the longest row allowed."""

    rows: int
    tokens: int
    supervised: int
    longest: int
    fewest_supervised: int
    share: float
    cut: int = 0


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
        share=sum(trained) / sum(lengths) if rows else 0.0, cut=sum(row.cut > 0 for row in rows),
    )  # fmt: skip


@dataclass(frozen=True)
class TokenLine:
    """One token of a comparison: `=` in both rows, `-` in the first alone, `+` in the second alone."""

    kind: str
    place: int
    token: int
    text: str
    trained: bool | None = None

    def shown(self) -> str:
        """The line as text."""
        return f"{self.kind} {self.place:5d} {self.token:6d} {self.text!r}" + ("  trained" if self.trained else "")


def token_lines(ids: Rows[int], tokenizer: Any, trained: Rows[bool] | None = None) -> list[TokenLine]:
    """A row token by token."""
    texts = [tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False) for token in ids]
    flags: Rows[bool | None] = [None] * len(ids) if trained is None else trained
    return [TokenLine("=", *each) for each in zip(range(len(ids)), ids, texts, flags, strict=True)]


def diff_lines(first: list[TokenLine], second: list[TokenLine], *, by_id: bool = True, around: int = 4) -> list[TokenLine]:
    """Where two rows part, token by token, `around` equal tokens before and after; empty where they are equal.

    Tokens are equal that have one id (`by_id` false: one text, for two tokenizers) and are both trained or both not.
    """
    keys = [[(line.token if by_id else line.text, line.trained) for line in lines] for lines in (first, second)]
    lines: list[TokenLine] = []
    for group in difflib.SequenceMatcher(a=keys[0], b=keys[1], autojunk=False).get_grouped_opcodes(around):
        for kind, start, stop, other_start, other_stop in group:
            if kind == "equal":
                lines += first[start:stop]
                continue
            lines += [replace(line, kind="-") for line in first[start:stop]]
            lines += [replace(line, kind="+") for line in second[other_start:other_stop]]
    return lines


def token_diff(first: Rows[int], second: Rows[int], tokenizer: Any) -> list[TokenLine]:
    """`diff_lines` of two rows of one tokenizer."""
    return diff_lines(token_lines(first, tokenizer), token_lines(second, tokenizer))
