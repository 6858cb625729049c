"""Personal data and secrets: what is found, what only looks like it, and what a redaction is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from temper.core.records import Message, Outcome, Preference, Provenance, Record, Sampled, ToolCall, ToolSpec
from temper.firewall.privacy import entropy, find, iban_valid, luhn, redact, redact_text, scan

PROVENANCE = Provenance(source="test", licence="MIT", split="train", privacy="internal", access="team", synthetic=False)

FOUND = {
    "write to jane.doe+x@acme-bank.co.uk, please": "email",
    "call +49 30 901820 today": "phone",
    "call +14155552671": "phone",
    "my number is (415) 555-2671.": "phone",
    "415-555-2671": "phone",
    "phone: 030 901820": "phone",
    "pay to DE89 3704 0044 0532 0130 00 now": "iban",
    "GB82WEST12345698765432": "iban",
    "card 4111 1111 1111 1111": "card",
    "card 4111111111111111.": "card",
    "amex 3782-822463-10005": "card",
    "SSN 536-90-4399": "ssn",
    "from 8.8.8.8 at noon": "ip_address",
    "from 2001:4860:4860::8888": "ip_address",
    "-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY-----": "private_key",
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.dozjgNryP4J3jVmNHl0w": "jwt",
    "AKIAIOSFODNN7EXAMPLE": "aws_key",
    "ghp_" + "a1B2c3D4e5" * 4: "api_key",
    "sk-proj-" + "a1B2c3D4e5" * 4: "api_key",
    "postgres://admin:s3cr3tpw@db.internal/x": "url_password",
    'password = "9f8A-kQ2z!xT"': "password",
    "the api key is 7d0cA91bE4f26358": "password",
    "Authorization: Bearer 7d0cA91bE4f26358": "password",
}
NOT_FOUND = [
    "The amount is 1,234,567.89 USD, of which 4,111,111,111,111,111 is due.",
    "Invoice INV-4111111111111111 of 2024-03-12, account 1000-2000-3000-4000.",
    "4111111111111112",  # Luhn's check digit is wrong
    "1234567890123456",  # no issuer
    "DE88 3704 0044 0532 0130 00",  # remainder modulo 97 is not 1
    "user@example.com, ops@bank.test",  # reserved names (RFC 2606)
    "call (415) 555-0123",  # reserved for fiction
    "5 +120000000 = 120000005",
    "x+12345678",
    "2019 2018 2017 | 417 356 2019",
    "Q1 200 300 4000, Q2 415 555 2671",
    "| 44.1 | 56.7 | -12.6 |",
    "000-12-3456 and 666-12-3456 and 900-12-3456",
    "10.0.0.1 192.168.1.1 127.0.0.1 203.0.113.7",  # private, or for documentation
    "version 1.2.3.4 and section 8.1.2.3",
    "999.1.2.3 at 12:30:45",
    "password: changeme, password: ********, password: ${DB_PASSWORD}",
    "your password is required to approve the transfer",
    "the secret is patience; token budgets matter",
    "the key is departments",
    "risk-adjusted-return-on-capital-2024-estimates",
    "std::vector and a::b",
    "+3.5% and +12,500,000.00",
    "journal 20240312-000417 posted 1700000000000",
]


@pytest.mark.parametrize("text", FOUND)
def test_found(text: str) -> None:
    assert [kind for kind, _, _ in find(text)] == [FOUND[text]]


@pytest.mark.parametrize("text", NOT_FOUND)
def test_not_found(text: str) -> None:
    assert find(text) == []


def test_checksums_by_hand() -> None:
    # 7992739871 + 3: doubled digits 9,9,7,... sum to 70 (the example in ISO/IEC 7812)
    assert luhn("79927398713")
    assert not luhn("79927398710")
    # GB82 WEST 1234 5698 7654 32 -> 3214282912345698765432161182 mod 97 = 1
    assert 3214282912345698765432161182 % 97 == 1
    assert iban_valid("GB82 WEST 1234 5698 7654 32")
    assert not iban_valid("GB82 WEST 1234 5698 7654 3")  # 21 characters; Britain's have 22


def test_entropy_by_hand() -> None:
    assert entropy("aaaa") == 0.0
    assert entropy("abcd") == 2.0  # four signs, each a quarter: log2 4
    assert entropy("aab") == pytest.approx(0.9183, abs=1e-4)  # -(2/3 log2 2/3 + 1/3 log2 1/3)


@given(st.integers(10**14, 10**15 - 1))
def test_one_wrong_digit_breaks_luhn(number: int) -> None:
    check = next(digit for digit in range(10) if luhn(f"{number}{digit}"))
    assert sum(luhn(f"{number}{digit}") for digit in range(10)) == 1
    assert not luhn(f"{number + 1 if number % 10 < 9 else number - 1}{check}")


@given(st.text(max_size=60))
def test_a_redacted_text_holds_nothing_more_to_find(text: str) -> None:
    full = f"{text} jane@acme.io {text} password: 9f8A-kQ2z!xT {text}"
    assert find(redact_text(full)) == []


def record() -> Record:
    mail = "jane@acme.io"
    call = ToolCall(name="send", arguments={"to": [mail], mail: 1, "card": 4111111111111111, "sum": 4111.11}, id="c")
    messages = (
        Message(role="system", content=f"Ask {mail}."),
        Message(role="user", content=f"I am {mail}"),
        Message(role="assistant", content="ok", reasoning=f"{mail}?", tool_calls=(call,)),
        Message(role="tool", content='{"iban": "DE89370400440532013000"}', tool_call_id="c"),
        Message(role="assistant", content="done"),
    )
    sampled = (Sampled(prompt_ids=(1,), token_ids=(2,), logprobs=(-1.0,), finish_reason="stop"),)
    preference = Preference(
        chosen=(Message(role="assistant", content=mail),), rejected=(Message(role="assistant", content="no"),), reason=mail
    )
    tools = (ToolSpec(name="send", description=f"as {mail}"),)
    return Record(
        messages=messages, provenance=PROVENANCE, tools=tools, sampled=sampled, preference=preference,
        outcome=Outcome(detail={"seen": [mail]}), slice="s", task_id="t",
    )  # fmt: skip


def test_every_place_is_looked_into() -> None:
    mails = ["system message", "messages[1].content", "messages[2].reasoning", "messages[2].send.to[0]", "messages[2].send key"]
    mails += ["chosen[0].content", "reason", "outcome.seen[0]", "tools"]
    numbers = {("card", "messages[2].send.card"), ("iban", "messages[3].content")}
    assert set(scan(record())) == {("email", place) for place in mails} | numbers


def test_a_redaction_is_a_new_record_that_names_its_parent() -> None:
    original = record()
    before = original.model_dump_json()
    clean = redact(original)
    assert original.model_dump_json() == before
    assert clean.id != original.id
    assert clean.provenance.parents == (original.id,)
    assert scan(clean) == []
    assert clean.messages[2].tool_calls[0].arguments == {"to": ["[EMAIL]"], "[EMAIL]": 1, "card": "[CARD]", "sum": 4111.11}
    assert clean.messages[3].content == '{"iban": "[IBAN]"}'
    assert clean.sampled == ()  # its tokens spell what was removed
    assert (clean.slice, clean.task_id) == ("s", "t")
    assert redact(clean) is clean


def test_only_the_asked_kinds_are_redacted_and_the_class_is_restated_by_hand() -> None:
    clean = redact(record(), ("card",), privacy="personal")
    assert clean.provenance.privacy == "personal"
    assert clean.messages[1].content == "I am jane@acme.io"
    assert clean.messages[2].tool_calls[0].arguments["card"] == "[CARD]"  # type: ignore[index]
