from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from esper.contracts import Severity
from esper.diagnosis.base import Evidence, Memory, RemedySlug, Rule, Threshold
from esper.diagnosis.observation import Observation, Unknown

WINDOW = 50
LEARNED = 0.6
BACK, STILL = 0.7, 0.3
FALLS = 0.9
NOISE = 4.0
OTHER_INPUTS, READ = 1.2, 3
INPUTS = 200  # kept, the newest
OTHER_ADVICE = (
    "The inputs are larger or smaller than before: if that is not meant, look at what the script "
    "does to them."
)


class FellBack(Rule):
    """The run had learned, and its loss is again near where it began."""

    slug = "fell_back"
    title = "The loss rose again"
    symptom = "The training loss had fallen by 40 %, and has been back near its first level since."
    thresholds = (
        Threshold("lowest loss / first loss, at most", LEARNED, "ratio", "chosen"),
        Threshold("loss given back / loss gained", BACK, "share", "chosen"),
        Threshold("steps at that level", WINDOW, "steps", "chosen: a spike is over before"),
        Threshold(
            "second half of these / first half", FALLS, "ratio", "below it the run learns again"
        ),
        Threshold(
            "loss gained / deviation between steps", NOISE, "ratio",
            "chosen: a smaller gain is noise",
        ),
        Threshold("loss given back, to resolve", STILL, "share", "chosen"),
        Threshold(
            "size of the model's input / that of then", OTHER_INPUTS, "ratio",
            "chosen: further away, the data are others, and no earlier weights know them",
        ),
    )  # fmt: skip
    severity = Severity.SERIOUS
    false_alarm = "A next stage with harder data or another loss, which the run cannot lower yet."
    advice = (
        "Return to a checkpoint from before the loss rose, with a lower learning rate; if the data "
        "or the loss changed there, that is the cause."
    )
    remedies = (RemedySlug.REWIND, RemedySlug.SET_LR, RemedySlug.TELL)
    closes_after = 1
    explained_by = frozenset({"non_finite", "rate_jump"})

    def check(self, observation: Observation, memory: Memory) -> Evidence | None:
        if observation.optimizers > 1:
            raise Unknown("one loss does not say what several optimizers have learned")
        inputs = _note_input(observation, memory)
        steps, losses = observation.finite_losses()
        if len(losses) < 3 * WINDOW:
            raise Unknown("too few losses")
        first = memory.notes.setdefault("first", observation.first_training_loss)
        # What was learned on other data says nothing about the loss on these.
        same = steps > observation.other_data_since
        steps, losses = steps[same], losses[same]
        if len(losses) < 3 * WINDOW:
            return None
        best, best_step = _best(steps, losses)
        if first <= 0 or best > LEARNED * first:
            return None
        recent = losses[-WINDOW:]
        level, gain = float(np.median(recent)), first - best
        if level < best + (STILL if memory.is_open else BACK) * gain:
            return None
        before, after = np.median(recent[: WINDOW // 2]), np.median(recent[WINDOW // 2 :])
        if gain < NOISE * float(np.std(recent)) or self._held_out_stays(observation, best_step):
            return None
        if after < best + FALLS * (before - best):
            return None
        other = _other_inputs(inputs, best_step)
        newest = max(inputs, default=observation.step)
        return Evidence(
            observed=f"{other}the loss fell from {first:.4g} to {best:.4g} at step {best_step:,}, "
            f"and has been {level:.4g} for {WINDOW:,} steps",
            limit=f"less than {BACK:.0%} of the gain given back",
            signal="loss",
            value=(level - best) / gain,
            since_step=int(steps[-WINDOW]),
            advice=OTHER_ADVICE if other else "",
            only_tell=bool(other),
            # The next look sees the inputs of now, where it can.
            passes=newest < int(steps[-WINDOW]) and not memory.is_open,
        )

    def _held_out_stays(self, observation: Observation, since: int) -> bool:
        """What was learned is still there, as the held-out loss says."""
        before = [loss for step, loss in observation.held_out if step <= since]
        later = [loss for step, loss in observation.held_out if step > since]
        if not later or len(before) < 2:
            return False
        return later[-1] < min(before) + STILL * (before[0] - min(before))


def _note_input(observation: Observation, memory: Memory) -> dict[int, float]:
    """Step -> root mean square of the model's input."""
    inputs: dict[int, float] = memory.notes.setdefault("inputs", {})
    inputs.update((seen.step, seen.input_rms) for seen in observation.passes if seen.input_rms > 0)
    for old in list(inputs)[:-INPUTS]:
        del inputs[old]
    return inputs


def _other_inputs(inputs: dict[int, float], until: int) -> str:
    """A clause where the newest inputs are larger or smaller than those of then."""
    then = [rms for step, rms in inputs.items() if step <= until]
    now = [rms for step, rms in inputs.items() if step > until]
    if not then or not now:
        return ""
    before, after = float(np.median(then[-READ:])), float(np.median(now[-READ:]))
    if 1 / OTHER_INPUTS < after / before < OTHER_INPUTS:
        return ""
    return f"the inputs had a size of {before:.3g} and have {after:.3g} now; "


def _best(steps: NDArray[np.int64], losses: NDArray[np.float64]) -> tuple[float, int]:
    """(median, last step) of the best window."""
    count = len(losses) // WINDOW
    windows = losses[len(losses) - count * WINDOW :].reshape(count, WINDOW)
    medians = np.median(windows, axis=1)
    place = int(np.argmin(medians))
    return float(medians[place]), int(steps[len(losses) - (count - 1 - place) * WINDOW - 1])
