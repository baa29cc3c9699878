from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from esper.contracts import Severity, Signal
from esper.diagnosis.base import Evidence, Memory, RemedySlug, Rule, Threshold, amount, of_size
from esper.diagnosis.facts import Gradients, ModelPass
from esper.diagnosis.observation import Observation, Unknown
from esper.diagnosis.updates import EXCESSIVE, STEADY

FIRST = 0.3
FIRST_STEPS = 10
HIGH = 0.2
STILL = 0.1
LEARNS = 0.1
ROSE, ROSE_FAR = 1.5, 10.0
GUESSING, ABOVE, FAR_ABOVE = 1.01, 1.1, 1.5
GUESSES, SAMPLES, LONG, READ = 40, 320, 300, 3
LEARNED = 0.9
ABOVE_SOUND = 3.0
LEVEL = 10
DIFFERENT, SHRANK, BEGIN = 0.01, 10.0, 50


class UpdateRatioHigh(Rule):
    """Each update changes a large part of the weights, so the run forgets what it has learned."""

    slug = "update_ratio_high"
    title = "Updates are too large"
    symptom = "In half of the layers, an update is more than 20 % of the weight."
    thresholds = (
        Threshold("median of update / weight", HIGH, "ratio", "1e-3 is usual; chosen on 0 to 9"),
        Threshold("the same in one of the first updates", FIRST, "ratio", "chosen on seeds 0 to 9"),
        Threshold("to resolve", STILL, "ratio", "chosen"),
        Threshold(
            "loss after it / before it", ROSE, "ratio",
            "chosen: where it does not rise, the weights had to go so far, as small ones often",
        ),
        Threshold(
            "the same of a model with one matrix", ROSE_FAR, "ratio",
            "chosen: it has no units that can die, so it comes back from anywhere",
        ),
        Threshold("fall of the loss between ten losses and the next", LEARNS, "share", "chosen"),
        Threshold(
            "the same while the loss is above that of guessing", ABOVE_SOUND * STEADY, "ratio",
            "healthy runs of seeds 0 to 9 have less than 0.005 from step 10 on",
        ),
        Threshold(
            "mean loss / that of guessing", GUESSING, "ratio",
            "chosen on 0 to 9; one that learns nothing at a sound rate has 1.00",
        ),
        Threshold(
            "the same, as info until it has lasted", ABOVE, "ratio",
            "of 209 nets drawn at random, those that learn by themselves later have less",
        ),
        Threshold("steps of that", LONG, "steps", "the latest of these nets learned at step 272"),
        Threshold("the same, at most", FAR_ABOVE, "ratio", "chosen: above, other rules explain"),
        Threshold("the same of a run that has learned", LEARNED, "ratio", "chosen"),
        Threshold(
            "samples in these losses", SAMPLES, "samples",
            "chosen: the losses of single samples are far apart, and their mean falls slowly",
        ),
        Threshold(
            "the largest update / a sound one, where the loss is above the first losses",
            EXCESSIVE, "ratio", "as for a new start; chosen on seeds 0 to 9",
        ),
        Threshold(
            "spread of the outputs after such an update", DIFFERENT, "share of their size",
            "chosen: 0.001 to 0.008 where it took the inputs' part away, 0.8 to 1.6 in runs that "
            "learn",
        ),
        Threshold("spread of the first outputs / that", SHRANK, "ratio", "chosen"),
        Threshold("from step", BEGIN, "steps", "chosen: healthy runs differ again by then"),
        Threshold("losses", GUESSES, "steps", "chosen: so many updates show in any healthy run"),
    )  # fmt: skip
    severity = Severity.SERIOUS
    false_alarm = "The first steps of an adapter that starts at zero."
    advice = "Lower the learning rate, by a factor of ten first."
    remedies = (RemedySlug.SET_LR, RemedySlug.REWIND)
    opens_after = 2
    explained_by = frozenset({"non_finite", "rate_jump", "weight_decay_high"})

    def check(self, observation: Observation, memory: Memory) -> Evidence | None:
        if observation.searches:
            raise Unknown("the optimizer finds the size of its updates by itself")
        if observation.step <= FIRST_STEPS:
            return self._first_updates(observation, memory)
        return (
            self._guesses(observation)
            or self._forgot_inputs(observation)
            or self._steady(observation, memory)
        )

    def _guesses(self, observation: Observation) -> Evidence | None:
        """Nothing was learned, and the updates are larger than those of runs that learn."""
        seen = observation.first_pass
        chance = seen.guessing_loss
        if math.isnan(chance):
            return None
        losses = observation.finite_losses()[1]
        rows = math.prod(seen.output_shape[:-1])
        count = max(GUESSES, math.ceil(SAMPLES / max(1, rows)))
        level = float(np.mean(losses[-count:]))
        read = [r for r in observation.gradients if not math.isnan(r.change)]
        newer = sum(r.step > observation.step - count for r in read)
        # On long steps few are read in so many, so the latest ones count.
        known = [r.change for r in read[-max(READ, newer) :]]
        if len(losses) < count or len(known) < READ:
            return None
        hurt = _was_hurt(observation, losses[-count:])
        if _has_learned(losses, chance) and not hurt:
            return None
        lowest = (LEARNED if hurt else GUESSING) * chance
        if not lowest <= level <= FAR_ABOVE * chance:
            return None  # it guesses or learns, or it is far above, which other rules explain
        if _falls(losses[-count:], lowest):
            return None  # it comes from a bad start, and gets better
        if hurt:
            return self._after(observation, level, count)
        change = float(np.median(known))
        if change < ABOVE_SOUND * STEADY:
            return None
        is_high = level >= ABOVE * chance or observation.step >= LONG
        if not is_high and change >= HIGH:
            return None  # the updates say enough by themselves
        return Evidence(
            observed=f"the loss has been {level:.3g} for {count} steps, that of guessing is "
            f"{chance:.3g}, and an update moves the weights by {of_size(change)}",
            limit=f"below {ABOVE_SOUND * STEADY:g} until something is learned",
            signal=Signal.UPDATE_RATIO,
            value=change,
            severity=Severity.CAUTION if is_high else Severity.INFO,
            since_step=max(1, observation.step - count),
            certain=True,
        )

    def _after(self, observation: Observation, level: float, count: int) -> Evidence:
        """An update was far too large; later ones may be small, where the gradient is faint."""
        return Evidence(
            observed=f"the loss has been {level:.3g} for {count} steps, it began with "
            f"{observation.first_training_loss:.3g}, and an update was "
            f"{observation.update_excess:.2g} times as large as a sound one",
            limit=f"at most {EXCESSIVE:g} times as large",
            signal=Signal.UPDATE_RATIO,
            value=observation.update_excess * STEADY,
            severity=Severity.CAUTION,
            since_step=max(1, observation.step - count),
            certain=True,
        )

    def _forgot_inputs(self, observation: Observation) -> Evidence | None:
        """It answers the same to all inputs since an update that was far too large.

        A loss below that of equal chances may be that of the classes' frequencies alone.
        """
        if not observation.update_excess > EXCESSIVE or not observation.passes:
            return None
        first, seen = observation.first_pass, observation.last_pass
        spread = seen.output_spread
        # The outputs of a regression, whose guessing loss is not known, may lie far from zero.
        if seen.step < BEGIN or math.isnan(first.guessing_loss) or not spread < DIFFERENT:
            return None
        if not first.output_spread > SHRANK * spread or not _inputs_differ(seen):
            return None
        losses = observation.finite_losses()[1][-2 * LEVEL :]
        if len(losses) < 2 * LEVEL or _falls(losses, -math.inf):
            return None
        if np.mean(losses) >= GUESSING * first.guessing_loss:
            return None  # which says enough by itself
        return Evidence(
            observed=f"the outputs of a batch differ by {spread:.1e} of their size, at first by "
            f"{first.output_spread:.2g}, and an update was {observation.update_excess:.2g} times "
            "as large as a sound one",
            limit=f"at least {DIFFERENT:g}",
            signal=Signal.UPDATE_RATIO,
            value=observation.update_excess * STEADY,
            severity=Severity.CAUTION,
            since_step=1,
            certain=True,
        )

    def _steady(self, observation: Observation, memory: Memory) -> Evidence | None:
        step, median = observation.update_ratios[-1]
        if memory.notes.get("step") == step:
            raise Unknown("no newer update was measured")
        memory.notes["step"] = step
        if median < (STILL if memory.is_open else HIGH) or self._learns(observation):
            return None
        return Evidence(
            observed=f"the median update is {amount(median)} of its weight at step {step:,}",
            limit=f"below {HIGH:g}; about 0.001 is usual",
            signal=Signal.UPDATE_RATIO,
            value=median,
            began_at=_most_moved(observation.gradients[-1]) if observation.gradients else "",
            passes=_recovers(observation),
        )

    def _learns(self, observation: Observation) -> bool:
        """The loss falls still, or has fallen to next to nothing, with updates of this size."""
        losses = observation.finite_losses()[1][-2 * LEVEL :]
        if len(losses) < 2 * LEVEL:
            return False
        before, now = float(np.median(losses[:LEVEL])), float(np.median(losses[LEVEL:]))
        first = observation.first_training_loss
        return now < before - LEARNS * abs(before) or 0 <= now < LEARNS * first

    def _first_updates(self, observation: Observation, memory: Memory) -> Evidence | None:
        """No health frame covers the first update, which has no past to average over."""
        reading = observation.last_gradients
        if math.isnan(reading.change):
            raise Unknown("how far the update moved the weights was not measured")
        change = reading.change / observation.overshoot  # that of the updates to come
        if change < (STILL if memory.is_open else FIRST):
            return None
        most = ROSE if observation.trainable_matrices > 1 else ROSE_FAR
        first = memory.notes.setdefault("first", reading.step)
        if not memory.is_open and observation.loss_change_after(first) < most - 1.0:
            return None
        return Evidence(
            observed=f"the update of step {reading.step} moved the weights by "
            f"{of_size(reading.change)} in the median",
            limit=f"below {FIRST:g}; about 0.001 is usual",
            signal=Signal.UPDATE_RATIO,
            value=reading.change,
            began_at=_most_moved(reading),
            certain=True,
            # Behind a batch norm the size of the weights has no effect: a far step makes them
            # larger, and each later update is a smaller share of them.
            severity=Severity.INFO if observation.batch_norms else None,
        )


