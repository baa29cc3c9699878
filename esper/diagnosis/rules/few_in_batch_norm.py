from __future__ import annotations

from esper.contracts import Severity
from esper.diagnosis.base import Evidence, Memory, Rule, Threshold
from esper.diagnosis.observation import Observation, Unknown

FEW = 4
PASSES = 2


class FewInBatchNorm(Rule):
    """Batch norm takes a mean and a deviation of two to four values, which are mostly chance."""

    slug = "few_in_batch_norm"
    title = "Batch norm over too few values"
    symptom = "A batch norm computes its statistics from at most four values of each channel."
    thresholds = (
        Threshold(
            "values of a channel", FEW, "values",
            "Wu and He 2018, arXiv 1803.08494: errors grow with batches below 8",
        ),
        Threshold(
            "forward passes that were observed", PASSES, "passes",
            "chosen: in all of them; the last batch of an epoch may be small",
        ),
    )  # fmt: skip
    severity = Severity.CAUTION
    false_alarm = "A model whose statistics are set from larger batches afterwards."
    advice = "Use larger batches, or a norm that needs no batch, such as GroupNorm or LayerNorm."
    closes_after = 1

    def check(self, observation: Observation, memory: Memory) -> Evidence | None:
        if len(observation.passes) < PASSES:
            raise Unknown("too few forward passes were observed")
        most: dict[str, int] = {}
        for seen in observation.passes:
            for entry in seen.layers:
                if entry.training and entry.values:
                    most[entry.layer] = max(entry.values, most.get(entry.layer, 0))
        few = {name: values for name, values in most.items() if values <= FEW}
        if not few:
            return None
        first = next(iter(few))
        return Evidence(
            observed=f"{first} computes the statistics of a channel from {few[first]} values",
            limit=f"more than {FEW:g} values",
            signal="batch_norm",
            value=float(few[first]),
            began_at=first,
            since_step=1,
        )
