from __future__ import annotations

from esper.contracts import Severity
from esper.diagnosis.base import Evidence, Memory, Rule, Threshold
from esper.diagnosis.observation import Observation, Unknown

HIGH = 0.9


class BatchNormMomentum(Rule):
    """The statistics that evaluation uses are those of the newest batch, or never change."""

    slug = "batch_norm_momentum"
    title = "Wrong momentum of a batch norm"
    symptom = "The momentum of a batch norm is 0, or so high that only the newest batch counts."
    thresholds = (
        Threshold("momentum", HIGH, "share", "0.1 is usual; it is the weight of the new batch"),
        Threshold("and above", 0.0, "share", "by definition: at 0 nothing is learned"),
    )
    severity = Severity.CAUTION
    false_alarm = "Batches that hold all of the data, or statistics that are kept on purpose."
    advice = (
        "Use 0.1, or None for a plain mean: in PyTorch it is the weight of the new batch, in "
        "other libraries that of the old ones."
    )
    closes_after = 1

    def check(self, observation: Observation, memory: Memory) -> Evidence | None:
        if not observation.batch_norms:
            raise Unknown("no batch norm keeps statistics")
        odd = [(name, m) for name, m in observation.batch_norms if m >= HIGH or m == 0]
        if not odd:
            return None
        layer, momentum = odd[0]
        so = "never change" if momentum == 0 else "are those of the newest batch"
        return Evidence(
            observed=f"the momentum of {layer} is {momentum:g}, so the statistics that evaluation "
            f"uses {so}",
            limit=f"above 0 and below {HIGH:g}; 0.1 is usual",
            signal="batch_norm",
            value=momentum,
            began_at=layer,
            since_step=1,
        )
