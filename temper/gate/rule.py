"""`GateRule`: what a release must show. Every number in it is spelt by its YAML; the code knows none."""

from __future__ import annotations

import difflib
import math
from typing import Annotated, Any, Literal, get_args

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from temper.core.config import Config
from temper.core.reports import Dimension

Basis = Literal["bound", "point"]


class Judged(Config):
    """A part of a rule that may say `by`."""

    @model_validator(mode="before")
    @classmethod
    def no_bare_on(cls, line: Any) -> Any:
        """YAML 1.1 reads a bare `on` as true: say so, where it would only say that keys should be strings."""
        if isinstance(line, dict) and (True in line or "on" in line):
            raise ValueError("the key for bound or point is `by` (YAML reads a bare `on` as true)")
        return line


class Line(Judged):
    """One line of a rule about one `metric`: `dimension.name`, `slice:NAME.name`, or `slice:*.name` for every slice.

    `min_count` overrides the rule's own for this line.
    """

    metric: str
    min_count: int | None = Field(default=None, ge=1)

    @field_validator("metric")
    @classmethod
    def known_group(cls, metric: str) -> str:
        """Refuse a metric whose dimension does not exist."""
        group, dot, name = metric.rpartition(".")
        if not dot or not name:
            raise ValueError(f"{metric!r} has no `dimension.metric` form; write for example tools.precision or slice:lookup.success")
        known = get_args(Dimension)
        if not group.startswith("slice:") and group not in known:
            near = difflib.get_close_matches(group, known, n=1)
            raise ValueError(
                f"{group!r} is no dimension; " + (f"did you mean {near[0]!r}?" if near else f"use one of {', '.join(known)} or slice:NAME")
            )
        return metric


class Target(Line):
    """The metric must reach `min` and not pass `max`; `by: bound` asks it of the 95% interval, `point` of the figure."""

    min: float | None = None
    max: float | None = None
    by: Basis

    @model_validator(mode="after")
    def has_limit(self) -> Target:
        """Refuse a target without a limit, or with limits that exclude each other."""
        limits = [limit for limit in (self.min, self.max) if limit is not None]
        if not limits or not all(map(math.isfinite, limits)) or (len(limits) == 2 and limits[0] > limits[1]):
            raise ValueError(f"{self.metric} needs `min`, `max`, or both in that order; got min={self.min}, max={self.max}")
        return self


class NonInferiority(Line):
    """The candidate may be worse than the baseline by less than `margin`, shown by the paired clustered interval."""

    margin: float = Field(ge=0, allow_inf_nan=False)
    coverage: float | None = Field(default=None, gt=0, le=1)


class Growth(Line):
    """The metric may grow over the baseline by at most `max_growth` (0.2 is 20%), on the interval or the figure."""

    max_growth: float = Field(gt=-1, allow_inf_nan=False)
    by: Basis
    coverage: float | None = Field(default=None, gt=0, le=1)


class Improvement(Line):
    """The candidate must beat the baseline; all improvement lines are one family under Holm's procedure."""

    coverage: float | None = Field(default=None, gt=0, le=1)


class StudentKeep(Judged):
    """In every slice of the teacher the student must keep `share` of the teacher's `metric`."""

    share: float = Field(gt=0, le=1)
    metric: str
    by: Basis
    min_count: int | None = Field(default=None, ge=1)


def kind_of(line: Any) -> str:
    """Which kind of guardrail a mapping spells, by its distinguishing key."""
    keys = line.keys() if isinstance(line, dict) else type(line).model_fields.keys()
    return "margin" if "margin" in keys else "max_growth" if "max_growth" in keys else "target"


Guardrail = Annotated[
    Annotated[Target, Tag("target")] | Annotated[NonInferiority, Tag("margin")] | Annotated[Growth, Tag("max_growth")],
    Discriminator(kind_of),
]


class GateRule(Config):
    """What a candidate must show to be promoted.

    `alpha`: two-sided level of every paired interval, and family-wise error of the improvement lines.
    `min_count`: fewer cases than this leave a line unknown. `coverage`: the least share of all cases, of
    both reports together, that must be paired for a comparison to count.
    """

    alpha: float = Field(gt=0, lt=1)
    min_count: int = Field(ge=1)
    coverage: float = Field(gt=0, le=1)
    targets: tuple[Target, ...] = ()
    noninferiority: tuple[NonInferiority, ...] = ()
    improvement: tuple[Improvement, ...] = ()
    guardrails: tuple[Guardrail, ...] = ()
    student_keep: StudentKeep | None = None

    @model_validator(mode="after")
    def asks_something(self) -> GateRule:
        """Refuse a rule without lines: it would promote anything."""
        if not (self.targets or self.noninferiority or self.improvement or self.guardrails or self.student_keep):
            raise ValueError("the rule has no line, so it would promote anything; give targets, noninferiority, improvement or guardrails")
        return self
