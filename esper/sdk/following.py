"""A rank that does not decide: it does at each step boundary what rank 0 does."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

from esper.contracts import AdaptationState
from esper.exceptions import UndoError
from esper.fail_closed import is_the_scripts
from esper.sdk.evaluation import Evaluations
from esper.sdk.ranks import Order, Ranks
from esper.sdk.surgery import Surgery

logger = logging.getLogger("esper")


class Follower:
    """Follows the orders of rank 0.

    Attributes:
        stop_reason: why rank 0 ended the run; empty while it goes on.
    """

    def __init__(self, ranks: Ranks, surgery: Surgery, evaluations: Evaluations) -> None:
        self._ranks = ranks
        self._surgery = surgery
        self._evaluations = evaluations
        self.stop_reason = ""

    def follow(self) -> None:
        """Until rank 0 ends its orders for this step.

        An error here does not end it: rank 0 gets it in the vote. The script's own exception, such
        as a time limit, goes on when the ranks are in step again.
        """
        interruption: Exception | None = None
        while (order := self._ranks.take_order()) is not None:
            if order.kind == "stop":
                self.stop_reason = order.reason
                continue
            try:
                self._prepared(order)()
            except Exception as error:
                if is_the_scripts(error):
                    interruption = error
                logger.warning("not done on this rank, nor on any other: %s", error)
        if interruption is not None:
            raise interruption

    def _prepared(self, order: Order) -> Callable[[], object]:
        """The order as a call, which votes even if something fails in it."""
        try:
            return self._meaning(order)
        except Exception as error:
            refuse = partial(self._ranks.refuse, error)
            if order.kind == "evaluate":
                refuse = partial(self._evaluations.take_no_part, look=bool(order.adaptation))
            if is_the_scripts(error):
                refuse()
                raise
            logger.exception("this rank cannot do what rank 0 does")
            return refuse

    def _meaning(self, order: Order) -> Callable[[], object]:
        if order.kind == "graft":
            operation = order.operation(self._surgery.layer(order.layer, order.since))
            return partial(self._surgery.apply, operation)
        if order.kind == "evaluate" and not order.adaptation:
            return self._evaluations.due_loss
        if order.kind == "remedy":
            return partial(
                self._surgery.remedies.apply_for_server,
                order.adaptation,
                order.remedy,
                order.layer,
                None,
                order.config,
            )
        if order.kind == "take back":
            return self._taking_back(order)
        adaptation = self._surgery.changes.find(order.adaptation)
        if adaptation is None:
            raise UndoError(
                f"this rank does not have the adaptation {order.adaptation!r}", layer=order.layer
            )
        if order.kind == "evaluate":
            return partial(self._evaluations.look, adaptation)
        state = AdaptationState(order.state)
        return partial(self._surgery.removals.take_out, adaptation, hard=order.hard, state=state)

    def _taking_back(self, order: Order) -> Callable[[], object]:
        receipt = self._surgery.changes.find_remedy(order.adaptation)
        if receipt is None:
            raise UndoError(
                f"this rank does not have the remedy of {order.adaptation!r}", layer=order.layer
            )
        return partial(self._surgery.remedies.take_back_for_server, receipt, hard=order.hard)
