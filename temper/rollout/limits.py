"""A time limit around code that we did not write: tools and symbolic maths."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from queue import Queue
from types import FrameType
from typing import Any, TypeVar

T = TypeVar("T")


class OutOfTime(Exception):
    """The call took longer than it was given."""


class _Interrupt(BaseException):
    """Raised inside the call; no `except Exception` in it can swallow it."""


def run_limited(function: Callable[[], T], seconds: float) -> T:
    """`function()`, or OutOfTime after `seconds`.

    The main thread is interrupted by a timer signal, so that the call ends and stays on its own thread. Elsewhere,
    where no signal arrives, the call runs on a thread of its own, which is abandoned when time is up.
    """
    if threading.current_thread() is threading.main_thread() and hasattr(signal, "setitimer"):
        return _interrupted(function, seconds)
    return _abandoned(function, seconds)


def _interrupted(function: Callable[[], T], seconds: float) -> T:
    def ring(number: int, frame: FrameType | None) -> None:
        raise _Interrupt

    outer, _ = signal.getitimer(signal.ITIMER_REAL)
    if outer and outer <= seconds:  # someone's limit around ours is due first: it is theirs to act on
        return function()
    previous, started = signal.signal(signal.SIGALRM, ring), time.monotonic()
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        result = function()
        signal.setitimer(signal.ITIMER_REAL, 0)
        return result
    except _Interrupt:
        raise OutOfTime(f"no result within {seconds:g} s") from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
        if outer:
            signal.setitimer(signal.ITIMER_REAL, max(1e-3, outer - (time.monotonic() - started)))


def _abandoned(function: Callable[[], T], seconds: float) -> T:
    done: Queue[tuple[bool, Any]] = Queue()

    def work() -> None:
        try:
            done.put((True, function()))
        except BaseException as error:  # handed to the caller's thread, which raises it
            done.put((False, error))

    thread = threading.Thread(target=work, daemon=True, name="temper-limited")
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise OutOfTime(f"no result within {seconds:g} s")
    succeeded, result = done.get()
    if not succeeded:
        raise result
    return result
