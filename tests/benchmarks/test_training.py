"""The benchmark's own arithmetic: what a pass needs, and when there is a ratio."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "training"))

import report
import run
import workloads


def test_rows_are_the_same_in_every_process_and_stand_by_length():
    for workload in (*workloads.CPU, *workloads.CUDA):
        few = replace(workload, rows=8)
        rows = workloads.rows_of(few)
        assert rows == workloads.rows_of(few)
        assert [workloads.size(row) for row in rows] == sorted(workloads.size(row) for row in rows)
        assert 1 <= len(workloads.check_rows(few)) <= workloads.CHECK_ROWS
        assert workload.rows % workload.step_rows == workload.step_rows % workload.peer_rows == 0


def test_operations_by_hand():
    # width 4, two layers, one head of 4, inner 8, V 10: a layer has 4·4·4 + 3·4·8 = 160 weights; LoRA of rank 16: 16·(4·8 + 3·12)
    model = workloads.Architecture(4, 2, 1, 1, 8, 10)
    assert (model.body, model.adapters) == (320, 2 * 16 * 68)
    assert (model.mlp, model.mlp_adapters) == (96, 16 * 36)  # of one layer: the last one's runs where it is read
    workloads.MODELS["hand"] = model
    base = workloads.Workload("hand", "", "sft", "hand", rows=1, step_rows=1, peer_rows=1, lengths=(10, 10))
    try:
        # 10 tokens of which 4 are trained; 55 pairs attend at 4·2·4 operations; forward and backward are three times that
        assert workloads.measure(base) == workloads.Size(10, 10, 6 * (320 * 10 - 96 * 6) + 3 * 32 * 55 + 6 * 40 * 4, 0.0)
        pair = replace(base, kind="dpo", lora=True, lengths=(5, 5), answers=(2, 2))
        # the prompt once: 5 + 2 + 2 tokens; 15 pairs in it, 2·5 + 3 for each answer; four answer tokens in the head
        attended = 32 * (15 + 2 * 13)
        step = (4 * 320 + 6 * 2176) * 9 - (4 * 96 + 6 * 576) * 5 + 3 * attended + 4 * 40 * 4
        assert workloads.measure(pair) == workloads.Size(1, 9, step, 2 * (320 * 9 - 96 * 5) + attended + 2 * 40 * 4)
    finally:
        del workloads.MODELS["hand"]


def sides(**more):
    size = {"units": 100.0, "tokens": 50, "operations": 1e9, "reference_operations": 1e9}
    return {"size": size, "errors": [], "peer": {"passes_s": [9.0, 11.0], "reference_s": 2.0, "warm_s": 1.0}, "ours": {"passes_s": [2.0, 2.0], "warm_s": 1.0}, **more}


def test_a_ratio_needs_equal_losses_and_counts_a_reference_once():
    made = run.conclude(sides(losses_apart=1e-6), "float32")
    assert (made["ratio"], made["training_ratio"], made["peer"]["spread"]) == (6.0, 5.0, pytest.approx(1 / 6))
    assert made["ours"]["units_per_s"] == 50.0
    refused = run.conclude(sides(losses_apart=0.01), "float32")
    assert "ratio" not in refused
    assert refused["errors"] == ["no ratio: the losses are 1.0e-02 apart"]
    assert run.conclude(sides(losses_apart=0.01), "bfloat16")["ratio"] == 6.0


def test_a_table_says_what_failed_and_holds_no_figure_for_it():
    found = run.conclude({"size": sides()["size"], "errors": ["the process ended before 'check': killed"]}, "float32")
    results = {
        "machine": {"processor": "P", "cores": 2, "threads": 2, "memory_gib": 4, "system": "S", "python": "3", "versions": {}}, "limit": {"default": 5e9},
        "limits": [{"default": 5e9}, {"default": 8e9, "onednn": 1e10}], "peer_versions": {}, "precision": "float32", "passes": 2, "device": "cpu",
        "workloads": {"sft_full": workloads.described(workloads.CPU[0]) | found},
    }  # fmt: skip
    text = report.markdown(results)
    assert "| SFT, full, d256 L8, V 32,768<br>the process ended before 'check': killed | – | – | – | ≥ 5× |" in text
    assert report.limit(results) == 1e10


def test_a_workload_that_is_not_there_is_named():
    with pytest.raises(SystemExit, match="there is no workload 'sft'"):
        workloads.by_name(["sft"], "cpu")
