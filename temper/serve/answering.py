"""One chat request on its way: waited for, or streamed token by token; written down, and given up when its client goes."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass

from fastapi import Request

from temper.core.records import Sampled
from temper.serve.audit import AuditLine, JsonLines, served_record
from temper.serve.chat import Choice, Plan, choices, require_adapter
from temper.serve.config import ServeConfig
from temper.serve.errors import ApiError
from temper.serve.loaded import Loaded
from temper.serve.stream import Ear, Events, failure
from temper.serve.worker import Job

log = logging.getLogger("temper.serve")


@dataclass
class Answering:
    """A request that is queued. `write` puts its audit line down; `look_at` is when its client is looked for next."""

    http: Request
    line: AuditLine
    loaded: Loaded
    tenant: str | None
    made: Plan
    job: Job
    ear: Ear
    answer: asyncio.Future[list[Sampled]]
    config: ServeConfig
    capture: JsonLines | None
    write: Callable[[], None]
    look_at: float = 0.0

    @property
    def model(self) -> str:
        """The name under which the answer is given."""
        return self.loaded.release.model_id + (f"@{self.tenant}" if self.tenant else "")

    async def whole(self) -> list[Choice]:
        """Every choice, once all are sampled. Raises ApiError where they are not to be had, or not the tenant's own."""
        try:
            while not self.answer.done():
                self.ear.news.clear()  # news once set would make the wait return at once, and this loop would starve the engine
                await self._listen()
        finally:
            self._hang_up()
        self._require_own()
        sampled = self.answer.result()
        note(self.line, self.job, self.loaded, sampled)
        answers = choices(self.made, self.loaded, self.tenant, sampled)
        self.line.finish_reason, self.line.schema_valid = answers[0].finish_reason, answers[0].schema_valid
        return answers

    async def first_token(self) -> None:
        """Until the engine has said something; then the audit line is opened. What fails before is refused as any request is."""
        try:
            while not (self.ear.news.is_set() or self.answer.done()):
                await self._listen()
            if self.answer.done():
                self.answer.result()
            self._require_own()
            line, loaded = self.line, self.loaded
            line.phase, line.adapter, line.weights, line.choices = "opened", self.ear.through, loaded.weights_hash, len(self.made.rows)
            line.adapter_hash, line.adapter_numbers = loaded.hash_of.get(line.adapter or ""), loaded.numbers_of.get(line.adapter or "")
            self.write()  # before a byte leaves: no answer without its audit line
        except BaseException:
            self._hang_up()
            raise

    async def events(self) -> AsyncGenerator[str, None]:
        """The events of a streamed answer. Its audit line is closed whatever becomes of it, before its last event leaves."""
        line, loaded = self.line, self.loaded
        events = Events(line.request_id, self.model, loaded.release.id, self.made, loaded.engine.policy.template)
        line.phase, line.status, line.code = "closed", 499, "client_gone"  # unless it comes to its end
        line.prompt_tokens = self.made.prompt_tokens
        last: list[str] = []
        try:
            for event in events.opening():
                yield event
            while not self.answer.done():
                self.ear.news.clear()
                self._require_own()
                for event in events.fresh(self.ear):
                    yield event
                await self._listen()
            answers = await self.whole()
            last = list(events.closing(answers))
            self.keep(answers)
            line.status, line.code = 200, None
        except ApiError as error:
            line.status, line.code, last = error.status, error.code, [failure(error)]
        except Exception:
            log.exception("request %s failed", line.request_id)
            line.status, line.code = 500, "internal_error"
            last = [failure(ApiError(500, line.code, f"the server failed on request {line.request_id}; its log says why"))]
        finally:
            self._hang_up()
            line.completion_tokens = line.completion_tokens or sum(map(len, self.ear.tokens))
            try:
                self.write()
            except ApiError as error:
                last = [failure(error)]
        for event in last:
            yield event

    def keep(self, answers: list[Choice]) -> None:
        """Capture what was said, where that is asked for."""
        for answer in answers if self.capture else ():
            assert self.capture is not None
            self.capture.append(
                served_record(
                    self.loaded.release, self.made.messages, (answer.message,), self.made.tools, (answer.sampled,),
                    tenant=self.tenant, licence=self.config.capture_licence, request_id=self.line.request_id,
                )
            )  # fmt: skip

    async def _listen(self) -> None:
        """Until there is news, or it is time to look whether the client is still there. Raises ApiError 499 where it is not."""
        news = asyncio.ensure_future(self.ear.news.wait())
        waited: set[asyncio.Future[object]] = {self.answer, news}  # type: ignore[arg-type]
        try:
            await asyncio.wait(waited, timeout=self.config.look_for_client_seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            news.cancel()
        if not self.answer.done() and time.monotonic() >= self.look_at:
            self.look_at = time.monotonic() + self.config.look_for_client_seconds
            if await self.http.is_disconnected():
                raise ApiError(499, "client_gone", "the client went away before its answer was whole")

    def _hang_up(self) -> None:
        """Nobody waits any more: what still runs ends at its next token, what still queues is not begun."""
        self.ear.hang_up()
        self.answer.cancel()

    def _require_own(self) -> None:
        """Raise ApiError 500 where a token came through another adapter than the tenant's; the audit line names that one."""
        if self.ear.withheld:
            self.line.adapter, self.line.adapter_hash = self.ear.through, self.loaded.hash_of.get(self.ear.through or "")
            require_adapter([self.ear.through], self.ear.expected)


def note(line: AuditLine, job: Job, loaded: Loaded, sampled: list[Sampled]) -> None:
    """What the engine says it did: the adapter is the one stamped on the sampled rows."""
    used = {row.adapter for row in sampled}
    line.adapter = next(iter(used)) if len(used) == 1 else "mixed"
    line.adapter_hash, line.adapter_numbers = loaded.hash_of.get(line.adapter or ""), loaded.numbers_of.get(line.adapter or "")
    line.weights, line.choices = loaded.weights_hash, len(sampled)
    prompts = {row.prompt_ids for row in sampled}  # n choices share one prompt
    line.prompt_tokens, line.completion_tokens = sum(map(len, prompts)), sum(len(row.token_ids) for row in sampled)
    line.batch_rows, line.queued_ms = job.batch_rows, round((job.started - job.queued) * 1000, 2)
