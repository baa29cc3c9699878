from __future__ import annotations

import math
from statistics import median

import numpy as np

from esper.contracts import Severity, ViolationRule
from esper.diagnosis.base import Evidence, Memory, RemedySlug, Rule, Threshold
from esper.diagnosis.observation import Observation
from esper.grafting.guard import LossGuard

HARM, FAR = 0.3, 10.0
BEGIN = 20
BEFORE, OFTEN = 60, 3
HEIGHT = 2.0
FALLS, LEVEL = 0.9, 10


class LossSpike(Rule):
    """The loss jumps far above its own recent level, and stays there for three steps."""

    slug = "loss_spike"
    title = "The loss jumped up"
    symptom = "The loss is far above its level of the last 20 steps, three times in a row."
    thresholds = (
        Threshold("loss / mean of the last 20", 3.0, "ratio", "the guard of esper.grafting"),
        Threshold("distance from that mean", 6.0, "standard deviations", "the same"),
        Threshold(
            f"losses as high in the {BEFORE} before", OFTEN, "losses, below it",
            "chosen: batches of one sample have such losses often",
        ),
        Threshold(
            "loss / first loss", HARM, "ratio",
            "chosen: below it, it is info; single batches of a run that has learned are as high",
        ),
        Threshold(
            "of a loss that begins on both sides of zero / the largest so far", FAR, "ratio",
            "chosen: of policy gradients and penalties that begin at zero; below it, it is info",
        ),
        Threshold(
            "loss / largest of the first 20", HEIGHT, "ratio",
            "chosen: below it, it may pass, as where the targets or the data have changed",
        ),
        Threshold(
            f"median of {LEVEL} losses / of the {LEVEL} before", FALLS, "ratio",
            "as for update_ratio_high: below it the run learns again by itself",
        ),
    )  # fmt: skip
    severity = Severity.CRITICAL
    false_alarm = "New data that is much harder, such as the next stage of a curriculum."
    advice = (
        "Look at the learning rate and at the batches before the jump; if the loss does not come "
        "back, return to a checkpoint before it."
    )
    remedies = (RemedySlug.CLIP_LAYER, RemedySlug.SET_LR, RemedySlug.REWIND)
    violation = ViolationRule.LOSS_BLOW_UP
    every_step = True
    closes_after = 1
    explained_by = frozenset({"non_finite", "rate_jump"})

    def check(self, observation: Observation, memory: Memory) -> Evidence | None:
        if memory.notes.setdefault("rewinds", observation.rewinds) != observation.rewinds:
            memory.notes.update(rewinds=observation.rewinds, guard=LossGuard())
        if memory.notes.get("other_data", -1) != observation.other_data_since:
            # The new level is the usual one from now on.
            memory.notes.update(other_data=observation.other_data_since, guard=LossGuard())
            memory.notes.pop("at", None)
        guard: LossGuard = memory.notes.setdefault("guard", LossGuard())
        for step, loss in observation.losses_after(memory.notes.get("step", -1)):
            memory.notes["step"] = step
            if not math.isfinite(loss):
                continue
            if len(begin := memory.notes.setdefault("begin", [])) < BEGIN:
                begin.append(loss)
            verdict = guard.observe(loss)
            if verdict is not None and not _is_usual(observation, step - 2, verdict.limit):
                memory.notes.update(text=verdict.text, limit=verdict.limit, since=step - 2, at=step)
            elif "at" in memory.notes and loss <= memory.notes["limit"]:
                memory.notes.pop("at")
        if "at" not in memory.notes:
            return None
        return Evidence(
            observed=memory.notes["text"],
            limit=f"{memory.notes['limit']:.4g}",
            signal="loss",
            value=observation.loss,
            since_step=memory.notes["since"],
            severity=None if _does_harm(observation, memory) else Severity.INFO,
            # Targets that are computed with a copy of the model change with each new copy, and
            # the next stage of a curriculum is harder: the run learns them within some steps.
            may_pass=0 < observation.loss < HEIGHT * max(memory.notes["begin"]),
            passes=_falls_again(observation, memory.notes["since"]),
        )


def _is_usual(observation: Observation, since: int, limit: float) -> bool:
    """Losses as high came before too, among lower ones.

    Those of single samples are far apart once a run has learned.
    """
    high = observation.losses[observation.loss_steps < since][-BEFORE:] > limit
    return not high.all() and int(high[int(np.argmin(high)) :].sum()) >= OFTEN


def _falls_again(observation: Observation, since: int) -> bool:
    """The run learns what it met there: at a rate that is too high the loss would stay."""
    after = observation.losses[observation.loss_steps >= since][-2 * LEVEL :]
    if len(after) < LEVEL:
        return False
    before, now = np.array_split(after, 2)
    return bool(np.median(now) < FALLS * np.median(before))


def _does_harm(observation: Observation, memory: Memory) -> bool:
    """The loss is not a small share of what it was before anything was learned."""
    loss, begin = observation.loss, memory.notes["begin"]
    before = observation.losses[observation.loss_steps < memory.notes["since"]]
    before = before[np.isfinite(before)]
    if not len(before) or min(before.min(), *begin) > 0:
        return not 0 < loss < HARM * median(begin)
    # A loss that may be below zero is no ratio of its level, which may be next to zero.
    if min(begin) > 0 or max(begin) < 0:
        return loss > float(max(begin))
    # How large such a loss is usually shows later than it begins.
    return len(before) >= BEFORE and loss > FAR * float(np.abs(before).max())
