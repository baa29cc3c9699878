from __future__ import annotations

from esper.contracts import Severity
from esper.diagnosis.base import Evidence, Memory, RemedySlug, Rule, Threshold
from esper.diagnosis.observation import Observation, Unknown


class EvaluationInTrainMode(Rule):
    """Dropout or batch statistics are active while the model is evaluated."""

    slug = "evaluation_in_train_mode"
    title = "Evaluation in training mode"
    symptom = "A forward pass of an evaluation ran in training mode, or changed batch statistics."
    thresholds = (
        Threshold("forward passes in training mode without an update", 2, "in one step", "chosen"),
        Threshold("such steps", 2, "steps", "chosen: one may be a restart"),
    )
    severity = Severity.CAUTION
    false_alarm = "Batch statistics that are measured again on purpose, or Monte Carlo dropout."
    advice = "Call model.eval() before an evaluation, and model.train() after it."
    remedies = (RemedySlug.TELL,)
    closes_after = 40

    def check(self, observation: Observation, memory: Memory) -> Evidence | None:
        modes = observation.modes
        if not modes.in_training and not modes.in_evaluation:
            raise Unknown("no module depends on the mode")
        if modes.evaluated_in_training:
            return Evidence(
                observed="evaluate() ran modules in training mode, in "
                f"{modes.evaluated_in_training} calls of them",
                limit="model.eval() in an evaluation",
                signal="training",
                value=float(modes.evaluated_in_training),
            )
        if modes.extra_steps == memory.notes.get("steps", 0):
            return None
        memory.notes["steps"] = modes.extra_steps
        if modes.extra_steps < 2:
            return None
        return Evidence(
            observed=f"{modes.extra_batches} forward passes in training mode had no update, in "
            f"{modes.extra_steps} steps; batch statistics took their data in",
            limit="model.eval() in an evaluation",
            signal="training",
            value=float(modes.extra_batches),
        )
