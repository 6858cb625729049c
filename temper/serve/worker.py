"""One thread owns the engine: it drains waiting requests into one mixed-adapter batch, runs it, and delivers.

Another watches the alias, loads what it points at, and swaps it in; a request ends on the release it began with.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

from temper.core.errors import TemperError
from temper.core.records import Sampled
from temper.registry import Registry
from temper.rollout.engine import Request
from temper.serve.errors import ApiError
from temper.serve.loaded import Loaded, OpenEngine, load_release

log = logging.getLogger("temper.serve")
RETRY_S = 10.0  # how long a release that failed to load is left alone


@dataclass
class Job:
    """The rows of one HTTP request, the release they began with, and where the answer goes.

    `again` is called before rows that were sampled in part are sampled once more.
    """

    loaded: Loaded
    rows: list[Request]
    again: Callable[[], None] = lambda: None
    future: Future[list[Sampled]] = field(default_factory=Future)
    queued: float = field(default_factory=time.monotonic)
    started: float = 0.0
    batch_rows: int = 0


class Worker:
    """The queue, the thread that samples, and the thread that watches the alias."""

    def __init__(
        self, registry: Registry, alias: str, open_engine: OpenEngine, *, max_rows: int = 64, max_waiting: int = 1024,
        gather_s: float = 0.003, poll_s: float = 1.0, override: bool = False,
    ) -> None:  # fmt: skip
        self.registry, self.alias, self.open_engine, self.override = registry, alias, open_engine, override
        self.max_rows, self.max_waiting, self.gather_s, self.poll_s = max_rows, max_waiting, gather_s, poll_s
        self.current = load_release(registry, alias, open_engine, override=override)
        self.swaps, self.batches, self.rows = 0, 0, 0
        self.fault: str | None = None
        self._failed = ("", 0.0)  # which release could not be loaded, and when
        self._waiting: deque[Job] = deque()
        self._wake = threading.Condition()
        self._poll_now, self._closed = threading.Event(), threading.Event()
        self._threads = [
            threading.Thread(target=target, name=f"temper-{name}", daemon=True)
            for name, target in (("engine", self._run), ("alias", self._watch))
        ]
        for thread in self._threads:
            thread.start()

    # --- from the HTTP side ------------------------------------------------------------------------------

    def submit(self, loaded: Loaded, rows: list[Request], again: Callable[[], None] = lambda: None) -> Job:
        """Queue rows for the release that the request began with. Raises ApiError 429 where too many wait."""
        job = Job(loaded, rows, again)
        with self._wake:
            if self._closed.is_set():
                raise ApiError(503, "shutting_down", "the server is shutting down")
            if len(self._waiting) >= self.max_waiting:
                raise ApiError(
                    429,
                    "too_many_requests",
                    f"{self.max_waiting} requests are waiting already; try again shortly",
                    headers={"Retry-After": "1"},
                )
            self._waiting.append(job)
            self._wake.notify()
        return job

    def waiting(self) -> int:
        """How many requests wait."""
        return len(self._waiting)

    def alive(self) -> bool:
        """Whether both threads run."""
        return all(thread.is_alive() for thread in self._threads)

    def poll(self) -> None:
        """Look at the alias now rather than at the next tick."""
        self._poll_now.set()

    def close(self) -> None:
        """Finish what is queued, then end both threads."""
        with self._wake:
            self._closed.set()
            self._wake.notify()
        self._poll_now.set()
        for thread in self._threads:
            thread.join(timeout=60)

    # --- the engine's thread -----------------------------------------------------------------------------

    def _run(self) -> None:
        while (jobs := self._next_batch()) is not None:
            self._sample(jobs)

    def _next_batch(self) -> list[Job] | None:
        """Wait for work, give company a moment to arrive, and take jobs of one release up to max_rows, oldest first."""
        with self._wake:
            while not self._waiting:
                if self._closed.is_set():
                    return None
                self._wake.wait()
            deadline = time.monotonic() + self.gather_s
            while sum(len(job.rows) for job in self._waiting) < self.max_rows and (left := deadline - time.monotonic()) > 0:
                self._wake.wait(left)
            first, rows = self._waiting[0].loaded, 0
            taken: list[Job] = []
            left_over: deque[Job] = deque()
            for job in self._waiting:
                fits = job.loaded is first and (not taken or rows + len(job.rows) <= self.max_rows)
                if not fits:
                    left_over.append(job)
                elif job.future.set_running_or_notify_cancel():  # a client that hung up while waiting costs nothing
                    taken.append(job)
                    rows += len(job.rows)
            self._waiting = left_over
        return taken

    def _sample(self, jobs: list[Job]) -> None:
        requests = [row for job in jobs for row in job.rows]
        for job in jobs:
            job.started, job.batch_rows = time.monotonic(), len(requests)
        if not jobs:
            return
        try:
            sampled = jobs[0].loaded.engine.sample(requests)
            if len(sampled) != len(requests):
                raise RuntimeError(f"the engine answered {len(sampled)} of {len(requests)} rows")
            self.batches, self.rows = self.batches + 1, self.rows + len(requests)
        except Exception as error:
            if len(jobs) == 1:
                log.exception("a batch failed")
                jobs[0].future.set_exception(error)
                return
            log.warning("a batch of %d requests failed (%s); each is run alone", len(jobs), type(error).__name__)
            for job in jobs:
                job.again()
                self._sample([job])
            return
        position = 0
        for job in jobs:
            job.future.set_result(sampled[position : position + len(job.rows)])
            position += len(job.rows)

    # --- the alias' thread -------------------------------------------------------------------------------

    def _watch(self) -> None:
        while not self._closed.is_set():
            self._poll_now.wait(self.poll_s)
            self._poll_now.clear()
            if not self._closed.is_set():
                self._follow_alias()

    def _follow_alias(self) -> None:
        """Load what the alias points at, if that changed. A release that fails to load leaves the old one serving."""
        wanted = ""
        try:
            wanted = self.registry.current(self.alias) or self.current.release.id
            if wanted == self.current.release.id:
                self.fault, self._failed = None, ("", 0.0)
                return
            if self._failed[0] == wanted and time.monotonic() - self._failed[1] < RETRY_S:
                return
            loaded = load_release(self.registry, wanted, self.open_engine, override=self.override)
        except Exception as error:  # whatever it is, the release that serves goes on serving
            told = str(error) if isinstance(error, TemperError) else f"{type(error).__name__}: {error}"
            self.fault = f"alias {self.alias!r} moved, but its release could not be loaded: {told}"
            self._failed = (wanted, time.monotonic())
            log.error("%s; release %s goes on serving", self.fault, self.current.release.id[:16])
            return
        log.warning("release %s replaces %s (loaded in %.1f s)", loaded.release.id[:16], self.current.release.id[:16], loaded.seconds)
        self.current, self.fault, self._failed = loaded, None, ("", 0.0)
        self.swaps += 1
