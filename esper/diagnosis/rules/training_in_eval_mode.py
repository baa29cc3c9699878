from __future__ import annotations

from esper.contracts import Severity
from esper.diagnosis.base import Evidence, Memory, Rule, Threshold
from esper.diagnosis.observation import Observation, Unknown


class TrainingInEvalMode(Rule):
    """Dropout is off and batch statistics are not learned, because train() was not called."""

    slug = "training_in_eval_mode"
    title = "Training in evaluation mode"
    symptom = "Every dropout and batch norm of the model is in evaluation mode during updates."
    thresholds = (
        Threshold("updates in a row in that mode", 3, "updates", "chosen"),
        Threshold("the same, after updates in training mode", 2, "updates", "chosen"),
    )
    severity = Severity.CAUTION
    false_alarm = "A fine-tuning that keeps dropout and batch statistics off on purpose."
    advice = "Call model.train() before each epoch, also after an evaluation."
    every_step = True
    closes_after = 1

    def check(self, observation: Observation, memory: Memory) -> Evidence | None:
        modes = observation.modes
        if not modes.in_training and not modes.in_evaluation:
            raise Unknown("no module depends on the mode")
        forgotten = modes.was_training
        if modes.updates < (2 if forgotten else 3):
            return None
        return Evidence(
            observed=f"{modes.in_evaluation} modules were in evaluation mode in the last "
            f"{modes.updates} updates"
            + (", and in training mode before" if forgotten else ", since the start"),
            limit="model.train() while the weights are updated",
            signal="training",
            value=float(modes.in_evaluation),
            since_step=modes.since_step,
            severity=Severity.SERIOUS if forgotten else None,
        )
