"""Killed at random moments, a stage goes on from its last checkpoint and ends with the same bytes."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from pathlib import Path

import killed
import pytest
from test_process_reward import solutions
from worlds import conversations, manifest, pairs

from temper.train import STAGES, distill, load_stage, preference, stage

# SIGKILLs of each stage: twenty fall on SFT, whose runs are the cheapest, a few on every other
KILLS = {"sft": 20, "preference": 4, "reward": 4, "rl": 4, "distill": 4, "kto": 2, "process_reward": 2, "ppo": 2}
SMALL = {"tokens_per_batch": 256, "checkpoint_every": 2, "precision": "float32", "optim": {"lr": 1e-2}}


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def lines(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_text().count("\n") if path.is_file() else 0


def losses(folder: Path) -> list[tuple[int, float | None]]:
    return [(row["step"], row.get("loss")) for row in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())]


def stages(base: str, deep: str, folder: Path) -> dict[str, dict]:
    two_sided, rows = manifest(folder / "pairs", pairs(24)), manifest(folder / "rows", conversations(30))
    world = {"environment": "worlds:say", "environment_options": {}}
    return {
        # LoRA dropout and the orders of epochs are in play
        "sft": {"base": base, "data": rows, "epochs": 6, "tokens_per_step": 130, "lora": {"rank": 4, "dropout": 0.2}, **SMALL, "tokens_per_batch": 128},
        "preference": {"base": base, "data": two_sided, "pairs_per_step": 4, **SMALL},
        "kto": {"base": base, "data": two_sided, "answers_per_step": 8, "epochs": 3, **SMALL},
        "reward": {"base": base, "data": two_sided, "pairs_per_step": 4, **SMALL},
        "process_reward": {"base": base, "data": manifest(folder / "solutions", solutions(24)), "step": "paragraph", "tokens_per_step": 130, "epochs": 6, **SMALL},
        "rl": {"base": base, "steps": 6, "tasks_per_step": 3, "group": 4, "minibatches": 2, "kl": 0.1, **world, **SMALL},
        "ppo": {"base": base, "steps": 6, "tasks_per_step": 3, "group": 2, "at_cut": "judge", "kl": 0.1, **world, **SMALL},
        "distill": {"base": deep, "data": rows, "student": {"layers": 2}, "tokens_per_step": 100, **SMALL},
        "distill on policy": {"base": deep, "student": {"layers": 2}, "steps": 6, "tasks_per_step": 4, "on_policy": True, **world, **SMALL},
    }


@pytest.fixture(scope="module")
def server():
    """Processes of these come from one that has imported everything: what is killed is a run, not an import."""
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload(["killed", "worlds", *STAGES.values()])
    return made


def test_no_stage_is_left_out(base, tmp_path) -> None:
    assert KILLS.keys() == STAGES.keys() == {name.split()[0] for name in stages(base, base, tmp_path)}


@pytest.mark.parametrize("name", list(KILLS))
def test_kill_minus_nine_at_random_moments_ends_with_the_same_bytes(server, base, deep, tmp_path, name) -> None:
    """SIGKILL falls anywhere: while weights are loaded, between steps, in a checkpoint, in a log line."""
    keys, out, whole = stages(base, deep, tmp_path)[name], tmp_path / "broken", tmp_path / "whole"
    unbroken = server.Process(target=killed.work, args=(name, {**keys, "out": str(whole)}))
    unbroken.start()
    unbroken.join(200)
    total = lines(whole)
    rng, kills = random.Random(5), 0
    goals = sorted(rng.choices(range(total), k=KILLS[name]))
    while not (out / "done.json").is_file():
        process = server.Process(target=killed.work, args=(name, {**keys, "out": str(out)}))
        process.start()
        goal = goals[kills] if kills < len(goals) else total + 1
        while process.is_alive() and lines(out) < goal:
            time.sleep(0.001)
        time.sleep(rng.random() * 0.1)
        if process.is_alive() and kills < len(goals):
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.join(200)
        assert process.exitcode in (0, -signal.SIGKILL)
    assert kills >= len(goals) - 1  # the last may come too late
    assert json.loads((out / "done.json").read_text())["result"]["hash"] == json.loads((whole / "done.json").read_text())["result"]["hash"]
    written = next(folder.name for folder in whole.iterdir() if folder.name in ("adapter", "model", "reward_model"))
    assert bytes_of(out / written) == bytes_of(whole / written)
    assert losses(out) == losses(whole)
    assert not list(out.glob(".*"))  # no scratch is left behind
    assert not (out / "checkpoints").exists()  # nor a checkpoint of finished work


class Stop(Exception):
    """Stands for the end of a process, where killing one would only cost time."""


@pytest.mark.parametrize("name", ["preference", "kto", "reward", "process_reward", "rl", "ppo", "distill", "distill on policy"])
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
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")


def cut(newest: Path) -> None:
    weights = newest / "trained.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])


def lose(newest: Path) -> None:
    (newest / "optimizer.safetensors").unlink()


def garble(newest: Path) -> None:
    (newest / "state.json").write_text('{"step": 4, "total_st')


def garble_the_listing(newest: Path) -> None:
    """What names the hashes is torn itself."""
    (newest / "FILES.json").write_text('{"state.json": "8f')


def lose_the_listing(newest: Path) -> None:
    (newest / "FILES.json").unlink()


@pytest.fixture(scope="module")
def at_step_four(base, tmp_path_factory) -> tuple[dict, str, Path]:
    """Keys of a run, the hash that it ends with, and its folder as it stood after step 4, with checkpoints 3 and 4."""
    folder = tmp_path_factory.mktemp("torn")
    keys = {"base": base, "data": manifest(folder / "pairs", pairs(24)), "pairs_per_step": 4, **SMALL, "checkpoint_every": 1, "out": str(folder / "out")}
    kept: list[list[str]] = []

    def watching(run, learner, cfg) -> None:
        stage.keep(run, learner, cfg)
        kept.append([path.name for path in run.checkpoints()])
        if learner.step == 4:
            shutil.copytree(run.path, folder / "step 4")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preference, "keep", watching)
        whole = preference.run(preference.Config(**keys))
    assert kept[:4] == [[f"step-{step:08d}" for step in range(max(1, last - 1), last + 1)] for last in (1, 2, 3, 4)]  # the two newest, no more
    return keys, whole["hash"], folder / "step 4"


@pytest.mark.parametrize("tear", [cut, lose, garble, garble_the_listing, lose_the_listing])
def test_a_torn_checkpoint_is_passed_over(at_step_four, capsys, tear) -> None:
    """Of two checkpoints the newer is torn, in one way or another: the run goes on from the older one, to the same bytes."""
    keys, expected, as_it_stood = at_step_four
    out = Path(keys["out"])
    shutil.rmtree(out)
    shutil.copytree(as_it_stood, out)
    tear(out / "checkpoints/step-00000004")
    assert preference.run(preference.Config(**keys))["hash"] == expected
    said = capsys.readouterr().err
    assert "passing over a torn checkpoint" in said
    assert "step-00000004" in said
    assert "going on from step 3 of 6" in said


def test_where_every_checkpoint_is_torn_the_run_starts_again(at_step_four, capsys) -> None:
    keys, expected, as_it_stood = at_step_four
    out = Path(keys["out"])
    shutil.rmtree(out)
    shutil.copytree(as_it_stood, out)
    for folder in (out / "checkpoints").iterdir():
        lose(folder)
    assert preference.run(preference.Config(**keys))["hash"] == expected
    said = capsys.readouterr().err
    assert said.count("passing over a torn checkpoint") == 2
    assert "going on" not in said
    assert [step for step, _ in losses(out)] == [1, 2, 3, 4, 5, 6]


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


def test_what_a_killed_process_was_writing_is_swept_up(at_step_four) -> None:
    """A kill in the middle of a write leaves a scratch folder; the next start removes it, and nothing that looks a little like it."""
    keys, _, as_it_stood = at_step_four
    out = Path(keys["out"])
    shutil.rmtree(out)
    shutil.copytree(as_it_stood, out)
    for scratch in (out / ".model.0a1b2c3d", out / "checkpoints/.step-00000005.89abcdef"):
        scratch.mkdir()
        (scratch / "half").write_bytes(b"half")
    (out / ".reference.safetensors.01234567").write_bytes(b"half")
    (out / ".keep").write_text("mine")
    stage.open_run(preference.Config(**keys), "preference", preference.inputs(preference.Config(**keys)))
    assert [path.name for path in out.rglob(".*")] == [".keep"]


def test_a_kill_while_other_work_is_removed_leaves_none_of_its_checkpoints(at_step_four, tmp_path, monkeypatch) -> None:
    """Found by the kills above: half removed, an earlier run's checkpoints were taken for those of the new one."""
    keys, _, as_it_stood = at_step_four
    out = tmp_path / "out"
    shutil.copytree(as_it_stood, out)
    (out / "done.json").write_text("{}")  # finished: what is unfinished would be kept
    other = preference.Config(**{**keys, "out": str(out), "beta": 0.2})
    removed = shutil.rmtree

    def killed_in_the_middle(path, **options) -> None:
        (Path(path) / "metrics.jsonl").unlink()
        (Path(path) / "stage.json").unlink()
        raise Stop

    monkeypatch.setattr(shutil, "rmtree", killed_in_the_middle)
    with pytest.raises(Stop):
        stage.open_run(other, "preference", preference.inputs(other))
    monkeypatch.setattr(shutil, "rmtree", removed)
    run = stage.open_run(other, "preference", preference.inputs(other))
    assert run.latest() is None
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
