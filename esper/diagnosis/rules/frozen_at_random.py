from __future__ import annotations

from esper.contracts import Severity
from esper.diagnosis.base import Evidence, Memory, RemedySlug, Rule, Threshold
from esper.diagnosis.observation import Observation, Unknown

LEAST = 0.1
FEWEST_VECTORS = 4  # that no training leaves as they were made


class FrozenAtRandom(Rule):
    """The first layers are frozen and were never trained: the rest learns from random features."""

    slug = "frozen_at_random"
    title = "A layer is frozen with random weights"
    symptom = (
        "The first layers are frozen, and all frozen matrices have the random values with which "
        "PyTorch creates layers, or all frozen biases and norms those of new layers."
    )
    thresholds = (
        Threshold("frozen share of the parameters", LEAST, "share", "chosen"),
        Threshold(
            "elements beyond 1 / sqrt(inputs)", 0, "elements",
            "by definition: torch.nn draws them from -1 / sqrt(inputs) to 1 / sqrt(inputs)",
        ),
    )  # fmt: skip
    severity = Severity.INFO  # random features may be meant
    false_alarm = "Random features that are meant, as in an extreme learning machine."
    advice = (
        "Load the trained weights, and check that load_state_dict reports no missing keys; "
        "otherwise set requires_grad=True."
    )
    remedies = (RemedySlug.THAW, RemedySlug.TELL)
    closes_after = 1

    def check(self, observation: Observation, memory: Memory) -> Evidence | None:
        total = observation.frozen + observation.trainable
        matrices = [tensor for tensor in observation.tensors if tensor.is_matrix]
        if not matrices or not total:
            raise Unknown("the parameters before the first update are not known")
        still = set(observation.frozen_layers)
        frozen = [tensor for tensor in matrices if not tensor.trainable and tensor.layer in still]
        random = all(tensor.untrained for tensor in frozen)
        if not frozen or not (random or _as_made(observation)):
            return None
        if not observation.matrices or observation.matrices[0] not in still:
            return None  # what comes before it learns, and adapts to it
        shape = next(tensor.shape for tensor in matrices if tensor.layer == observation.matrices[0])
        if any(tensor.trainable and tensor.shape == shape for tensor in matrices):
            return None  # a teacher or a target, which follows the part that learns
        if observation.frozen < LEAST * total or not observation.trainable:
            return None
        observed = (
            f"{observation.frozen:,} of {total:,} parameters are frozen, and all their matrices "
            "have the random values of new layers"
        )
        if not random:
            observed = (
                f"{observation.frozen:,} of {total:,} parameters are frozen, and all their biases "
                "and norms have the values of new layers"
            )
        return Evidence(
            observed=observed,
            limit="frozen weights that were trained",
            signal="requires_grad",
            value=observation.frozen / total,
            began_at=frozen[0].layer,
            since_step=0,
            only_tell=not random,
        )


def _as_made(observation: Observation) -> bool:
    """All frozen biases and norms are the constants that layers begin with, as zeros and ones.

    No training leaves all of them so, whatever the matrices were drawn from.
    """
    frozen = [t for t in observation.tensors if not t.trainable and t.elements > 1]
    vectors = [t for t in frozen if not t.is_matrix]
    return len(vectors) >= FEWEST_VECTORS and all(t.std == 0 for t in vectors)
