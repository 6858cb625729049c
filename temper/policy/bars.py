"""transformers' own progress bars, where nobody waits for them: shown from the third second on, and to a terminal only.

Its warnings are left as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers.utils import logging

PATIENCE_S = 2.0


def only_slow_ones() -> None:
    """Have transformers show a bar only for what takes longer than PATIENCE_S, and none that stays on the screen."""
    logging.set_tqdm_hook(_patient)


def _patient(factory: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    unhurried = {"delay": PATIENCE_S, "leave": False}
    return factory(*args, **({"disable": None} | options | unhurried))  # disable=None: not where stderr is a file
