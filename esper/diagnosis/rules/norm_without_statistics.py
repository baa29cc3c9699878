from __future__ import annotations

from esper.contracts import Severity
from esper.diagnosis.base import Evidence, Memory, Rule, Threshold
from esper.diagnosis.observation import Observation

LARGE = 10.0


class NormWithoutStatistics(Rule):
    """A batch norm is frozen before it has seen a batch, so that it normalises nothing."""

    slug = "norm_without_statistics"
    title = "Batch norm without statistics"
    symptom = (
        "A batch norm in evaluation mode has the mean 0 and the variance 1 with which it is made, "
        "and the model around it trains."
    )
    thresholds = (
        Threshold("mean of every channel", 0.0, "exactly", "what torch makes it with"),
        Threshold("variance of every channel", 1.0, "exactly", "what torch makes it with"),
        Threshold(
            "standard deviation of what enters it, else it is info", LARGE, "std",
            "AutoTrainer (ICSE'21): activations of 10 are abnormal; others do no harm unscaled",
        ),
    )  # fmt: skip
    severity = Severity.CAUTION
    false_alarm = "A norm that is to be a scale and a shift alone, on inputs of unit variance."
    advice = (
        "Leave the norm in training mode until it has seen the data, or load trained weights "
        "before it is frozen."
    )
    closes_after = 1

    def check(self, observation: Observation, memory: Memory) -> Evidence | None:
        names = observation.without_statistics
        if not names:
            return None
        seen = observation.passes[0].layers if observation.passes else ()
        harms = any(one.layer in names and one.input_std >= LARGE for one in seen)
        return Evidence(
            observed=f"{len(names)} batch norms are in evaluation mode and have seen no batch, "
            f"{names[0]} first",
            limit="statistics of the data, or training mode",
            signal="batch_norm",
            value=float(len(names)),
            began_at=names[0],
            since_step=1,
            severity=None if harms else Severity.INFO,
        )
