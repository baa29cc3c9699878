from __future__ import annotations

import math

import numpy as np

from esper.contracts import Severity, Signal
from esper.diagnosis.base import Evidence, Memory, RemedySlug, Rule, Threshold
from esper.diagnosis.facts import LossKind
from esper.diagnosis.observation import Observation, Unknown

STEPS = 48
BLOCKS = 12
SWING = 0.2
EXCESS = 2.5
FLIPS = 0.7
UNLEARNED = 0.5
SAMPLES = 320
LARGE_UPDATE = 1e-2
LOST, LOST_UNKNOWN = 2.0, 10.0
SQUARES = 0.01  # distance of their weights from those of a mean


class OscillatingLoss(Rule):
    """The loss swings up and down far more than its batches explain, because steps are too long."""

    slug = "oscillating_loss"
    title = "The loss oscillates"
    symptom = "The loss swings by a fifth of its level, without a trend, while updates are large."
    thresholds = (
        Threshold(
            "swing of the mean of a block", SWING, "share of the level", "AutoTrainer (ICSE'21)",
        ),
        Threshold("swing / what single batches explain", EXCESS, "ratio", "chosen on 0 to 9"),
        Threshold(
            f"samples in {STEPS} losses", SAMPLES, "samples, at least",
            "chosen: fewer swing by themselves",
        ),
        Threshold("level / first loss", UNLEARNED, "ratio", "below it the run learns"),
        Threshold("steps that change direction", FLIPS, "share", "2/3 by chance"),
        Threshold(
            "largest update / weight, or a loss so much above the first", LARGE_UPDATE, "ratio",
            "1e-3 is usual",
        ),
        Threshold("loss / first loss, of a known loss function", LOST, "ratio", "chosen"),
        Threshold(
            "the same of any other", LOST_UNKNOWN, "ratio",
            "chosen: that of a policy gradient grows on the way to a better policy",
        ),
    )  # fmt: skip
    severity = Severity.CAUTION
    false_alarm = "Batches that are sorted, so that easy and hard ones alternate."
    advice = "Lower the learning rate, or make the batches larger."
    remedies = (RemedySlug.SET_LR, RemedySlug.TELL)
    opens_after = 2
    explained_by = frozenset({"non_finite", "update_ratio_high", "loss_spike", "rate_jump"})

    def check(self, observation: Observation, memory: Memory) -> Evidence | None:
        _, losses = observation.finite_losses()
        if len(losses) < STEPS:
            raise Unknown("too few losses")
        if STEPS * _rows(observation) < SAMPLES:
            raise Unknown("the losses of so few samples swing by themselves")
        if observation.script_writes:
            # As a meta-learner does after each task, whose losses swing with the tasks.
            raise Unknown("the script writes the weights between the updates")
        ratios = observation.signal(Signal.UPDATE_RATIO)
        largest = max(ratios.values())
        recent = losses[-STEPS:]
        if recent.min() < 0 < recent.max():
            # Such as that of a policy gradient, whose value is no measure of what was learned.
            raise Unknown("the loss changes its sign, so it has no level")
        level = float(np.median(np.abs(recent)))
        # Above where it began, the loss swings for no other reason, however large the weights are.
        first = abs(observation.first_training_loss)
        lost = level > (LOST if _is_known(observation) else LOST_UNKNOWN) * first
        if (largest < LARGE_UPDATE and not lost) or level <= UNLEARNED * first:
            return None
        means = recent.reshape(BLOCKS, -1).mean(1)
        inside = recent.reshape(BLOCKS, -1).std(1).mean() / np.sqrt(STEPS / BLOCKS)
        trend = np.polyval(np.polyfit(np.arange(BLOCKS), means, 1), np.arange(BLOCKS))
        swing = float(np.std(means - trend))
        slow = swing > SWING * level and swing > EXCESS * inside
        moves = np.diff(recent)
        flips = float((moves[1:] * moves[:-1] < 0).mean())
        fast = flips > FLIPS and float(np.median(np.abs(moves))) > 2 * SWING * level
        if not slow and not fast:
            return None
        size = swing if slow else float(np.median(np.abs(moves)))
        return Evidence(
            observed=f"the loss swings by {size:.3g} around {level:.3g}, at updates of "
            f"{largest:.2g} of the weights",
            limit=f"swings below {SWING:.0%} of the level",
            signal="loss",
            value=size / level,
            since_step=observation.step - STEPS,
        )


def _is_known(observation: Observation) -> bool:
    """The loss function is one whose value says how good the model is."""
    try:
        seen = observation.first_pass
        if seen.loss_kind is not LossKind.UNKNOWN:
            return True
        return abs(observation.squares_in_loss(seen) - 1) < SQUARES
    except Unknown:
        return False


def _rows(observation: Observation) -> int:
    """Of a batch; many where it is not known."""
    try:
        return math.prod(observation.first_pass.output_shape[:-1]) or SAMPLES
    except Unknown:
        return SAMPLES
