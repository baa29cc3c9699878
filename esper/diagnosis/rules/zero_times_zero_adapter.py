from __future__ import annotations

from esper.contracts import Severity
from esper.diagnosis.base import Evidence, Memory, RemedySlug, Rule, Threshold
from esper.diagnosis.facts import TensorFacts
from esper.diagnosis.observation import Observation, Unknown


class ZeroTimesZeroAdapter(Rule):
    """Both factors of an adapter start at zero, so each one's gradient is zero for ever."""

    slug = "zero_times_zero_adapter"
    title = "Both factors of an adapter are zero"
    symptom = "Two matrices that are multiplied are both zero, and neither has a gradient."
    thresholds = (
        Threshold("factors that are zero", 1, "of two", "LoRA starts one of them at zero"),
    )
    severity = Severity.SERIOUS
    false_alarm = "Two layers that start at zero and are not multiplied with one another."
    advice = "Start one of the two factors with random numbers."
    remedies = (RemedySlug.REPAIR_SCALE, RemedySlug.TELL)
    closes_after = 1

    def check(self, observation: Observation, memory: Memory) -> Evidence | None:
        zero = [t for t in observation.tensors if t.trainable and t.all_zero and len(t.shape) == 2]
        pairs = [(a, b) for a in zero for b in zero if _multiplied(a, b)]
        if not pairs:
            if not observation.tensors:
                raise Unknown("the weights before the first update are not known")
            return None
        norms = {row.name: row.norm for row in observation.last_gradients.rows}
        still = [(a, b) for a, b in pairs if norms.get(a.name) == 0 and norms.get(b.name) == 0]
        if not still:
            return None
        first, second = still[0]
        return Evidence(
            observed=f"{first.name} and {second.name} are zero, and so are their gradients; "
            f"{len(still)} such pairs",
            limit="a factor that is not zero",
            signal="grad",
            value=float(len(still)),
            began_at=first.layer,
            since_step=0,
        )


def _multiplied(a: TensorFacts, b: TensorFacts) -> bool:
    """``b @ a`` is possible with a small inner size, and both are parts of the same module."""
    if a is b or a.shape[0] != b.shape[1] or a.shape[0] >= min(a.shape[1], b.shape[0]):
        return False
    return _place(a) == _place(b)


def _place(tensor: TensorFacts) -> str:
    """The module that holds both: ``proj`` for ``proj.lora_a.weight`` and for ``proj.a``."""
    parts = tensor.name.split(".")
    return ".".join(parts[:-2] if parts[-1] == "weight" else parts[:-1])
