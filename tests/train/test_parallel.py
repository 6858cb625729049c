"""Two processes give what one gives: losses, gradients, weights; checkpoints change hands; a killed rank is told of."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ranks
import torch
from safetensors.torch import load_file
from test_process_reward import solutions
from worlds import conversations, manifest, pairs

TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--nnodes", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0",
            "--local-addr", "127.0.0.1")  # fmt: skip
ROOT = Path(__file__).parents[2]


def launch(folder: Path, asked: dict) -> subprocess.Popen[str]:
    """torchrun with two ranks of ranks.py."""
    task = folder / f"task-{time.time_ns()}.json"
    task.write_text(json.dumps(asked))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.Popen([*TORCHRUN, str(Path(__file__).parent / "ranks.py"), str(task)], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finished(process: subprocess.Popen[str]) -> str:
    said, _ = process.communicate(timeout=240)
    assert process.returncode == 0, said
    return said


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}


def logged(folder: Path) -> list[tuple[int, float]]:
    path = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    return [(row["step"], row["loss"]) for row in rows]


@pytest.fixture(scope="module")
def world(base, deep, tmp_path_factory) -> dict:
    """One torchrun for all equalities: what it measured, and the folders that its stages left."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "two").mkdir()
    rows, two_sided = manifest(folder / "rows", conversations(24)), manifest(folder / "pairs", pairs(15))
    keys = {"base": base, "data": rows, "steps": 6, "tokens_per_step": 150, "checkpoint_every": 2, **ranks.SMALL}
    adapted, judged = {**keys, **ranks.LORA}, {**keys, "data": two_sided, "pairs_per_step": 3, "optim": {"lr": 1e-3}}
    del judged["tokens_per_step"]
    acting = {"base": base, "steps": 3, "tasks_per_step": 3, "group": 4, "kl": 0.1, "environment": "worlds:say", **ranks.SMALL, **ranks.LORA}
    others = {
        "kto": {**keys, "data": two_sided, "answers_per_step": 6, "steps": 3},
        "process_reward": {**keys, "data": manifest(folder / "solutions", solutions(12)), "step": "paragraph", "steps": 3},
        "ppo": {**acting, "at_cut": "judge"},
        "distill": {**keys, "base": deep, "student": {"layers": 2}, "steps": 3},
    }
    del others["kto"]["tokens_per_step"]
    # "back": one process stops in the middle, two go on
    assert ranks.run_stage("sft", {**keys, "out": str(folder / "back")}, 4) is None
    asked = {
        "measure": [base, rows, two_sided, str(folder / "two")],
        "stages": [
            ["sft", {**keys, "out": str(folder / "unbroken")}, None],
            ["sft", {**keys, "out": str(folder / "forth")}, 4],
            ["sft", {**keys, "out": str(folder / "back")}, None],
            ["sft", {**adapted, "out": str(folder / "adapter")}, 4],
            ["reward", {**judged, "out": str(folder / "reward")}, None],
            ["rl", {**acting, "out": str(folder / "rl")}, None],
            *[[name, {**asked, "out": str(folder / name)}, None] for name, asked in others.items()],
        ],
    }
    said = finished(launch(folder, asked))
    return {"folder": folder, "keys": keys, "adapted": adapted, "judged": judged, "acting": acting, "rows": rows, "pairs": two_sided, "others": others, "said": said}


@pytest.mark.parametrize("case", ["sft", "sft lora", "sft recomputed", "preference"])
def test_losses_gradients_and_weights_are_those_of_one_process(world, base, tmp_path, case) -> None:
    one = ranks.measured(base, world["rows"], world["pairs"], tmp_path)[case] if case == "preference" else ranks.measure(*ranks.fine_tuning({
        "base": base, "data": world["rows"], **{"sft": {"hold_unseen": True}, "sft lora": ranks.LORA, "sft recomputed": {"recompute": True}}[case],
    }))  # fmt: skip
    two = load_file(world["folder"] / "two" / f"{case}.safetensors")
    assert two.keys() == one.keys()
    assert any(name.startswith("gradient") and bool(value.abs().max() > 1e-4) for name, value in one.items())
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, **TOLERANCE, msg=lambda told, name=name: f"{name}: {told}")


def test_a_checkpoint_of_two_ranks_goes_on_on_one_and_back(world, base) -> None:
    """Six steps on two ranks; four on two and two on one; four on one and two on two: the same losses and weights."""
    folder, keys = world["folder"], world["keys"]
    kept = sorted(path.name for path in (folder / "forth/checkpoints").iterdir())
    assert kept == ["step-00000002", "step-00000004"]
    assert (folder / "forth/checkpoints/step-00000004/.metadata").is_file()  # a distributed checkpoint, each rank's shards apart
    went_on = ranks.run_stage("sft", {**keys, "out": str(folder / "forth")})
    assert went_on is not None
    unbroken = weights_of(folder / "unbroken/model")
    for other in ("forth", "back"):
        found = weights_of(folder / other / "model")
        assert found.keys() == unbroken.keys()
        for name, value in unbroken.items():
            torch.testing.assert_close(found[name], value, **TOLERANCE, msg=lambda told, name=name, other=other: f"{other} {name}: {told}")
        assert [step for step, _ in logged(folder / other)] == [1, 2, 3, 4, 5, 6]
        assert [loss for _, loss in logged(folder / other)] == pytest.approx([loss for _, loss in logged(folder / "unbroken")], abs=1e-5)
    assert world["said"].count("going on from step 4 of 6") == 1  # once, and not once a rank
    assert not list(folder.glob("*/.*"))


