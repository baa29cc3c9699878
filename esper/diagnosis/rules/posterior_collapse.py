from __future__ import annotations

from itertools import pairwise

from esper.contracts import Severity
from esper.diagnosis.base import Evidence, Memory, Rule, Threshold
from esper.diagnosis.facts import LayerPass, ModelPass
from esper.diagnosis.observation import Observation, Unknown

NEXT_TO_NOTHING, OF_FIRST = 0.05, 0.25
NOISE = 0.5
LATE, PASSES = 100, 2


class PosteriorCollapse(Rule):
    """The two heads of a variational encoder say nothing, so that the decoder reads noise alone."""

    slug = "posterior_collapse"
    title = "The posterior has collapsed"
    symptom = (
        "Two layers that read the same input return next to nothing, as they did not at first, and "
        "the layer behind them reads values of the size of their noise."
    )
    thresholds = (
        Threshold("std of what both return", NEXT_TO_NOTHING, "std", "measured: 0.003, else 0.3"),
        Threshold("the same / at first", OF_FIRST, "ratio", "chosen: heads may start near zero"),
        Threshold("std of what enters the next layer", NOISE, "std", "that of the noise is 1"),
        Threshold(
            f"in {PASSES} observed passes in a row, the last from step", LATE, "steps",
            "chosen: many recover in the first steps, Bowman 2016, arXiv 1511.06349",
        ),
    )  # fmt: skip
    severity = Severity.CAUTION
    false_alarm = "Two branches beside a residual path, which weight decay has taken to zero."
    advice = (
        "Give the divergence (KL) a smaller factor, or raise that factor slowly. Sum the error of "
        "the reconstruction over its elements: a mean makes it small beside the divergence."
    )
    closes_after = 1

    def check(self, observation: Observation, memory: Memory) -> Evidence | None:
        newest = [seen for seen in observation.passes[1:] if seen.layers][-PASSES:]
        if len(newest) < PASSES or newest[-1].step < LATE:
            raise Unknown("too few forward passes were observed")
        first = {entry.layer: entry.output_std for entry in observation.first_pass.layers}
        for one, other, behind in _heads(newest[-1]):
            pair = {one.layer, other.layer}
            returned = [entry for seen in newest for entry in seen.layers if entry.layer in pair]
            silent = len(returned) == 2 * PASSES and all(
                entry.output_std < min(NEXT_TO_NOTHING, OF_FIRST * first.get(entry.layer, 0.0))
                for entry in returned
            )
            if silent:
                return Evidence(
                    observed=f"{one.layer} and {other.layer} read the same and return values of "
                    f"{max(one.output_std, other.output_std):.1g} in size, and {behind.layer} "
                    f"behind them reads {behind.input_std:.2g}: noise, and nothing of the input",
                    limit=f"at least {NEXT_TO_NOTHING:g} of one of them",
                    signal="activation",
                    value=max(one.output_std, other.output_std),
                    began_at=one.layer,
                    since_step=newest[0].step,
                )
        return None


def _heads(seen: ModelPass) -> list[tuple[LayerPass, LayerPass, LayerPass]]:
    """Two layers in a row with the same input, no third one, and the layer behind them."""
    found = []
    runs: list[list[LayerPass]] = []
    for entry in seen.layers:
        if runs and _input_of(runs[-1][0]) == _input_of(entry):
            runs[-1].append(entry)
        else:
            runs.append([entry])
    for heads, (behind, *_) in pairwise(runs):
        if len(heads) == 2 and behind.input_std > NOISE and behind.input_spread > NOISE:
            found.append((heads[0], heads[1], behind))
    return found


def _input_of(entry: LayerPass) -> tuple[float, float, float]:
    return entry.input_std, entry.input_spread, entry.input_zeros
