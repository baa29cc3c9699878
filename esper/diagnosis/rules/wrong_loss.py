from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from esper.contracts import Severity
from esper.diagnosis.base import Evidence, Memory, RemedySlug, Rule, Threshold
from esper.diagnosis.facts import LossKind, ModelPass
from esper.diagnosis.observation import CAME_TRAINED, Observation, Unknown

SAME_LOSSES = 3
EXACT = 0.01
SEVERAL, MOST_CLASSES = 3, 20
BEGINNING, ENDLESS_FROM = 20, 80
ENDLESS, FASTER = 100.0, 1.6
BINARY = (LossKind.BINARY, LossKind.BINARY_LOGITS)


class WrongLoss(Rule):
    """The loss function does not fit the outputs or the targets, as its gradient shows."""

    slug = "wrong_loss"
    title = "The loss does not fit the outputs"
    symptom = "The loss is one that these outputs or targets cannot lower as intended."
    thresholds = (
        Threshold("smallest loss", 0, "units of the loss", "AutoTrainer (TDSC'24)"),
        Threshold("targets of a binary loss", 1, "largest", "by definition"),
        Threshold(
            "first loss / that of guessing, of a minus sign",
            CAME_TRAINED,
            "ratio",
            "chosen: who makes a trained model forget begins below it",
        ),
        Threshold(
            "loss below zero / largest of the first losses, of one without end", ENDLESS, "ratio",
            "chosen: a density that is learned falls below zero by a few of these",
        ),
        Threshold(
            "the same / that of the quarter before, in two of them", FASTER, "ratio",
            "chosen: a straight line has 1.4, a square of the time 2",
        ),
        Threshold("equal losses without a gradient", SAME_LOSSES, "steps", "none by chance"),
        Threshold("largest whole number that looks like a class", MOST_CLASSES, "class", "chosen"),
    )  # fmt: skip
    severity = Severity.SERIOUS
    false_alarm = "A loss of one's own whose gradient looks like that of a known one."
    advice = "Use the loss that fits the outputs: cross_entropy for classes, mse_loss for numbers."
    remedies = (RemedySlug.TELL,)
    closes_after = 1
    explained_by = frozenset({"wrong_output_activation", "softmax_over_batch"})

    def check(self, observation: Observation, memory: Memory) -> Evidence | None:
        seen = observation.first_pass  # later, saturated outputs hide which loss it is
        if constant := _constant(observation):
            return constant
        if negated := _negated(observation, seen):
            return negated
        if endless := _without_end(observation, memory):
            return endless
        if seen.loss_kind is LossKind.UNKNOWN:
            raise Unknown("the loss is not one that its gradient shows")
        return (
            _likelihood(seen)
            or _classes(observation, seen)
            or _binary(seen)
            or _average(seen)
            or _class_numbers(seen)
            or _negative(observation, seen)
        )


def _likelihood(seen: ModelPass) -> Evidence | None:
    if seen.loss_kind is not LossKind.LIKELIHOOD:
        return None
    if seen.loss_scale < 0:
        of_class = "log-probability" if seen.log_sum_near_zero else "probability"
        return _evidence(
            f"the loss is the {of_class} of the right class without its minus sign, so that "
            "training lowers that probability",
            "Use nll_loss, or put a minus sign before the loss.",
        )
    if seen.log_sum_near_zero:
        return None
    return _evidence(
        "nll_loss is applied to outputs that are no log-probabilities, so it falls without end",
        "End the model with log_softmax, or use cross_entropy.",
    )


def _classes(observation: Observation, seen: ModelPass) -> Evidence | None:
    """The sign of a loss of classes, or a softmax where its logarithm belongs."""
    first = observation.first_training_loss
    if seen.loss_kind is LossKind.CROSS_ENTROPY and seen.loss_scale < 0:
        # Who makes a trained model forget begins near zero.
        if not first < -CAME_TRAINED * math.log(max(2, seen.classes)):
            return None
        return _evidence(
            "the loss is cross-entropy with a minus sign, so that training raises the error",
            "Remove the minus sign before the loss.",
        )
    if seen.loss_kind is not LossKind.PROBABILITY or first * seen.loss_scale > 0:
        return None
    if seen.loss_scale < 0:
        return _evidence(
            "the loss is the probability of the right class, so that training lowers it",
            "Use cross_entropy of the raw outputs (logits), without a softmax and without a sign.",
        )
    return replace(
        _evidence(
            "the loss is the negative probability of the right class, as nll_loss of a softmax "
            "gives it: where that probability is small, it has next to no gradient",
            "Use cross_entropy of the raw outputs (logits), or nll_loss of log_softmax.",
        ),
        severity=Severity.CAUTION,
    )


def _binary(seen: ModelPass) -> Evidence | None:
    if seen.loss_kind not in BINARY or seen.targets_averaged:
        return None
    if seen.target_low >= 0 and seen.target_high <= 1:
        return None
    return _evidence(
        f"{seen.loss_kind} has targets from {seen.target_low:g} to {seen.target_high:g}",
        "Use targets 0 and 1, or cross_entropy for more than two classes.",
    )


