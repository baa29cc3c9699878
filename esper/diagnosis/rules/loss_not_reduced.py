from __future__ import annotations

from esper.contracts import Severity
from esper.diagnosis.base import Evidence, Memory, RemedySlug, Rule, Threshold
from esper.diagnosis.observation import LossKind, Observation, Unknown

ROWS = 8


class LossNotReduced(Rule):
    """The loss is a sum over the batch, so its gradient grows with the size of the batch."""

    slug = "loss_not_reduced"
    title = "Loss is not reduced"
    symptom = "Each row of the batch has the weight 1 in the loss, instead of one part of it."
    thresholds = (
        Threshold("weight of a row, times the rows", 1, "ratio", "a mean over the batch"),
    )
    severity = Severity.INFO
    false_alarm = "A sum on purpose, with a learning rate that was chosen for it."
    advice = 'Use reduction="mean", or divide the learning rate by the size of the batch.'
    remedies = (RemedySlug.SET_LR, RemedySlug.TELL)
    closes_after = 1

    def check(self, observation: Observation, memory: Memory) -> Evidence | None:
        seen = observation.first_pass
        if seen.loss_kind not in (LossKind.CROSS_ENTROPY, LossKind.LIKELIHOOD):
            raise Unknown("the loss is not one whose weights its gradient shows")
        rows = 1
        for size in seen.output_shape[:-1]:
            rows *= size
        if rows < ROWS or abs(seen.loss_scale / rows - 1) > 0.01:
            return None
        return Evidence(
            observed=f"the loss is a sum over {rows} rows",
            limit="a mean over the batch",
            signal="loss",
            value=seen.loss_scale,
            since_step=1,
        )
