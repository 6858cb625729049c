"""LoRA: several adapters on one base, each row of a batch its own; merge with proof; PEFT's format on disk.

LoRA (Hu et al. 2021, eq. 3): h = W x + s·B A x with s = alpha/rank, or alpha/√rank for rsLoRA (Kalajdzievski 2023).
A batch of mixed adapters costs one dense product with all A stacked, a mask that keeps each row's own block, and
one with all B stacked: nothing is gathered, and the shapes do not depend on which row has which adapter.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from temper.core.config import Config
from temper.core.errors import ConfigError, DataError, IntegrityError, ShapeError

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


class Pair(nn.Module):
    """The two factors of one adapter at one layer: A [rank, in] at random, B [out, rank] at zero."""

    def __init__(self, features_in: int, features_out: int, rank: int, scaling: float, dropout: float, device: torch.device) -> None:
        super().__init__()
        self.scaling, self.dropout = scaling, dropout
        self.A = nn.Parameter(torch.empty(rank, features_in, device=device, dtype=torch.float32))
        self.B = nn.Parameter(torch.zeros(features_out, rank, device=device, dtype=torch.float32))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def delta(self) -> Tensor:
        """What the adapter adds to the weight, [out, in] in float32."""
        return self.scaling * (self.B.detach().float() @ self.A.detach().float())


@dataclass
class Route:
    """Which adapter each row of the running batch goes through. `names` are the distinct ones, `slot_B` the row's
    number among them (-1: none), or None where every row has the same."""

    names: tuple[str, ...]
    slot_B: Tensor | None
    masks: dict[tuple[int, ...], Tensor] = field(default_factory=dict)

    def mask(self, slots: tuple[int, ...], ranks: tuple[int, ...]) -> Tensor:
        """[rows, Σ ranks] bool: the block of columns that belongs to each row, for the adapters in `slots`."""
        assert self.slot_B is not None
        key = (*slots, -1, *ranks)
        if key not in self.masks:
            owner_R = torch.tensor([slot for slot, rank in zip(slots, ranks, strict=True) for _ in range(rank)], device=self.slot_B.device)
            self.masks[key] = self.slot_B[:, None] == owner_R
        return self.masks[key]


class Router:
    """The names of one model's adapters and the route of the running batch, shared by every adapted layer."""

    def __init__(self) -> None:
        self.names: set[str] = set()
        self.route: Route | None = None

    @contextmanager
    def use(self, names: Sequence[str | None], device: torch.device) -> Iterator[None]:
        """Send row i of every batch inside the block through adapter `names[i]` (None: the base alone)."""
        before, self.route = self.route, self.plan(names, device)
        try:
            yield
        finally:
            self.route = before

    @staticmethod
    def plan(names: Sequence[str | None], device: torch.device) -> Route | None:
        """The route of rows named `names`."""
        distinct = tuple(sorted({name for name in names if name is not None}))
        if not distinct:
            return None
        if len(distinct) == 1 and None not in names:
            return Route(distinct, None)
        return Route(distinct, torch.tensor([distinct.index(name) if name is not None else -1 for name in names], device=device))


