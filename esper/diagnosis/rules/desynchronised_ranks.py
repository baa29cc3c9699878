from __future__ import annotations

from esper.contracts import Severity
from esper.diagnosis.base import Evidence, Memory, RemedySlug, Rule, Threshold
from esper.diagnosis.observation import Observation, Unknown


class DesynchronisedRanks(Rule):
    """The ranks of one run hold different weights, so they train different models."""

    slug = "desynchronised_ranks"
    title = "The weights of the ranks differ"
    symptom = "The same sample of the weights differs between the ranks."
    thresholds = (Threshold("difference between ranks", 0, "exactly", "DDP keeps replicas equal"),)
    severity = Severity.CRITICAL
    false_alarm = "A method that averages the ranks only now and then, such as local SGD."
    advice = (
        "Make the first weights and all branches of forward() the same on each rank, and average "
        "every gradient."
    )
    remedies = (RemedySlug.TELL, RemedySlug.REWIND)
    closes_after = 1

    def check(self, observation: Observation, memory: Memory) -> Evidence | None:
        digests = observation.rank_digests
        if len(digests) < 2:
            raise Unknown("the weights of one rank only are known")
        others = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
        if not others:
            return None
        return Evidence(
            observed=f"{len(others)} of {len(digests)} ranks hold other weights than rank 0, the "
            f"first is rank {others[0]}",
            limit="equal weights on all ranks",
            signal="weights",
            value=float(len(others)),
            certain=True,
        )
