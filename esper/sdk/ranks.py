"""How the ranks of a run keep together: rank 0 decides, all do.

Each step begins with one meeting of all ranks. It carries the loss, so that a NaN on any rank is
seen by the guard of rank 0 in the same step, and rank 0's word whether this step may change or
evaluate the model. Only then the others wait for its orders, until it says that there are no more.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from esper import blueprints
from esper.contracts import LayerInfo
from esper.exceptions import ReplicaError
from esper.grafting import Replicas
from esper.grafting.replicas import Call
from esper.sdk.surgeon import Operation

logger = logging.getLogger("esper")


@dataclass(frozen=True, slots=True)
class Order:
    """What rank 0 does at this moment, for the others to do with it."""

    kind: str  # "graft", "undo", "evaluate" or "stop"
    adaptation: str = ""
    layer: str = ""
    blueprint: str = ""
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
            blueprint=operation.blueprint.slug,
            config=operation.config,
            seed=operation.seed,
        )

    @classmethod
    def undo(cls, adaptation: str, *, hard: bool, state: str) -> Order:
        return cls("undo", adaptation=adaptation, hard=hard, state=str(state))

    @classmethod
    def evaluate(cls, without: str = "") -> Order:
        return cls("evaluate", adaptation=without)

    def operation(self, layer: Callable[[str], LayerInfo]) -> Operation:
        """The same graft for this rank's own layer, which may be on another device."""
        return Operation(
            layer=layer(self.layer),
            blueprint=blueprints.get_blueprint(self.blueprint),
            config=self.config,
            seed=self.seed,
            uid=self.adaptation,
        )


class Ranks:
    """One rank's place among the others. With ``replicas`` None there are no others.

    Attributes:
        stop_reason: why rank 0 ended the run; empty while it goes on, and on rank 0.
    """

    def __init__(self, replicas: Replicas | None) -> None:
        self._replicas = replicas
        self._step_is_quiet: bool | None = None  # None: outside a step
        self.stop_reason = ""

    @property
    def alone(self) -> bool:
        return self._replicas is None

    @property
    def decides(self) -> bool:
        """This process takes decisions, talks to the server and keeps the journal."""
        return self._replicas is None or self._replicas.lead

    @property
    def shared_layers(self) -> tuple[LayerInfo, ...]:
        return () if self._replicas is None else (self._replicas.whole_model,)

    def meet(self, call: Call, step: int, *arguments: object) -> None:
        """A call that a script makes on all ranks; raises ``ReplicaError`` where it did not."""
        if self._replicas is not None:
            self._replicas.meet(call, step, key=json.dumps(arguments, default=repr))

    @contextmanager
    def all_or_none(self) -> Iterator[None]:
        """After a meeting: what one rank refuses inside, none does; raises on each of them."""
        error: Exception | None = None
        try:
            yield
        except Exception as found:
            error = found
            raise
        finally:
            if self._replicas is not None:
                self._replicas.vote(error)

    def meet_for_step(
        self, step: int, loss: float | None, may_operate: Callable[[], bool]
    ) -> tuple[float | None, bool]:
        """(mean loss of all ranks, something may be done in this step)."""
        if self._replicas is None:
            return loss, True
        busy = self.decides and may_operate()
        meeting = self._replicas.meet(Call.STEP, step, loss=loss, busy=busy)
        return meeting.loss, meeting.busy

    @contextmanager
    def leading(self, busy: bool, stop_reason: Callable[[], str]) -> Iterator[None]:
        """Inside, in a busy step, rank 0 gives orders; at its end the others are let go."""
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
        """Tells the other ranks, where they wait to be told; a script's call they make themselves.

        Raises:
            ReplicaError: they do not listen in this step.
        """
        if self._replicas is None or self._step_is_quiet is None:
            return
        if self._step_is_quiet:
            raise ReplicaError("the other ranks do not expect a change in this step")
        self._replicas.order(asdict(order))

    def follow(self, prepare: Callable[[Order], Callable[[], object]]) -> None:
        """Does what rank 0 does, until it says that there is no more.

        An error here is no reason to stop following: rank 0 hears of it in the vote.

        Args:
            prepare: what an order means here, as a call that votes whatever happens in it.
        """
        assert self._replicas is not None
        while (message := self._replicas.take_order()) is not None:
            order = Order(**message)
            if order.kind == "stop":
                self.stop_reason = order.reason
                continue
            try:
                self._prepared(order, prepare)()
            except Exception as error:
                logger.warning("not done on this rank, nor on any other: %s", error)

    def _prepared(
        self, order: Order, prepare: Callable[[Order], Callable[[], object]]
    ) -> Callable[[], object]:
        replicas = self._replicas
        assert replicas is not None
        try:
            return prepare(order)
        except Exception as error:
            logger.exception("this rank cannot do what rank 0 does")
            if order.kind == "evaluate":
                return partial(replicas.mean, math.nan)
            return partial(replicas.vote, error)

    def mean(self, measure: Callable[[], float]) -> float:
        """Of what all ranks measure; NaN, unknown, where one of them fails."""
        if self._replicas is None:
            return measure()
        try:
            value = measure()
        except Exception:
            logger.exception("evaluate() failed on this rank")
            value = math.nan
        return self._replicas.mean(value)
