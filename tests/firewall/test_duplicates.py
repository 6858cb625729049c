"""Near duplicates: by hand, against brute force, and the settings that would miss too many."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from temper.core.records import Message, Preference, Provenance, Record, ToolCall
from temper.firewall.dedup import NearDuplicates, content_hash, jaccard, minhash, near_duplicates
from temper.firewall.text import ngrams, words

PROVENANCE = Provenance(source="test", licence="MIT", split="train", privacy="public", access="public", synthetic=False)
ONE_TEXT = NearDuplicates(apart=False)


def chat(user: str, assistant: str, **fields: object) -> Record:
    messages = (Message(role="user", content=user), Message(role="assistant", content=assistant))
    return Record.model_validate({"messages": messages, "provenance": PROVENANCE, **fields})


def grams_of(text: str, size: int) -> set[tuple[str, ...]]:
    found = words(text)
    return {tuple(found[index : index + size]) for index in range(len(found) - size + 1)} or {tuple(found)}


def test_words_ignore_case_punctuation_and_width() -> None:
    assert words("The Q3 budget, in ＵＳＤ:\n1,200!") == ["the", "q3", "budget", "in", "usd", "1", "200"]
    assert words("华东 Q3") == ["华", "东", "q3"]
    assert words("…") == []


def test_ngrams_by_hand() -> None:
    grams = ngrams(["a b c", "", "a b", "b c d", "a b c"], 2, keep_short=True)
    # "a b c" -> ab, bc; "" -> none; "a b" -> ab; "b c d" -> bc, cd; "a b c" -> ab, bc
    assert grams.starts_D1.tolist() == [0, 2, 2, 3, 5, 7]
    ab, bc = grams.hashes_N[:2]
    assert grams.hashes_N[2] == ab
    assert grams.hashes_N[3] == bc
    assert grams.hashes_N[5:].tolist() == [ab, bc]
    assert len({*grams.hashes_N.tolist()}) == 3
    assert ngrams(["a b"], 3, keep_short=False).starts_D1.tolist() == [0, 0]
    assert ngrams(["a b"], 3, keep_short=True).starts_D1.tolist() == [0, 1]


@given(st.lists(st.text("ab c", max_size=12), max_size=6), st.integers(1, 4))
def test_ngrams_against_sets_of_words(texts: list[str], size: int) -> None:
    grams = ngrams(texts, size, keep_short=True)
    for left in range(len(texts)):
        for right in range(len(texts)):
            if words(texts[left]) and words(texts[right]):
                one, other = grams_of(texts[left], size), grams_of(texts[right], size)
                expected = len(one & other) / len(one | other)
                assert jaccard(set(grams.of(left).tolist()), set(grams.of(right).tolist())) == expected


def test_minhash_estimates_the_jaccard_index() -> None:
    # 100 words shared of 150: Jaccard 100 / 200 = 0.5; 112 hashes have a standard deviation of 0.047
    left, right = (" ".join(f"w{index}" for index in range(start, start + 150)) for start in (0, 50))
    signatures = minhash(ngrams([left, right], 1, keep_short=True), 112)
    assert (signatures[0] == signatures[1]).mean() == pytest.approx(0.5, abs=4 * 0.047)


def test_recall_of_the_published_setting() -> None:
    # P = 1 - (1 - s^8)^14: 0.565 at 0.7, 0.924 at 0.8, 0.988 at 0.85
    rule = NearDuplicates()
    assert [round(rule.recall(similarity), 3) for similarity in (0.7, 0.8, 0.85)] == [0.565, 0.924, 0.988]


@pytest.mark.parametrize(("shared", "own", "similarity"), [(80, 10, 0.8), (170, 15, 0.85)])
def test_pairs_are_found_as_often_as_the_formula_says(shared: int, own: int, similarity: float) -> None:
    assert shared / (shared + 2 * own) == similarity
    texts = []
    for pair in range(600):
        common = [f"p{pair}s{index}" for index in range(shared)]
        texts += [" ".join([*common, *(f"p{pair}{side}{index}" for index in range(own))]) for side in "lr"]
    rule = NearDuplicates(shingle=1, apart=False)
    found = near_duplicates([texts], rule)
    expected = rule.recall(similarity)
    deviation = (expected * (1 - expected) / 600) ** 0.5
    assert sum(hit is not None for hit in found) / 600 == pytest.approx(expected, abs=4 * deviation)


def test_settings_that_would_miss_pairs_are_refused() -> None:
    with pytest.raises(ValidationError, match=r"find only 21% of pairs at 0\.6"):
        NearDuplicates(threshold=0.6)
    assert NearDuplicates(threshold=0.6, bands=28, rows=4).recall(0.6) > 0.9


def test_first_is_kept_and_a_refused_one_stands_in_nobodys_way() -> None:
    base = [f"w{index}" for index in range(40)]
    # Each next text replaces four words more at the end: neighbours share 31 of 41 or more shingles, others fewer.
    chain = [" ".join(base[: 40 - cut] + [f"x{index}" for index in range(cut)]) for cut in (0, 4, 8)]
    # 36 five-word shingles each. 0 and 4: 32 shared, 32/40 = 0.8. 4 and 8: 28 + 0 shared, as x's shift: 28/44.
    found = near_duplicates([chain], ONE_TEXT)
    assert found[0] is None
    assert found[1] == (0, pytest.approx(0.8))
    assert found[2] is None  # alike only with the second, which is not kept


def test_roles_apart_keep_another_question_about_the_same_table() -> None:
    table = " ".join(f"cell{index}" for index in range(300))
    users = [f"{table} What was Other in 2019?", f"{table} What was Total in 2018?", f"{table} What was Other in 2019, please?"]
    answers = ["Other was 44.1 million in 2019.", "Total was 1202.9 million in 2018.", "Other was 44.1 million in 2019."]
    kept = [hit is None for hit in near_duplicates([users, answers], NearDuplicates())]
    assert kept == [True, True, False]
    joined = [f"{user}\n{answer}" for user, answer in zip(users, answers, strict=True)]
    assert [hit is None for hit in near_duplicates([joined], ONE_TEXT)] == [True, False, False]


def test_empty_texts_are_nobodys_duplicate() -> None:
    assert near_duplicates([["", "…", "a b"], ["", "", ""]], NearDuplicates()) == [None, None, None]
    assert near_duplicates([[], []], NearDuplicates()) == []


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6))
def test_every_refusal_is_of_a_kept_record_at_or_above_the_threshold(seed: int) -> None:
    rng = random.Random(seed)
    texts = []
    for _ in range(12):
        base = [rng.choice("abcdefghijklmnopqrstuvwxyz") * rng.randint(1, 3) for _ in range(60)]
        texts += [" ".join(word if rng.random() > share else "zz" for word in base) for share in (0.0, 0.01, 0.03, 0.1)]
    found = near_duplicates([texts], ONE_TEXT)
    sets = [grams_of(text, 5) for text in texts]
    kept: set[int] = set()
    for number, hit in enumerate(found):
        if hit is None:
            kept.add(number)
            continue
        other, index = hit
        assert other in kept
        assert index >= 0.8
        assert index == len(sets[number] & sets[other]) / len(sets[number] | sets[other])


def test_the_exact_hash_sees_what_is_said_and_nothing_else() -> None:
    base = chat("How much?", "12 USD")
    elsewhere = PROVENANCE.model_copy(update={"source": "another", "split": "dev"})
    same = [
        chat("How  much?\n", "12 USD"),
        chat("How much?", "12 USD", provenance=elsewhere, slice="x", task_id="y"),
        chat("Ｈow much?", "12 USD"),
    ]
    assert {content_hash(item) for item in same} == {content_hash(base)}
    pair = Preference(chosen=(Message(role="assistant", content="a"),), rejected=(Message(role="assistant", content="b"),))
    turned = Preference(chosen=pair.rejected, rejected=pair.chosen)
    others = [chat("How much?", "13 USD"), chat("how much?", "12 USD")]
    pairs = [chat("How much?", "12 USD", preference=item) for item in (pair, turned)]
    assert len({content_hash(item) for item in [base, *others, *pairs]}) == 5


def test_call_ids_do_not_hide_a_repetition() -> None:
    def called(name: str, value: int) -> Record:
        call = ToolCall(name="f", arguments={"a": value}, id=name)
        turns = (
            Message(role="user", content="x"),
            Message(role="assistant", tool_calls=(call,)),
            Message(role="tool", content="1", tool_call_id=name),
        )
        return Record(messages=turns, provenance=PROVENANCE)

    assert content_hash(called("one", 1)) == content_hash(called("two", 1))
    assert content_hash(called("one", 1)) != content_hash(called("one", 2))


def test_hashes_are_the_same_on_every_machine() -> None:
    assert ngrams(["a b c d e"], 5, keep_short=True).hashes_N.tolist() == [8896333498963714743]
    assert ngrams(["a b c d e"], 5, keep_short=True).hashes_N.dtype == np.uint64
