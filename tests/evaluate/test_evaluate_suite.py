"""Running a suite: what is asked, kept, hashed and put on record."""

import json
from pathlib import Path

import pytest

from temper.core.config import load_config
from temper.core.errors import ConfigError, DataError
from temper.core.reports import Report
from temper.core.storage import verify_folder
from temper.evaluate import Config, Options, Price, read_report, run_suite
from temper.evaluate import run as evaluate_run
from temper.evaluate.ledger import looks

ROOT = Path(__file__).resolve().parents[2]


def suite(world, engine, collect, split="dev", **more):
    return run_suite(engine, world, split, name=more.pop("name", "model"), collect=collect, **more)


def test_a_right_model_by_dimension_slice_and_tenant(world, engine, script, gold):
    report, records = suite(world, engine, script(gold))
    assert len(records) == 36
    success = report.measure("instruction.task_success")
    assert (success.value, success.count, success.high) == (1.0, 36, 1.0)
    assert success.low == pytest.approx(36 / (36 + 3.8415), abs=1e-4)
    assert report.measure("safety.refusal_recall").count == 12
    assert report.measure("safety.over_refusal").value == 0.0
    assert sorted(report.slices) == ["lookup", "risky", "safe_lookalike", "tenant:bank_a", "tenant:retail_b"]
    assert report.measure("slice:lookup.success").count == 12
    assert (report.model, report.model_hash) == ("models/fake", "f" * 64)
    assert Report.model_validate_json(report.model_dump_json()) == report


def test_latency_is_measured_alone_and_spread_over_the_slices(world, engine, script, gold):
    seen = []
    report, _ = suite(world, engine, script(gold, seen), options=Options(latency_tasks=6, chunk=5))
    timed = [task for task, _ in seen[36:]]
    assert {name: sum(name in task for task in timed) for name in ("-lookup-", "-risky-", "-safe_lookalike-")} == {
        "-lookup-": 2, "-risky-": 2, "-safe_lookalike-": 2,
    }  # fmt: skip
    assert report.measure("runtime.latency_p50").count == 6
    assert set(report.measure("runtime.latency").cases) == set(timed)
    untimed, _ = suite(world, engine, script(gold), options=Options(latency_tasks=0))
    assert untimed.measure("runtime.latency_p50").value is None


def test_the_suite_hash_is_what_was_asked(world, engine, script, gold):
    def hash_of(**more):
        return suite(world, engine, script(gold), **more)[0].suite_hash

    base = hash_of()
    assert base == hash_of(
        constrained=True, adapter_of=lambda task: task.tenant, options=Options(conversations=0, latency_tasks=0, chunk=3)
    )
    assert (
        len({base, hash_of(limit=2), hash_of(split="train"), hash_of(options=Options(seed=1)), hash_of(options=Options(temperature=1.0))})
        == 5
    )
    world.version = "2"
    assert hash_of() != base


def test_the_limit_is_a_slice_and_the_same_for_every_model(world, engine, script, gold):
    first = [record.task_id for record in suite(world, engine, script(gold), limit=2)[1]]
    second = [record.task_id for record in suite(world, engine, script(lambda task: "?"), limit=2)[1]]
    assert first == second
    assert len(first) == 6
    with pytest.raises(DataError, match="limit is 0"):
        suite(world, engine, script(gold), limit=0)


def test_kept_conversations_are_the_same_tasks_in_every_report(world, engine, script, gold):
    good, bad = (suite(world, engine, script(how))[0] for how in (gold, lambda task: "?"))
    assert [item["case"] for item in good.conversations] == [item["case"] for item in bad.conversations]
    assert [item["slice"] for item in good.conversations] == ["lookup"] * 2 + ["risky"] * 2 + ["safe_lookalike"] * 2
    shown = bad.conversations[0]
    assert shown["messages"][-1]["content"] == "?"
    assert shown["checks"]["task_success"] is False
    assert shown["expected"]["sum"]


def test_each_task_is_answered_through_its_own_adapter(world, engine, script, gold):
    seen = []
    report, _ = suite(world, engine, script(gold, seen), adapter_of=lambda task: task.tenant)
    company = {"0": "bank_a", "1": "retail_b", "2": "bank_a", "3": "retail_b"}
    assert all(adapter == company[task.split("-")[1]] for task, adapter in seen)
    assert report.settings["adapters"] == ["bank_a", "retail_b"]


