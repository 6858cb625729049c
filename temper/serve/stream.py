"""Answers on their way: the engine's thread hears tokens, the client reads events, and whoever hangs up is not sampled for."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Iterator
from typing import Any

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from temper.serve.chat import Choice, Plan, calls_shown, head_of, usage
from temper.serve.errors import ApiError


class Ear:
    """What the rows of one request say, token by token. `heard` is called on the engine's thread, the rest on the server's loop.

    No token is kept that came through another adapter than the tenant's (`expected`); `through` is the one it came through.
    """

    def __init__(self, rows: int, expected: str | None) -> None:
        self.expected, self.through = expected, expected
        self.tokens: list[list[int]] = [[] for _ in range(rows)]
        self.at = [0] * rows
        self.gone = False
        self.loop, self.news = asyncio.get_running_loop(), asyncio.Event()

    def listener(self, row: int) -> Callable[[int, str | None], bool]:
        """What the engine tells of `row`; it is answered whether the row is still wanted."""

        def heard(token: int, adapter: str | None) -> bool:
            if adapter != self.expected:
                self.through, self.gone = adapter, True
            if self.gone:
                return False
            known, at = self.tokens[row], self.at[row]
            if known[at : at + 1] not in ([], [token]):
                raise RuntimeError(f"row {row} was sampled again with other tokens than were sent already")
            known[at:] = known[at:] or [token]
            self.at[row] = at + 1
            if not self.news.is_set():
                self.loop.call_soon_threadsafe(self.news.set)
            return True

        return heard

    def again(self) -> None:
        """The rows are sampled anew, each alone: with their seeds they say the same, and nothing is told twice."""
        self.at = [0] * len(self.tokens)

    def hang_up(self) -> None:
        """Nobody reads any more: each row ends at its next token."""
        self.gone = True

    @property
    def withheld(self) -> bool:
        """Whether a token came through another adapter."""
        return self.through != self.expected


class Events:
    """The events of one streamed answer, in OpenAI's form: role, text as it comes, calls whole, finish, usage, [DONE]."""

    def __init__(self, request_id: str, model: str, release_id: str, made: Plan, template: Any) -> None:
        self.made, self.head = made, head_of(request_id, model, release_id, "chat.completion.chunk")
        options = made.request.stream_options
        self.wants_usage = bool(options and options.include_usage)
        self.readers = [template.reader(calls=bool(made.tools), stops=made.request.stops()) for _ in made.rows]
        self.read = [0] * len(made.rows)
        self.thinking, self.text = [""] * len(made.rows), [""] * len(made.rows)

    def opening(self) -> Iterator[str]:
        """Each choice's role."""
        for row in range(len(self.made.rows)):
            yield self._delta(row, {"role": "assistant", "content": ""})

    def fresh(self, ear: Ear) -> Iterator[str]:
        """What the tokens heard since the last call make certain."""
        for row, reader in enumerate(self.readers):
            pieces = [reader.read(token) for token in ear.tokens[row][self.read[row] :]]
            self.read[row] += len(pieces)
            yield from self._say(row, "".join(piece.thinking for piece in pieces), "".join(piece.text for piece in pieces))

    def closing(self, answers: list[Choice]) -> Iterator[str]:
        """The rest of each choice, its calls, why it ended; then the usage where it was asked for, and the end."""
        for row, choice in enumerate(answers):
            thinking, text = choice.message.reasoning or "", choice.message.content
            if not thinking.startswith(self.thinking[row]) or not text.startswith(self.text[row]):
                raise RuntimeError(f"choice {row} was streamed otherwise than it ends")
            yield from self._say(row, thinking[len(self.thinking[row]) :], text[len(self.text[row]) :])
            for place, call in enumerate(calls_shown(choice.message.tool_calls)):
                yield self._delta(row, {"tool_calls": [{"index": place, **call}]})
            logprobs = {"content": choice.logprobs, "refusal": None} if choice.logprobs is not None else None
            yield self._event([{"index": row, "delta": {}, "finish_reason": choice.finish_reason, "logprobs": logprobs}])
        if self.wants_usage:
            yield self._event([], usage(self.made, [choice.sampled for choice in answers]))
        yield "data: [DONE]\n\n"

    def _say(self, row: int, thinking: str, text: str) -> Iterator[str]:
        self.thinking[row] += thinking
        self.text[row] += text
        if thinking:
            yield self._delta(row, {"reasoning_content": thinking})
        if text:
            yield self._delta(row, {"content": text})

    def _delta(self, row: int, delta: dict[str, Any]) -> str:
        return self._event([{"index": row, "delta": delta, "finish_reason": None, "logprobs": None}])

    def _event(self, choices: list[dict[str, Any]], counted: dict[str, int] | None = None) -> str:
        tail = {"usage": counted} if self.wants_usage else {}
        return f"data: {json.dumps({**self.head, 'choices': choices, **tail}, ensure_ascii=False)}\n\n"


def failure(error: ApiError) -> str:
    """The event that ends a stream that went wrong: clients raise what it says, and no [DONE] follows."""
    return f"data: {json.dumps(error.body(), ensure_ascii=False)}\n\n"


class EventStream(StreamingResponse):
    """Server-sent events from a generator that is closed whatever becomes of the client."""

    def __init__(self, events: AsyncGenerator[str, None], headers: dict[str, str]) -> None:
        self.events = events
        super().__init__(events, media_type="text/event-stream", headers={**headers, "Cache-Control": "no-store"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self.events.aclose()
