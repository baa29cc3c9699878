"""When the held-out loss is measured: counted in training steps, so that a run can be repeated.

It is due at each multiple of the period. The period follows what an evaluation was measured to
cost, but it changes only after fixed evaluations (the 1st, 2nd, 4th, and each further 4th), and
only by powers of two, so that two runs on one machine usually choose the same. What was chosen is
recorded, and can be given to another run, which then evaluates at the same steps.
"""

from __future__ import annotations

import operator
import statistics
from collections import deque
from collections.abc import Iterable, Sequence

from esper.exceptions import ConfigurationError
from esper.health.pace import period_for

SHARE = 0.02  # of the run's time that evaluations may take
SHORTEST = 100  # steps
FIRST_CHANGES, CHANGE_EVERY = (1, 2), 4  # evaluations
REMEMBERED = 7  # evaluations whose cost counts

Recorded = tuple[tuple[int, int], ...]  # (since step, steps between evaluations), oldest first

_WRONG = (
    "evaluate_every must be a number of steps, or (since step, steps between evaluations) in "
    "order, with at least 1 step; got {!r}"
)


class EvaluationPace:
    """The period of one run.

    Args:
        fixed: periods that are used as they are, such as those that another run recorded.
    """

    def __init__(self, fixed: Recorded | None = None) -> None:
        self._is_fixed = fixed is not None
        self._recorded: list[tuple[int, int]] = list(fixed or ((0, SHORTEST),))
        self._needed: deque[float] = deque(maxlen=REMEMBERED)
        self._count = 0

    @property
    def recorded(self) -> Recorded:
        """All periods so far, oldest first."""
        return tuple(self._recorded)

    def resume(self, recorded: Recorded) -> None:
        """Goes on with the periods of a checkpoint, unless a person fixed them."""
        if not self._is_fixed:
            self._recorded = list(recorded)

    def after(self, step: int) -> int:
        """The first step after ``step`` at which an evaluation is due."""
        period = self._at(step)
        return (step // period + 1) * period

    def add(self, step: int, seconds: float, step_seconds: float) -> None:
        """An evaluation was made.

        Args:
            seconds: what it took.
            step_seconds: a typical step without evaluations.
        """
        self._count += 1
        if step_seconds > 0:
            self._needed.append(seconds / (SHARE * step_seconds))
        changes = self._count in FIRST_CHANGES or self._count % CHANGE_EVERY == 0
        if self._is_fixed or not changes or not self._needed:
            return
        present = self._at(step)
        period = period_for(_typical(list(self._needed)), SHORTEST, present)
        if period != present:
            self._recorded.append((step, period))

    def _at(self, step: int) -> int:
        found = (every for since, every in reversed(self._recorded) if since <= step)
        return next(found, self._recorded[0][1])


def pace_of(evaluate_every: int | Iterable[Sequence[int]] | None) -> Recorded | None:
    """What a person fixed; None for nothing.

    Raises:
        ConfigurationError: it is neither a number of steps nor what a session recorded.
    """
    if evaluate_every is None:
        return None
    if isinstance(evaluate_every, int):
        evaluate_every = ((0, evaluate_every),)
    try:
        fixed = [(operator.index(since), operator.index(every)) for since, every in evaluate_every]
    except (TypeError, ValueError):
        raise ConfigurationError(_WRONG.format(evaluate_every)) from None
    steps = [since for since, _ in fixed]
    if not fixed or steps != sorted(steps) or any(every < 1 for _, every in fixed):
        raise ConfigurationError(_WRONG.format(fixed))
    return tuple(fixed)


def _typical(needed: Sequence[float]) -> float:
    """The median; of one or two the latest, because the first call may load code."""
    return needed[-1] if len(needed) < 3 else statistics.median(needed)