def test_repeats_are_cases_of_one_cluster(world, engine, script, gold):
    report, records = suite(world, engine, script(gold), options=Options(repeats=2, latency_tasks=0))
    assert len(records) == 72
    measure = report.measure("instruction.task_success")
    assert "dev-0-lookup-0#1" in measure.cases
    assert measure.clusters["dev-0-lookup-0#1"] == "company 0"


def test_the_win_rate_counts_ties_half(world, engine, script, gold):
    before, _ = suite(world, engine, script(lambda task: "no"), name="before")
    after, _ = suite(world, engine, script(gold), previous=before)
    won = after.measure("preference.win_rate")
    # refusing everything is right on the 12 risky tasks (ties), wrong on 24: (24 + 6) / 36
    assert (won.value, won.count) == (pytest.approx(30 / 36), 36)
    assert after.settings["win_rate_against"] == "before"
    with pytest.raises(DataError, match="another suite"):
        suite(world, engine, script(gold), previous=before, limit=1)


def test_the_sealed_split_counts_looks_and_refuses_to_be_looked_at_in_secret(world, engine, script, gold, tmp_path):
    with pytest.raises(DataError, match="sealed"):
        suite(world, engine, script(gold), split="test")
    ledger = tmp_path / "looks.jsonl"
    first, _ = suite(world, engine, script(gold), split="test", ledger=ledger)
    second, _ = suite(world, engine, script(gold), split="test", ledger=ledger, limit=1)
    assert (first.settings["sealed_looks"], second.settings["sealed_looks"]) == (1, 2)
    rows = looks(ledger)
    assert [row["suite_hash"] for row in rows] == [first.suite_hash, second.suite_hash]
    assert rows[0]["model_hash"] == "f" * 64
    assert rows[0]["when"].endswith("Z")
    suite(world, engine, script(gold), ledger=ledger)
    assert len(looks(ledger)) == 2


def test_a_run_that_is_killed_has_looked_as_well(world, engine, tmp_path):
    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        suite(world, engine, killed, split="test", ledger=tmp_path / "looks.jsonl")
    assert len(looks(tmp_path / "looks.jsonl")) == 1


def test_a_damaged_ledger_is_an_error(world, engine, script, gold, tmp_path):
    (tmp_path / "looks.jsonl").write_text('{"when": \n')
    with pytest.raises(DataError, match=r"looks\.jsonl:1"):
        suite(world, engine, script(gold), split="test", ledger=tmp_path / "looks.jsonl")


def test_tasks_of_another_split_are_refused(world, engine, script, gold):
    world.task = lambda split, *rest: type(world).task(world, "train", *rest)
    with pytest.raises(DataError, match="of another split"):
        suite(world, engine, script(gold))


def test_records_that_answer_other_tasks_are_refused(world, engine, script, gold):
    collect = script(gold)
    with pytest.raises(DataError, match="stands where"):
        suite(world, engine, lambda engine, environment, tasks, **how: collect(engine, environment, tasks, **how)[::-1])


def test_run_writes_a_whole_folder_and_it_reads_back(world, engine, script, gold, tmp_path, monkeypatch):
    monkeypatch.setattr("temper.evaluate.suite.default_collect", lambda: script(gold))
    cfg = Config(name="sft", model="m", out=str(tmp_path / "out"), options=Options(price=Price(input_per_million=1, output_per_million=2)))
    result = evaluate_run(cfg, engine, world, model_hash="weights and adapters")
    verify_folder(tmp_path / "out")
    report = read_report(Path(result["report"]))
    assert report.measure("runtime.cost").value > 0
    assert report.model_hash == "weights and adapters"
    assert result["figures"]["instruction.task_success"]["count"] == 36
    assert len((tmp_path / "out" / "records.jsonl").read_text().splitlines()) == 36
    (tmp_path / "wrong.json").write_text(json.dumps({"name": 1}))
    with pytest.raises(DataError, match="is not a report"):
        read_report(tmp_path / "wrong.json")


def test_the_shipped_config_loads(tmp_path):
    assert load_config(Config, ROOT / "configs" / "evaluate.yaml").split == "dev"
    with pytest.raises(ConfigError, match="constrained"):
        load_config(Config, ROOT / "configs" / "evaluate.yaml", ["constraned=true"])
