from __future__ import annotations

from esper.contracts import Severity, ViolationRule
from esper.diagnosis.base import Evidence, Memory, RemedySlug, Rule, Threshold
from esper.diagnosis.observation import Observation, Unknown

FEW = 0.1
ADAPTED = "base_layer"  # PEFT's name for what an adapter is around


class FrozenPart(Rule):
    """All matrices are frozen, or a frozen one is all zero and can never become anything else."""

    slug = "frozen_part"
    title = "A part of the model is frozen"
    symptom = "All weight matrices are frozen, or a frozen one is all zero."
    thresholds = (
        Threshold("trainable share of the parameters", FEW, "share", "norms hold less"),
        Threshold("elements of a frozen matrix that are not 0", 0, "elements", "by definition"),
    )
    severity = Severity.CAUTION
    false_alarm = "A fine-tuning that trains only biases (BitFit) or norms on purpose."
    advice = "Set requires_grad=True on the matrices that should learn."
    remedies = (RemedySlug.THAW, RemedySlug.TELL)
    violation = ViolationRule.DIAGNOSIS
    closes_after = 1

    def check(self, observation: Observation, memory: Memory) -> Evidence | None:
        matrices = [tensor for tensor in observation.tensors if tensor.is_matrix]
        total = observation.frozen + observation.trainable
        if not matrices or not total:
            raise Unknown("the parameters before the first update are not known")
        still = set(observation.frozen_layers)
        if observation.passes:  # an adapter that is not in use does no harm
            still &= {entry.layer for entry in observation.last_pass.layers}
        # What was thawed for a while may not be zero any more.
        learned = {row.name for reading in observation.gradients for row in reading.rows}
        zero = [t for t in matrices if t.all_zero and not t.trainable and t.name not in learned]
        empty = [t for t in zero if t.layer in still]
        if empty:
            return Evidence(
                observed=f"{empty[0].name} is frozen, and all its elements are 0; the "
                f"same is true of {len(empty)} matrices in all",
                limit="frozen weights that do something",
                signal="requires_grad",
                value=float(len(empty)),
                began_at=empty[0].layer,
                since_step=0,
            )
        share = observation.trainable / total
        if share >= FEW or not observation.trainable or observation.trainable_matrices:
            return None
        if any(ADAPTED in t.name.split(".") for t in observation.tensors):
            return None  # what learns are the vectors of an adapter, such as VeRA's
        return Evidence(
            observed=f"{observation.frozen:,} of {total:,} parameters are frozen; no weight matrix "
            "learns",
            limit="a weight matrix that learns",
            signal="requires_grad",
            value=share,
            began_at=observation.frozen_layers[0] if observation.frozen_layers else "",
        )
