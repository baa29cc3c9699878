"""What trackers are given: events as they happen, and the progress of the run at intervals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

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


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is.

    Attributes:
        step: optimizer steps that were counted.
        target_steps: that are planned; None: unknown.
        loss: of training, the newest that is known; None: none yet.
        held_out: loss on data that is not trained on; None: unknown.
    """

    step: int
    target_steps: int | None = None
    loss: float | None = None
    held_out: float | None = None


@runtime_checkable
class ProgressTracker(Tracker, Protocol):
    """A tracker that is told the progress too, every few seconds while the run goes on."""

    def report(self, progress: Progress) -> None:
        """Tell it; the last time just before ``close``."""
