"""BM25 with citable passages."""

from __future__ import annotations

import math

import pytest

from temper.core.errors import DataError
from temper.rollout.retrieval import Document, Index, words

HANDBOOK = [
    Document("P-1", "Transfers above 5,000 USD need a second approver.", "3"),
    Document("P-2", "Travel costs are claimed within thirty days.", "1"),
    Document("P-3", "A travel claim needs receipts; travel by train is preferred.", "2"),
]


def test_the_best_passages_come_first_with_id_and_version():
    index = Index(HANDBOOK)
    best = index.search("Who approves a transfer over 5,000 USD?", k=1)[0]
    assert (best.id, best.version, best.text) == ("P-1", "3", HANDBOOK[0].text)
    assert [passage.id for passage in index.search("travel")] == ["P-3", "P-2"]  # said twice, although in more words


def test_what_shares_no_word_is_not_found():
    assert Index(HANDBOOK).search("quarterly budget") == []
    assert Index(HANDBOOK).search("who is the") == []  # stop words alone


def test_equal_scores_keep_the_order_of_documents():
    twins = Index([("b", "same words"), ("a", "same words"), ("c", "other text")])
    assert [passage.id for passage in twins.search("same words", k=5)] == ["b", "a"]


def test_a_score_by_hand():
    # Lucene's BM25, k1 = 1.5, b = 0.75: three documents of two words (so length does not matter), "cat" in one, once:
    # idf = ln(1 + (3 - 1 + 0.5)/(1 + 0.5)); tf = 1/(1 + 1.5).
    index = Index([("a", "cat dog"), ("b", "dog bird"), ("c", "bird fish")])
    expected = math.log(1 + 2.5 / 1.5) * 1 / 2.5
    assert index.search("cat")[0].score == pytest.approx(expected, rel=1e-5)


def test_words_are_matched_in_singular_and_plural():
    assert words("Policies, transfers and the status of 5,000 USD") == ["policy", "transfer", "status", "5,000", "usd"]


def test_an_index_without_words_is_refused():
    with pytest.raises(DataError, match="at least one document"):
        Index([])
    with pytest.raises(DataError, match="no document of the index holds a word"):
        Index([("a", "the of"), ("b", "…")])
