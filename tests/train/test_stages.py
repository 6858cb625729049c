"""What every stage promises: a plan that covers the rows, content-addressed work, manifests only, configs that load."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest
import torch
import yaml
from worlds import conversations, manifest, tool_conversation

from temper.core.config import load_config
from temper.core.errors import ConfigError, DataError, ManifestError
from temper.core.storage import verify_folder
from temper.policy.adapters import LoraConfig
from temper.policy.model import Policy
from temper.train import STAGES, load_stage, sft
from temper.train.learner import OptimConfig
from temper.train.stage import StageConfig, cut, plan_steps, tasks_of

CONFIGS = Path(__file__).parents[2] / "configs"
FAST = {"tokens_per_step": 400, "tokens_per_batch": 256, "optim": {"lr": 3e-3}, "precision": "float32"}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return manifest(tmp_path_factory.mktemp("manifest") / "rows", [*conversations(30), tool_conversation()])


def config(**keys) -> StageConfig:
    return StageConfig(out="o", base="b", **keys)


def test_every_epoch_visits_every_row_once() -> None:
    lengths = [5 + number % 7 for number in range(40)]
    plan = plan_steps(lengths, config(tokens_per_step=64, tokens_per_batch=32, epochs=2))
    visits = [row for step in plan for batch in step for row in batch]
    half = len(visits) // 2
    assert sorted(visits[:half]) == sorted(visits[half:]) == list(range(40))
    assert visits[:half] != visits[half:]
    for step in plan:
        assert all(max(lengths[row] for row in batch) * len(batch) <= 32 for batch in step)
        assert 40 <= sum(lengths[row] for batch in step for row in batch) <= 80
    assert plan_steps(lengths, config(tokens_per_step=64, tokens_per_batch=32, epochs=2)) == plan
    assert plan_steps(lengths, config(tokens_per_step=64, tokens_per_batch=32, epochs=2, seed=1)) != plan


def test_steps_bucketed_together_hold_the_same_rows_with_less_padding() -> None:
    rng = random.Random(0)
    lengths = [rng.randint(5, 60) for _ in range(400)]

    def padded(plan) -> int:
        return sum(max(lengths[row] for row in batch) * len(batch) for step in plan for batch in step)

    keys = {"tokens_per_step": 400, "tokens_per_batch": 150, "epochs": 1}
    alone, together = (plan_steps(lengths, config(**keys, bucket_steps=count)) for count in (1, 8))
    assert len(together) == len(alone)
    assert sorted(row for step in together for batch in step for row in batch) == list(range(400))
    assert padded(together) - sum(lengths) < 0.5 * (padded(alone) - sum(lengths))
    for step in together:
        assert 200 <= sum(lengths[row] for batch in step for row in batch) <= 600
    assert {row for step in together[:8] for batch in step for row in batch} == {row for step in alone[:8] for batch in step for row in batch}


def test_steps_override_epochs_and_half_an_epoch_is_half() -> None:
    lengths = [10] * 20
    assert len(plan_steps(lengths, config(tokens_per_step=50, steps=7))) == 7
    assert len(plan_steps(lengths, config(tokens_per_step=50, epochs=0.5))) == 2
    assert [len(step[0]) for step in plan_steps(lengths, config(epochs=1), rows_of_step=8)] == [8, 8, 4]


def test_cut_by_hand() -> None:
    """Sixty tokens in steps of about 20: three pieces, none left with a single straggler."""
    assert cut([0, 1, 2, 3, 4, 5], [10] * 6, 20, None) == [[0, 1], [2, 3], [4, 5]]
    assert cut([0, 1, 2, 3, 4], [10] * 5, 20, None) == [[0, 1, 2], [3, 4]]
    assert cut([0, 1], [500, 1], 20, None) == [[0], [1]]


def test_micro_batch_size_changes_no_step() -> None:
    lengths = [3 + number % 11 for number in range(30)]
    small, large = (plan_steps(lengths, config(tokens_per_step=50, tokens_per_batch=size)) for size in (16, 4096))
    assert [sorted(row for batch in step for row in batch) for step in small] == [sorted(row for batch in step for row in batch) for step in large]


def test_tasks_of_a_step_are_a_function_of_seed_and_step() -> None:
    tasks = list("abcdefg")
    steps = [tasks_of(step, tasks, 3, 0) for step in range(7)]
    assert sorted(task for step in steps for task in step) == sorted(tasks * 3)
    assert tasks_of(4, tasks, 3, 0) == steps[4]


def test_sft_learns_and_a_second_run_does_nothing(base, data, tmp_path, capsys) -> None:
    cfg = sft.Config(out=str(tmp_path / "sft"), base=base, data=data, dev=data, epochs=6, **FAST)
    result = sft.run(cfg)
    log = [json.loads(line) for line in (tmp_path / "sft/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log] == list(range(1, result["steps"] + 1))
    assert log[-1]["dev_loss"] < log[0]["loss"] - 1
    assert {"loss", "lr", "grad_norm", "tokens", "supervised", "tokens_per_s", "step_s", "limit_share"} <= log[0].keys()
    verify_folder(tmp_path / "sft/model")
    written = (tmp_path / "sft/metrics.jsonl").stat().st_mtime_ns
    capsys.readouterr()
    assert sft.run(cfg) == json.loads(json.dumps(result))
    assert "unchanged: sft" in capsys.readouterr().err
    assert (tmp_path / "sft/metrics.jsonl").stat().st_mtime_ns == written
    other = cfg.model_copy(update={"seed": 1})
    assert sft.run(other)["hash"] != result["hash"]


def test_an_adapter_leaves_the_base_alone(base, data, tmp_path) -> None:
    first = sft.run(sft.Config(out=str(tmp_path / "a"), base=base, data=data, adapter="bank", lora=LoraConfig(rank=4, dropout=0.1), **FAST))
    assert set(first) >= {"adapter", "hash"}
    assert "model" not in first
    policy = Policy.load(base, precision="float32")
    before = policy.weights_hash()
    policy.load_adapter("bank", first["adapter"])
    assert policy.weights_hash() == before
    assert float(sum(weight.detach().abs().sum() for name, weight in policy.model.named_parameters() if name.endswith(".B"))) > 0
    again = sft.run(sft.Config(out=str(tmp_path / "b"), base=base, data=data, adapter="bank", initial_adapter=first["adapter"], **FAST))
    log = [json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[0])["loss"] for name in "ab"]
    assert log[1] < log[0]  # the second goes on from where the first ended
    assert again["hash"] != first["hash"]


def test_weightings_by_hand(base, data) -> None:
    policy = Policy.load(base, precision="float32")
    records = conversations(4)
    by_token = sft.sequences(records, policy, sft.Config(out="o", base=base, data=data))
    by_row = sft.sequences(records, policy, sft.Config(out="o", base=base, data=data, weighting="sequence"))
    assert {weight for row in by_token for weight in row.weights} == {0.0, 1.0}
    for token, row in zip(by_token, by_row, strict=True):
        assert sum(row.weights) == pytest.approx(1.0)
        assert max(row.weights) == pytest.approx(1 / token.supervised)


def test_rows_come_from_an_intact_manifest_only(base, tmp_path) -> None:
    cfg = sft.Config(out=str(tmp_path / "out"), base=base, data=str(tmp_path / "rows"), **FAST)
    with pytest.raises(ManifestError, match=r"manifest\.json does not exist"):
        sft.run(cfg)
    manifest(tmp_path / "rows", conversations(4))
    records = tmp_path / "rows/records.jsonl"
    records.write_text(records.read_text().replace("budget", "gamble"))
    with pytest.raises(ManifestError, match="not what was admitted"):
        sft.run(cfg)
    assert not (tmp_path / "out/model").exists()
    records.unlink()
    with pytest.raises(ManifestError, match=r"records\.jsonl does not exist"):
        sft.run(cfg)
    manifest(tmp_path / "rows", [])
    with pytest.raises(DataError, match="admits no record"):
        sft.run(cfg)
    long = conversations(1)
    manifest(tmp_path / "rows", long)
    with pytest.raises(DataError, match=rf"{long[0].id[:16]}.*max_tokens=4"):
        sft.run(cfg.model_copy(update={"max_tokens": 4}))


def test_estimates_say_where_they_come_from(base, data, monkeypatch) -> None:
    cfg = sft.Config(out="o", base=base, data=data, epochs=2, **FAST)
    policy = Policy.load(base, precision="float32")
    lengths = [len(row.tokens) for row in sft.sequences(sft.load_records(data)[1], policy, cfg)]
    timed = sft.estimate(cfg)
    assert (timed.rows, timed.tokens, timed.steps) == (31, 2 * sum(lengths), len(plan_steps(lengths, cfg)))
    count = sum(weight.numel() for weight in policy.model.parameters())
    assert (timed.parameters, timed.trained) == (count, count)
    assert timed.optimizer_mb == round(12 * count / 2**20, 1)  # gradient and two moments, four bytes each
    small = sft.estimate(cfg.model_copy(update={"optim": OptimConfig(kind="adamw8bit")}))
    assert small.optimizer_mb < 0.6 * timed.optimizer_mb  # of matrices a gradient of four bytes and two moments of one
    assert timed.seconds > 0
    assert "timed" in timed.seconds_from
    monkeypatch.setattr("temper.train.estimate.PROBE_BELOW", 0)
    counted = sft.estimate(cfg.model_copy(update={"lora": LoraConfig(rank=2)}))
    assert counted.trained < count / 5
    assert "GFLOP/s" in counted.seconds_from


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_stage_file_loads(path: Path) -> None:
    name = yaml.safe_load(path.read_text()).get("stage")
    if name not in STAGES:
        return
    cfg = load_config(load_stage(name).Config, path)
    assert cfg.out.startswith("runs/demo/")
    assert cfg.stage == name
    with pytest.raises(ConfigError, match="unknown key 'epoch'"):
        load_config(load_stage(name).Config, path, ["epoch=3"])


def test_stages_have_a_config_a_run_and_an_estimate_under_their_budget() -> None:
    for name in STAGES:
        module = load_stage(name)
        assert module.Config.model_fields.keys() >= {"out", "base", "seed", "optim"}
        assert callable(module.run)
        assert callable(module.estimate)
        assert len(re.findall(r"^    .*$", Path(module.__file__).read_text().partition("\ndef run(")[2].partition("\ndef ")[0], re.M)) < 120
    with pytest.raises(ConfigError, match="there is no stage 'stf'"):
        load_stage("stf")
    with pytest.raises(ConfigError, match="does not exist"):
        load_stage("no.such_module")


def test_threads_are_what_the_config_says(base, data, tmp_path) -> None:
    before = torch.get_num_threads()
    sft.run(sft.Config(out=str(tmp_path / "o"), base=base, data=data, threads=1, steps=1, **FAST))
    assert torch.get_num_threads() == 1
    torch.set_num_threads(before)
