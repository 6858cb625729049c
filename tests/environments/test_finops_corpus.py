"""What the base model reads: plain text alone, the same for the same seed, and slips that hold exactly what was asked for."""

from __future__ import annotations

import random
import re

from temper.data.tokenizer import SPECIAL_TOKENS
from temper.environments.finops.corpus import DRILLED, SELECTING, documents, told
from temper.environments.finops.drills import wanted


def test_a_document_depends_on_its_number_alone():
    assert list(documents(3, 40, SELECTING)) == list(documents(3, 80, SELECTING))[:40]
    assert list(documents(3, 5, SELECTING)) != list(documents(4, 5, SELECTING))


def test_the_base_sees_no_markup_and_no_json():
    for writers in (DRILLED, SELECTING):
        for text in documents(1, 400, writers):
            assert not any(token in text for token in SPECIAL_TOKENS)
            assert not re.search(r'\{\s*"', text)


def test_a_slip_holds_what_was_asked_for_in_that_order_and_no_more():
    for seed in range(50):
        rng = random.Random(seed)
        sentence, facts = told(rng)
        some = rng.sample(list(facts), rng.randint(1, len(facts)))
        first, second, slip = wanted(rng, sentence, facts, some).strip().split("\n")[:3]
        request = second if first == sentence else first
        assert {first, second} >= {sentence}
        assert ", ".join(some) in request
        assert [re.sub(r"^\W+", "", part).split(" ")[0].rstrip(":=") for part in re.split(r"; |, | \| ", slip)] == some
