"""What a script keeps of its model by itself, such as averages of its weights.

A graft comes there too, or not at all.
"""

from __future__ import annotations

import numpy as np
from torch import nn

from esper import grafting
from esper.contracts import HealthFrame, Signal
from esper.exceptions import IncompatibleLayerError
from esper.grafting import Surroundings
from esper.grafting.companions.companion import with_companions
from esper.grafting.found_copies.search import Copies
from esper.sdk import checkpoint
from esper.sdk.adaptation import Operation
from esper.sdk.findings import Findings, LedgerWatch, average_found
from esper.sdk.layers import Layers


class ScriptCopies:
    """Looks for them, and refuses a graft where one could not follow.

    Args:
        copies: those that are known; more are found here.
    """

    def __init__(
        self,
        model: nn.Module,
        copies: Copies,
        surroundings: Surroundings,
        *,
        layers: Layers,
        ledger: LedgerWatch,
        findings: Findings,
    ) -> None:
        self._model = model
        self._copies = copies
        self._surroundings = surroundings
        self._layers = layers
        self._ledger = ledger
        self._findings = findings

    def prepare(self, operation: Operation, *, by_script: bool) -> None:
        """Averages of the model that nobody named get its next graft too.

        Args:
            by_script: the script asks for the graft by itself, so it knows what it keeps by hand.

        Raises:
            IncompatibleLayerError: the script keeps one by hand, or one of a part, which cannot;
                or the optimizer that would train the graft makes no steps any more.
        """
        if checkpoint.is_sharded(self._surroundings):
            return  # comparing weights that are spread over ranks would be a collective call
        self._copies.search()
        for _ in self._copies.settle():
            self._findings.add(average_found())
        by_hand = self._copies.by_hand
        by_hand.look()
        by_hand.awaited = by_hand.awaited and by_script
        reason = self._why_not_at(operation.layer.name, by_script=by_script)
        if reason:
            raise IncompatibleLayerError(
                layer=operation.layer.name, blueprint=operation.blueprint.slug, reason=reason
            )

    def _why_not_at(self, layer: str, *, by_script: bool) -> str:
        """Empty: a graft may come there."""
        copies, by_hand = self._copies, self._copies.by_hand
        told = by_hand.reason if by_script else by_hand.reason_for_policy
        return (
            told(layer)
            or ("" if by_script else copies.reason_for_policy())
            or copies.parts.reason(
                layer,
                with_companions(self._surroundings.optimizers),
                (own.name for own in self._layers.own if own.in_shape),
                by_script=by_script,
            )
            or copies.named.reason(self._model, layer, map(grafting.bare_copy, copies))
            or self._ledger.replaced
        )

    def find(self) -> None:
        """After each step, so that few grafts wait for the search, and for what it is to show."""
        self._copies.search_in_time()
        self._copies.look()

    def on_frame(self, frame: HealthFrame) -> None:
        """Notes which layers had a gradient: the script may clear it before the step ends."""
        known = ~np.isnan(frame.column(Signal.GRAD_NORM))
        names = (name for name, has in zip(frame.layers, known, strict=True) if has)
        self._copies.parts.on_gradients(names)

    def must_wait(self) -> bool:
        """A graft that is no line of the script should come some steps later: whether the script
        keeps an average by hand is not known yet."""
        if checkpoint.is_sharded(self._surroundings):
            return False
        return self._copies.search_for_graft() or self._copies.by_hand.undecided

    @property
    def is_watched(self) -> bool:
        """A graft waits for what the script does in its next steps."""
        return self._copies.by_hand.awaited and self._copies.by_hand.undecided
