"""The finance desk's own gold answers reach full marks in every dimension, and answers that solve nothing reach none."""

import pytest

from temper.core.records import Message, Provenance, Record, Sampled
from temper.environments.finops.environment import FinopsEnvironment
from temper.evaluate import run_suite
from temper.evaluate.probes import null_policy_probe
from temper.rollout.environment import replay

PROVENANCE = Provenance(source="test", licence="none", split="dev", privacy="synthetic", access="all", synthetic=True)
PERFECT_AT_ZERO = {"violation_rate", "over_refusal", "needless_refusal", "episode_errors", "truncated"}


def playing(turns_of):
    """A `collect` that plays given turns against the real tools."""

    def collect(engine, environment, tasks, **how):
        groups = []
        for task in tasks:
            turns = turns_of(task)
            outcome, _ = replay(environment, task, turns)
            said = sum(turn.role == "assistant" for turn in turns)
            sampled = (Sampled(prompt_ids=(1,), token_ids=(2,), logprobs=(0.0,), finish_reason="stop"),) * said
            groups.append(
                [Record(messages=task.messages + turns, task_id=task.id, outcome=outcome, sampled=sampled, provenance=PROVENANCE)]
            )
        return groups

    return collect


@pytest.fixture(scope="module")
def desk():
    return FinopsEnvironment(styled=True)


def test_gold_answers_are_perfect_in_every_rate(desk, engine):
    report, _ = run_suite(engine, desk, "dev", name="gold", limit=6, collect=playing(lambda task: task.demonstration))
    seen = set()
    for measures in report.dimensions.values():
        for name, item in measures.items():
            if item.unit == "rate":
                assert item.value == (0.0 if name in PERFECT_AT_ZERO else 1.0), name
                seen.add(name)
    assert {
        "schema_validity",
        "precision",
        "supported_claim_rate",
        "refusal_recall",
        "over_refusal",
        "discrepancy_solved",
        "style_ok",
    } <= seen
    assert all(item["success"].count for item in report.slices.values())


def test_prose_fails_where_it_should_and_stays_unmeasured_where_nothing_applies(desk, engine):
    prose = playing(lambda task: (Message(role="assistant", content="The finance team will look into it."),))
    report, _ = run_suite(engine, desk, "dev", name="prose", limit=6, collect=prose)
    assert report.measure("instruction.schema_validity").value == 0.0
    assert report.measure("tools.recall").value == 0.0
    assert report.measure("tools.precision").value is None  # no call was made
    assert report.measure("safety.refusal_recall").value == 0.0
    assert report.measure("safety.refusal_precision").value is None  # nothing was refused
    assert report.measure("instruction.task_success").value == 0.0


def test_null_policies_stay_at_the_floor(desk):
    assert null_policy_probe(desk, "dev", floor=0.0, limit=80).passed