def _average(seen: ModelPass) -> Evidence | None:
    if not seen.targets_averaged:
        return None
    return _evidence(
        "every output is compared with the mean of all targets: outputs and targets have shapes "
        "that broadcast against one another",
        "Give outputs and targets the same shape, with squeeze(-1) or unsqueeze(-1).",
    )


def _class_numbers(seen: ModelPass) -> Evidence | None:
    """Squares of whole numbers that begin at 0: classes have no distance between them."""
    if seen.loss_kind is not LossKind.SQUARED or seen.classes != 1:
        return None
    if seen.target_low != 0 or not SEVERAL <= seen.target_high <= MOST_CLASSES:
        return None
    return replace(
        _evidence(
            f"mse_loss has whole numbers from 0 to {seen.target_high:g} as targets, which look "
            "like class numbers",
            "For classes use cross_entropy with one output for each; for counts poisson_nll_loss.",
        ),
        severity=Severity.CAUTION,
    )


def _constant(observation: Observation) -> Evidence | None:
    """The loss is the same for all batches and weights, and so it has no gradient."""
    losses = observation.finite_losses()[1]
    if len(losses) < SAME_LOSSES or bool((losses != losses[0]).any()):
        return None
    norms = [row.norm for row in observation.last_gradients.rows if not math.isnan(row.norm)]
    if not norms or max(norms) > 0:
        return None
    return _evidence(
        f"the loss has been {losses[0]:g} in each step, and its gradient exactly zero: it does not "
        "depend on the outputs",
        "cross_entropy of a single output is always 0; use binary_cross_entropy_with_logits.",
    )


def _negated(observation: Observation, seen: ModelPass) -> Evidence | None:
    """A sum or a mean of squares with a minus sign; its targets may be any numbers."""
    try:
        weight = observation.squares_in_loss(seen)
    except Unknown:
        return None
    wanted = (-1.0, -float(math.prod(seen.output_shape)))
    if not any(abs(weight / one - 1) < EXACT for one in wanted):
        return None
    return _evidence(
        "the loss is a squared error with a minus sign, so that training raises the error",
        "Remove the minus sign before the loss.",
    )


def _without_end(observation: Observation, memory: Memory) -> Evidence | None:
    """The loss began above zero, and falls below it faster and faster: nothing bounds it.

    What is learned falls more and more slowly. Not the losses of a critic or of rewards, which
    begin on both sides of zero.
    """
    losses = observation.finite_losses()[1]
    beginning = observation.first_losses if len(observation.first_losses) else losses[:BEGINNING]
    largest = float(np.abs(beginning).max())
    if len(losses) < ENDLESS_FROM or largest == 0 or not observation.first_training_loss > 0:
        return None
    before, then, now = (float(np.median(part)) for part in np.array_split(losses, 4)[1:])
    grows = before < 0 and then < FASTER * before and now < FASTER * then
    if not now < -ENDLESS * largest or not (grows or memory.is_open) or observation.is_warming_up:
        return None
    return _evidence(
        f"the loss began with {observation.first_training_loss:.3g}, is {observation.loss:.3g} and "
        "falls faster and faster, so nothing bounds it",
        "Look for a wrong sign or a term that is subtracted, such as a divergence (KL), which is "
        "added to the error of the reconstruction.",
    )


def _negative(observation: Observation, seen: ModelPass) -> Evidence | None:
    loss = observation.loss
    told = (LossKind.LIKELIHOOD, LossKind.PROBABILITY)
    is_negated = seen.loss_kind is LossKind.CROSS_ENTROPY and seen.loss_scale < 0
    # The square of the output, with a term that may be below zero, as of a normalising flow.
    is_square = seen.loss_kind is LossKind.SQUARED and seen.target_low == seen.target_high == 0
    if not loss < 0 or seen.loss_kind in told or is_negated or is_square:
        return None
    found = _evidence(
        f"the loss is {loss:.3g}, and {seen.loss_kind} is never below zero",
        "Look for a wrong sign, or for a term that is subtracted.",
    )
    # The logarithm of a weight that is learned, as one for each task, may be any number.
    return replace(found, severity=Severity.INFO) if _has_other_terms(observation, seen) else found


def _has_other_terms(observation: Observation, seen: ModelPass) -> bool:
    """The loss is cross-entropy and something else."""
    own = seen.cross_entropy * seen.loss_scale
    whole = observation.losses[observation.loss_steps == seen.step]
    return bool(len(whole) and abs(whole[0] - own) > EXACT * abs(own))


def _evidence(observed: str, advice: str) -> Evidence:
    return Evidence(
        observed=observed,
        limit="a loss that fits outputs and targets",
        signal="loss",
        since_step=1,
        advice=advice,
    )
