"""Log-probs of a reference that stands still: computed once, in evaluation mode, and kept under what they depend on."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from collections.abc import Sequence as Rows
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from temper.core.errors import ConfigError
from temper.core.hashing import hash_value
from temper.core.storage import write_bytes
from temper.data.sequence import Sequence
from temper.policy.model import Policy
from temper.train import parallel

ELSEWHERE = {"_name_or_path", "transformers_version", "dtype", "torch_dtype"}  # where weights came from, who wrote them, how they lay on disk


def with_reference(rows: Rows[Sequence], reference: Policy, folder: Path, score: Callable[[list[Sequence]], list[Tensor]]) -> list[Sequence]:
    """`rows` with the reference's log-prob of every token, from `folder` where they are there for this very key.

    `score(asked)` gives them, one tensor a row in order; it is called only where they are not. A reference that is another
    checkpoint has no adapter under training: it is asked through its weights alone. Raises ConfigError where the
    reference is a policy that has been trained since it was loaded: what it says changes from step to step.
    """
    if reference.version:
        raise ConfigError(f"the reference has moved: {reference.version} updates since it was loaded", why="its log-probs are kept for the whole run",
                          do="score before training begins, or score a moving reference batch by batch")  # fmt: skip
    there = set(reference.adapters())
    asked = [row if row.adapter in there else dataclasses.replace(row, adapter=None) for row in rows]
    key = cache_key(asked, reference)
    path = folder / f"reference-{key[:16]}.safetensors"
    with parallel.rank_zero_first():
        flat_N = read(path, key)
        if flat_N is None:
            flat_N = torch.cat(score(asked)).contiguous()
            write_bytes(path, save({"logprobs": flat_N}, metadata={"key": key}))
    values, at, found = flat_N.tolist(), 0, []
    for row in rows:
        found.append(dataclasses.replace(row, ref_logprobs=values[at : at + len(row.tokens)]))
        at += len(row.tokens)
    return found


def cache_key(rows: Rows[Sequence], reference: Policy) -> str:
    """The hash of all that the log-probs depend on: weights, the model's config, adapters, precision, and each row's tokens and mask."""
    config = {name: value for name, value in json.loads(reference.model.config.to_json_string(use_diff=False)).items() if name not in ELSEWHERE}
    adapters = sorted({row.adapter for row in rows if row.adapter is not None})
    return hash_value({
        "weights": reference.weights_hash(), "config": config, "precision": str(reference.compute_dtype),
        "adapters": [reference.adapter_hash(name) for name in adapters],
        "rows": [[row.tokens, [weight != 0 for weight in row.weights], adapters.index(row.adapter) if row.adapter else -1] for row in rows],
    })  # fmt: skip


def read(path: Path, key: str) -> Tensor | None:
    """The log-probs in `path`, or None where it is not there, is torn, or was made for another key."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor("logprobs") if (file.metadata() or {}).get("key") == key else None
    except SafetensorError:
        return None
