"""A run folder whose key changes: what is unfinished is kept and can be gone on with, what goes is named."""

from __future__ import annotations

import shutil
import time
from importlib import metadata
from pathlib import Path

import pytest

from temper.core.errors import StorageError
from temper.core.run import RunDirectory

CONFIG = {"tokens_per_batch": 8192, "optim": {"lr": 0.1}, "layout": "auto"}


def opened(out: Path, data: str = "d1", **changes) -> RunDirectory:
    return RunDirectory.create(out, stage="sft", config={**CONFIG, **changes}, inputs={"data": data}, rooms=("core",))


def interrupted(out: Path, **changes) -> RunDirectory:
    """Work with a checkpoint of step 50, and no end."""
    run = opened(out, **changes)
    run.checkpoint(50, lambda folder: (folder / "weights").write_text(f"weights of {changes}") and None)
    return run


def under(monkeypatch, **numbers: str) -> None:
    """Let the libraries be of these versions."""
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: numbers.get(name) or real(name))


def test_unfinished_work_of_another_key_is_kept_and_gone_on_with(tmp_path, capsys):
    """Out of memory, started again with less a micro-batch: the checkpoints must not be lost to it."""
    out = tmp_path / "sft"
    first = interrupted(out)
    second = opened(out, tokens_per_batch=4096)
    assert second.latest() is None  # nor may they be taken for the new work's
    kept = tmp_path / "unfinished" / f"sft-{first.key[:12]}"
    assert (kept / "checkpoints/step-00000050/weights").read_text() == "weights of {}"
    (said,) = capsys.readouterr().err.splitlines()
    for told in (str(kept), first.key[:12], "tokens_per_batch 8192 -> 4096", "set that back"):
        assert told in said
    back = opened(out)
    assert back.latest() == (50, out / "checkpoints/step-00000050")
    assert not kept.exists()
    assert f"{kept} is back in {out}" in capsys.readouterr().err


def test_two_unfinished_runs_change_places(tmp_path):
    out = tmp_path / "sft"
    for lr in (0.1, 0.2):
        interrupted(out, optim={"lr": lr})
    for lr in (0.1, 0.2, 0.1):
        found = opened(out, optim={"lr": lr}).latest()
        assert found is not None
        assert (found[1] / "weights").read_text() == f"weights of { {'optim': {'lr': lr}} }"


def test_a_place_that_is_taken_is_not_written_over(tmp_path):
    out = tmp_path / "sft"
    first = interrupted(out)
    taken = tmp_path / "unfinished" / f"sft-{first.key[:12]}"
    taken.mkdir(parents=True)
    (taken / "mine").write_text("mine")
    with pytest.raises(StorageError, match="unfinished") as told:
        opened(out, tokens_per_batch=4096)
    assert "remove or move one of the two" in told.value.do
    assert first.latest() is not None
    assert (taken / "mine").read_text() == "mine"


@pytest.mark.parametrize(("changes", "told"), [({"optim": {"lr": 0.2}}, "optim.lr 0.1 -> 0.2"), ({"data": "d2"}, "another data")])
def test_finished_work_is_replaced_and_named(tmp_path, capsys, changes, told):
    run = interrupted(tmp_path / "sft")
    run.finish({"loss": 1.0}, time.monotonic())
    assert not opened(tmp_path / "sft", **changes).done
    (said,) = capsys.readouterr().err.splitlines()
    assert said == f"removing the finished sft in {tmp_path / 'sft'} (key {run.key[:12]}): {told}"
    assert [path.name for path in tmp_path.iterdir()] == ["sft"]


def test_work_without_a_checkpoint_is_replaced_and_named(tmp_path, capsys):
    run = opened(tmp_path / "sft")
    opened(tmp_path / "sft", layout="padded", optim={"lr": 0.2})
    (said,) = capsys.readouterr().err.splitlines()
    assert said == f"removing the unfinished sft, without a checkpoint, in {tmp_path / 'sft'} (key {run.key[:12]}): layout auto -> padded, optim.lr 0.1 -> 0.2"
    assert [path.name for path in tmp_path.iterdir()] == ["sft"]


def test_other_code_is_named_where_config_and_inputs_are_equal(tmp_path, capsys):
    interrupted(tmp_path / "sft")
    RunDirectory.create(tmp_path / "sft", stage="sft", config=CONFIG, inputs={"data": "d1"}, rooms=("core", "data"))
    assert "temper's own code" in capsys.readouterr().err


def test_going_on_under_other_libraries_is_said(tmp_path, capsys, monkeypatch):
    out = tmp_path / "sft"
    under(monkeypatch, torch="2.12.0", transformers="5.1.0")
    interrupted(out)
    assert opened(out).latest() is not None
    assert capsys.readouterr().err == ""  # the same ones
    under(monkeypatch, torch="2.13.0", transformers="5.1.0")
    run = opened(out)
    assert run.latest() is not None
    said = capsys.readouterr().err
    for told in ("warning", "step-00000050", "torch 2.12.0", "torch 2.13.0", f"Remove {out}"):
        assert told in said
    assert "transformers" not in said  # it did not change
    # A checkpoint is of the libraries that wrote it, not of those that the run began under.
    run.checkpoint(100, lambda folder: None)
    assert run.latest() == (100, out / "checkpoints/step-00000100")
    assert capsys.readouterr().err == ""


def test_a_checkpoint_that_names_no_libraries_is_of_those_its_run_began_under(tmp_path, capsys, monkeypatch):
    """Checkpoints of earlier versions of temper."""
    under(monkeypatch, transformers="5.1.0")
    run = opened(tmp_path / "sft")
    with run.folder("checkpoints/step-00000050") as scratch:
        (scratch / "weights").write_text("w")
    under(monkeypatch, transformers="5.2.0")
    assert run.latest() is not None
    assert "transformers 5.1.0" in capsys.readouterr().err


def test_finished_work_is_unchanged_under_other_libraries(tmp_path, capsys, monkeypatch):
    under(monkeypatch, torch="2.12.0")
    interrupted(tmp_path / "sft").finish({"loss": 1.0}, time.monotonic())
    under(monkeypatch, torch="2.13.0")
    run = opened(tmp_path / "sft")
    assert run.done
    assert run.result() == {"loss": 1.0}
    assert capsys.readouterr().err == ""


def test_a_kill_in_the_middle_of_a_removal_leaves_nothing_to_the_new_work(tmp_path, monkeypatch):
    """Finished work whose checkpoints a kill left behind: half removed, they must not be taken for the new work's."""
    out = tmp_path / "sft"
    run = interrupted(out)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda path, **options: None)  # killed after done.json, before the checkpoints went
        run.finish({}, time.monotonic())
    assert run.checkpoints()

    def killed(path, **options) -> None:
        (Path(path) / "stage.json").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            opened(out, tokens_per_batch=4096)
    assert opened(out, tokens_per_batch=4096).latest() is None
    assert [path.name for path in tmp_path.iterdir()] == ["sft"]
