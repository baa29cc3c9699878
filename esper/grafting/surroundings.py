"""What trains a model: everything that a graft or a remedy must keep in step with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from esper.grafting.ranks.replicas import RankGroup


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What trains the model; a snapshot holds it beside the model.

    Attributes:
        optimizers: those that train the model; new weights get a companion of one of them.
        schedulers: those of the optimizers, which a hard undo rewinds too.
        scaler: the ``GradScaler``, None where there is none.
        copies: running averages of the model, which get each graft too.
        replicas: the other ranks of the model, None for a model in one process.
        takes_no_graft: why the model takes none, a sentence with the way out; remedies go on.
    """

    optimizers: Sequence[Any] = ()
    schedulers: Sequence[Any] = ()
    scaler: Any = None
    copies: Sequence[Any] = ()
    replicas: RankGroup | None = None
    takes_no_graft: str = ""

    def why_unchangeable(self) -> str:
        """Why the model takes no graft now, with the way out; empty if it does."""
        return self.takes_no_graft or self._why_unchangeable()

    def _why_unchangeable(self) -> str:
        if any(type(entry).__name__ == "ZeroRedundancyOptimizer" for entry in self.optimizers):
            return (
                "ZeroRedundancyOptimizer keeps each parameter's state on one rank only, so a "
                "rollback could not bring it back: use its inner optimizer on every rank"
            )
        if self.replicas is None:
            return ""
        if self.copies and self.replicas.layout is not None:
            return (
                "a running average (copies=) of a model that is spread over ranks cannot follow a "
                "graft: attach without copies"
            )
        return self.replicas.why_not()

    def why_no_remedy(self) -> str:
        """The same for a remedy, and for a merge."""
        reason = self._why_unchangeable()
        return reason or ("" if self.replicas is None else self.replicas.why_no_remedy())


BARE = Surroundings()  # a model that nothing trains