def test_an_adapter_trained_on_two_ranks_goes_on_on_one(world) -> None:
    folder, adapted = world["folder"], world["adapted"]
    ranks.run_stage("sft", {**adapted, "out": str(folder / "adapter")})
    ranks.run_stage("sft", {**adapted, "out": str(folder / "alone")})
    one, two = weights_of(folder / "alone/adapter"), weights_of(folder / "adapter/adapter")
    assert any(bool(value.abs().max() > 1e-3) for name, value in one.items() if "lora_B" in name)
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, **TOLERANCE, msg=lambda told, name=name: f"{name}: {told}")


def test_a_reward_model_of_two_ranks_is_saved_whole(world) -> None:
    """Its backbone's head is tied to embeddings that were sharded, and stands outside of what was trained."""
    from temper.policy.scalar_head import RewardModel

    folder, judged = world["folder"], world["judged"]
    ranks.run_stage("reward", {**judged, "out": str(folder / "reward alone")})
    one, two = (weights_of(folder / name / "reward_model") for name in ("reward alone", "reward"))
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, **TOLERANCE, msg=lambda told, name=name: f"{name}: {told}")
    RewardModel.load(folder / "reward/reward_model", precision="float32")  # verifies the hash of its weights


def test_two_ranks_sample_their_share_and_learn_from_all_of_it(world) -> None:
    """RL: three tasks over two ranks; what is drawn depends on seed, task and number alone, so the episodes are those of one process."""
    folder, acting = world["folder"], world["acting"]
    ranks.run_stage("rl", {**acting, "out": str(folder / "rl alone")})
    for step in (0, 2):
        one, two = ((folder / name / f"episodes/step-{step:06d}.jsonl").read_text().splitlines() for name in ("rl alone", "rl"))
        assert [[turn["token_ids"] for turn in json.loads(line)["sampled"]] for line in one] == [[turn["token_ids"] for turn in json.loads(line)["sampled"]] for line in two]
    one, two = weights_of(folder / "rl alone/adapter"), weights_of(folder / "rl/adapter")
    assert any(bool(value.abs().max() > 1e-4) for name, value in one.items() if "lora_B" in name)
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, **TOLERANCE, msg=lambda told, name=name: f"{name}: {told}")


@pytest.mark.parametrize(("stage", "written"), [("kto", "model"), ("process_reward", "reward_model"), ("ppo", "adapter"), ("distill", "model")])
def test_the_other_stages_learn_on_two_ranks_what_one_learns(world, stage, written) -> None:
    folder = world["folder"]
    ranks.run_stage(stage, {**world["others"][stage], "out": str(folder / f"{stage} alone")})
    assert [loss for _, loss in logged(folder / stage)] == pytest.approx([loss for _, loss in logged(folder / f"{stage} alone")], abs=1e-5)
    one, two = (weights_of(folder / name / written) for name in (f"{stage} alone", stage))
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, **TOLERANCE, msg=lambda told, name=name: f"{name}: {told}")


def test_a_killed_rank_ends_the_job_with_a_word_and_the_job_goes_on(world, tmp_path) -> None:
    """SIGKILL of one of two ranks in the middle: no hang, a reason and a way on, and then the bytes of an unbroken run."""
    keys = {**world["keys"], "steps": 12, "checkpoint_every": 1}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    # the unbroken run comes first in the same job, so that one start serves both
    process = launch(tmp_path, {"stages": [["sft", {**keys, "out": str(whole)}, None], ["sft", {**keys, "out": str(broken)}, None]]})
    deadline = time.monotonic() + 200
    while len(logged(broken)) < 3:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(rank_pid(process.pid, 1), signal.SIGKILL)
    said, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "rank 0 of 2 lost another rank during" in said or "rank 0 of 2 was told to stop" in said
    assert "the same command goes on from the last checkpoint, on this or another number of ranks" in said
    assert not (broken / "done.json").exists()
    assert 3 <= len(logged(broken)) < 12
    said = finished(launch(tmp_path, {"stages": [["sft", {**keys, "out": str(broken)}, None]]}))
    assert "going on from step" in said
    assert logged(broken) == logged(whole)
    assert (broken / "model/model.safetensors").read_bytes() == (whole / "model/model.safetensors").read_bytes()
    assert not list(broken.glob(".*"))


def rank_pid(torchrun: int, wanted: int) -> int:
    """The process of a rank, by the variable that torchrun gave it."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            variables = (path / "environ").read_bytes().split(b"\0")
        except (OSError, IndexError):
            continue
        if parent == torchrun and f"RANK={wanted}".encode() in variables:
            return int(path.name)
    raise AssertionError(f"torchrun {torchrun} has no rank {wanted}")
