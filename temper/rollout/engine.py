"""The engine: what samples, for RL, evaluation and serving alike.

Rows of one batch share each forward pass. Keys and values stay in slots, so a finished row leaves its place to a
waiting one, a prefix that another row already computed is copied, and the next turn of a conversation goes on where
the last one stopped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from temper.core.errors import ConfigError, DataError
from temper.core.records import Sampled
from temper.rollout.batch import Batch
from temper.rollout.cache import SlotCache
from temper.rollout.grammar import Grammar, Grammars
from temper.rollout.lean import LeanDecoder
from temper.rollout.masks import Masks
from temper.rollout.rows import Request, Residents, Row

if TYPE_CHECKING:
    from temper.policy.model import Policy, Precision

__all__ = ["Engine", "Grammar", "Reply", "Request", "Stats"]

Reply = Callable[[int, Sampled], Request | None]


@dataclass
class Stats:
    """What the engine did: tokens of prompts, of them computed and reused, tokens sampled, steps, and wall seconds."""

    prompt_tokens: int = 0
    prefilled_tokens: int = 0
    reused_tokens: int = 0
    sampled_tokens: int = 0
    steps: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    seconds: float = 0.0


class Engine:
    """Samples from a policy, at most `max_rows` rows at once and `memory_bytes` of cached keys and values.

    With `keep_prefixes` a later call reuses what earlier calls computed with the same weights and adapter (a server
    wants that); without it equal calls give equal bytes whatever was sampled before them.
    Raises ConfigError for a model that it cannot sample from.
    """

    def __init__(self, policy: Policy, max_rows: int = 64, *, keep_prefixes: bool = False, memory_bytes: int = 4 << 30) -> None:
        if max_rows < 1:
            raise ConfigError(f"max_rows is {max_rows}", do="give the engine at least one row")
        self.policy, self.max_rows, self.keep_prefixes = policy, max_rows, keep_prefixes
        self.memory_bytes = memory_bytes
        self.masks = Masks(policy.model)
        self.lean = LeanDecoder.of(policy.model, self.masks)
        self.grammars = Grammars(policy)
        self.stats = Stats()
        self.cache = SlotCache()
        self.residents = Residents()
        self._computed_with: Hashable = None

    @classmethod
    def load(
        cls, path: Path, *, precision: Precision = "auto", device: str = "auto", max_rows: int = 64, keep_prefixes: bool = False
    ) -> Engine:
        """An engine over the checkpoint at `path`, for rooms that sample and never train. Raises as `Policy.load` does."""
        from temper.policy.model import Policy

        return cls(Policy.load(path, precision=precision, device=device), max_rows, keep_prefixes=keep_prefixes)

    @property
    def context(self) -> int:
        """How many tokens a prompt and its answer may have together."""
        return int(self.policy.model.config.get_text_config().max_position_embeddings)

    def sample(self, requests: Sequence[Request]) -> list[Sampled]:
        """One turn for each request, in order. A row's tokens depend on its own request, not on its neighbours.

        Raises DataError for a prompt that is empty or fills the context, and for an unknown adapter.
        """
        return [turns[0] for turns in self.converse(requests, lambda index, sampled: None)]

    def converse(self, requests: Sequence[Request], reply: Reply) -> list[list[Sampled]]:
        """Several turns for each request: when a turn ends, `reply(index, sampled)` gives the next request or None.

        The next request starts at once, in the place where the last turn's keys and values already are; it pays only
        for the tokens that its prompt adds. Equal to calling `sample` turn by turn, and faster.
        """
        for number, request in enumerate(requests):
            self._check(request, number)
        started = time.perf_counter()
        with self._ready(), torch.inference_mode():
            turns = Batch(self, requests, reply).run()
        self.stats.seconds += time.perf_counter() - started
        return turns

    def row(self, index: int, request: Request) -> Row:
        """A request as a row, with its grammar started."""
        self._check(request, index)
        stop_ids = self.policy.template.stop_ids if request.stop_ids is None else request.stop_ids
        matcher = None if request.grammar is None else self.grammars.start(request.grammar)
        return Row(index, request, stop_ids, matcher)

    def rows_for(self, positions: int) -> int:
        """How many rows of that many positions the memory holds."""
        config = self.policy.model.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        bytes_a_row = 2 * config.num_hidden_layers * heads * size * positions * self.policy.model.dtype.itemsize
        return max(1, min(self.max_rows, self.memory_bytes // bytes_a_row))

    def _check(self, request: Request, number: int) -> None:
        if not request.prompt_ids:
            raise DataError(f"request {number} has an empty prompt", do="render the messages with template.prompt_ids first")
        if request.max_tokens < 1:
            raise DataError(f"request {number} asks for {request.max_tokens} tokens", do="ask for at least one")
        if len(request.prompt_ids) + request.max_tokens > self.context:
            told = f"{len(request.prompt_ids)} prompt tokens and {request.max_tokens} more exceed the context of {self.context}"
            raise DataError(f"request {number} does not fit the model", why=told, do="shorten the prompt or lower max_tokens")
        if request.temperature < 0 or not 0 < request.top_p <= 1 or request.top_k < 0:
            told = f"temperature {request.temperature}, top_p {request.top_p}, top_k {request.top_k}"
            raise DataError(f"request {number} cannot be sampled", why=told, do="use temperature ≥ 0, 0 < top_p ≤ 1 and top_k ≥ 0")

    @contextmanager
    def _ready(self) -> Iterator[None]:
        """Evaluation mode around sampling; cached prefixes of other weights are forgotten."""
        weights: Hashable = (self.policy.version, *((item.data_ptr(), item._version) for item in self.policy.model.parameters()))
        if not self.keep_prefixes or weights != self._computed_with:
            self.residents.clear()
        self._computed_with = weights
        training = self.policy.model.training
        self.policy.model.eval()
        try:
            yield
        finally:
            self.policy.model.train(training)
