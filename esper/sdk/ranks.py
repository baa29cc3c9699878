"""How the ranks of a run stay equal: rank 0 decides, and all ranks do the same.

Each step begins with one meeting of all ranks. It carries the loss, so that the guard of rank 0
sees a NaN of any rank in the same step. It also says whether rank 0 may change or evaluate the
model in this step. Only then do the others wait for its orders, until rank 0 ends them.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from esper import blueprints
from esper.contracts import LayerInfo
from esper.exceptions import ReplicaError
from esper.fail_closed import is_the_scripts
from esper.grafting.ranks.replicas import Call, RankGroup
from esper.sdk.adaptation import Operation

Told = TypeVar("Told")

logger = logging.getLogger("esper")

COMPARED_AT = (2, 10, 50)  # steps after which the ranks compare their weights
COMPARED_EVERY = 500


@dataclass(frozen=True, slots=True)
class Order:
    """What rank 0 does at this moment; the other ranks do the same."""

    kind: str  # "graft", "undo", "evaluate", "remedy", "take back" or "stop"
    adaptation: str = ""
    layer: str = ""
    since: str = ""
    blueprint: str = ""
    remedy: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    hard: bool = False
    state: str = ""
    reason: str = ""

    @classmethod
    def graft(cls, operation: Operation) -> Order:
        return cls(
            "graft",
            adaptation=operation.uid,
            layer=operation.layer.name,
            since=operation.layer.since,
            blueprint=operation.blueprint.slug,
            config=operation.config,
            seed=operation.seed,
        )

    @classmethod
    def undo(cls, adaptation: str, *, hard: bool, state: str) -> Order:
        return cls("undo", adaptation=adaptation, hard=hard, state=str(state))

    @classmethod
    def of_remedy(cls, slug: str, layer: str, config: dict[str, Any], adaptation: str) -> Order:
        """A remedy of the server."""
        return cls("remedy", adaptation=adaptation, layer=layer, remedy=slug, config=config)

    @classmethod
    def take_back(cls, adaptation: str, *, hard: bool) -> Order:
        """A remedy of the server is undone, or ended."""
        return cls("take back", adaptation=adaptation, hard=hard)

    @classmethod
    def evaluate(cls, without: str = "") -> Order:
        return cls("evaluate", adaptation=without)

    def operation(self, layer: LayerInfo) -> Operation:
        """The same graft for this rank's own ``layer``, which may be on another device."""
        return Operation(
            layer=layer,
            blueprint=blueprints.get_blueprint(self.blueprint),
            config=self.config,
            seed=self.seed,
            uid=self.adaptation,
        )


class Ranks:
    """One rank's view of the others. With ``replicas`` None there are no others."""

    def __init__(self, replicas: RankGroup | None) -> None:
        self._replicas = replicas
        self._step_is_quiet: bool | None = None  # None: outside a step

    @property
    def alone(self) -> bool:
        return self._replicas is None

    @property
    def decides(self) -> bool:
        """This process takes decisions, talks to the server and keeps the journal."""
        return self._replicas is None or self._replicas.lead

    def meet(self, call: Call, step: int, *arguments: object) -> None:
        """A call that a script makes on all ranks; raises ``ReplicaError`` where it did not."""
        if self._replicas is not None:
            self._replicas.meet(call, step, key=json.dumps(arguments, default=repr))

    def all_agree(self, call: Call, step: int, answer: bool, *arguments: object) -> bool:
        """The answers of all ranks to the same question: True where each of them is."""
        if self._replicas is None:
            return answer
        self.meet(call, step, *arguments)
        return self._replicas.mean(float(answer)) == 1.0

    def meet_for_step(
        self,
        step: int,
        loss: float | None,
        may_operate: Callable[[], bool],
        agreed: Callable[[], bool],
    ) -> tuple[float | None, bool]:
        """(mean loss of all ranks, something may be done in this step).

        Args:
            agreed: the ranks have agreed to meet in this step; asked where they do not in each.
        """
        if self._replicas is None:
            return loss, True
        if not self._replicas.meets_each_step and not agreed():
            return loss, False
        busy = self.decides and may_operate()
        meeting = self._replicas.meet(Call.STEP, step, loss=loss, busy=busy)
        return meeting.loss, meeting.busy

    def digests(self, step: int, digest: Callable[[], float]) -> tuple[float, ...]:
        """One number of each rank's weights, at a few steps; empty in the others.

        Ranks over which the model is spread hold different weights, and are not compared.
        """
        ranks = self._replicas
        if ranks is None or ranks.layout is not None or not ranks.meets_each_step:
            return ()
        if step not in COMPARED_AT and step % COMPARED_EVERY:
            return ()
        return _told(ranks.values, digest, "the weights of this rank could not be read")

    @contextmanager
    def leading(self, busy: bool, stop_reason: Callable[[], str]) -> Iterator[None]:
        """Inside, in a busy step, rank 0 gives orders; its end tells the others to go on."""
        if self._replicas is None:
            yield
            return
        self._step_is_quiet = not busy
        try:
            yield
        finally:
            if busy:
                if stop_reason():
                    self.order(Order("stop", reason=stop_reason()))
                self._replicas.order(None)
            self._step_is_quiet = None

    def order(self, order: Order) -> None:
        """Tells the other ranks, if they wait for orders; a script calls on each rank itself.

        Raises:
            ReplicaError: they do not wait for orders in this step.
        """
        if self._replicas is None or self._step_is_quiet is None:
            return
        if self._step_is_quiet:
            raise ReplicaError("the other ranks do not expect a change in this step")
        self._replicas.order(asdict(order))

    def take_order(self) -> Order | None:
        """On the other ranks: what rank 0 does next; None when it does nothing more."""
        assert self._replicas is not None
        message = self._replicas.take_order()
        return None if message is None else Order(**message)

    def refuse(self, error: Exception) -> None:
        """This rank's vote against what all do; raises ``ReplicaError`` on the others."""
        if self._replicas is not None:
            self._replicas.vote(error)

    def mean(self, measure: Callable[[], float]) -> float:
        """Of what all ranks measure; NaN where one of them fails."""
        if self._replicas is None:
            return measure()
        return _told(self._replicas.mean, measure, "evaluate() failed on this rank")


def _told(tell: Callable[[float], Told], measure: Callable[[], float], complaint: str) -> Told:
    """The number of this rank, told to the others; NaN where it fails, as they wait for it."""
    try:
        value = measure()
    except Exception as error:
        if is_the_scripts(error):
            tell(math.nan)
            raise
        logger.exception(complaint)
        value = math.nan
    return tell(value)
