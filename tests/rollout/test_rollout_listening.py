"""Whoever listens to a row hears each token as it is sampled, through which adapter, and may end the row."""

from __future__ import annotations

import torch

from temper.policy.adapters import LoraConfig
from temper.policy.model import Policy
from temper.rollout.engine import Engine, Request
from tests.checkpoints import tiny_checkpoint


def test_listeners_hear_the_tokens_and_the_adapter_and_end_their_own_row_only(tmp_path):
    torch.manual_seed(0)
    policy = Policy.load(tiny_checkpoint("qwen3", tmp_path / "base"), precision="float32", device="cpu")
    policy.add_lora("a", LoraConfig(rank=2, alpha=4))
    heard: dict[str, list[tuple[int, str | None]]] = {"all": [], "three": []}

    def listen(name: str, wanted: int):
        def take(token: int, adapter: str | None) -> bool:
            heard[name].append((token, adapter))
            return len(heard[name]) < wanted

        return take

    plain = [
        Request([5, 6, 7], 12, temperature=1.0, seed=1, adapter="a", stop_ids=frozenset()),
        Request([8, 9], 12, temperature=1.0, seed=2, stop_ids=frozenset()),
        Request([5, 9], 12, temperature=1.0, seed=3, adapter="a", stop_ids=frozenset()),
    ]
    listened = [
        Request([5, 6, 7], 12, temperature=1.0, seed=1, adapter="a", stop_ids=frozenset(), heard=listen("all", 99)),
        Request([8, 9], 12, temperature=1.0, seed=2, stop_ids=frozenset(), heard=listen("three", 3)),
        plain[2],
    ]
    alone, found = Engine(policy).sample(plain), Engine(policy).sample(listened)
    assert [row.token_ids for row in found[::2]] == [row.token_ids for row in alone[::2]]
    assert heard["all"] == [(token, "a") for token in found[0].token_ids]
    assert heard["three"] == [(token, None) for token in alone[1].token_ids[:3]]
    assert (found[1].token_ids, found[1].finish_reason) == (alone[1].token_ids[:3], "error")
    assert found[0].finish_reason == "length"
