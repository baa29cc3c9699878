"""Short steps in which nothing is due are only counted, and looked at together a little later.

A step of the session runs the code of a dozen parts. In a row that takes some 10 µs, but between
two training steps, whose work has filled the processor's caches, five to ten times as long. On
short steps that is what watching costs. So each part says until when it has nothing to do but take
the loss. Until then a step keeps its loss, and the next step that is not idle hands the losses to
the parts, in order, before anything else. What follows from a loss is the same as without:

- a loss that is not finite or jumps is never idle, nor is a step with a report or a command;
- a run with a graft, a remedy in its window, or other ranks has no idle steps;
- a step is idle only within a second of one that was not, so that a server's page shows the loss
  in time. The last idle steps before a pause are handed over after it.
"""

from __future__ import annotations

from collections.abc import Callable, Sized
from time import time
from typing import NamedTuple

from esper.sdk.run_state import RunState

LONGEST_SECONDS = 1.0
MOST_STEPS = 128


class IdleStep(NamedTuple):
    """A step that was only counted.

    Attributes:
        at: the step of the loss: on a GPU the one before.
        wall_time: seconds since the epoch.
    """

    step: int
    at: int
    loss: float
    wall_time: float


class IdleSteps:
    """Counts the idle steps of one run.

    Args:
        is_usual: takes the loss of a step; False where the step is not idle because of it.
        commands: of the server, that wait for the next step.
    """

    def __init__(
        self, run: RunState, is_usual: Callable[[float, int], bool], commands: Sized = ()
    ) -> None:
        self._run = run
        self._is_usual = is_usual
        self._commands = commands
        self._since = 0.0
        self._kept: list[tuple[int, int, float, float]] = []  # made an IdleStep when handed over

    def begin(self, idle_until: float) -> None:
        """A whole step is over; nothing is due before step ``idle_until``."""
        self._run.idle_until = int(min(idle_until, self._run.step + MOST_STEPS))
        self._since = time()

    def take(self, at: int, loss: float) -> bool:
        """Count a step; False where it is not idle, and was not counted."""
        run = self._run
        step = run.step + 1
        if step >= run.idle_until or self._commands:
            return False
        now = time()
        if not 0.0 <= now - self._since < LONGEST_SECONDS or not self._is_usual(loss, step):
            return False
        run.step = step
        run.losses.append((at, loss))
        self._kept.append((step, at, loss, now))
        return True

    def handed_over(self) -> list[IdleStep]:
        """The idle steps since the last call, oldest first."""
        kept, self._kept = self._kept, []
        return [IdleStep(*entry) for entry in kept]
