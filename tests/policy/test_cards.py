"""Checkpoints and adapters carry their template's card, and loading says nothing that nobody needs to read."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from temper.core.errors import TemplateError
from temper.core.storage import FILES
from temper.data.golden import PIN, read_card
from temper.policy.adapters import LoraConfig
from temper.policy.model import Policy
from tests.checkpoints import tiny_checkpoint

HUB = Path(__file__).parents[1] / "data/templates/qwen3_hub.jinja"


def test_a_checkpoint_and_its_adapters_are_pinned_and_refused_under_another_template(tmp_path):
    policy = Policy.load(tiny_checkpoint("qwen3", tmp_path / "plain"), precision="float32", device="cpu")
    policy.add_lora("a", LoraConfig(rank=2, alpha=4))
    policy.save(tmp_path / "base")
    policy.save_adapter("a", tmp_path / "adapter")
    kept = read_card(tmp_path / "base")
    assert kept == read_card(tmp_path / "adapter")
    assert kept.fingerprint == policy.template.fingerprint == Policy.load(tmp_path / "base").template.fingerprint
    other = tiny_checkpoint("qwen3", tmp_path / "other")
    (other / "chat_template.jinja").write_text(HUB.read_text())
    with pytest.raises(TemplateError, match="not the one that its weights were trained with"):
        Policy.load(other, precision="float32", device="cpu").load_adapter("a", tmp_path / "adapter")
    (tmp_path / "base" / "chat_template.jinja").write_text(HUB.read_text())
    (tmp_path / "base" / FILES).unlink()  # as a copy by another program would leave it
    assert (tmp_path / "base" / PIN).is_file()
    with pytest.raises(TemplateError, match="the text differs") as caught:
        Policy.load(tmp_path / "base")
    assert caught.value.exit_code == 2


def test_loading_and_saving_leave_stderr_empty_and_warnings_as_they_are(tmp_path):
    folder = tiny_checkpoint("llama", tmp_path / "plain")
    code = (
        "from temper.policy.model import Policy; from transformers.utils import logging\n"
        f"Policy.load({str(folder)!r}).save({str(tmp_path / 'saved')!r})\n"
        "logging.get_logger('transformers').warning('a real warning')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    assert "it/s" not in done.stderr
    assert "Loading weights" not in done.stderr
    assert "a real warning" in done.stderr