class LoraLinear(nn.Linear):
    """A linear layer with adapters beside its weight. Weight and bias keep their names and identity."""

    def __init__(self, base: nn.Linear, router: Router) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.router = router
        self.lora = nn.ModuleDict()
        self._stacked: tuple[tuple, Tensor, Tensor] | None = None
        self.train(base.training)

    def pair(self, name: str) -> Pair:
        """The factors of adapter `name`."""
        pair = self.lora[name]
        assert isinstance(pair, Pair)
        return pair

    def forward(self, x: Tensor) -> Tensor:
        """W x + b, plus each row's own s·B A x."""
        out = F.linear(x, self.weight, self.bias)
        route = self.router.route
        slots = () if route is None else tuple(slot for slot, name in enumerate(route.names) if name in self.lora)
        if route is None or not slots:
            return out
        pairs = [self.pair(route.names[slot]) for slot in slots]
        if self.training and pairs[0].dropout:
            x = F.dropout(x, pairs[0].dropout)
        if route.slot_B is None:
            return out + F.linear(F.linear(x, pairs[0].A) * pairs[0].scaling, pairs[0].B)
        if x.shape[0] != route.slot_B.shape[0]:
            raise ShapeError(
                f"a batch of {x.shape[0]} rows meets a route of {route.slot_B.shape[0]}",
                do="name one adapter (or None) for each row in use()",
            )
        mask_B_R = route.mask(slots, tuple(pair.A.shape[0] for pair in pairs))
        all_A, all_B = self.stack(pairs)
        inner = F.linear(x, all_A)
        return out + F.linear(inner.where(mask_B_R.view(x.shape[0], *[1] * (x.ndim - 2), -1), 0.0), all_B)

    def stack(self, pairs: list[Pair]) -> tuple[Tensor, Tensor]:
        """All A one below the other and all s·B side by side; kept between calls that take no gradient."""
        if torch.is_grad_enabled():
            return torch.cat([pair.A for pair in pairs]), torch.cat([pair.B * pair.scaling for pair in pairs], 1)
        key = tuple((id(pair), pair.A._version, pair.B._version, pair.A.data_ptr(), pair.B.data_ptr()) for pair in pairs)
        if self._stacked is None or self._stacked[0] != key:
            self._stacked = key, torch.cat([pair.A for pair in pairs]), torch.cat([pair.B * pair.scaling for pair in pairs], 1)
        return self._stacked[1], self._stacked[2]


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


def attach(model: nn.Module, router: Router, name: str, layers: dict[str, tuple[nn.Linear, int, float, float]]) -> None:
    """Put a fresh pair of (rank, scaling, dropout) at each path of `layers`."""
    router.names.add(name)
    for path, (linear, rank, scaling, dropout) in layers.items():
        if not isinstance(linear, LoraLinear):
            linear = LoraLinear(linear, router)
            parent, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(parent), leaf, linear)
        linear.lora[name] = Pair(linear.in_features, linear.out_features, rank, scaling, dropout, linear.weight.device).train(
            linear.training
        )


def add_lora(model: nn.Module, router: Router, head: nn.Module, name: str, config: LoraConfig) -> None:
    """A fresh adapter on every linear layer that `config` selects. Raises ConfigError where it selects none."""
    check_name(router, name)
    linears = linear_layers(model, head)
    chosen = {path: (linear, config.rank, config.scaling, config.dropout) for path, linear in linears.items() if config.selects(path)}
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
        for weight in (pair.A, pair.B):
            digest.update(weight.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()


class Merge:
    """An adapter folded into the weights it adapts, with the originals and their checksum to restore them from."""

    def __init__(self, model: nn.Module, name: str) -> None:
        self.name, self.layers = name, layers_of(model, name)
        self.originals = {path: layer.weight.detach().clone() for path, layer in self.layers.items()}
        self.checksum = checksum(self.layers)
        with torch.no_grad():
            for layer in self.layers.values():
                layer.weight += layer.pair(name).delta().to(layer.weight.dtype)
        self.merged = checksum(self.layers)

    def undo(self) -> None:
        """Put the originals back. Raises IntegrityError where what was merged changed meanwhile, or what is restored differs."""
        if checksum(self.layers) != self.merged:
            raise IntegrityError(
                f"the weights changed after adapter {self.name!r} was merged", do="unmerge before training, or load the base again"
            )
        with torch.no_grad():
            for path, layer in self.layers.items():
                layer.weight.copy_(self.originals[path])
        if checksum(self.layers) != self.checksum:
            raise IntegrityError(f"unmerging {self.name!r} did not restore the weights", do="load the base again")


def checksum(layers: dict[str, LoraLinear]) -> str:
    """SHA-256 of the layers' own weights."""
    digest = hashlib.sha256()
    for path, layer in sorted(layers.items()):
        digest.update(path.encode())
        digest.update(layer.weight.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
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
