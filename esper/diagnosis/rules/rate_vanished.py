from __future__ import annotations

import math

from esper.contracts import Severity
from esper.diagnosis.base import Evidence, Memory, RemedySlug, Rule, Threshold
from esper.diagnosis.observation import Observation, Unknown

VANISHED = 1e-4
STAYED = 0.25
FEWEST = 50
STILL = 1e-6
UNLEARNED = 0.9


class RateVanished(Rule):
    """The schedule has brought the learning rate to nothing, long before the run ends."""

    slug = "rate_vanished"
    title = "The learning rate has vanished"
    symptom = (
        "The learning rate is next to zero for a quarter of the run, the weights stand still, and "
        "the run goes on."
    )
    thresholds = (
        Threshold("rate / highest rate so far", VANISHED, "ratio", "chosen: schedules end there"),
        Threshold("so long, of the run's steps", STAYED, "share", "chosen: cosines end in 0.01"),
        Threshold("and at least", FEWEST, "steps", "chosen"),
        Threshold("update / weight", STILL, "ratio", "chosen: nothing is learned with it"),
        Threshold("loss / first loss, else it is info", UNLEARNED, "ratio", "chosen"),
    )
    severity = Severity.CAUTION
    false_alarm = "A run that has converged, and whose scheduler has lowered the rate for it."
    advice = (
        "Look at the schedule: scheduler.step() may be called once a batch where it counts epochs, "
        "or the number of steps that it was given is too small."
    )
    remedies = (RemedySlug.HOLD_LR, RemedySlug.TELL)

    def check(self, observation: Observation, memory: Memory) -> Evidence | None:
        rates = [(step, rate) for step, rate in observation.rates if math.isfinite(rate)]
        highest = max((rate for _, rate in rates), default=0.0)
        if not highest > 0:
            raise Unknown("no learning rate was read")
        if rates[-1][1] > VANISHED * highest:
            return None
        high = max(step for step, rate in rates if rate > VANISHED * highest)
        since = min(step for step, _ in rates if step > high)
        if observation.step - since < max(FEWEST, STAYED * observation.step):
            return None
        changes = [reading.change for reading in observation.gradients if reading.step > since]
        if not changes or math.isnan(changes[-1]):
            raise Unknown("no update was measured since")
        if max(changes) > STILL:
            return None  # whatever the groups say: a remedy holds the rate
        share = observation.learned_share
        return Evidence(
            observed=f"the learning rate was {highest:.3g}, and since step {since:,} it is at most "
            f"{VANISHED * highest:.1g}",
            limit=f"a rate above {VANISHED:g} of the highest while the run goes on",
            signal="highest_rate",
            value=highest,
            since_step=since,
            severity=None if share >= UNLEARNED else Severity.INFO,
        )
