"""Grafts that come and go with a state: of a checkpoint, or of a plain state dict."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

from esper import grafting
from esper.contracts import AdaptationState, RemedyKind
from esper.exceptions import ConfigurationError
from esper.grafting import UndoReceipt
from esper.grafting.ranks.replicas import Joint
from esper.grafting.slot import find_host, slot_of
from esper.grafting.state_dicts import Difference
from esper.remedies import Stop
from esper.sdk import checkpoint, framework_loads
from esper.sdk.adaptation import Adaptation
from esper.sdk.findings import came_back, left_by_load
from esper.sdk.surgery.after_change import AfterChange
from esper.sdk.surgery.idle_slots import IdleSlots
from esper.sdk.surgery.subject import Subject


class Loads:
    """Brings the grafts of the model in line with a state."""

    def __init__(
        self, subject: Subject, after: AfterChange, idle_slots: IdleSlots, stop: Stop
    ) -> None:
        self._subject = subject
        self._changes = subject.changes
        self._after = after
        self._idle_slots = idle_slots
        self._stop = stop

    # -- checkpoints ---------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The grafts, their weights, all optimizer state by name, and the remedies."""
        subject = self._subject
        return checkpoint.state_of(subject.model, subject.surroundings, self._changes)

    def load_state_dict(self, state: dict[str, Any], joint: Joint) -> None:
        """Rebuild what :meth:`state_dict` described; see :func:`checkpoint.load`."""
        if self._changes.grafted:
            raise ConfigurationError("this model carries grafts already; load into a fresh one")
        subject = self._subject
        adaptations, receipts = checkpoint.load(
            subject.model, subject.surroundings, state, joint, self._stop
        )
        self._changes.resume(adaptations, receipts)
        for adaptation in adaptations:
            self.follow(adaptation)

    # -- plain states that the script loads ----------------------------------------------------

    def follow_state(self, difference: Difference) -> None:
        """The script loads a state with other grafts: the model gets those of the state.

        Each rank does so by itself, because scripts often load the best state for a last test on
        one rank alone: it would wait for the others in vain.

        Raises:
            ConfigurationError: a graft of the state cannot be built here; the model is as before.
        """
        model = self._subject.model
        grafting.check_manifest(model, difference.coming, self._subject.surroundings)
        for layer, slug in difference.leaving:
            slot = slot_of(find_host(model, layer))
            if slot is not None and slug in slot.grafts():
                slot.leave(slug)
        if difference.coming:
            self._bring_back(difference.coming)

    def _bring_back(self, entries: Sequence[dict[str, Any]]) -> None:
        """Builds grafts that were in the model when the state was saved; torch loads the weights.

        They count as kept: the script chose the state that has them.
        """
        subject = self._subject
        receipts = grafting.rebuild(subject.model, entries, subject.surroundings)
        grafting.let_follow(subject.model, subject.surroundings.copies)
        self._after.tell_replicas()
        for receipt in receipts:
            adaptation = self._changes.bring_back(receipt)
            self.follow(adaptation)
            subject.reports.came_back(adaptation)
            subject.findings.add(came_back(adaptation))
        self._after.follow_up(restored=True)

    def follow(self, adaptation: Adaptation) -> None:
        """A loaded state without this graft takes it out of the model and of this record."""
        slot = slot_of(find_host(self._subject.model, adaptation.layer))
        if slot is None or adaptation.blueprint not in slot.grafts():
            return
        mine = weakref.ref(self)  # the session ends when its script drops it

        def leave() -> bool:
            loads = mine()
            return loads is not None and loads._left(adaptation)

        slot.on_leave(adaptation.blueprint, leave)
        framework_loads.install()

    def _left(self, adaptation: Adaptation) -> bool:
        """True: a finding tells of it."""
        subject = self._subject
        self._after.tell_replicas()
        gone = self._changes.mark_gone(AdaptationState.REVERTED)
        adaptation.left_by_load = True
        if adaptation.receipt is not None:
            adaptation.receipt.forget_snapshot()
        self._idle_slots.left_by_load = True
        self._after.follow_up(restored=True)
        report = UndoReceipt(hard=False, exact=False, pause_ms=0.0)
        subject.reports.taken_out(gone, report, subject.run.step, RemedyKind.UNDO, meant=adaptation)
        subject.reports.left_by_load(gone)
        subject.findings.add(left_by_load(adaptation))
        return True
