"""What the training losses of a run say about a fault and its remedies."""

from __future__ import annotations

import math
import statistics

from esper.sdk.run_state import RunState

LEVEL_LOSSES = 20
COMPARED_LOSSES = 50  # before a fault
FEWEST_LOSSES = 10  # before a fault, to say something about them
RISE = 1.5  # times the usual loss: it has jumped
GROWTH = 2.0  # times the first loss
LEARNED = 0.5  # of the first loss
UNLEARNED = 0.95  # of the first losses: above it nothing was learned, as for update_ratio_low
ERRORS = 2.0  # standard errors of the difference of two levels: it is no noise
LESS = 0.8  # of the first losses: below it something was learned


def level(run: RunState, count: int = LEVEL_LOSSES) -> float:
    """Median of the newest losses; infinite where most of them are not finite."""
    newest = [loss for _, loss in list(run.losses)[-count:]]
    known = sorted(loss if math.isfinite(loss) else math.inf for loss in newest)
    return known[len(known) // 2] if known else math.nan


def error(run: RunState, until: int) -> float:
    """Standard error of the difference of two levels: of now, and up to step ``until``."""
    finite = [(step, loss) for step, loss in run.losses if math.isfinite(loss)]
    earlier = [loss for step, loss in finite if step <= until][-LEVEL_LOSSES:]
    newest = [loss for step, loss in finite if step > until][-LEVEL_LOSSES:]
    known = [part for part in (earlier, newest) if len(part) >= FEWEST_LOSSES]
    return math.sqrt(sum(statistics.variance(part) / len(part) for part in known))


def fell_since(run: RunState, at: int) -> bool:
    """The newest losses are below those up to step ``at``, by more than noise."""
    before = [loss for step, loss in run.losses if step <= at][-LEVEL_LOSSES:]
    if len(before) < FEWEST_LOSSES:
        return False
    return level(run) < statistics.median(before) - ERRORS * error(run, at)


def jumped(run: RunState, at: int) -> bool:
    """The loss was much higher from step ``at`` on than before."""
    before = [loss for step, loss in run.losses if step < at][-COMPARED_LOSSES:]
    after = [loss for step, loss in run.losses if step >= at]
    if len(before) < FEWEST_LOSSES or not after:
        return False
    return not statistics.median(after) <= RISE * abs(statistics.median(before))


def were_usual_until(run: RunState, at: int) -> bool:
    """The loss was at its usual level until step ``at``."""
    before = [loss for step, loss in run.losses if step < at]
    recent = [loss for loss in before[-LEVEL_LOSSES:] if math.isfinite(loss)]
    return len(recent) >= FEWEST_LOSSES and recent[-1] <= RISE * abs(statistics.median(recent))


def have_grown(run: RunState) -> bool:
    """The newest loss is far above the first one, or not finite."""
    losses = [loss for _, loss in run.losses]
    return bool(losses) and not losses[-1] <= GROWTH * abs(losses[0])


def have_fallen(run: RunState, guessing: float) -> bool:
    """Ten in a row were below half of the first, whatever came after.

    Args:
        guessing: the loss of equal chances; NaN unknown. See :func:`_begin`.
    """
    values = [loss for _, loss in run.losses_of_its_weights() if math.isfinite(loss)]
    places = range(0, len(values) - FEWEST_LOSSES + 1, FEWEST_LOSSES // 2)
    levels = [statistics.median(values[at : at + FEWEST_LOSSES]) for at in places]
    return bool(levels) and min(levels) < LEARNED * _begin(values[0], guessing)


def fell(run: RunState, since: int, guessing: float) -> bool:
    """The newest losses are well below the first ones after step ``since``."""
    values = [loss for step, loss in run.losses if step > since]
    if len(values) < 2 * LEVEL_LOSSES:
        return False
    return level(run) < LESS * _begin(statistics.median(values[:LEVEL_LOSSES]), guessing)


def never_fell(run: RunState, since: int, guessing: float) -> bool:
    """The newest losses are as high as the first ones after step ``since``."""
    values = [loss for step, loss in run.losses if step > since]
    if len(values) < 2 * LEVEL_LOSSES or not math.isfinite(level(run)):
        return False
    return level(run) >= UNLEARNED * _begin(statistics.median(values[:LEVEL_LOSSES]), guessing)


def _begin(first: float, guessing: float) -> float:
    """From where a fall counts: who comes down to guessing has learned nothing yet."""
    return abs(first) if math.isnan(guessing) else min(abs(first), guessing)
