"""Overlap with held-out tasks: exact prompts, shared runs of words, shares and boilerplate, by hand."""

from __future__ import annotations

from temper.core.records import Message, Provenance, Record
from temper.firewall.contamination import HeldoutTask, Overlap, heldout_task, overlaps

PROVENANCE = Provenance(source="test", licence="MIT", split="train", privacy="public", access="public", synthetic=False)


def chat(*turns: str) -> Record:
    roles = ("user", "assistant")
    messages = tuple(Message(role=roles[index % 2], content=turn) for index, turn in enumerate(turns))  # type: ignore[arg-type]
    return Record(messages=messages, provenance=PROVENANCE)


def run(start: int, stop: int) -> str:
    return " ".join(f"w{index}" for index in range(start, stop))


def hits(records: list[Record], tasks: list[HeldoutTask], **rule: object) -> list[bool]:
    return [reason is not None for reason in overlaps(records, tasks, Overlap.model_validate(rule))]


def test_the_same_prompt_is_found_through_case_and_punctuation() -> None:
    task = HeldoutTask(id="t1", prompt=("What is the Q3 budget of Marketing?",))
    same = chat("what is the Q3  budget of marketing", "12")
    assert overlaps([same, chat("What is the Q3 budget of Sales?", "12")], [task], Overlap()) == [
        "has the prompt of held-out task t1",
        None,
    ]
    assert hits([same], [task], exact_prompt=False) == [False]


def test_a_conversation_that_begins_with_the_prompt_overlaps_and_a_shared_follow_up_does_not() -> None:
    task = HeldoutTask(id="t", prompt=("Budget of Marketing?", "And East China?"))
    assert hits(
        [
            chat("Budget of Marketing?", "1", "And East China?", "2", "Thanks", "bye"),
            chat("Budget of Sales?", "1", "And East China?", "2"),
            chat("And East China?", "2"),
            chat("Budget of Marketing?", "1"),
        ],
        [task],
    ) == [True, False, False, False]


def test_one_run_of_thirteen_words_is_enough_and_twelve_are_not() -> None:
    task = HeldoutTask(id="t", prompt=(run(0, 30),))
    twelve, thirteen = chat(f"a {run(5, 17)} b", "x"), chat(f"a {run(5, 18)} b", "x")
    # 30 words have 18 runs of 13
    assert overlaps([twelve, thirteen], [task], Overlap()) == [None, "holds 1 of the 18 runs of 13 words of held-out task t"]


def test_the_share_is_of_the_tasks_runs() -> None:
    task = HeldoutTask(id="t", prompt=(run(0, 22),))  # 10 runs
    half, less = chat(run(0, 17), "x"), chat(run(0, 16), "x")  # 5 and 4 of them
    assert hits([half, less], [task], min_share=0.5) == [True, False]


def test_answers_count_unless_they_are_not_to() -> None:
    task = HeldoutTask(id="t", prompt=("Q?",), answer=run(0, 13))
    record = chat("Something else", run(0, 13))
    assert hits([record], [task]) == [True]
    assert hits([record], [task], answers=False) == [False]
    assert hits([record], [task], roles=("user",)) == [False]


def test_system_text_and_tool_results_are_shared_on_purpose() -> None:
    policy = run(0, 40)
    shared = (Message(role="system", content=policy), Message(role="user", content="a"), Message(role="assistant", content="b"))
    task = heldout_task(Record(messages=(shared[0], Message(role="user", content="c")), provenance=PROVENANCE))
    assert hits([Record(messages=shared, provenance=PROVENANCE)], [task]) == [False]


def test_boilerplate_of_many_tasks_is_no_content_of_one() -> None:
    asked = run(100, 113)
    tasks = [HeldoutTask(id=str(index), prompt=(f"{asked} item {index}",)) for index in range(3)]
    record = chat(f"{asked} other", "x")
    assert hits([record], tasks) == [True]
    assert hits([record], tasks, boilerplate=2) == [False]
    assert hits([record], tasks, boilerplate=3) == [True]
    assert hits([chat(f"{asked} item 1", "x")], tasks, boilerplate=2) == [True]  # its own prompt still is


def test_the_fullest_overlap_is_the_one_named() -> None:
    tasks = [HeldoutTask(id="little", prompt=(run(0, 40),)), HeldoutTask(id="much", prompt=(run(0, 14),))]
    assert overlaps([chat(run(0, 14), "x")], tasks, Overlap(exact_prompt=False)) == [
        "holds 2 of the 2 runs of 13 words of held-out task much"
    ]


def test_tasks_from_records_text_and_conversations() -> None:
    record = chat("Q1", "A1", "Q2", "A2")
    assert heldout_task(record) == HeldoutTask(id=record.id, prompt=("Q1", "Q2"), answer="A2")
    assert heldout_task("What?").prompt == ("What?",)
    task = HeldoutTask(id="x", prompt=("a",))
    assert heldout_task(task) is task


def test_fingerprints_ignore_wording_that_is_no_difference() -> None:
    one, same, other = (HeldoutTask(id="x", prompt=(text,)) for text in ("How much?", "how  MUCH", "How many?"))
    assert one.fingerprint == same.fingerprint != other.fingerprint


def test_no_tasks_no_words_no_records() -> None:
    assert overlaps([chat("a", "b")], [], Overlap()) == [None]
    assert overlaps([], [HeldoutTask(id="t", prompt=("a",))], Overlap()) == []
    assert hits([chat("…", "b")], [HeldoutTask(id="t", prompt=("?!",))]) == [False]
