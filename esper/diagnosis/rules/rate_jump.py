from __future__ import annotations

import math

import numpy as np

from esper.contracts import Severity, ViolationRule
from esper.diagnosis.base import Evidence, Memory, RemedySlug, Rule, Threshold
from esper.diagnosis.observation import Observation, Unknown

JUMP = 3.0
RISE = 1.3
BACK = 1.1
NOISE = 4.0
LEARNED = 0.7
FORGOTTEN = 1_000
FORGOTTEN_OPEN = 10_000
LEVEL_LOSSES, FEWEST_LOSSES = 50, 20
NEWEST_LOSSES = 5


class RateJump(Rule):
    """The learning rate jumped to more than the run has ever had, and the loss went up with it."""

    slug = "rate_jump"
    title = "The learning rate jumped"
    symptom = "The learning rate rose at once above its highest value so far, and the loss rose."
    thresholds = (
        Threshold("rate / highest rate before", JUMP, "ratio", "chosen on 0 to 9"),
        Threshold("loss / level before the jump", RISE, "ratio", "chosen on 0 to 9"),
        Threshold("rise of the loss", NOISE, "standard deviations", "chosen on 0 to 9"),
        Threshold(
            "level before the jump / loss of guessing",
            LEARNED,
            "ratio",
            "chosen: what was learned is lost where the loss is above that of guessing",
        ),
        Threshold("loss / level, to resolve", BACK, "ratio", "chosen"),
        Threshold("a jump so long ago opens nothing", FORGOTTEN, "steps", "chosen"),
        Threshold("after these the new level is the usual one", FORGOTTEN_OPEN, "steps", "chosen"),
    )
    severity = Severity.CRITICAL
    false_alarm = "A second stage of training that is meant to start from a higher loss."
    advice = "Look at the schedule: return to a state before the jump, with the rate of before."
    remedies = (RemedySlug.REWIND, RemedySlug.SET_LR)
    violation = ViolationRule.LOSS_BLOW_UP
    every_step = True
    closes_after = 1

    def check(self, observation: Observation, memory: Memory) -> Evidence | None:
        self._look_for_a_jump(observation, memory)
        jump = memory.notes.get("jump")
        if jump is None:
            return None
        loss = float(np.median(observation.finite_losses()[1][-NEWEST_LOSSES:]))
        level, spread = jump["level"], jump["spread"]
        ratio = BACK if memory.is_open else RISE
        limit = level + max(NOISE * spread, (ratio - 1.0) * abs(level))
        if not memory.is_open:
            limit = min(limit, _lost(observation, level))
        # A person may need minutes to answer, in which a small model makes thousands of steps.
        patience = FORGOTTEN_OPEN if memory.is_open else FORGOTTEN
        over = observation.step > jump["seen"] + patience
        if over or (memory.is_open and loss <= limit):
            memory.notes["jump"] = None
            return None
        if not loss > limit:
            return None
        before, after = jump["rates"]
        return Evidence(
            observed=f"the learning rate rose from {before:.3g} to {after:.3g} between steps "
            f"{jump['since'] - 1:,} and {jump['seen']:,}, and the loss from {level:.4g} "
            f"to {loss:.4g}",
            limit=f"a loss of at most {limit:.4g}",
            signal="learning_rate",
            value=after / before,
            since_step=jump["since"],
        )

    def _look_for_a_jump(self, observation: Observation, memory: Memory) -> None:
        """Once for each new reading of the rate."""
        rates = [(step, rate) for step, rate in observation.rates if math.isfinite(rate)]
        if len(rates) < 4:
            raise Unknown("the learning rate was read fewer than four times")
        (before_step, before), (step, rate) = rates[-2:]
        if memory.notes.get("read") == step:
            return
        memory.notes["read"] = step
        highest = max(earlier for _, earlier in rates[:-1])
        # In a warm-up or a range test the rate rises all the time: that is meant. One jump that
        # did no harm is no warm-up: the next may be the one too many.
        waits = memory.notes.get("jump") is not None and not memory.is_open
        rises = rates[-2][1] > rates[-3][1] or (rates[-3][1] > rates[-4][1] and not waits)
        if rises or not highest > 0 or rate < JUMP * highest:
            return
        steps, losses = observation.finite_losses()
        usual = losses[steps <= before_step][-LEVEL_LOSSES:]
        if len(usual) < FEWEST_LOSSES:
            return
        # A rate that has stayed the same was read long ago, and the loss has fallen since.
        latest = losses[steps <= step][-FEWEST_LOSSES:]
        level = float(min(np.median(usual[-FEWEST_LOSSES:]), np.median(latest)))
        # From one step to the next, so that a loss that falls is not taken for a noisy one.
        noise = np.abs(np.diff(usual))
        memory.notes["jump"] = {
            "rates": (before, rate),
            "since": before_step + 1,
            "seen": step,
            "level": level,
            "spread": 1.4826 / math.sqrt(2.0) * float(np.median(noise)),
        }


def _lost(observation: Observation, level: float) -> float:
    """The loss of guessing, for a run that was better; infinity for others."""
    chance = observation.passes[0].guessing_loss if observation.passes else math.nan
    return chance if level < LEARNED * chance else math.inf
