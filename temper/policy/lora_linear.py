"""A linear layer with adapters beside its weight, and which row of a batch goes through which of them.

A batch of mixed adapters costs one product with all A stacked, a mask that keeps each row's own block, and one with
all B stacked: nothing is gathered, and the shapes do not depend on which row has which adapter.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from temper.core.errors import ShapeError
from temper.policy.linear import Update, linear
from temper.policy.quantised import dense


class Pair(nn.Module):
    """The factors of one adapter at one layer: A [rank, in] at random, B [out, rank] at zero; m [out] for DoRA alone."""

    m: nn.Parameter | None

    def __init__(self, layer: nn.Linear, rank: int, scaling: float, dropout: float, dora: bool) -> None:
        super().__init__()
        self.scaling, self.dropout = scaling, dropout
        device = layer.weight.device
        self.A = nn.Parameter(torch.empty(rank, layer.in_features, device=device, dtype=torch.float32))
        self.B = nn.Parameter(torch.zeros(layer.out_features, rank, device=device, dtype=torch.float32))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        self.m = nn.Parameter(self.norm(layer)) if dora else None

    @torch.no_grad()
    def norm(self, layer: nn.Linear) -> Tensor:
        """‖W + s·B A‖ of each row, [out] in float32. DoRA takes no gradient through it (Liu et al. 2024, section 4.3)."""
        return torch.addmm(dense(layer, torch.float32), self.B, self.A, alpha=self.scaling).norm(dim=1)

    def row_scale(self, layer: nn.Linear) -> Tensor:
        """DoRA's m/‖W + s·B A‖, [out] (Liu et al. 2024, eq. 5): exactly one at the start; ones for plain LoRA."""
        if self.m is None:
            return torch.ones(layer.out_features, device=self.B.device)
        return self.m / self.norm(layer).clamp(min=torch.finfo(torch.float32).tiny)

    @torch.no_grad()
    def merged(self, layer: nn.Linear) -> Tensor:
        """The weight with this adapter in it, [out, in] in float32."""
        weight = torch.addmm(dense(layer, torch.float32), self.B.float(), self.A.float(), alpha=self.scaling)
        return weight if self.m is None else weight * self.row_scale(layer)[:, None]

    def factors(self) -> dict[str, nn.Parameter]:
        """A, B and, for DoRA, m."""
        return {"A": self.A, "B": self.B} | ({} if self.m is None else {"m": self.m})


@dataclass
class Route:
    """Which adapter each row of the running batch goes through. `names` are the distinct ones, `slot_B` the row's
    number among them (-1: none), or None where every row has the same."""

    names: tuple[str, ...]
    slot_B: Tensor | None
    masks: dict[tuple[int, ...], Tensor] = field(default_factory=dict)

    def foreign(self, slots: tuple[int, ...], ranks: tuple[int, ...]) -> Tensor:
        """[rows, Σ ranks] bool: the columns that are not the row's own, for the adapters in `slots`."""
        assert self.slot_B is not None
        key = (*slots, -1, *ranks)
        if key not in self.masks:
            owner_R = torch.tensor([slot for slot, rank in zip(slots, ranks, strict=True) for _ in range(rank)], device=self.slot_B.device)
            self.masks[key] = self.slot_B[:, None] != owner_R
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
    """A linear layer with adapters beside its weight. Weight and bias (and what a packed weight needs) keep their names."""

    def __init__(self, base: nn.Linear, router: Router) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        for name, parameter in base._parameters.items():
            self.register_parameter(name, parameter)
        self.router = router
        self.lora = nn.ModuleDict()
        self._stacked: tuple[tuple, tuple[Tensor, Tensor, Tensor | None]] | None = None
        self.train(base.training)

    def pair(self, name: str) -> Pair:
        """The factors of adapter `name`."""
        pair = self.lora[name]
        assert isinstance(pair, Pair)
        return pair

    def forward(self, x: Tensor) -> Tensor:
        """W x + b, plus each row's own s·B A x; for DoRA scaled row by row of W before b is added."""
        route = self.router.route
        slots = () if route is None else tuple(slot for slot, name in enumerate(route.names) if name in self.lora)
        if route is None or not slots:
            return linear(self, x)
        pairs = [self.pair(route.names[slot]) for slot in slots]
        dropped = drop(x, route, [(slot, pair.dropout) for slot, pair in zip(slots, pairs, strict=True)]) if self.training else None
        if route.slot_B is None:
            scale = None if pairs[0].m is None else self.stack(pairs)[2]
            update = Update(pairs[0].A, pairs[0].B, pairs[0].scaling, dropped)
        else:
            check_rows(x, route.slot_B)
            A, B, scale = self.stack(pairs)
            update = Update(A, B, 1.0, dropped, route.foreign(slots, tuple(pair.A.shape[0] for pair in pairs)))
        out = linear(self, x, update, with_bias=scale is None)
        if scale is None:
            return out
        if route.slot_B is None:
            scale = scale[0]
        else:
            # rows without an adapter here take the row of ones that stands last
            place = torch.full((len(route.names) + 1,), len(slots), device=x.device)
            place[list(slots)] = torch.arange(len(slots), device=x.device)
            scale = scale[place[route.slot_B]].view(x.shape[0], *[1] * (x.ndim - 2), -1)
        out = out * scale.to(out.dtype)
        return out if self.bias is None else out + self.bias.to(out.dtype)

    def stack(self, pairs: list[Pair]) -> tuple[Tensor, Tensor, Tensor | None]:
        """All A one below the other, all s·B side by side, and where one is DoRA's the row scales [pairs + 1, out],
        the last all ones. Kept between calls that take no gradient."""
        if torch.is_grad_enabled():
            return self._stack(pairs)
        key = tuple((id(pair), *((weight._version, weight.data_ptr()) for weight in pair.factors().values())) for pair in pairs)
        if self._stacked is None or self._stacked[0] != key:
            self._stacked = key, self._stack(pairs)
        return self._stacked[1]

    def _stack(self, pairs: list[Pair]) -> tuple[Tensor, Tensor, Tensor | None]:
        scales = None
        if any(pair.m is not None for pair in pairs):
            ones_D = torch.ones(self.out_features, device=self.weight.device)
            scales = torch.stack([*(pair.row_scale(self) for pair in pairs), ones_D])
        return torch.cat([pair.A for pair in pairs]), torch.cat([pair.B * pair.scaling for pair in pairs], 1), scales


def drop(x: Tensor, route: Route, dropouts: list[tuple[int, float]]) -> Tensor | None:
    """`x` after the dropout of each row's own adapter, given as (slot, probability); None where no adapter has any."""
    wanted = {dropout for _, dropout in dropouts}
    if wanted == {0.0}:
        return None
    if len(wanted) == 1:
        return F.dropout(x, wanted.pop())
    assert route.slot_B is not None
    by_slot = torch.zeros(len(route.names) + 1)
    by_slot[[slot for slot, _ in dropouts]] = torch.tensor([dropout for _, dropout in dropouts])
    p = by_slot.to(x.device)[route.slot_B].view(x.shape[0], *[1] * (x.ndim - 1)).to(x.dtype)
    return (x / (1 - p)).where(torch.rand_like(x) >= p, 0.0)


def check_rows(x: Tensor, slot_B: Tensor) -> None:
    """Raise ShapeError where the batch has other rows than the route."""
    if x.shape[0] != slot_B.shape[0]:
        raise ShapeError(
            f"a batch of {x.shape[0]} rows meets a route of {slot_B.shape[0]}", do="name one adapter (or None) for each row in use()"
        )
