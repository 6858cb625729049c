"""What a YAML file may configure: the one dict from its `stage:` to the room that reads it."""

from __future__ import annotations

import difflib
import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from temper.core.config import Config, apply_overrides, interpolate, parse_config, read_yaml
from temper.core.errors import ConfigError

if TYPE_CHECKING:
    from types import ModuleType

TRAINING = ("sft", "preference", "kto", "reward", "process_reward", "rl", "ppo", "distill")
CONFIGS = {
    **{name: f"temper.train.{name}:Config" for name in TRAINING},
    "data": "temper.pipeline.data:Config",
    "evaluate": "temper.evaluate.run:Config",
    "gate": "temper.gate.rule:GateRule",
    "serve": "temper.serve.config:ServeConfig",
    "pipeline": "temper.pipeline.config:PipelineConfig",
}


def config_class(stage: str) -> type[Config]:
    """The typed config that `stage` names. A dotted name is a module with a `Config`. Raises ConfigError."""
    place = CONFIGS.get(stage, f"{stage}:Config" if "." in stage else None)
    if place is None:
        near = difflib.get_close_matches(stage, CONFIGS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"use one of {', '.join(CONFIGS)}, or the dotted name of a module"
        raise ConfigError(f"there is no stage {stage!r}", do=hint)
    module, _, name = place.partition(":")
    return getattr(load_module(module), name)  # type: ignore[no-any-return]


def load_module(dotted: str) -> ModuleType:
    """A room's module. Raises ConfigError where a dotted name in a config names nothing."""
    try:
        return importlib.import_module(dotted)
    except ModuleNotFoundError as error:
        if error.name is None or not (dotted == error.name or dotted.startswith(f"{error.name}.")):
            raise
        raise ConfigError(f"module {dotted} does not exist", do="check the dotted name under `stage:`") from error


def read_values(path: Path, overrides: list[str] | None) -> dict[str, Any]:
    """What `path` says, with overrides applied and `${key}` filled in."""
    return interpolate(apply_overrides(read_yaml(path), overrides or []))


def stage_of(path: Path, values: dict[str, Any]) -> str:
    """The stage that a file configures: its `stage:` key, or how its name begins (gate-student.yaml). Raises ConfigError."""
    stage, begins = values.get("stage"), path.stem.replace("_", "-").partition("-")[0]
    if stage is None and begins in CONFIGS:
        return begins
    if not isinstance(stage, str):
        raise ConfigError(
            f"{path} does not say what it configures", why="it has no `stage:` key", do=f"add `stage:` with one of {', '.join(CONFIGS)}"
        )
    return stage


def typed_config(path: Path, overrides: list[str] | None = None, stage: str | None = None) -> Config:
    """The file as the config of its stage (or of `stage`). Raises ConfigError naming file, line and key."""
    values = read_values(path, overrides)
    cls = config_class(stage or stage_of(path, values))
    if "stage" not in cls.model_fields:
        values.pop("stage", None)
    return parse_config(cls, values, source=path)
