"""Where metrics go besides metrics.jsonl: TensorBoard, Weights & Biases, MLflow, Trackio. Each is imported when it is asked for.

A tracker has `log(step, metrics)` and `close()`. Strings and absent values are left out: none of the four can plot them,
and absent is not zero. A resumed run goes on in the same tracker run, under the key of the work.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

from temper.core.errors import ConfigError, MissingDependency
from temper.core.run import Metrics, RunDirectory, Tracker

PROJECT = "temper"


def numbers(metrics: Metrics) -> dict[str, float]:
    """The metrics that are numbers."""
    return {name: float(value) for name, value in metrics.items() if isinstance(value, (int, float))}


def library(name: str, package: str) -> Any:
    """The module `name`. Raises MissingDependency with the command that installs `package`."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise MissingDependency(
            f"tracker {package!r} is not installed", why=f"{error}", do=f"pip install {package}, or take it out of `trackers`"
        ) from error


class TensorBoard:
    """Event files in the run's folder `tensorboard/`: tensorboard --logdir <folder>."""

    def __init__(self, run: RunDirectory, stage: str, config: dict[str, Any]) -> None:
        library("tensorboard", "tensorboard")
        self.folder = run.path / "tensorboard"
        self.writer: Any = None

    def log(self, step: int, metrics: Metrics) -> None:
        """One scalar a metric. The first call hides what an earlier, killed process logged from this step on."""
        if self.writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(self.folder), purge_step=step)
        for name, value in numbers(metrics).items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def close(self) -> None:
        """Close the event file."""
        if self.writer is not None:
            self.writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases; its own settings come from WANDB_* variables (WANDB_MODE=offline, WANDB_PROJECT)."""

    def __init__(self, run: RunDirectory, stage: str, config: dict[str, Any]) -> None:
        wandb = library("wandb", "wandb")
        named = {"name": f"{stage} {run.path.name}", "id": run.key[:16], "resume": "allow"}
        self.run = wandb.init(project=environment("WANDB_PROJECT"), dir=str(run.path), config=config, **named)

    def log(self, step: int, metrics: Metrics) -> None:
        """One row."""
        self.run.log(numbers(metrics), step=step)

    def close(self) -> None:
        """Finish the run."""
        self.run.finish()


class MLflow:
    """A run of MLflow; where it goes comes from MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME."""

    def __init__(self, run: RunDirectory, stage: str, config: dict[str, Any]) -> None:
        mlflow = library("mlflow", "mlflow")
        self.client = mlflow.MlflowClient()
        name = environment("MLFLOW_EXPERIMENT_NAME")
        found = self.client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self.client.create_experiment(name)
        # the run's id is the server's, so what tells it again is our key on it
        earlier = self.client.search_runs([experiment], filter_string=f"tags.temper_key = '{run.key}'", max_results=1)
        if earlier:
            self.run = earlier[0].info.run_id
            return
        self.run = self.client.create_run(experiment, run_name=f"{stage} {run.path.name}", tags={"temper_key": run.key}).info.run_id
        for key, value in flat(config).items():
            self.client.log_param(self.run, key, value)

    def log(self, step: int, metrics: Metrics) -> None:
        """One value a metric."""
        for name, value in numbers(metrics).items():
            self.client.log_metric(self.run, name, value, step=step)

    def close(self) -> None:
        """Mark the run as finished."""
        self.client.set_terminated(self.run)


class Trackio:
    """A run of Trackio, on this machine or in a Space: its own settings come from TRACKIO_* variables."""

    def __init__(self, run: RunDirectory, stage: str, config: dict[str, Any]) -> None:
        trackio = library("trackio", "trackio")
        self.run = trackio.init(project=environment("TRACKIO_PROJECT"), name=f"{stage}-{run.key[:16]}", config=config, resume="allow")

    def log(self, step: int, metrics: Metrics) -> None:
        """One row."""
        self.run.log(numbers(metrics), step=step)

    def close(self) -> None:
        """Send what is left."""
        self.run.finish()


TRACKERS: dict[str, Callable[[RunDirectory, str, dict[str, Any]], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "mlflow": MLflow,
    "trackio": Trackio,
}


class Guarded:
    """A tracker whose failure does not end a training: it is said once, and metrics.jsonl goes on."""

    def __init__(self, name: str, tracker: Tracker) -> None:
        self.name, self.tracker, self.working = name, tracker, True

    def log(self, step: int, metrics: Metrics) -> None:
        """Pass on, while the tracker works."""
        self._try(lambda: self.tracker.log(step, metrics))

    def close(self) -> None:
        """Pass on, while the tracker works."""
        self._try(self.tracker.close)

    def _try(self, act: Callable[[], None]) -> None:
        if not self.working:
            return
        try:
            act()
        except Exception as error:  # any of four foreign libraries, most of them over a network
            self.working = False
            print(f"tracker {self.name} failed and is left out from here on ({type(error).__name__}: {error}); metrics.jsonl goes on", file=sys.stderr)


def open_trackers(names: tuple[str, ...], run: RunDirectory, stage: str, config: dict[str, Any]) -> tuple[Tracker, ...]:
    """The named trackers of one run. Raises ConfigError for an unknown name, MissingDependency where one is not installed."""
    unknown = [name for name in names if name not in TRACKERS]
    if unknown:
        raise ConfigError(f"there is no tracker {unknown[0]!r}", do=f"set trackers to some of {', '.join(TRACKERS)}")
    return tuple(Guarded(name, TRACKERS[name](run, stage, config)) for name in names)


def environment(variable: str) -> str:
    """The project that the user set in the library's own variable, or temper's."""
    return os.environ.get(variable, PROJECT)


def flat(value: dict[str, Any], above: str = "") -> dict[str, Any]:
    """The leaves of a nested mapping under dotted names."""
    found: dict[str, Any] = {}
    for name, item in value.items():
        found |= flat(item, f"{above}{name}.") if isinstance(item, dict) and item else {f"{above}{name}": item}
    return found
