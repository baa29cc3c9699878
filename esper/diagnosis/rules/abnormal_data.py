from __future__ import annotations

import math

from esper.contracts import Severity
from esper.diagnosis.base import Evidence, Memory, RemedySlug, Rule, Threshold
from esper.diagnosis.observation import Observation, Unknown

LARGE = 10.0
FITS = 3.0
FAR = 100.0
GREW = 3.0
NORMS = ("BatchNorm", "LayerNorm", "GroupNorm", "InstanceNorm", "RMSNorm", "SyncBatchNorm")


class AbnormalData(Rule):
    """The inputs are far from the scale that weights are initialised for."""

    slug = "abnormal_data"
    title = "Abnormal data"
    symptom = "The inputs of the model are not finite, or ten times larger than usual."
    thresholds = (
        Threshold(
            "root mean square of the input", LARGE, "units of the data", "AutoTrainer (TDSC'24)"
        ),
        Threshold("the same, as serious", FAR, "units of the data", "chosen"),
        Threshold(
            "input / that to which the weights were fitted", GREW, "ratio", "chosen: other data"
        ),
        Threshold(
            "std of the first layer's output", FITS, "units", "below it the weights fit the data"
        ),
    )
    severity = Severity.CAUTION
    false_alarm = (
        "A model that scales its input by itself, in a way that is no normalisation layer."
    )
    advice = "Scale each feature to a mean of 0 and a standard deviation of 1, or to 0..1."
    remedies = (RemedySlug.REPAIR_SCALE, RemedySlug.TELL)
    closes_after = 1

    def check(self, observation: Observation, memory: Memory) -> Evidence | None:
        seen = observation.last_pass
        if math.isnan(seen.input_rms):
            raise Unknown("the model has no input of floating-point numbers")
        if not seen.input_finite:
            return Evidence(
                observed="the model's input has values that are NaN or infinite",
                limit="finite inputs",
                signal="input",
                severity=Severity.CRITICAL,
                advice="Remove or replace the values that are NaN or infinite.",
                only_tell=True,  # no scale of the weights makes such a value finite
            )
        if seen.layers and seen.layers[0].kind.startswith(NORMS):
            return None
        if seen.input_rms < LARGE:
            return None
        if seen.layers and seen.layers[0].output_std < FITS:
            memory.notes["fitted"] = seen.input_rms
            return None  # its weights are small accordingly
        if seen.input_rms < GREW * memory.notes.get("fitted", 0.0):
            return None  # the weights have grown since, as they learn
        return Evidence(
            observed=f"the root mean square of the model's input is {seen.input_rms:.3g}",
            limit=f"below {LARGE:g}",
            signal="input",
            value=seen.input_rms,
            began_at=seen.layers[0].layer if seen.layers else "",
            since_step=1,
            severity=Severity.SERIOUS if seen.input_rms >= FAR else None,
        )
