"""Killed at random moments, a stage goes on from its last checkpoint and ends with the same bytes."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import killed
import pytest
from worlds import conversations, manifest, pairs

from temper.train import distill, load_stage, preference, stage

KILLS = 6


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def logged(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_text().count("\n") if path.is_file() else 0


def test_kill_minus_nine_at_random_moments_ends_with_the_same_bytes(base, tmp_path) -> None:
    """SIGKILL falls anywhere: between steps, in a checkpoint, in a log line. LoRA dropout and epochs' orders are in play."""
    data = manifest(tmp_path / "rows", conversations(48))
    keys = {"base": base, "data": data, "epochs": 6, "tokens_per_step": 200, "tokens_per_batch": 128, "checkpoint_every": 2, "precision": "float32",
            "lora": {"rank": 4, "dropout": 0.2}, "optim": {"lr": 1e-2}}  # fmt: skip
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["killed", "temper.train.sft"])
    unbroken = server.Process(target=killed.work, args=({**keys, "out": str(tmp_path / "unbroken")},))
    unbroken.start()
    unbroken.join(200)
    steps = json.loads((tmp_path / "unbroken/done.json").read_text())["result"]["steps"]
    rng, kills, out = random.Random(5), 0, tmp_path / "broken"
    goals = sorted(rng.sample(range(1, steps), KILLS))
    while not (out / "done.json").is_file():
        process = server.Process(target=killed.work, args=({**keys, "out": str(out)},))
        process.start()
        goal = goals[kills] if kills < KILLS else steps + 1
        while process.is_alive() and logged(out) < goal:
            time.sleep(0.002)
        time.sleep(rng.random() * 0.03)
        if process.is_alive() and kills < KILLS:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.join(200)
    assert kills >= 5
    assert bytes_of(out / "adapter") == bytes_of(tmp_path / "unbroken/adapter")
    logs = [[json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()] for folder in (out, tmp_path / "unbroken")]
    assert [(row["step"], row.get("loss")) for row in logs[0]] == [(row["step"], row.get("loss")) for row in logs[1]]
    assert not list(out.glob(".*"))  # no scratch is left behind


class Stop(Exception):
    """Stands for the end of a process, where killing one would only cost time."""


SMALL = {"tokens_per_batch": 256, "checkpoint_every": 2, "precision": "float32", "optim": {"lr": 1e-2}}


def stages(base: str, deep: str, folder: Path) -> dict[str, dict]:
    two_sided, rows = manifest(folder / "pairs", pairs(24)), manifest(folder / "rows", conversations(30))
    world = {"environment": "worlds:say", "environment_options": {}}
    return {
        "preference": {"base": base, "data": two_sided, "pairs_per_step": 4, **SMALL},
        "reward": {"base": base, "data": two_sided, "pairs_per_step": 4, **SMALL},
        "rl": {"base": base, "steps": 6, "tasks_per_step": 3, "group": 4, "minibatches": 2, "kl": 0.1, **world, **SMALL},
        "distill": {"base": deep, "data": rows, "student": {"layers": 2}, "tokens_per_step": 100, **SMALL},
        "distill on policy": {"base": deep, "student": {"layers": 2}, "steps": 6, "tasks_per_step": 4, "on_policy": True, **world, **SMALL},
    }


@pytest.mark.parametrize("name", ["preference", "reward", "rl", "distill", "distill on policy"])
def test_every_stage_goes_on_to_the_same_bytes(base, deep, tmp_path, monkeypatch, name) -> None:
    """Stopped in step 5, one step after its last checkpoint, and started again."""
    monkeypatch.setattr(distill, "LARGEST_SHARE", 0.8)
    module, keys = load_stage(name.split()[0]), stages(base, deep, tmp_path)[name]
    whole = module.run(module.Config(out=str(tmp_path / "whole"), **keys))
    calls = []

    def stopping(run, learner, cfg, **options) -> None:
        calls.append(learner.step)
        if len(calls) == 5:
            raise Stop
        stage.keep(run, learner, cfg, **options)

    broken_config = module.Config(out=str(tmp_path / "broken"), **keys)
    monkeypatch.setattr(module, "keep", stopping)
    with pytest.raises(Stop):
        module.run(broken_config)
    monkeypatch.setattr(module, "keep", stage.keep)
    went_on = []
    monkeypatch.setattr(module, "resume", lambda run, learner: went_on.append(stage.resume(run, learner)) or went_on[-1])
    broken = module.run(broken_config)
    assert went_on[0] > 0
    assert broken["hash"] == whole["hash"]
    logs = [[json.loads(line) for line in (tmp_path / folder / "metrics.jsonl").read_text().splitlines()] for folder in ("whole", "broken")]
    assert [(row["step"], row.get("loss")) for row in logs[0]] == [(row["step"], row.get("loss")) for row in logs[1]]


def test_a_torn_checkpoint_is_passed_over(base, tmp_path, monkeypatch, capsys) -> None:
    """Of two checkpoints the newer is torn: the run goes on from the older one, to the same bytes."""
    keys = {"base": base, "data": manifest(tmp_path / "pairs", pairs(24)), "pairs_per_step": 4, **SMALL, "checkpoint_every": 1}
    whole = preference.run(preference.Config(out=str(tmp_path / "whole"), **keys))

    def stopping(run, learner, cfg) -> None:
        stage.keep(run, learner, cfg)
        if learner.step == 4:
            raise Stop

    cfg = preference.Config(out=str(tmp_path / "torn"), **keys)
    monkeypatch.setattr(preference, "keep", stopping)
    with pytest.raises(Stop):
        preference.run(cfg)
    monkeypatch.setattr(preference, "keep", stage.keep)
    newest = sorted((tmp_path / "torn/checkpoints").iterdir())[-1]
    weights = newest / "trained.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    capsys.readouterr()
    assert preference.run(cfg)["hash"] == whole["hash"]
    said = capsys.readouterr().err
    assert "torn checkpoint" in said
    assert "going on from step 3 of 6" in said




def test_a_full_disk_leaves_nothing_half_written(base, tmp_path, monkeypatch) -> None:
    """safetensors reports a full disk with an exception of its own; the user is told what to do, and it goes on from there."""
    from safetensors import SafetensorError

    from temper.core.errors import StorageError
    from temper.train import checkpoint

    cfg = preference.Config(out=str(tmp_path / "out"), base=base, data=manifest(tmp_path / "pairs", pairs(24)), pairs_per_step=4, **SMALL)

    def full(tensors, path) -> None:
        Path(path).write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    save_file = checkpoint.save_file
    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(StorageError, match="no space left") as told:
        preference.run(cfg)
    assert "goes on from the last checkpoint" in told.value.do
    assert [path.name for path in (tmp_path / "out/checkpoints").iterdir()] == []
    monkeypatch.setattr(checkpoint, "save_file", save_file)
    assert preference.run(cfg)["steps"] == 6
