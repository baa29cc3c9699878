"""When the sampler measures: counted in training steps, so that a run can be repeated.

A frame is due at each multiple of the frame period, and activations are read at each multiple of
the deep period. The periods follow what sampling was measured to cost, but they change only at the
first frame from fixed steps on (50, 100, 200, 500, 1,000, and each further 1,000), and only by
powers of two, so that two runs on one machine usually choose the same. What was chosen is recorded,
and can be given to another run, which then measures at the same steps.
"""

from __future__ import annotations

import math
import operator
import statistics
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from esper.exceptions import ConfigurationError

FIRST_CHANGES = (50, 100, 200, 500)
CHANGE_EVERY = 1_000
LONGEST_DOUBLING = 20  # a period of some ten million steps: sampling has stopped
# Of the one percent that observing may take; the rest is for the rules of the diagnosis, and for
# what each step costs.
BUDGET = 0.003
# On short steps a share of the step would be less than one frame of a tiny model costs.
LEAST_SECONDS_PER_STEP = 20e-6
DEEP_FRAMES = 5
# The first sample of activations may load code and fill caches for most of its time, on a GPU for a
# hundred times as long as the next one takes. Until that is known, the period stays below this.
LONGEST_DEEP_AT_FIRST = 400
SHRINK_MARGIN = 1.5  # a shorter period must have this much room, or periods would go to and fro

_WRONG = (
    "sampling must be a number of steps, or (since step, steps between frames, steps between "
    "samples of activations) in order, with at least 1 step; got {!r}"
)


@dataclass(frozen=True, slots=True)
class Periods:
    """In steps: from step ``since`` on, a frame each ``frame`` and activations each ``deep``."""

    since: int
    frame: int
    deep: int


class SamplingPace:
    """The periods of one run.

    Args:
        budget: share of a step that sampling may take in the mean, half for each kind of
            sample; at least ``LEAST_SECONDS_PER_STEP``. 0: the periods do not change.
        frame_every, deep_every: shortest periods, in steps; the second one is rounded up to a
            multiple of the first.
        fixed: periods that are used as they are, such as those that another run recorded.

    Raises:
        ConfigurationError: ``fixed`` is empty, or not in order, or has a period below 1.
    """

    def __init__(
        self,
        *,
        budget: float = BUDGET,
        frame_every: int = 10,
        deep_every: int = 50,
        fixed: Sequence[Periods] | None = None,
    ) -> None:
        self._budget = budget
        self._frame_every = max(1, frame_every)
        self._deep_every = self._frame_every * max(1, math.ceil(deep_every / self._frame_every))
        self._is_fixed = fixed is not None
        first = Periods(0, self._frame_every, self._deep_every)
        self._recorded = [first] if fixed is None else list(_checked(fixed))
        self._next_change = FIRST_CHANGES[0]
        self._frame_costs: deque[float] = deque(maxlen=7)
        self._deep_costs: deque[float] = deque(maxlen=7)

    @property
    def recorded(self) -> tuple[Periods, ...]:
        """All periods so far, oldest first."""
        return tuple(self._recorded)

    def resume(self, recorded: Sequence[Periods]) -> None:
        """Goes on with the periods of a checkpoint, unless a person fixed them."""
        if not self._is_fixed:
            self._recorded = list(recorded)

    def begin(self, step: int) -> None:
        """This is the first step that the process makes."""
        self._next_change = _next_change(step - 1)

    def at(self, step: int) -> Periods:
        """The periods in force at this step."""
        return next((p for p in reversed(self._recorded) if p.since <= step), self._recorded[0])

    def next_frame(self, step: int) -> int:
        """The first step after ``step`` at which a frame is due."""
        period = self.at(step).frame
        return (step // period + 1) * period

    def is_deep(self, step: int, last_deep: int) -> bool:
        """A multiple of the deep period lies after ``last_deep``, and not after ``step``."""
        period = self.at(step).deep
        return step // period > last_deep // period

    def add_frame(self, seconds: float) -> None:
        """What a frame cost, without what only a deep one reads."""
        self._frame_costs.append(seconds)

    def add_deep(self, seconds: float) -> None:
        """What reading activations, ranks and moments cost."""
        self._deep_costs.append(seconds)

    def adapt(self, step: int, step_seconds: float) -> bool:
        """At a step with a frame; True if other periods apply from here on.

        Args:
            step_seconds: a typical step without sampling.
        """
        if self._is_fixed or step < self._next_change:
            return False
        self._next_change = _next_change(step)
        if self._budget <= 0 or not self._frame_costs or not step_seconds > 0:
            return False
        now = self.at(step)
        allowed = max(self._budget * step_seconds, LEAST_SECONDS_PER_STEP) / 2
        frame = period_for(typical(self._frame_costs) / allowed, self._frame_every, now.frame)
        deep = now.deep
        if self._deep_costs:
            needed = typical(self._deep_costs) / allowed
            if len(self._deep_costs) == 1:
                needed = min(needed, LONGEST_DEEP_AT_FIRST)
            deep = period_for(needed, self._deep_every, now.deep)
        while deep % frame:  # activations are read at a step with a frame
            deep *= 2
        if (frame, deep) == (now.frame, now.deep):
            return False
        self._recorded.append(Periods(step, frame, deep))
        return True


def periods_of(sampling: int | Iterable[Sequence[int]] | None) -> tuple[Periods, ...] | None:
    """What a person fixed: None for nothing.

    Args:
        sampling: steps between frames, with activations in each fifth; or what another session
            recorded, (since step, steps between frames, steps between samples of activations).

    Raises:
        ConfigurationError: it is neither.
    """
    if sampling is None:
        return None
    if isinstance(sampling, int):
        return _checked((Periods(0, sampling, DEEP_FRAMES * sampling),))
    try:
        return _checked(tuple(Periods(*map(operator.index, entry)) for entry in sampling))
    except TypeError:
        raise ConfigurationError(_WRONG.format(sampling)) from None


def _next_change(step: int) -> int:
    """The first fixed step after this one."""
    later = (step // CHANGE_EVERY + 1) * CHANGE_EVERY
    return next((change for change in FIRST_CHANGES if change > step), later)


def period_for(needed: float, shortest: int, present: int) -> int:
    """The shortest period times a power of two that is at least ``needed`` steps."""
    chosen = _doubled(shortest, needed)
    return chosen if chosen >= present else min(present, _doubled(shortest, SHRINK_MARGIN * needed))


def _doubled(shortest: int, needed: float) -> int:
    doubling = math.ceil(math.log2(max(1.0, needed / shortest)))
    return int(shortest * 2 ** min(doubling, LONGEST_DOUBLING))


def typical(costs: Iterable[float]) -> float:
    """The median; of one or two costs the smaller, because the first calls fill caches."""
    found = sorted(costs)
    return found[0] if len(found) < 3 else statistics.median(found)


def _checked(periods: Sequence[Periods]) -> tuple[Periods, ...]:
    steps = [p.since for p in periods]
    if not periods or steps != sorted(steps) or any(min(p.frame, p.deep) < 1 for p in periods):
        raise ConfigurationError(_WRONG.format([*periods]))
    return tuple(periods)
