from __future__ import annotations

from esper.contracts import Severity
from esper.diagnosis.base import Evidence, Memory, Rule, Threshold
from esper.diagnosis.observation import Observation, Unknown
from esper.diagnosis.output_gradient import CLOSE, SOME


class ClassesOnOtherAxis(Rule):
    """The loss takes its classes from another axis of the output than the model gives them on."""

    slug = "classes_on_other_axis"
    title = "Classes on another axis"
    symptom = (
        "The loss chooses among elements of the output that are no classes of one place: it reads "
        "a view that mixes the places, or the model's softmax is over another axis."
    )
    thresholds = (
        Threshold(
            "sum of the gradient over the classes / sum of its sizes", CLOSE, "ratio",
            "0 by definition behind a softmax; chosen above rounding",
        ),
        Threshold("chosen elements that the gradient shows", SOME, "and more", "no chance"),
    )  # fmt: skip
    severity = Severity.SERIOUS
    false_alarm = "A last linear layer whose outputs have no order before the loss gives them one."
    advice = (
        "Bring the axis of the classes to its place with permute or transpose: view and reshape "
        "keep the order of the elements and mix the axes. Let the softmax be over the axis of the "
        "classes: the second for cross_entropy and nll_loss."
    )
    closes_after = 1

    def check(self, observation: Observation, memory: Memory) -> Evidence | None:
        seen = observation.first_pass
        if len(seen.output_shape) < 3:
            raise Unknown("the output has no other axis than the classes")
        shape = " x ".join(map(str, seen.output_shape))
        if seen.mixes_axes:
            observed = f"the loss reads an output of {shape} in a view that mixes its axes"
            limit = "classes that lie on one axis of the output"
        elif seen.softmax_axis and seen.class_axes and seen.softmax_axis not in seen.class_axes:
            observed = (
                f"the softmax of an output of {shape} is over axis {seen.softmax_axis}, and the "
                f"loss chooses among the elements of axis {seen.class_axes[0]}"
            )
            limit = f"a softmax over axis {seen.class_axes[0]}"
        else:
            return None
        return Evidence(
            observed=observed, limit=limit, signal="output", value=0.0, since_step=seen.step
        )
