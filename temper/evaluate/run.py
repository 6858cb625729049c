"""`temper evaluate CONFIG`: one model on one split, and what is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, ValidationError

from temper.core.config import Config as CoreConfig
from temper.core.errors import DataError
from temper.core.records import Split
from temper.core.reports import Report
from temper.core.storage import read_json, whole_folder, write_json, write_jsonl
from temper.evaluate.suite import Options, run_suite

if TYPE_CHECKING:
    from temper.rollout.engine import Engine
    from temper.rollout.environment import Environment


class Config(CoreConfig):
    """What `temper evaluate` reads.

    `model`: a checkpoint folder or hub name. `environment`: a name, or a dotted name that is imported;
    `environment_options` are keywords for its factory.
    `adapters`: tenant -> adapter folder; a task of that tenant is answered through it. `limit`: tasks a slice.
    `out`: the folder for report.json and records.jsonl. `previous`: the report.json that the win rate is
    against. `ledger`: where looks at the sealed split are recorded.
    """

    name: str
    model: str
    environment: str = "finops"
    environment_options: dict[str, Any] = Field(default_factory=dict)
    split: Split = "dev"
    constrained: bool = False
    limit: int | None = Field(default=None, ge=1)
    adapters: dict[str, str] = Field(default_factory=dict)
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    device: str = "auto"
    out: str
    previous: str | None = None
    ledger: str | None = None
    options: Options = Options()


def run(cfg: Config, engine: Engine, environment: Environment, *, model_hash: str | None = None) -> dict[str, Any]:
    """Evaluate, write report.json and records.jsonl into `cfg.out` (whole or absent), and return their paths and the figures.

    The caller opens the model with its adapters loaded under the tenants' names, and the environment. `model_hash`
    is what a verdict will be bound to (weights and adapters together); the weights' own hash unless told.
    """
    adapter_of = (lambda task: task.tenant if task.tenant in cfg.adapters else None) if cfg.adapters else None
    report, records = run_suite(
        engine,
        environment,
        cfg.split,
        name=cfg.name,
        constrained=cfg.constrained,
        adapter_of=adapter_of,
        limit=cfg.limit,
        options=cfg.options,
        previous=read_report(Path(cfg.previous)) if cfg.previous else None,
        ledger=Path(cfg.ledger) if cfg.ledger else None,
        model_hash=model_hash,
    )
    out = Path(cfg.out)
    with whole_folder(out) as scratch:
        write_json(scratch / "report.json", report)
        write_jsonl(scratch / "records.jsonl", records)
    return {"report": str(out / "report.json"), "records": str(out / "records.jsonl"), "figures": figures(report)}


def read_report(path: Path) -> Report:
    """A report from its file. Raises DataError where it is missing or is none."""
    try:
        return Report.model_validate_json(json.dumps(read_json(path)))
    except ValidationError as error:
        fault = error.errors()[0]
        raise DataError(
            f"{path} is not a report", why=f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}", do="make it with `temper evaluate`"
        ) from error


def figures(report: Report) -> dict[str, dict[str, Any]]:
    """Each measured figure with its count and interval, by `dimension.metric`; for tables and `--json`."""
    return {
        f"{dimension}.{name}": {"value": item.value, "low": item.low, "high": item.high, "count": item.count, "unit": item.unit}
        for dimension, measures in report.dimensions.items()
        for name, item in measures.items()
    }
