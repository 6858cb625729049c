"""Concrete environments. `ENVIRONMENTS` is the one dict that names them; any other is named by where it stands."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
from pathlib import Path
from typing import Any

from temper.core.errors import ConfigError
from temper.rollout.environment import Environment

ENVIRONMENTS = {
    "finops": "temper.environments.finops:environment",
    "gsm8k": "temper.environments.gsm8k:environment",
    "tatqa": "temper.environments.tatqa:environment",
}


def load_environment(name: str, **options: Any) -> Environment:
    """The environment that `name` makes: a key of ENVIRONMENTS, `package.module:factory`, or `path/file.py:factory`.

    `options` go to the factory. Raises ConfigError where it cannot be found, or does not take an option.
    """
    place = ENVIRONMENTS.get(name, name)
    module_name, _, attribute = place.rpartition(":")
    if not module_name:
        near = difflib.get_close_matches(name, ENVIRONMENTS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"use one of {', '.join(ENVIRONMENTS)}, package.module:factory, or path/file.py:factory"
        raise ConfigError(f"there is no environment {name!r}", do=hint)
    factory = getattr(_module(module_name), attribute, None)
    if factory is None:
        raise ConfigError(f"{module_name} has no {attribute!r}", why=f"environment {name!r} is made by it", do="check the name after the colon")
    try:
        inspect.signature(factory).bind(**options)
    except TypeError as error:
        raise ConfigError(f"environment {name!r} does not take these options", why=str(error), do=f"its signature is {inspect.signature(factory)}") from error
    return factory(**options)


def _module(name: str) -> Any:
    if name.endswith(".py"):
        path = Path(name)
        if not path.is_file():
            raise ConfigError(f"environment file {path} does not exist", do="give its path relative to the folder you run from")
        spec = importlib.util.spec_from_file_location(f"temper_environment_{path.stem}", path)
        if spec is None or spec.loader is None:
            raise ConfigError(f"{path} cannot be imported as Python")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and not name.startswith(error.name):
            raise
        raise ConfigError(f"environment module {name} cannot be imported", why=str(error), do="check the dotted name") from error
