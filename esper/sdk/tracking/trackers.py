"""The trackers that are known by name, and those that users bring."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from importlib import import_module
from typing import Any

from esper.exceptions import ConfigurationError
from esper.near_names import did_you_mean
from esper.sdk.tracking.events import PREFIX, Event, Tracker
from esper.sdk.tracking.kubeflow import Kubeflow, NotInKubeflowError

logger = logging.getLogger("esper")

VARIABLE = "ESPER_TRACKERS"
MAX_LINES = 1000  # of the artifact in MLflow


class TensorBoard:
    """Scalars and texts, into the user's ``SummaryWriter`` or one of its own."""

    def __init__(self, writer: Any = None) -> None:
        self._own = writer is None
        if writer is None:
            writer = import_module("torch.utils.tensorboard").SummaryWriter()
        self._writer = writer

    def write(self, event: Event) -> None:
        for name, value in event.metrics().items():
            self._writer.add_scalar(name, value, event.step)
        link = f" [decision]({event.link})" if event.link else ""
        self._writer.add_text(f"{PREFIX}{event.kind}", f"{event.text}{link}", event.step)

    def close(self) -> None:
        self._writer.flush()
        if self._own:
            self._writer.close()


class WeightsAndBiases:
    """Into the user's run, with its next ``log``: W&B's own step must not move by our calls."""

    def __init__(self, run: Any = None) -> None:
        self._run = run if run is not None else import_module("wandb").run
        if self._run is None:
            raise ConfigurationError("call wandb.init before attach, or give its run")

    def write(self, event: Event) -> None:
        row = {**event.metrics(), f"{PREFIX}step": event.step, f"{PREFIX}event": event.line}
        self._run.log(row, commit=False)

    def close(self) -> None:
        """The user finishes the run."""


class MLflow:
    """Metrics at the step, the newest event of each kind as a tag, and all in one artifact."""

    def __init__(self, run_id: str = "") -> None:
        mlflow = import_module("mlflow")
        active = mlflow.active_run()
        if not run_id and active is None:
            raise ConfigurationError("call mlflow.start_run before attach")
        self._run = run_id or active.info.run_id
        self._client = mlflow.MlflowClient()
        self._lines: list[str] = []

    def write(self, event: Event) -> None:
        for name, value in event.metrics().items():
            self._client.log_metric(self._run, name, value, step=event.step)
        self._client.set_tag(self._run, f"esper.{event.kind}", f"step {event.step}: {event.line}")
        self._lines = [*self._lines[-MAX_LINES:], f"- step {event.step}: {event.line}"]

    def close(self) -> None:
        if self._lines:
            self._client.log_text(self._run, "\n".join(self._lines), "esper/events.md")


class Trackio:
    """Rows of their own at the run's step, into the run that ``trackio.init`` has begun."""

    def __init__(self) -> None:
        self._trackio = import_module("trackio")

    def write(self, event: Event) -> None:
        self._trackio.log({**event.metrics(), f"{PREFIX}event": event.line}, step=event.step)

    def close(self) -> None:
        """The user finishes the run."""


BY_NAME: dict[str, Callable[[], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "mlflow": MLflow,
    "trackio": Trackio,
    "kubeflow": Kubeflow,
}


def trackers_of(given: Iterable[Any] | None) -> list[Tracker]:
    """The trackers that a user has named, or whose writer or run they give.

    One whose package is not installed, or that has no server here, is left out with a warning.

    Args:
        given: None: those that ``ESPER_TRACKERS`` names, separated by commas.

    Raises:
        ConfigurationError: this is no tracker, or its run has not begun.
    """
    if given is None:
        given = filter(None, map(str.strip, os.environ.get(VARIABLE, "").split(",")))
    if isinstance(given, str):
        raise ConfigurationError(f"trackers must be a list such as [{given!r}]")
    found = [_tracker(entry) for entry in given]
    return [tracker for tracker in found if tracker is not None]


def _tracker(entry: Any) -> Tracker | None:
    if isinstance(entry, str):
        if entry not in BY_NAME:
            raise ConfigurationError(
                f"unknown tracker {entry!r}{did_you_mean(entry, BY_NAME)}; "
                f"known are: {', '.join(BY_NAME)}"
            )
        try:
            return BY_NAME[entry]()
        except (ImportError, NotInKubeflowError) as error:
            logger.warning("events are not mirrored into %s: %s", entry, error)
            return None
    if hasattr(entry, "add_scalar") and hasattr(entry, "add_text"):
        return TensorBoard(entry)
    if hasattr(entry, "log") and hasattr(entry, "define_metric"):
        return WeightsAndBiases(entry)
    if isinstance(entry, Tracker):
        return entry
    raise ConfigurationError(
        f"{type(entry).__name__} is no tracker: give {', '.join(BY_NAME)}, a SummaryWriter, a run "
        "of wandb, or an object with write(event) and close()"
    )
