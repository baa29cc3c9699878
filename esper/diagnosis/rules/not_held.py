from __future__ import annotations

from esper.contracts import Severity, ViolationRule
from esper.diagnosis.base import Evidence, Memory, RemedySlug, Rule, Threshold
from esper.diagnosis.observation import Observation


class NotHeld(Rule):
    """A tensor requires a gradient, and no optimizer holds it: it keeps its first values."""

    slug = "not_held"
    title = "A part is held by no optimizer"
    symptom = "A trainable tensor is in no parameter group, so it never changes."
    thresholds = (Threshold("trainable tensors in no optimizer", 0, "tensors", "by definition"),)
    severity = Severity.SERIOUS
    false_alarm = "A part that another optimizer trains, which attach() was not given."
    advice = "Give it to the optimizer, or set requires_grad=False."
    remedies = (RemedySlug.ADOPT, RemedySlug.TELL)
    violation = ViolationRule.OPTIMIZER_LEDGER
    closes_after = 1
    by_ledger = True

    def check(self, observation: Observation, memory: Memory) -> Evidence | None:
        found = observation.in_ledger(self.slug)
        if not found:
            return None
        return Evidence(
            observed=found[0].observed,
            limit=found[0].limit,
            signal="param_groups",
            value=float(len(found)),
            began_at=found[0].layer,
            advice=found[0].remedy,
        )
