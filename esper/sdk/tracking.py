"""What happens to a run, mirrored into the trackers that its user has: ``attach(trackers=[…])``.

A tracker gets one :class:`Event` for each finding, proposal, graft, remedy and verdict. It is
written in a thread of its own: a slow or broken tracker never delays or ends the training, and is
left out after some failures. Four adapters of a few lines each are here; anything with ``write``
and ``close`` is a tracker too.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Protocol, runtime_checkable

from esper.exceptions import ConfigurationError
from esper.near_names import did_you_mean

logger = logging.getLogger("esper")

MAX_WAITING = 1000  # events; what comes when so many wait is dropped
MAX_FAILURES = 3
PREFIX = "esper/"


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened to a run.

    Attributes:
        step: of the run.
        kind: ``finding``, ``proposed``, ``waits``, ``graft``, ``kept``, ``taken_out``, ``remedy``
            or ``verdict``.
        text: one sentence.
        link: the page of the decision or the run; empty without a server.
        values: finite numbers by name, such as ``gain``, a share of the loss.
    """

    step: int
    kind: str
    text: str
    link: str = ""
    values: Mapping[str, float] = field(default_factory=dict)

    @property
    def line(self) -> str:
        """The text with its link."""
        return f"{self.text} ({self.link})" if self.link else self.text

    def metrics(self) -> dict[str, float]:
        """A marker, which is 1 at this step, and the values, by their names in a tracker."""
        return {
            f"{PREFIX}{self.kind}": 1.0,
            **{f"{PREFIX}{name}": value for name, value in self.values.items()},
        }


@runtime_checkable
class Tracker(Protocol):
    """Where events are written. Called from one thread; it may raise."""

    def write(self, event: Event) -> None:
        """Write one event."""

    def close(self) -> None:
        """The run has ended."""


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
        self._lines = [*self._lines[-MAX_WAITING:], f"- step {event.step}: {event.line}"]

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
}


def trackers_of(given: Iterable[Any]) -> list[Tracker]:
    """The trackers that a user has named, or whose writer or run they give.

    One whose package is not installed is left out with a warning.

    Raises:
        ConfigurationError: this is no tracker, or its run has not begun.
    """
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
        except ImportError as error:
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


class Mirror:
    """Sends events to trackers from a thread that begins with the first one."""

    def __init__(self, trackers: Iterable[Tracker] = ()) -> None:
        self._failures = dict.fromkeys(trackers, 0)
        self._waiting: queue.Queue[Event | None] = queue.Queue(MAX_WAITING)
        self._thread: threading.Thread | None = None
        self.dropped = 0

    def send(self, event: Event) -> None:
        """Queue an event; never waits and never raises."""
        if not self._failures:
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="esper-trackers", daemon=True)
            self._thread.start()
        try:
            self._waiting.put_nowait(event)
        except queue.Full:
            self.dropped += 1

    def close(self, timeout: float = 5.0) -> None:
        """Write what waits, and close the trackers; for ``timeout`` seconds at most."""
        if self._thread is None:
            return
        try:
            self._waiting.put(None, timeout=timeout)
        except queue.Full:
            return
        self._thread.join(timeout)
        self._thread = None

    def _work(self) -> None:
        while (event := self._waiting.get()) is not None:
            for tracker in list(self._failures):
                self._try(tracker, lambda: tracker.write(event))  # noqa: B023 (called at once)
        for tracker in list(self._failures):
            self._try(tracker, tracker.close)

    def _try(self, tracker: Tracker, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:
            self._failures[tracker] += 1
            if self._failures[tracker] >= MAX_FAILURES:
                del self._failures[tracker]
                name = type(tracker).__name__
                logger.warning("no more events are mirrored into %s: %s", name, error)
