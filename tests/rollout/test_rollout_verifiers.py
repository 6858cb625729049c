"""Verifiers: their own examples, and the cases that are easily got wrong."""

from __future__ import annotations

import threading
from decimal import Decimal

import pytest

from temper.core.errors import ConfigError
from temper.rollout import verifiers
from temper.rollout.verifiers import (
    VERIFIERS,
    Verifier,
    amount,
    exact_fields,
    json_schema,
    numeric,
    same_items,
    same_text,
    scaled,
    stated_answer,
    to_number,
    verifier,
)


@pytest.mark.parametrize("name", VERIFIERS)
def test_every_verifier_judges_its_own_examples(name):
    finding = VERIFIERS[name].self_check()
    assert finding.status == "pass", finding.reason


def test_the_self_check_fails_for_a_verifier_that_accepts_everything():
    lax = Verifier("lax", "1", lambda text, gold: verifiers.Judged(True, ""), accepts=(("a", "a"),), refuses=(("", "a"),))
    assert lax.self_check().status == "fail"
    assert "accepted ''" in lax.self_check().reason


def test_an_unknown_verifier_names_the_known_ones():
    with pytest.raises(ConfigError, match="numeric"):
        verifier("numerical")


@pytest.mark.parametrize(
    ("text", "number"),
    [("1,234.50", "1234.50"), ("$18", "18"), ("(12.5)", "-12.5"), ("-3", "-3"), ("−3", "-3"), ("18.", "18"), (".5", "0.5"), ("$ 1,452.4", "1452.4")],
)
def test_plain_numbers(text, number):
    assert to_number(text) == Decimal(number)


@pytest.mark.parametrize("text", ["", "abc", "4 or 5", "1/2", "12e3", "--3", "."])
def test_what_is_no_plain_number(text):
    assert to_number(text) is None or text == "4 or 5"
    if text == "4 or 5":
        assert to_number(text) is None


def test_the_stated_answer_is_the_last_marked_one():
    assert stated_answer("#### 3\nno, wait\n#### 4 ") == "4"
    assert stated_answer(r"so \boxed{\frac{1}{2}} holds") == r"\frac{1}{2}"
    assert stated_answer(r"\boxed{1} and \boxed{unclosed") is None
    assert stated_answer("the answer is 4") is None


def test_numeric_judges_value_and_not_form():
    assert numeric("#### 0.50", "1/2").passed is True
    assert numeric("#### $1,200", "1200").passed is True
    assert numeric("#### 12", "120").passed is False
    assert numeric("it is 4", "4").passed is False
    assert numeric("it is 4", "4", lenient=True).passed is True
    assert numeric("4 ducks, 5 dogs", "4", lenient=True).passed is False


def test_numeric_works_off_the_main_thread():
    found = []
    thread = threading.Thread(target=lambda: found.append(numeric(r"#### \frac{3}{6}", "0.5").passed))
    thread.start()
    thread.join(20)
    assert found == [True]


def test_a_comparison_that_takes_too_long_judges_nothing(monkeypatch):
    monkeypatch.setattr(verifiers, "MATH_LIMIT_S", 0.05)
    monkeypatch.setattr(verifiers, "_symbolically_equal", lambda answer, gold: __import__("time").sleep(5))
    assert numeric("#### x^2", "y").passed is None


@pytest.mark.parametrize(
    ("given", "gold", "scale", "right"),
    [
        ("-12.6 million", "-12.6", "million", True),
        ("-12.6", "-12.6", "million", False),  # the scale is part of the answer
        ("-12,600 thousand", "-12.6", "million", True),  # the same amount
        ("22.2%", "22.22", "percent", False),  # gold has two decimals: within 0.005
        ("22.216%", "22.22", "percent", True),
        ("0.2222", "22.22", "percent", True),
        ("$1.2 billion", "$1.2 billion", "", True),
        ("1 million or 2 million", "1", "million", False),
        ("", "4", "", False),
        ("(3) million", "-3", "million", True),
    ],
)
def test_amounts_with_scales(given, gold, scale, right):
    assert scaled(given, gold, scale).passed is right


def test_amount_wants_one_number():
    assert amount("about 12.6 million USD") == (Decimal("12.6"), "million")
    assert amount("2018 and 2019") is None


def test_texts_and_items():
    assert same_text("The annual basis", "Annual basis.").passed is True
    assert same_text("2019", "2,019").passed is True
    assert same_text("", "").passed is False
    assert same_items(["2018", " 2019"], ["2019", "2018", ""]).passed is True
    assert same_items(["2018", "2018"], ["2018", "2019"]).passed is False


def test_json_verifiers_tell_validity_from_truth():
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    wrong_but_valid = '{"a": 2}'
    assert json_schema(wrong_but_valid, schema).passed is True
    assert exact_fields(wrong_but_valid, {"a": 1}).passed is False
    assert json_schema('{"a": "1"}', schema).reason == "a: '1' is not of type 'integer'"
    assert exact_fields('{"a": true}', {"a": 1}).passed is False  # True == 1 in Python, not in JSON
