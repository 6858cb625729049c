"""One run of the engine: rows join, decode together, finish, and give their slots to others."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from contextlib import ExitStack, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from temper.core.records import Sampled
from temper.rollout.cache import Writing
from temper.rollout.products import FEW_TOKENS, tiny_products
from temper.rollout.rows import WORTH_SHARING, Request, Row, heads_first, passes
from temper.rollout.sampling import Settings, choose

if TYPE_CHECKING:
    from temper.rollout.engine import Engine

JOIN_SHARE = 8  # rows join when they are at least one to eight that run: a prefill pass has a price of its own


class Batch:
    """The state of one call of `Engine.converse`.

    Running rows are in slots 0 … n−1, row i in slot i. A paused row (its next turn waits for prefill) keeps a slot
    behind them; the other slots behind them are free, and what they still hold may serve as a prefix.
    """

    def __init__(self, engine: Engine, requests: Sequence[Request], reply: Callable[[int, Sampled], Request | None]) -> None:
        self.engine, self.policy, self.stats, self.reply = engine, engine.policy, engine.stats, reply
        self.cache, self.residents = engine.cache, engine.residents
        self.turns: list[list[Sampled]] = [[] for _ in requests]
        self.waiting = deque(engine.row(number, request) for number, request in enumerate(requests))
        self.running: list[Row] = []
        self.paused: dict[int, Row] = {}
        self.slots = min(engine.rows_for(max((row.need for row in self.waiting), default=1)), len(requests))
        self.settings: Settings | None = None
        self.routed: tuple[str | None, ...] = ()
        self.routing = ExitStack()

    def run(self) -> list[list[Sampled]]:
        """Until every conversation has ended."""
        try:
            while self.waiting or self.paused or self.running:
                joining = len(self.paused) + min(len(self.waiting), self.slots - len(self.running) - len(self.paused))
                if joining and joining * JOIN_SHARE >= len(self.running):
                    started = time.perf_counter()
                    self.join()
                    self.stats.prefill_s += time.perf_counter() - started
                started = time.perf_counter()
                self.step()
                self.stats.decode_s += time.perf_counter() - started
        finally:
            self.route(())
        return self.turns

    # --- joining ---

    def join(self) -> None:
        """Prefill every paused row and as many waiting ones as there are slots for, and let them run."""
        free = [slot for slot in range(len(self.running), self.slots) if slot not in self.paused]
        fresh = [self.waiting.popleft() for _ in range(min(len(free), len(self.waiting)))]
        positions = max(row.need for row in [*self.paused.values(), *fresh])
        self.cache.reserve(self.slots, positions)
        self.residents.reserve(self.slots, self.cache.size)
        placed = dict(self.paused)
        self.paused = {}
        for row in placed.values():
            self.stats.prompt_tokens += len(row.tokens)
            self.stats.reused_tokens += row.cached
        heads, later = heads_first(fresh, owner_of, self.residents)
        for rows in (heads, later):
            for row in rows:
                placed[self.place(row, free)] = row
            self.prefill({slot: row for slot, row in placed.items() if len(row.tokens) - 1 > row.cached})
        for slot in sorted(placed):
            self.swap(slot, len(self.running))
            self.running.append(placed[slot])
        self.settings = None

    def place(self, row: Row, free: list[int]) -> int:
        """Give a row a free slot, with the longest prefix that any slot holds copied into it."""
        prompt = row.tokens[:-1]
        source, length = self.residents.longest(prompt, owner_of(row))
        slot = source if source in free and length >= WORTH_SHARING else free[0]
        free.remove(slot)
        if length >= WORTH_SHARING:
            if slot != source:
                self.cache.copy(source, slot, length)
            row.cached = length
        self.residents.put(slot, prompt[: row.cached], owner_of(row))
        self.stats.prompt_tokens += len(row.tokens)
        self.stats.reused_tokens += row.cached
        return slot

    def prefill(self, placed: dict[int, Row]) -> None:
        """Compute keys and values of every token but the last one, which the first step feeds."""
        slot_of = {id(row): slot for slot, row in placed.items()}
        for rows in passes(list(placed.values())):
            slots = torch.tensor([slot_of[id(row)] for row in rows])
            starts_R = torch.tensor([row.cached for row in rows])
            lengths_R = torch.tensor([len(row.tokens) - 1 - row.cached for row in rows])
            longest = int(lengths_R.max())
            ids_R_T = torch.zeros(len(rows), longest, dtype=torch.long)
            for number, row in enumerate(rows):
                ids_R_T[number, : lengths_R[number]] = torch.tensor(row.tokens[row.cached : -1])
            steps_T = torch.arange(longest)
            positions_R_T = starts_R[:, None] + steps_T
            written_R_T = positions_R_T.where(steps_T < lengths_R[:, None], self.cache.padding_position)
            fresh = rows[0].cached == 0
            reach = longest if fresh else int((starts_R + lengths_R).max())
            writing = Writing(len(rows), written_R_T.to(self.policy.device), reach, slots.to(self.policy.device), fresh)
            self.route(tuple(row.request.adapter for row in rows))
            self.forward(ids_R_T, positions_R_T, writing, logits=False)
            self.stats.prefilled_tokens += int(lengths_R.sum())
            for row in rows:
                row.cached = len(row.tokens) - 1
                self.residents.put(slot_of[id(row)], row.tokens[:-1], owner_of(row))

    # --- stepping ---

    def step(self) -> None:
        """Feed every running row its last token and sample the next one."""
        rows = self.running
        if self.settings is None:
            kinds = [(row.request.temperature, row.request.top_k, row.request.top_p, row.request.seed) for row in rows]
            self.settings = Settings.of(kinds, self.policy.device)
            self.route(tuple(row.request.adapter for row in rows))
        fed_R = np.array([row.tokens[-1] for row in rows])
        at_R = np.array([row.cached for row in rows])
        positions_R_1 = torch.from_numpy(at_R)[:, None]
        writing = Writing(len(rows), positions_R_1.to(self.policy.device), int(at_R.max()) + 1)
        logits_R_V = self.forward(torch.from_numpy(fed_R)[:, None], positions_R_1, writing, logits=True)
        self.residents.tokens_S_L[np.arange(len(rows)), at_R] = fed_R
        self.residents.lengths_S[: len(rows)] = at_R + 1
        allowed_R_V = self.engine.grammars.allowed(rows, logits_R_V)
        chosen = choose(logits_R_V, self.settings, np.array([row.sampled for row in rows], dtype=np.uint64), allowed_R_V)
        self.take(chosen.tokens_R.tolist(), chosen.logprobs_R.tolist(), chosen.logits_R_V)
        self.stats.steps += 1

    def take(self, tokens: list[int], logprobs: list[float], logits_R_V: Tensor) -> None:
        """Append what was sampled, and let the rows go whose turn has ended."""
        ended = []
        for number, row in enumerate(self.running):
            row.cached += 1
            if not np.isfinite(logprobs[number]):  # no finite distribution: broken weights, or a grammar without a way on
                row.failed = True
            if not row.failed:
                row.tokens.append(tokens[number])
                row.logprobs.append(logprobs[number])
                self.stats.sampled_tokens += 1
                if row.request.keep_support:
                    row.support.append(support_of(row, logits_R_V[number]))
                if row.matcher is not None:
                    self.engine.grammars.consume(row, tokens[number])
                if row.request.heard is not None and not row.request.heard(tokens[number], self.routed[number]):
                    row.failed = True
            if row.done:
                ended.append(number)
        for number in reversed(ended):
            self.end(number)

    def end(self, number: int) -> None:
        """Close the turn of a running row; its slot moves behind the running ones, paused if the conversation goes on."""
        row = self.running[number]
        sampled = row.finish(str(self.policy.version))
        self.turns[row.index].append(sampled)
        request = self.reply(row.index, sampled)
        last = len(self.running) - 1
        self.swap(number, last)
        self.running[number] = self.running[last]
        self.running.pop()
        self.settings = None
        if request is not None:
            following = self.engine.row(row.index, request)
            held = self.residents.lengths_S[last]
            if owner_of(following) == owner_of(row):
                before = np.asarray(following.tokens[:-1])[:held]
                same = self.residents.tokens_S_L[last, : len(before)] == before
                following.cached = len(before) if same.all() else int(same.argmin())
            self.paused[last] = following

    def swap(self, first: int, second: int) -> None:
        """Exchange two slots."""
        if first == second:
            return
        self.cache.swap(first, second, int(self.residents.lengths_S[[first, second]].max()))
        self.residents.swap(first, second)

    # --- the model ---

    def route(self, adapters: tuple[str | None, ...]) -> None:
        """Tell the policy which adapter each row goes through, where that changes."""
        if adapters == self.routed:
            return
        self.routing.close()
        if any(adapters):
            self.routing.enter_context(self.policy.use(list(adapters)))
        self.routed = adapters

    def forward(self, ids_R_T: Tensor, positions_R_T: Tensor, writing: Writing, *, logits: bool) -> Tensor:
        """One pass over the model: the logits of the last position, or nothing worth having where only keys are wanted."""
        if ids_R_T.numel() < FEW_TOKENS or (logits and self.engine.lean is None):
            with tiny_products():
                return self._forward(ids_R_T, positions_R_T, writing, logits=logits)
        return self._forward(ids_R_T, positions_R_T, writing, logits=logits)

    def _forward(self, ids_R_T: Tensor, positions_R_T: Tensor, writing: Writing, *, logits: bool) -> Tensor:
        device, model, lean = self.policy.device, self.policy.model, self.engine.lean
        ids_R_T, positions_R_T = ids_R_T.to(device), positions_R_T.to(device)
        if lean is not None:
            hidden = lean(ids_R_T, positions_R_T, writing, self.cache)
            return self.policy.head.logits(hidden[:, -1]) if logits else hidden
        self.cache.writing = writing
        inputs: dict[str, Any] = {
            "input_ids": ids_R_T, "position_ids": positions_R_T, "past_key_values": self.cache, "use_cache": True,
            "attention_mask": self.engine.masks(positions_R_T, writing.reach, fresh=writing.fresh, dtype=model.dtype),
        }  # fmt: skip
        try:  # on a CPU everything is float32: decoding is bound by memory, and the learner's figures are met to 1e-5
            with self.policy.computing() if device.type != "cpu" else nullcontext():
                return model(**inputs).logits[:, -1] if logits else model.get_decoder()(**inputs).last_hidden_state
        finally:
            self.cache.writing = None


def owner_of(row: Row) -> Hashable:
    """Whose keys and values a row's are: those of one adapter are never another's."""
    return ("adapter", row.request.adapter)


def support_of(row: Row, logits_V: Tensor) -> tuple[int, ...] | None:
    """What could be sampled, as `Sampled.support` writes it; None where nothing restricted it."""
    if row.matcher is None and not row.request.truncated:
        return None
    allowed_V = logits_V > float("-inf")
    forbidden = (~allowed_V).nonzero()[:, 0]
    if not len(forbidden):
        return None
    shorter = -1 - forbidden if 2 * len(forbidden) < len(logits_V) else allowed_V.nonzero()[:, 0]
    return tuple(shorter.tolist())