def _inputs_differ(seen: ModelPass) -> bool:
    """Of the first layer that has numbers as inputs: behind an embedding, where it has tokens."""
    spreads = (one.input_spread for one in seen.layers)
    return next((spread for spread in spreads if not math.isnan(spread)), math.nan) > DIFFERENT


def _recovers(observation: Observation) -> bool:
    """The loss of a net with batch norm comes down again by itself."""
    losses = observation.finite_losses()[1][-2 * LEVEL :]
    if not observation.batch_norms or len(losses) < LEVEL:
        return False
    before, now = np.array_split(losses, 2)
    return bool(np.median(now) < (1.0 - LEARNS) * np.median(before))


def _falls(losses: NDArray[np.float64], guessing: float) -> bool:
    """The later half of the losses reaches that of guessing, or is lower than chance explains.

    A narrow net at a sound rate begins above guessing and leaves it slowly; where the rate is too
    high, the losses stay where they are.
    """
    before, now = np.array_split(losses, 2)
    error = math.sqrt(before.var() / len(before) + now.var() / len(now))
    return bool(now.mean() < max(guessing, before.mean() - error))


def _was_hurt(observation: Observation, newest: NDArray[np.float64]) -> bool:
    """An update was far too large, and the losses are above the first ones by more than chance."""
    if not observation.update_excess > EXCESSIVE or observation.other_data_since >= 0:
        return False
    error = float(newest.std()) / math.sqrt(len(newest))
    return bool(newest.mean() > observation.first_training_loss + error)


def _has_learned(losses: NDArray[np.float64], chance: float) -> bool:
    """Forty losses in a row were well below that of guessing; other data may have come since."""
    whole = losses[: len(losses) // GUESSES * GUESSES].reshape(-1, GUESSES)
    return float(whole.mean(1).min()) < LEARNED * chance


def _most_moved(reading: Gradients) -> str:
    """Name of a layer; empty where it is not known."""
    known = [row for row in reading.rows if not math.isnan(row.change)]
    worst = max(known, key=lambda row: row.change, default=None)
    return "" if worst is None else worst.name.rpartition(".")[0]
