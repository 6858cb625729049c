"""Trackers: every number of metrics.jsonl arrives, under the work's key; what is absent is refused with the command that helps."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from worlds import conversations, manifest, pairs

from temper.core.errors import ConfigError, MissingDependency
from temper.core.run import RunDirectory
from temper.train import distill, load_stage, sft
from temper.train.trackers import TRACKERS, flat, numbers, open_trackers

Logged = list[tuple[int, dict[str, float]]]


class FakeRun:
    """A run of wandb or trackio: both have `log(metrics, step=)` and `finish()`."""

    def __init__(self) -> None:
        self.logged: Logged = []
        self.finished = False

    def log(self, metrics: dict[str, float], step: int | None = None) -> None:
        assert step is not None
        self.logged.append((step, dict(metrics)))

    def finish(self) -> None:
        self.finished = True


class FakeClient:
    """mlflow.MlflowClient, as far as it is used; runs outlive the client, as they do on a server."""

    runs: dict[str, dict[str, Any]] = {}

    def get_experiment_by_name(self, name: str) -> Any:
        return SimpleNamespace(experiment_id="7") if self.runs else None

    def create_experiment(self, name: str) -> str:
        assert name == "temper"
        return "7"

    def search_runs(self, experiment_ids: list[str], filter_string: str = "", max_results: int = 1000) -> list[Any]:
        assert experiment_ids == ["7"]
        wanted = filter_string.split("'")[1]
        return [SimpleNamespace(info=SimpleNamespace(run_id=name)) for name, run in self.runs.items() if run["tags"]["temper_key"] == wanted]

    def create_run(self, experiment_id: str, tags: dict[str, str] | None = None, run_name: str | None = None) -> Any:
        name = f"run {len(self.runs)}"
        self.runs[name] = {"tags": tags, "name": run_name, "params": {}, "metrics": [], "ended": False}
        return SimpleNamespace(info=SimpleNamespace(run_id=name))

    def log_param(self, run_id: str, key: str, value: Any) -> None:
        assert key not in self.runs[run_id]["params"]  # the server refuses to change one
        self.runs[run_id]["params"][key] = value

    def log_metric(self, run_id: str, key: str, value: float, step: int | None = None) -> None:
        self.runs[run_id]["metrics"].append((step, key, value))

    def set_terminated(self, run_id: str) -> None:
        self.runs[run_id]["ended"] = True


@pytest.fixture
def fakes(monkeypatch) -> dict[str, Any]:
    """wandb, trackio and mlflow by their names, and what `init` was called with."""
    made: dict[str, Any] = {}
    for name in ("wandb", "trackio"):
        module, run = ModuleType(name), FakeRun()

        def init(library: str = name, run: FakeRun = run, **options: Any) -> FakeRun:
            made[f"{library} options"] = options
            return run

        module.init = init  # type: ignore[attr-defined]
        made[name] = run
        monkeypatch.setitem(sys.modules, name, module)
    mlflow = ModuleType("mlflow")
    mlflow.MlflowClient = FakeClient  # type: ignore[attr-defined]
    monkeypatch.setattr(FakeClient, "runs", {})
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    made["mlflow"] = FakeClient
    return made


def keys(base: str, folder: Path) -> dict[str, Any]:
    return {"base": base, "data": manifest(folder / "rows", conversations(12)), "out": str(folder / "out"), "steps": 3, "tokens_per_step": 100,
            "precision": "float32"}  # fmt: skip


def lines(folder: Path) -> Logged:
    rows = [json.loads(line) for line in (folder / "out/metrics.jsonl").read_text().splitlines()]
    return [(row.pop("step"), numbers(row)) for row in rows]


def test_every_number_of_every_step_arrives(base, tmp_path, fakes) -> None:
    cfg = sft.Config(**keys(base, tmp_path), trackers=("wandb", "trackio", "mlflow"))
    sft.run(cfg)
    written = lines(tmp_path)
    assert [step for step, _ in written] == [1, 2, 3]
    assert {"loss", "grad_norm", "lr", "tokens_per_s", "limit_share"} <= written[0][1].keys()
    for name in ("wandb", "trackio"):
        assert fakes[name].logged == written
        assert fakes[name].finished
        assert fakes[f"{name} options"]["config"]["optim"]["lr"] == cfg.optim.lr
        assert fakes[f"{name} options"]["resume"] == "allow"
    (run,) = FakeClient.runs.values()
    assert sorted(run["metrics"]) == sorted((step, name, value) for step, metrics in written for name, value in metrics.items())
    assert run["params"]["optim.lr"] == cfg.optim.lr
    assert run["ended"]


def test_a_resumed_run_goes_on_in_the_same_tracker_run(tmp_path, fakes) -> None:
    run = RunDirectory(tmp_path, "k" * 64)
    for metrics in ({"loss": 2.0}, {"loss": 1.0}):
        for tracker in open_trackers(("mlflow", "wandb"), run, "sft", {"seed": 1}):
            tracker.log(1, metrics)
    assert list(FakeClient.runs) == ["run 0"]
    assert fakes["wandb options"]["id"] == "k" * 16


def test_what_is_no_number_is_left_out(tmp_path, fakes) -> None:
    """Absent is not zero: a reward that nobody gave must not be plotted as one."""
    assert numbers({"reward": None, "note": "x", "loss": 1.5, "tokens": 7}) == {"loss": 1.5, "tokens": 7.0}
    (tracker,) = open_trackers(("trackio",), RunDirectory(tmp_path, "k"), "rl", {})
    tracker.log(4, {"reward": None, "length": 3.0})
    assert fakes["trackio"].logged == [(4, {"length": 3.0})]
    assert flat({"optim": {"lr": 1, "betas": [1, 2]}, "lora": None, "options": {}}) == {"optim.lr": 1, "optim.betas": [1, 2], "lora": None, "options": {}}


@pytest.mark.parametrize("name", list(TRACKERS))
def test_an_absent_library_is_named_before_anything_is_trained(base, tmp_path, monkeypatch, name) -> None:
    monkeypatch.setitem(sys.modules, name, None)  # import then raises ModuleNotFoundError
    with pytest.raises(MissingDependency, match=f"pip install {name}"):
        sft.run(sft.Config(**keys(base, tmp_path), trackers=(name,)))
    assert not (tmp_path / "out/metrics.jsonl").exists()


def test_an_unknown_tracker_is_refused_with_the_known_ones(base, tmp_path) -> None:
    with pytest.raises(ConfigError, match="tensorboard, wandb, mlflow, trackio"):
        sft.run(sft.Config(**keys(base, tmp_path), trackers=("tensorbord",)))


def test_a_tracker_that_fails_is_left_out_and_the_training_goes_on(base, tmp_path, fakes, capsys) -> None:
    def failing(metrics: dict[str, float], step: int | None = None) -> None:
        raise ConnectionError("no route to host")

    fakes["wandb"].log = failing
    sft.run(sft.Config(**keys(base, tmp_path), trackers=("wandb", "trackio")))
    said = capsys.readouterr().err
    assert said.count("tracker wandb failed and is left out from here on (ConnectionError: no route to host)") == 1
    assert fakes["trackio"].logged == lines(tmp_path)


def test_trackers_do_not_name_the_work(base, tmp_path, fakes, capsys) -> None:
    """Sending metrics elsewhere changes no weight, so nothing is trained again for it."""
    given = keys(base, tmp_path)
    sft.run(sft.Config(**given))
    sft.run(sft.Config(**given, trackers=("trackio",)))
    assert "unchanged: sft" in capsys.readouterr().err
    assert fakes["trackio"].logged == []


def test_tensorboard_reads_what_was_written_and_hides_what_a_killed_run_wrote(tmp_path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = RunDirectory(tmp_path, "k")
    for start, loss in ((1, 5.0), (3, 1.0)):  # the second process goes on from step 2
        (tracker,) = open_trackers(("tensorboard",), run, "sft", {})
        for step in range(start, 5):
            tracker.log(step, {"loss": loss, "reward": None})
        if start == 3:
            tracker.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["loss"]
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 5.0), (2, 5.0), (3, 1.0), (4, 1.0)]


def small_runs(base: str, deep: str, folder: Path) -> dict[str, dict[str, Any]]:
    """One or two steps of every stage, with all that adds a metric."""
    rows, two_sided = manifest(folder / "rows", conversations(8)), manifest(folder / "pairs", pairs(8))
    few = {"precision": "float32", "optim": {"lr": 1e-2}}
    acting = {"environment": "worlds:say", "steps": 1, "tasks_per_step": 3, "group": 4, "kl": 0.1, **few}
    return {
        "sft": {"base": base, "data": rows, "dev": rows, "steps": 1, **few},
        "preference": {"base": base, "data": two_sided, "steps": 1, "pairs_per_step": 4, **few},
        "kto": {"base": base, "data": two_sided, "steps": 1, **few},
        "reward": {"base": base, "data": two_sided, "heldout": two_sided, "steps": 1, "pairs_per_step": 4, **few},
        "rl": {"base": base, "tis_cap": 2.0, **acting},
        "ppo": {"base": base, **acting},
        "distill": {"base": deep, "data": rows, "dev": rows, "student": {"layers": 2}, "steps": 1, **few},
    }


@pytest.mark.parametrize("name", ["sft", "preference", "kto", "reward", "rl", "ppo", "distill"])
def test_every_metric_that_a_stage_logs_is_explained(base, deep, tmp_path, monkeypatch, name) -> None:
    monkeypatch.setattr(distill, "LARGEST_SHARE", 0.8)
    module = load_stage(name)
    module.run(module.Config(out=str(tmp_path / "out"), **small_runs(base, deep, tmp_path)[name]))
    text = (Path(__file__).parents[2] / "docs/trackers.md").read_text()
    logged = {name for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines() for name in json.loads(line)} - {"step"}
    missing = sorted(metric for metric in logged if f"`{metric}`" not in text)
    assert not missing, f"docs/trackers.md says nothing of {missing}"
