"""What trains a model: everything that a graft or a remedy must keep in step with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from esper.grafting.replicas import Replicas


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What trains the model; a snapshot holds it beside the model.

    Attributes:
        optimizers: those that train the model; new weights get a group in one of them.
        schedulers: those of the optimizers, whose lists for each group grow and shrink.
        scaler: the ``GradScaler``, None where there is none.
        copies: running averages of the model, which get each graft too.
        replicas: the other ranks of the model, None for a model in one process.
    """

    optimizers: Sequence[Any] = ()
    schedulers: Sequence[Any] = ()
    scaler: Any = None
    copies: Sequence[Any] = ()
    replicas: Replicas | None = None


BARE = Surroundings()  # a model that nothing trains
