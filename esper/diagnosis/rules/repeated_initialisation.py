from __future__ import annotations

from esper.contracts import Severity
from esper.diagnosis.base import Evidence, Memory, RemedySlug, Rule, Threshold
from esper.diagnosis.observation import Observation, Unknown
from esper.diagnosis.weights import EQUAL_ROWS


class RepeatedInitialisation(Rule):
    """Units or layers that start with equal weights learn the same, or nearly."""

    slug = "repeated_initialisation"
    title = "Units or layers start with equal weights"
    symptom = "The units of a layer, or two layers, start with exactly the same weights."
    thresholds = (
        Threshold("rows equal to the row before", EQUAL_ROWS, "share", "chosen: none by chance"),
        Threshold("matrices with equal elements", 0, "pairs", "TrainCheck (OSDI'25)"),
    )
    severity = Severity.SERIOUS
    false_alarm = "Layers that were copied on purpose, as torch's TransformerEncoder does."
    advice = "Initialise each layer with new random numbers; do not set the seed again."
    remedies = (RemedySlug.REPAIR_SCALE, RemedySlug.TELL)
    closes_after = 1

    def check(self, observation: Observation, memory: Memory) -> Evidence | None:
        matrices = [t for t in observation.tensors if t.is_matrix and t.trainable]
        if not matrices:
            raise Unknown("the weights before the first update are not known")
        # Another matrix of the same units, such as the means beside deviations that start equal.
        told_apart = {(t.layer, t.shape[0]) for t in matrices if t.equal_rows < EQUAL_ROWS}
        matrices = [t for t in matrices if t.name in observation.symmetric]
        equal = [t for t in matrices if t.equal_rows >= EQUAL_ROWS]
        equal = [t for t in equal if (t.layer, t.shape[0]) not in told_apart]
        if equal:
            return Evidence(
                observed=f"{equal[0].equal_rows:.0%} of the units of {equal[0].layer} start with "
                f"the weights of the unit before; the same is true of {len(equal)} layers in all",
                limit="units that differ",
                signal="weights",
                value=equal[0].equal_rows,
                began_at=equal[0].layer,
                since_step=0,
            )
        twins = [t for t in matrices if t.twin]
        if not twins:
            return None
        cloned = all(".layers." in f".{t.layer}." for t in twins)
        return Evidence(
            observed=f"{len(twins)} matrices start with exactly the elements of another; "
            f"{twins[0].name} with those of {twins[0].twin}",
            limit="layers that differ",
            signal="weights",
            value=float(len(twins)),
            began_at=twins[0].layer,
            since_step=0,
            severity=Severity.INFO if cloned else Severity.CAUTION,
            only_tell=True,  # no scale tells copies apart, and they may be meant
        )
