"""Lexical retrieval (BM25) over a few documents, with what a citation needs: id, version and score."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import bm25s

from temper.core.errors import DataError

WORD = re.compile(r"[^\W_]+(?:[.,]\d+)*", re.UNICODE)
STOP_TEXT = """a an and are as at be by can do does for from has have how i in is it its may of on or our the this to we what when
which who will with you your"""
STOP_WORDS = frozenset(STOP_TEXT.split())


@dataclass(frozen=True)
class Document:
    """A text to be found. `version` goes into citations, so that a superseded text is told from the current one."""

    id: str
    text: str
    version: str = ""


@dataclass(frozen=True)
class Passage:
    """A document that was found, and how well it matched."""

    id: str
    version: str
    text: str
    score: float


def words(text: str) -> list[str]:
    """The words that count: lower case, no stop words, plain plurals and the singular alike."""
    found = [word.lower() for word in WORD.findall(text)]
    return [_stem(word) for word in found if word not in STOP_WORDS]


def _stem(word: str) -> str:
    if len(word) > 4 and word.endswith("ies"):
        return word[:-3] + "y"
    if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")):
        return word[:-1]
    return word


class Index:
    """BM25 (Robertson & Zaragoza 2009; Lucene's variant) over documents, given as `Document` or (id, text)."""

    def __init__(self, documents: Iterable[Document | tuple[str, str]]) -> None:
        self.documents = [item if isinstance(item, Document) else Document(*item) for item in documents]
        if not self.documents:
            raise DataError("an index needs at least one document")
        tokens = [words(document.text) for document in self.documents]
        if not any(tokens):
            raise DataError("no document of the index holds a word", why=f"{len(tokens)} documents, all without words")
        self._known = {word for row in tokens for word in row}
        self._bm25 = bm25s.BM25()
        self._bm25.index(tokens, show_progress=False)

    def search(self, query: str, k: int = 3) -> list[Passage]:
        """The `k` best passages, best first; equal scores keep document order, and what shares no word is left out."""
        known = [word for word in words(query) if word in self._known]
        if not known:
            return []
        scores = self._bm25.get_scores(known).tolist()
        order = sorted((number for number, score in enumerate(scores) if score > 0), key=lambda number: (-scores[number], number))
        return [Passage(self.documents[n].id, self.documents[n].version, self.documents[n].text, scores[n]) for n in order[:k]]
