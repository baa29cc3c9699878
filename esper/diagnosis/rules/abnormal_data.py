from __future__ import annotations

import math

from esper.contracts import Severity
from esper.diagnosis.base import Evidence, Memory, RemedySlug, Rule, Threshold
from esper.diagnosis.facts import LayerPass
from esper.diagnosis.observation import Observation, Unknown

LARGE = 10.0
FITS = 3.0
FAR = 100.0
GREW = 3.0
ALIKE, PASSES = 0.01, 2
SAME = 1e-6
UNLEARNED = 0.9
RECURRENT = ("RNN", "GRU", "LSTM", "RNNCell", "GRUCell", "LSTMCell")
NORMS = ("BatchNorm", "LayerNorm", "GroupNorm", "InstanceNorm", "RMSNorm", "SyncBatchNorm")


class AbnormalData(Rule):
    """The inputs are far from the scale that weights are initialised for."""

    slug = "abnormal_data"
    title = "The model's input is abnormal"
    symptom = (
        "The inputs of the model are not finite, ten times larger than usual, all zero, or nearly "
        "the same in all rows."
    )
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
        Threshold(
            f"spread of the rows, in {PASSES} batches",
            ALIKE,
            "share of the input's size",
            "chosen: data of a standard deviation of 1 has a mean of 100 then",
        ),
        Threshold("loss / first loss, else that is info", UNLEARNED, "ratio", "chosen"),
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
            return _alike(observation)
        if seen.layers and _fits(seen.layers[0]):
            memory.notes["fitted"] = seen.input_rms
            return None
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


def _fits(first: LayerPass) -> bool:
    """Its weights are small accordingly; what a recurrent layer returns is squashed anyway."""
    return first.output_std < FITS and first.kind not in RECURRENT


def _alike(observation: Observation) -> Evidence | None:
    """Nothing, or next to nothing, tells one input from another."""
    newest = observation.passes[-PASSES:]
    if len(newest) < PASSES or not all(seen.layers for seen in newest):
        return None
    spreads = [seen.layers[0].input_spread for seen in newest]
    # Where the answers differ, another input tells the rows apart.
    empty = all(seen.input_rms == 0 and seen.output_spread < SAME for seen in newest)
    # Rows that are exactly alike may be meant: a model of one distribution has no other input.
    if not empty and not all(0 < spread < ALIKE for spread in spreads):
        return None
    observed = (
        "the model's input is exactly zero"
        if empty
        else f"the rows of a batch differ by {spreads[-1]:.1g} of the input's size, the root mean "
        f"square of which is {newest[-1].input_rms:.3g}"
    )
    return Evidence(
        observed=observed,
        limit=f"at least {ALIKE:g}",
        signal="input",
        value=0.0 if empty else spreads[-1],
        began_at=newest[-1].layers[0].layer,
        since_step=newest[0].step,
        severity=Severity.INFO if _learns(observation) else None,
        advice="Look at what is loaded: a type, a scale or a mean that does not fit the data."
        if empty
        else "Subtract each feature's own mean, and divide by its own standard deviation.",
        only_tell=True,  # no scale of the weights takes out what all rows have in common
    )


def _learns(observation: Observation) -> bool:
    """As long as nobody knows, too."""
    try:
        return observation.learned_share < UNLEARNED
    except Unknown:
        return True
