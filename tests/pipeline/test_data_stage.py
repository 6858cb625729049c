"""The data stage: generators and files through admission, done once, refused clearly."""

import json
from pathlib import Path

import pytest

from temper.core.config import load_config, parse_config
from temper.core.errors import ConfigError, DataError, ManifestError
from temper.data.sequence import load_manifest
from temper.pipeline import data
from temper.pipeline.config import PipelineConfig

GENERATED = {"generate": "temper.environments.finops.demonstrations:sft", "count": 30}
PROVENANCE = {"licence": "MIT", "privacy": "public", "access": "public", "synthetic": False}


def config(tmp_path, sets, **extra):
    return parse_config(data.Config, {"out": str(tmp_path / "data"), "sets": sets, **extra})


def test_generated_records_become_a_manifest_that_training_reads(tmp_path):
    result = data.run(config(tmp_path, {"sft": {"sources": [GENERATED]}}, environment="finops", heldout_limit=3))
    manifest, records = load_manifest(tmp_path / "data" / "sft")
    assert result["manifests"]["sft"]["admitted"] == len(records) == len(manifest.admitted)
    assert len(manifest.heldout) == 2 * 8 * 3  # dev and test, eight slices, three tasks each


def test_unchanged_work_is_not_done_again_and_says_so(tmp_path, capsys):
    cfg = config(tmp_path, {"sft": {"sources": [GENERATED]}})
    data.run(cfg)
    written = (tmp_path / "data" / "sft" / "records.jsonl").stat().st_mtime_ns
    data.run(cfg)
    assert "unchanged" in "".join(capsys.readouterr())
    assert (tmp_path / "data" / "sft" / "records.jsonl").stat().st_mtime_ns == written


def test_a_file_that_changed_is_admitted_anew(tmp_path):
    chats = tmp_path / "chats.jsonl"
    turns = [{"role": "user", "content": "What is due?"}, {"role": "assistant", "content": "Nothing is due today."}]
    chats.write_text(json.dumps({"messages": turns}) + "\n")
    cfg = config(tmp_path, {"mine": {"sources": [{"path": str(chats), "provenance": PROVENANCE}]}})
    assert data.run(cfg)["manifests"]["mine"]["admitted"] == 1
    other = [{"role": "user", "content": "Who approves?"}, {"role": "assistant", "content": "The controller approves it."}]
    chats.write_text(chats.read_text() + json.dumps({"messages": other}) + "\n")
    assert data.run(cfg)["manifests"]["mine"]["admitted"] == 2


def test_a_row_without_an_assistant_turn_is_refused_with_its_line(tmp_path):
    chats = tmp_path / "chats.jsonl"
    chats.write_text(json.dumps({"messages": [{"role": "user", "content": "Hello?"}]}) + "\n")
    with pytest.raises(DataError, match=r"chats\.jsonl"):
        data.run(config(tmp_path, {"mine": {"sources": [{"path": str(chats), "format": "openai", "provenance": PROVENANCE}]}}))
    assert not (tmp_path / "data" / "mine").exists()


def test_dev_records_are_not_let_into_a_training_manifest(tmp_path):
    wrong = {"sources": [GENERATED], "split": "dev", "rules": {"splits": ["train"]}}
    with pytest.raises(ManifestError, match="admit nothing"):
        data.run(config(tmp_path, {"sft": wrong}))


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ({"generate": "temper.nowhere:records", "count": 3}, "cannot be imported"),
        ({"path": "a.jsonl", "generate": "a:b", "count": 3}, "exactly one"),
        ({"generate": "a:b"}, "count"),
    ],
)
def test_a_source_that_makes_no_sense_is_refused(tmp_path, source, said):
    with pytest.raises(ConfigError, match=said):
        data.run(config(tmp_path, {"sft": {"sources": [source]}}))


@pytest.mark.parametrize("name", ["finops", "finops-quick"])
def test_a_phase_is_compared_with_one_that_comes_before_it(name):
    cfg = load_config(PipelineConfig, Path(f"configs/{name}.yaml"))
    seen: list[str] = []
    for phase in cfg.phases:
        assert phase.against is None or phase.against in seen, phase.name
        seen.append(phase.name)
    assert {cfg.release.phase, cfg.release.baseline, cfg.release.student} <= set(seen)


def test_looks_stand_in_the_run_folder_where_no_ledger_is_named(tmp_path):
    """A default that held ${run} was never filled in: the record of looks landed in a folder of that very name."""
    values = Path("configs/finops.yaml").read_text().replace("ledger: ${run}/looks.jsonl\n", "")
    (tmp_path / "lap.yaml").write_text(values)
    assert load_config(PipelineConfig, tmp_path / "lap.yaml", [f"run={tmp_path}/mine"]).ledger == f"{tmp_path}/mine/looks.jsonl"
    assert load_config(PipelineConfig, Path("configs/finops.yaml")).ledger == "runs/demo/looks.jsonl"
