"""Adapters on disk as PEFT writes them: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from temper.core.errors import DataError, ShapeError
from temper.core.storage import read_json, write_json
from temper.policy.adapters import Form, adapter_hash, attach, check_name, finite, layers_of, linear_layers
from temper.policy.lora_linear import Router
from temper.policy.quantised import is_packed

CONFIG, WEIGHTS, IDENTITY = "adapter_config.json", "adapter_model.safetensors", "temper.json"
PREFIX = "base_model.model."
FACTORS = {"A": "lora_A.weight", "B": "lora_B.weight", "m": "lora_magnitude_vector"}  # DoRA's has no ".weight" on disk
# settings that change what the numbers mean, with the only value under which they mean LoRA or DoRA
PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    "modules_to_save": (None, []),
    "lora_bias": (False, None),
    "alora_invocation_tokens": (None,),
    "trainable_token_indices": (None, []),
    "megatron_config": (None,),
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),  # the others (PiSSA, OLoRA, CorDA, LoftQ) change the base
}


def save_adapter(model: nn.Module, head: nn.Module, name: str, folder: Path, *, base: str, base_hash: str) -> None:
    """Write adapter `name` into `folder`, with its content hash and that of the base it was trained on."""
    layers = layers_of(model, name)
    pairs = {path: layer.pair(name) for path, layer in layers.items()}
    ranks, scalings = {pair.A.shape[0] for pair in pairs.values()}, {pair.scaling for pair in pairs.values()}
    if len(ranks) != 1 or len(scalings) != 1:
        raise ShapeError(
            f"adapter {name!r} has ranks {sorted(ranks)} and scalings {sorted(scalings)}",
            why="one adapter file states one of each",
            do="merge it into the base, or train it again with one rank",
        )
    rank, scaling = ranks.pop(), scalings.pop()
    state = {
        f"{PREFIX}{path}.{FACTORS[factor]}": weight.detach().cpu().contiguous()
        for path, pair in pairs.items()
        for factor, weight in pair.factors().items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    write_json(
        folder / CONFIG,
        {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "r": rank,
            "lora_alpha": scaling * rank,
            "lora_dropout": next(iter(pairs.values())).dropout,
            "use_rslora": False,
            "bias": "none",
            "fan_in_fan_out": False,
            "use_dora": next(iter(pairs.values())).m is not None,
            "init_lora_weights": True,
            "inference_mode": True,
            "modules_to_save": None,
            "target_modules": short_targets(set(layers), set(linear_layers(model, head))),
        },
    )
    quantised = "nf4" if any(is_packed(layer) for layer in layers.values()) else None
    write_json(folder / IDENTITY, {"adapter_hash": adapter_hash(model, name), "base_hash": base_hash, "quantised": quantised})


def short_targets(chosen: set[str], linears: set[str]) -> list[str]:
    """Last parts of the chosen paths where these choose exactly them, else the whole paths."""
    leaves = {path.rpartition(".")[2] for path in chosen}
    return sorted(leaves if {path for path in linears if path.rpartition(".")[2] in leaves} == chosen else chosen)


def load_adapter(model: nn.Module, router: Router, head: nn.Module, name: str, folder: Path) -> dict[str, str]:
    """Attach the adapter in `folder` as `name`; return its recorded hashes ({} where another program wrote it).

    Raises DataError where files are missing, the adapter is neither LoRA nor DoRA, or its layers are not this model's.
    """
    check_name(router, name)
    for file in (CONFIG, WEIGHTS):
        if not (folder / file).is_file():
            raise DataError(f"{folder} holds no adapter", why=f"{file} is missing", do="give a folder in PEFT's format")
    config = read_json(folder / CONFIG)
    for key, plain in PLAIN.items():
        if config.get(key, plain[0]) not in plain:
            raise DataError(
                f"{folder / CONFIG} asks for {key}={config[key]!r}",
                why="temper serves LoRA and DoRA on linear layers",
                do="train the adapter without it, or merge it into the base",
            )
    state = load_file(folder / WEIGHTS)
    finite(name, state)
    if config.get("alpha_pattern"):
        raise DataError(
            f"{folder / CONFIG} has an alpha_pattern", why="one adapter has one scaling here", do="train it with a single lora_alpha"
        )
    found = factors_by_path(folder, state, dora=bool(config.get("use_dora")))
    linears = linear_layers(model, head)
    layers = {}
    for path, factors in found.items():
        linear, a, b = linears.get(path), factors["A"], factors["B"]
        if linear is None or a.shape[1] != linear.in_features or b.shape[0] != linear.out_features or a.shape[0] != b.shape[1]:
            there = "no linear layer of this model" if linear is None else f"{linear.in_features} → {linear.out_features} in this model"
            raise DataError(
                f"adapter {folder} does not fit this model",
                why=f"{path} is {there}; the adapter has A {tuple(a.shape)}, B {tuple(b.shape)}",
                do=f"load it on the base it was trained on ({config.get('base_model_name_or_path')})",
            )
        scaling = float(config["lora_alpha"]) / (math.sqrt(a.shape[0]) if config.get("use_rslora") else a.shape[0])
        layers[path] = linear, Form(a.shape[0], scaling, float(config.get("lora_dropout") or 0.0), "m" in factors)
    state_of_random = torch.get_rng_state()  # fresh pairs draw from the global stream; loading must not move it
    attach(model, router, name, layers)
    torch.set_rng_state(state_of_random)
    with torch.no_grad():
        for path, layer in layers_of(model, name).items():
            for factor, weight in layer.pair(name).factors().items():
                weight.copy_(found[path][factor].view(weight.shape))
    return read_json(folder / IDENTITY) if (folder / IDENTITY).is_file() else {}


def factors_by_path(folder: Path, state: dict[str, torch.Tensor], *, dora: bool) -> dict[str, dict[str, torch.Tensor]]:
    """Path to A, B and, for DoRA, m. Raises DataError for a key that is none of them, or where one is missing."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in state.items():
        factor, suffix = next(((factor, end) for factor, end in FACTORS.items() if key.endswith(f".{end}")), ("", ""))
        if not key.startswith(PREFIX) or not factor:
            raise DataError(
                f"{folder / WEIGHTS} holds {key!r}",
                why="that is not a factor of a linear layer",
                do="train the adapter on linear layers only",
            )
        found.setdefault(key.removeprefix(PREFIX).removesuffix(f".{suffix}"), {})[factor] = tensor
    wanted = {"A", "B", "m"} if dora else {"A", "B"}
    for path, factors in found.items():
        if factors.keys() != wanted:
            raise DataError(
                f"{folder / WEIGHTS} holds {', '.join(sorted(factors))} of {path}",
                why=f"use_dora is {dora}: it must hold {', '.join(sorted(wanted))}",
                do="save the adapter again whole",
            )
    return found
