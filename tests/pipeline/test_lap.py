"""The whole lap: run once, run again, killed at random moments, planned before anything is there."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import small  # noqa: E402
from checkpoints import tiny_checkpoint  # noqa: E402

from temper.core.reports import Measure  # noqa: E402
from temper.core.storage import read_json  # noqa: E402
from temper.pipeline import judged, lap  # noqa: E402
from temper.pipeline.judged import Judged, accuracy_of, case_ids, reward_measure  # noqa: E402
from temper.pipeline.summary import judge_words  # noqa: E402

KILLS = 4
MODELS = ("sft/model", "preference/model", "reward/reward_model")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return str(tiny_checkpoint("qwen3", tmp_path_factory.mktemp("qwen3") / "base"))


@pytest.fixture(scope="module")
def unbroken(base, tmp_path_factory) -> Path:
    """The run folder of a lap that nothing disturbed."""
    path = small.write_lap(tmp_path_factory.mktemp("unbroken"), base)
    small.work(str(path))
    return path.parent


def bytes_of(run: Path) -> dict[str, bytes]:
    return {f"{name}/{path.name}": path.read_bytes() for name in MODELS for path in sorted((run / name).iterdir())}


def figures(run: Path) -> dict[str, object]:
    """Every figure of every report, with its cases; not how long the answering took."""
    found: dict[str, object] = {}
    for path in sorted((run / "evaluate").glob("*/report.json")):
        report = read_json(path)
        found[path.parent.name] = [report[key] for key in ("dimensions", "slices", "suite_hash", "model_hash", "conversations")]
    return found | {"judged": read_json(run / "judged/preference/done.json")["result"], "verdict": read_json(run / "verdict.json")["findings"]}


def finished(run: Path) -> int:
    return len(list(run.glob("*/done.json"))) + len(list(run.glob("*/*/done.json")))


def progress(run: Path) -> int:
    """How far a lap is: pieces of work that are done, and steps that were logged."""
    return finished(run) + sum(path.read_text().count("\n") for path in run.glob("*/metrics.jsonl"))


def test_the_lap_serves_its_release_and_is_judged_by_its_reward_model(unbroken):
    run = unbroken / "run"
    summary = read_json(run / "summary.json")
    assert summary["verdict"] == "promote"
    assert summary["served"]["rollback"]["worked"] is True
    told = Judged.model_validate(read_json(run / "judged/preference/done.json")["result"])
    assert (told.before.count, told.after.count, told.slices, told.accuracy.count) == (8, 8, ("say",), 8)
    page = (run / "report.html").read_text()
    assert "beside the targets" in page
    assert "held-out pairs" in page


def test_the_same_command_again_does_nothing_and_says_so(unbroken, capsys):
    run = unbroken / "run"
    before = {path: path.stat().st_mtime_ns for path in sorted(run.rglob("*")) if path.is_file()}
    found = lap.run(unbroken / "lap.yaml")
    told = capsys.readouterr()
    after = {path: path.stat().st_mtime_ns for path in sorted(run.rglob("*")) if path.is_file()}
    assert found["made"] == []
    assert "nothing was run" in " ".join(told.err.split())
    assert told.err.count("unchanged:") + told.out.count("unchanged:") >= finished(run)
    changed = {str(path.relative_to(run)) for path in after if before.get(path) != after[path]}
    assert changed <= {"verdict.json", "verdict-base.json"}  # judged again, for nothing is cheaper; the same bytes


def test_a_report_that_was_altered_is_made_again(unbroken):
    page = unbroken / "run" / "report.html"
    whole = page.read_text()
    page.write_text("altered")
    assert lap.run(unbroken / "lap.yaml")["made"] == ["report"]
    assert len(page.read_text()) > 0.9 * len(whole)


def test_kill_minus_nine_anywhere_in_the_lap_ends_with_the_same_weights_and_figures(base, unbroken, tmp_path):
    """SIGKILL falls in stages, between them, while evaluating, registering, serving or drawing; the same command goes on."""
    path = small.write_lap(tmp_path / "broken", base)
    run = path.parent / "run"
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["small", "temper.pipeline.lap"])
    rng, kills = random.Random(11), 0
    goals = sorted(rng.sample(range(1, progress(unbroken / "run")), KILLS))
    for _ in range(3 * KILLS):
        process = server.Process(target=small.work, args=(str(path),))
        process.start()
        while process.is_alive() and kills < KILLS and progress(run) < goals[kills]:
            time.sleep(0.005)
        time.sleep(rng.random() * 0.1 if kills < KILLS else 0)
        if process.is_alive() and kills < KILLS:
            os.kill(int(process.pid or 0), signal.SIGKILL)
            kills += 1
        process.join(240)
        if (run / "summary.json").is_file():
            break
    assert kills == KILLS
    assert bytes_of(run) == bytes_of(unbroken / "run")
    assert figures(run) == figures(unbroken / "run")
    assert read_json(run / "summary.json")["verdict"] == "promote"
    assert not [path for path in run.rglob(".*") if path.is_dir() and path.parent.name != "store"]  # no scratch is left


def test_a_plan_is_estimated_before_anything_has_run(base, tmp_path):
    path = small.write_lap(tmp_path / "planned", base)
    found = lap.run(path, dry_run=True)
    assert not (path.parent / "run").exists()
    costs = {step["out"].rpartition("/")[2]: step["estimate"] for step in found["steps"]}
    assert costs["data"]["planned"] == {"sft": 40, "pairs": 24, "pairs_dev": 8}
    assert (costs["sft"]["rows"], costs["sft"]["steps"]) == (40, 6)
    assert (costs["preference"]["rows"], costs["preference"]["steps"]) == (24, 3)
    for name in ("sft", "preference", "reward"):
        assert costs[name]["seconds"] > 0
        assert costs[name]["tokens"] > 0
    assert f"{base} stands in for" in costs["preference"]["seconds_from"]
    assert [item["phase"] for item in found["evaluations"]] == ["base", "sft", "preference", "base", "preference"]
    assert all(item["seconds"] > 0 and item["tokens"] > 0 for item in found["evaluations"])
    assert found["seconds"] > 0
    json.dumps(found)


# --- the reward model's word ----------------------------------------------------------------------------------


class Lengths:
    """A judge that pays for tokens."""

    def score(self, rows):
        return [float(len(row)) for row in rows]


def record(task: str, prompt: int, answer: int):
    from temper.core.records import Message, Record, Sampled

    turn = Sampled(prompt_ids=tuple(range(prompt)), token_ids=tuple(range(answer)), logprobs=(0.0,) * answer, finish_reason="stop")
    messages = (Message(role="user", content="q"), Message(role="assistant", content="a"))
    return Record(messages=messages, provenance=small.provenance("dev"), task_id=task, sampled=(turn, turn))


def test_the_first_answer_is_scored_as_it_was_sampled():
    found = reward_measure(Lengths(), [record("a", 5, 2), record("b", 5, 4)], {"a": "x", "b": "y"})
    assert found.cases == {"a": 7.0, "b": 9.0}  # 5 + 2 and 5 + 4 tokens: the first turn alone
    assert (found.value, found.count, found.clusters) == (8.0, 2, {"a": "x", "b": "y"})
    assert reward_measure(Lengths(), [], {}).value is None


def test_repeats_of_a_task_are_cases_of_their_own():
    assert case_ids([record("a", 1, 1), record("b", 1, 1), record("b", 1, 1)]) == ["a", "b#0", "b#1"]


def test_a_judge_no_better_than_a_coin_is_no_evidence():
    coin, good = accuracy_of({"heldout_accuracy": 0.55, "heldout_pairs": 40}), accuracy_of({"heldout_accuracy": 0.9, "heldout_pairs": 40})
    side = Measure(value=0.5, count=8, unit="reward")
    words = [judge_words(Judged(against="sft", accuracy=item, slices=("say",), before=side, after=side)) for item in (coin, good, accuracy_of({}))]
    assert coin.low < 0.5 < good.low
    assert "a coin could do" in words[0]
    assert "90.0% of 40 held-out pairs rightly" in words[1]
    assert "no held-out pair" in words[2]
    assert judged.COIN == 0.5
