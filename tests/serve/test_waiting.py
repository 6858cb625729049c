"""Waiting for a whole answer costs nothing while the engine works."""

import asyncio
import math
from types import SimpleNamespace

from temper.serve.answering import Answering


def test_waiting_for_a_whole_answer_does_not_spin_after_the_first_token(monkeypatch):
    looks = 0
    listen = Answering._listen

    async def counted(self):
        nonlocal looks
        looks += 1
        await listen(self)

    async def wait() -> None:
        answering = Answering.__new__(Answering)
        answering.answer, answering.look_at = asyncio.get_running_loop().create_future(), math.inf
        answering.ear = SimpleNamespace(news=asyncio.Event(), hang_up=lambda: None)
        answering.config = SimpleNamespace(look_for_client_seconds=5.0)
        answering.ear.news.set()  # the first token was heard
        waiting = asyncio.ensure_future(answering.whole())
        await asyncio.sleep(0.1)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)

    monkeypatch.setattr(Answering, "_listen", counted)
    asyncio.run(wait())
    assert looks == 1
