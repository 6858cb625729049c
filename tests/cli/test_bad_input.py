"""What bad input gets, through the command line as a process: what, why, what to do; exit code 2; nothing half-written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from checkpoints import tiny_checkpoint  # noqa: E402
from child import Told, temper  # noqa: E402

from temper.core.storage import read_json  # noqa: E402

STATED = ("--licence", "MIT", "--privacy", "internal", "--access", "team")
ASK, ANSWER = {"role": "user", "content": "Which ledger holds the invoice?"}, {"role": "assistant", "content": "The sales ledger holds it."}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tiny_checkpoint("qwen3", tmp_path_factory.mktemp("model") / "base")


def chats(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def admitted(folder: Path) -> Path:
    """A manifest of good rows."""
    rows = [{"messages": [{"role": "user", "content": f"Which ledger holds invoice {number * 7919}?"}, ANSWER]} for number in range(12)]
    told = temper(folder / "admit", "data", "admit", chats(folder / "good.jsonl", *rows), "--out", folder / "data", *STATED)
    assert told.code == 0, told.err
    return folder / "data" / "train"


def sft(folder: Path, base: Path, **changed: Any) -> Path:
    """A stage file that works, but for what was changed."""
    values = {
        "stage": "sft", "run": str(folder), "base": str(base), "data": str(folder / "data" / "train"), "out": str(folder / "out"), "steps": 2,
        "tokens_per_step": 64, "precision": "float32", "checkpoint_every": 1, **changed,
    }  # fmt: skip
    path = folder / "sft.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def refused(told: Told, *said: str, why: bool = True) -> None:
    """Exit code 2, no traceback, and an error that says what, why and what to do."""
    assert told.code == 2, told.err
    assert "Traceback" not in told.err
    assert "error: " in told.err
    assert "  do:  " in told.err
    assert not why or "  why: " in told.err
    for text in said:
        assert text in told.err


def untouched(folder: Path) -> None:
    """Neither an output nor a scratch folder was left."""
    left = [path.name for path in folder.rglob("*") if path.name in ("model", "adapter", "done.json") or (path.is_dir() and path.name.startswith("."))]
    assert left == []


def test_a_refused_admission_leaves_the_data_of_an_earlier_one(tmp_path):
    """A licence that is not allowed, a rules file with a misspelt key, a privacy class that does not exist: each refused, nothing lost."""
    kept = admitted(tmp_path)
    before = {path: path.read_bytes() for path in (tmp_path / "data").rglob("*") if path.is_file()}
    (tmp_path / "rules.yaml").write_text("licence: [internal-use]\n")
    again = ("data", "admit", tmp_path / "good.jsonl", "--out", tmp_path / "data", "--access", "team")
    refused(temper(tmp_path / "a", *again, "--licence", "GPL-9", "--privacy", "internal"), "would admit nothing")
    refused(temper(tmp_path / "b", *again, "--licence", "MIT", "--privacy", "internal", "--rules", tmp_path / "rules.yaml"), "licence", "licences")
    told = temper(tmp_path / "c", *again, "--licence", "MIT", "--privacy", "private")
    refused(told, "privacy: ")
    assert "errors.pydantic.dev" not in told.err
    assert kept.is_dir()
    assert {path: path.read_bytes() for path in (tmp_path / "data").rglob("*") if path.is_file()} == before


def test_the_stage_file_that_the_others_spoil_works(base, tmp_path):
    admitted(tmp_path)
    told = temper(tmp_path / "told", "run", sft(tmp_path, base), "--json")
    assert told.code == 0, told.err
    assert (tmp_path / "out" / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"optm": {}}, ("sft.yaml", "line 10", "unknown key 'optm'", "did you mean 'optim'?")),
        ({"optim": {"lr": "fast"}}, ("sft.yaml", "line 11", "optim.lr", "'fast'")),
        ({"steps": "many"}, ("sft.yaml", "line 6", "steps", "'many'")),
    ],
)
def test_a_key_that_is_unknown_or_of_a_wrong_type_names_file_and_line(base, tmp_path, changed, said):
    refused(temper(tmp_path / "told", "run", sft(tmp_path, base, **changed)), *said)
    untouched(tmp_path)


def test_a_missing_file_is_named_whichever_it_is(base, tmp_path):
    refused(temper(tmp_path / "a", "run", tmp_path / "sfft.yaml"), "sfft.yaml does not exist", why=False)
    refused(temper(tmp_path / "b", "run", sft(tmp_path, base)), f"{tmp_path / 'data' / 'train'}", "does not exist", "temper data admit")
    refused(temper(tmp_path / "c", "data", "admit", tmp_path / "no.jsonl", "--out", tmp_path / "data", *STATED), "no.jsonl does not exist", why=False)
    admitted(tmp_path)
    refused(temper(tmp_path / "d", "run", sft(tmp_path, tmp_path / "nowhere")), str(tmp_path / "nowhere"), why=False)
    untouched(tmp_path / "out")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": [ASK]}, "assistant"),
        ({"messages": [ASK, {"role": "narrator", "content": "Meanwhile."}, ANSWER]}, "narrator"),
        ({"messages": [ASK, {"role": "tool", "tool_call_id": "c1", "content": "42"}, ANSWER]}, "call"),
    ],
    ids=["no assistant turn", "unknown role", "a result without a call"],
)
def test_a_row_that_cannot_be_trained_on_names_file_and_row(tmp_path, row, said):
    path = chats(tmp_path / "chats.jsonl", {"messages": [ASK, ANSWER]}, row)
    told = temper(tmp_path / "told", "data", "admit", path, "--out", tmp_path / "data", "--format", "openai", *STATED)
    refused(told, "chats.jsonl", said)
    assert ":2" in told.err or "row 2" in told.err or "line 2" in told.err
    assert not list((tmp_path / "data").glob("*/records.jsonl"))


def spoilt(base: Path, folder: Path) -> Path:
    """A copy of the checkpoint, to be spoilt."""
    return Path(shutil.copytree(base, folder))


NO_CALLS = "{% if tools %}{{ tools | tojson }}\n{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
NO_CALLS += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
REWRITES = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if loop.last or m.role != 'assistant' %}{{ m.content }}{% else %}(cut){% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def with_template(base: Path, folder: Path, text: str) -> Path:
    made = spoilt(base, folder)
    (made / "chat_template.jinja").write_text(text)
    return made


CALL = {"id": "c1", "type": "function", "function": {"name": "get_balance", "arguments": json.dumps({"account": "cash"})}}
TOOL = {"type": "function", "function": {"name": "get_balance", "description": "d", "parameters": {"type": "object", "properties": {"account": {"type": "string"}}}}}
WITH_CALL = {
    "messages": [ASK, {"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "tool_call_id": "c1", "content": "42"}, ANSWER],
    "tools": [TOOL],
}  # fmt: skip
TWO_TURNS = {"messages": [ASK, ANSWER, {"role": "user", "content": "And the one before it?"}, {"role": "assistant", "content": "That one too."}]}


@pytest.mark.parametrize(
    ("template", "row", "said"),
    [(NO_CALLS, WITH_CALL, "call"), (REWRITES, TWO_TURNS, "template")],
    ids=["drops tool calls", "not prefix-preserving"],
)
def test_a_template_that_breaks_the_contract_is_refused(base, tmp_path, template, row, said):
    model = with_template(base, tmp_path / "model_made", template)
    told = temper(tmp_path / "admit", "data", "admit", chats(tmp_path / "rows.jsonl", row), "--out", tmp_path / "data", *STATED)
    assert told.code == 0, told.err
    refused(temper(tmp_path / "told", "run", sft(tmp_path, model)), said)
    untouched(tmp_path / "out")


def test_an_empty_mask_after_truncation_names_the_row(base, tmp_path):
    admitted(tmp_path)
    told = temper(tmp_path / "told", "run", sft(tmp_path, base, max_tokens=4))
    refused(told, "trains nothing within max_tokens=4", "raise max_tokens")
    untouched(tmp_path / "out")


def test_a_pad_token_that_is_the_end_token_is_refused(base, tmp_path):
    admitted(tmp_path)
    model = spoilt(base, tmp_path / "model_made")
    settings = read_json(model / "tokenizer_config.json")
    (model / "tokenizer_config.json").write_text(json.dumps({**settings, "pad_token": settings["eos_token"]}))
    refused(temper(tmp_path / "told", "run", sft(tmp_path, model)), "padding")
    untouched(tmp_path / "out")


def test_a_checkpoint_that_differs_from_its_hashes_is_refused(base, tmp_path):
    admitted(tmp_path)
    model = spoilt(base, tmp_path / "model_made")
    assert temper(tmp_path / "hash", "data", "hash", model).code == 0
    weights = model / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(bytes(content))
    refused(temper(tmp_path / "told", "run", sft(tmp_path, model)), "model.safetensors differs from its manifest", "recorded", "found")
    untouched(tmp_path / "out")


def test_a_file_that_may_not_grow_further_is_a_full_disk(base, tmp_path):
    """A process whose files may hold 64 KiB each: the checkpoint does not fit, and says so; without the limit the same command goes on."""
    admitted(tmp_path)
    path = sft(tmp_path, base)
    told = temper(tmp_path / "told", "run", path, file_limit=64 * 1024)
    refused(told, "no space left while writing", "goes on from the last checkpoint")
    untouched(tmp_path / "out")
    assert not list((tmp_path / "out").glob("checkpoints/step-*"))
    assert temper(tmp_path / "again", "run", path).code == 0


def test_a_disk_that_is_really_full(base, tmp_path):
    """The run folder on a file system of 400 KiB; then it grows, and the same command goes on to the end."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(disk)], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("no small file system can be mounted here; the limit on a file's size stands for it")
    try:
        admitted(tmp_path)
        path = sft(tmp_path, base, out=str(disk / "out"))
        refused(temper(tmp_path / "told", "run", path), "no space left while writing", "bytes are free")
        untouched(disk)
        subprocess.run(["mount", "-o", "remount,size=16m", str(disk)], check=True)
        told = temper(tmp_path / "again", "run", path)
        assert told.code == 0, told.err
        assert (disk / "out" / "model" / "model.safetensors").is_file()
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_an_absent_optional_package_is_named_with_how_to_install_it(base, tmp_path):
    admitted(tmp_path)
    refused(temper(tmp_path / "told", "run", sft(tmp_path, base, trackers=["wandb"]), absent="wandb"), "'wandb' is not installed", "pip install wandb")
    untouched(tmp_path / "out")


@pytest.mark.skipif(os.path.exists("/dev/nvidia0"), reason="this machine has the GPU that is asked for")
def test_a_gpu_that_is_asked_for_and_absent(base, tmp_path):
    admitted(tmp_path)
    refused(temper(tmp_path / "told", "run", sft(tmp_path, base, device="cuda")), "cuda")
    untouched(tmp_path / "out")
