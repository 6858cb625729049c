"""The learner and the stages of post-training. `STAGES` is the one dict that names them."""

from __future__ import annotations

import importlib
from types import ModuleType

from temper.core.errors import ConfigError

STAGES = {
    "sft": "temper.train.sft",
    "preference": "temper.train.preference",
    "kto": "temper.train.kto",
    "reward": "temper.train.reward",
    "process_reward": "temper.train.process_reward",
    "rl": "temper.train.rl",
    "ppo": "temper.train.ppo",
    "distill": "temper.train.distill",
}


def load_stage(name: str) -> ModuleType:
    """The module of stage `name`: its `Config`, `run` and `estimate`. A dotted name is imported. Raises ConfigError."""
    dotted = STAGES.get(name, name if "." in name else None)
    if dotted is None:
        raise ConfigError(f"there is no stage {name!r}", do=f"set `stage:` to one of {', '.join(STAGES)}, or to the dotted name of a module")
    try:
        return importlib.import_module(dotted)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{dotted}.".startswith(f"{error.name}."):
            raise  # the module is there; something that it imports is not
        raise ConfigError(f"stage module {dotted} does not exist", do="check the dotted name") from error
