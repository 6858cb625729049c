"""Adapters of a model: their form, the layers they stand on, and what identifies them.

LoRA (Hu et al. 2021, eq. 3): h = W x + s·B A x with s = alpha/rank, or alpha/√rank for rsLoRA (Kalajdzievski 2023).
DoRA (Liu et al. 2024, eq. 5): the rows of W + s·B A are given the lengths m, which are learnt as well.
"""

from __future__ import annotations

import hashlib
import math
import re
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor, nn

from temper.core.config import Config
from temper.core.errors import ConfigError, DataError
from temper.policy.lora_linear import LoraLinear, Pair, Router

TARGETS = {
    "all": r".*",
    "attention": r".*(attn|attention).*",
    "mlp": r".*(mlp|feed_forward|ffn).*",
}
NAME = re.compile(r"[A-Za-z0-9_\-]+")


class LoraConfig(Config):
    """The form of a LoRA adapter."""

    rank: int = Field(16, gt=0, description="inner width of the two factors")
    alpha: float = Field(32.0, gt=0, description="the update is scaled by alpha/rank")
    rslora: bool = Field(False, description="scale by alpha/√rank instead, so that higher ranks keep learning")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout of the adapter's input while training")
    dora: bool = Field(False, description="learn the length of each row of the adapted weight apart from its direction (DoRA)")
    targets: str | tuple[str, ...] = Field(
        "all", description="all, attention, mlp, a regular expression of module paths, or a list of module names"
    )

    @property
    def scaling(self) -> float:
        """The factor of B A x."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def selects(self, path: str) -> bool:
        """Whether the linear layer at module `path` gets this adapter."""
        if isinstance(self.targets, str):
            return re.fullmatch(TARGETS.get(self.targets, self.targets), path) is not None
        return any(path == target or path.endswith(f".{target}") for target in self.targets)


def adapted_layers(model: nn.Module) -> dict[str, LoraLinear]:
    """Every layer that carries adapters, by module path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, LoraLinear)}


def layers_of(model: nn.Module, name: str) -> dict[str, LoraLinear]:
    """The layers that carry adapter `name`, by path. Raises ConfigError where there is no such adapter."""
    found = {path: layer for path, layer in adapted_layers(model).items() if name in layer.lora}
    if not found:
        known = sorted({other for layer in adapted_layers(model).values() for other in layer.lora})
        raise ConfigError(
            f"there is no adapter {name!r}",
            why=f"loaded: {', '.join(known) or 'none'}",
            do="load it with load_adapter, or make it with add_lora",
        )
    return found


def linear_layers(model: nn.Module, head: nn.Module) -> dict[str, nn.Linear]:
    """Every linear layer but the language-model head, by path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head}


def check_name(router: Router, name: str) -> None:
    """Raise ConfigError where `name` cannot name a new adapter."""
    if not NAME.fullmatch(name):
        raise ConfigError(f"adapter name {name!r} is not a plain name", do="use letters, digits, - and _")
    if name in router.names:
        raise ConfigError(f"there is an adapter {name!r} already", do="choose another name, or remove_adapter it first")


@dataclass(frozen=True)
class Form:
    """What a fresh pair of factors at one layer is made of."""

    rank: int
    scaling: float
    dropout: float = 0.0
    dora: bool = False


def attach(model: nn.Module, router: Router, name: str, layers: dict[str, tuple[nn.Linear, Form]]) -> None:
    """Put a fresh pair of the given form at each path of `layers`."""
    router.names.add(name)
    for path, (linear, form) in layers.items():
        if not isinstance(linear, LoraLinear):
            linear = LoraLinear(linear, router)
            parent, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(parent), leaf, linear)
        linear.lora[name] = Pair(linear, form.rank, form.scaling, form.dropout, form.dora).train(linear.training)


def add_lora(model: nn.Module, router: Router, head: nn.Module, name: str, config: LoraConfig) -> None:
    """A fresh adapter on every linear layer that `config` selects. Raises ConfigError where it selects none."""
    check_name(router, name)
    linears = linear_layers(model, head)
    form = Form(config.rank, config.scaling, config.dropout, config.dora)
    chosen = {path: (linear, form) for path, linear in linears.items() if config.selects(path)}
    if not chosen:
        raise ConfigError(
            f"targets {config.targets!r} select no linear layer",
            why=f"layers are called for example {', '.join(sorted(linears)[:3])}",
            do="use all, attention, mlp, a regular expression of whole paths, or a list of names",
        )
    attach(model, router, name, chosen)


def remove(model: nn.Module, router: Router, name: str) -> None:
    """Forget adapter `name`."""
    for layer in layers_of(model, name).values():
        del layer.lora[name]
        layer._stacked = None
    router.names.discard(name)


def adapter_hash(model: nn.Module, name: str) -> str:
    """SHA-256 over paths, scaling and float32 bytes of adapter `name`: its content, whatever it is called."""
    digest = hashlib.sha256()
    for path, layer in sorted(layers_of(model, name).items()):
        pair = layer.pair(name)
        digest.update(f"{path}{list(pair.A.shape)}{list(pair.B.shape)}{pair.scaling!r}".encode())
        for weight in pair.factors().values():
            digest.update(weight.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()


def finite(name: str, tensors: dict[str, Tensor]) -> None:
    """Raise DataError where an adapter holds NaN or infinity: in a mixed batch it would reach other tenants' rows."""
    for key, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise DataError(
                f"adapter {name!r} holds numbers that are not finite",
                why=f"in {key}",
                do="train it again; it must not share a batch with others",
            )
