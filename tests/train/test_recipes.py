"""The recipes run as they stand, on a tiny checkpoint."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from worlds import conversations, manifest, pairs

from temper.policy.model import Policy

RECIPES = Path(__file__).parents[2] / "recipes"


def recipe(name: str):
    spec = importlib.util.spec_from_file_location(f"recipe_{name}", RECIPES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_sft_recipe_learns_and_stops_when_done(base, tmp_path) -> None:
    data, out = manifest(tmp_path / "rows", conversations(24)), str(tmp_path / "out")
    result = recipe("sft").main(base, data, out, steps=12, lr=3e-3)
    assert result["loss"] < 5.5  # a uniform guess over this vocabulary costs 6.2
    assert recipe("sft").main(base, data, out, steps=12, lr=3e-3) == result
    assert Policy.load(result["model"]).weights_hash() != Policy.load(base).weights_hash()


def test_dpo_recipe_widens_the_margin(base, tmp_path) -> None:
    found = recipe("dpo").main(base, manifest(tmp_path / "pairs", pairs(32)), str(tmp_path / "out"), epochs=2, lr=1e-3)
    assert found["margin"] > 0.2
    assert (tmp_path / "out/model/model.safetensors").is_file()


def test_grpo_recipe_refuses_silence_and_pays_for_the_number_of_words(base, tmp_path) -> None:
    module = recipe("grpo")
    from temper.core.records import Message
    from temper.rollout.environment import require, self_check

    environment = module.BriefEnvironment()
    require([finding for finding in self_check(environment, "dev") if "constant" not in finding.rule])
    task = environment.tasks("train")[1]  # three words
    paid = [environment.verify(task, (Message(role="assistant", content=text),), None).reward for text in ("cash at hand", "cash cash cash", "cash", "")]
    assert paid == pytest.approx([1.0, 0.0, 1 / 3, 0.0])
    curve = module.main(base, str(tmp_path / "out"), steps=3, lr=1e-3)
    assert len(curve) == 3


@pytest.mark.parametrize("name", ["sft", "dpo", "grpo"])
def test_recipes_stay_short(name) -> None:
    assert len((RECIPES / f"{name}.py").read_text().splitlines()) <= 85
