"""Takes grafts out of the model: for the server, the guard, local mode and the user's script."""

from __future__ import annotations

from dataclasses import replace

from esper import grafting
from esper.contracts import AdaptationState, RemedyKind
from esper.exceptions import UndoError
from esper.grafting import GuardVerdict, Receipt, UndoReceipt
from esper.grafting.ranks.replicas import Call
from esper.grafting.tensors.digests import Frozen
from esper.sdk.adaptation import Adaptation
from esper.sdk.ranks import Order
from esper.sdk.surgery.after_change import AfterChange
from esper.sdk.surgery.idle_slots import IdleSlots
from esper.sdk.surgery.subject import Subject

# What an undo did, and every adaptation that is out of the model because of it.
TakenOut = tuple[UndoReceipt, tuple[Adaptation, ...]]


class Removals:
    """Takes grafts out, and tells of those that had to go with them."""

    def __init__(self, subject: Subject, after: AfterChange, idle_slots: IdleSlots) -> None:
        self._subject = subject
        self._run = subject.run
        self._changes = subject.changes
        self._reports = subject.reports
        self._after = after
        self._idle_slots = idle_slots

    def take_out(self, adaptation: Adaptation, *, hard: bool, state: AdaptationState) -> TakenOut:
        """Undo one graft. A hard undo restores the whole model, so later grafts go too.

        Args:
            state: of every adaptation that is out of the model afterwards.

        Raises:
            UndoError: it could not be taken out.
            ReplicaError: another rank could not take it out.
        """
        self._subject.ranks.order(Order.undo(adaptation.uid, hard=hard, state=state))
        receipt, before = adaptation.receipt, tuple(self._changes.remedies)
        if receipt is None:
            raise UndoError("this graft is not in the model any more", layer=adaptation.layer)
        report = receipt.undo(hard=hard)
        if hard:
            self._changes.drop_since(adaptation)
            self._run.go_back(adaptation.step)
        else:
            self._run.give_up(adaptation.step)  # the losses since were those of a larger model
        gone = self._changes.mark_gone(state)
        self._idle_slots.remove()
        self._after.follow_up(restored=True)
        self._after.say_what_was_kept(adaptation.blueprint, adaptation.layer, report)
        self._after.report_undone(before, report)
        return report, gone

    def take_out_for_server(self, adaptation: Adaptation, *, hard: bool) -> TakenOut:
        """As the server ordered. It gets a report of other grafts that had to go with this one."""
        report, gone = self.take_out(adaptation, hard=hard, state=AdaptationState.ROLLED_BACK)
        others = [entry for entry in gone if entry is not adaptation]
        self._reports.removed(gone, report, "ordered by the server")
        self._reports.taken_out(others, report, self._run.step, RemedyKind.UNDO, meant=adaptation)
        return report, gone

    def take_out_for_guard(
        self, adaptation: Adaptation, verdict: GuardVerdict
    ) -> tuple[Adaptation, ...]:
        """At once; to the state before the graft, if its snapshot was kept."""
        report, gone = self.take_out(
            adaptation, hard=adaptation.restorable, state=AdaptationState.ROLLED_BACK
        )
        self._reports.rolled_back(gone, report, self._run.step, verdict)
        return gone

    def undo(self, receipt: Receipt, *, hard: bool) -> UndoReceipt:
        """A script undoes a graft; see :meth:`Session.undo`."""
        if not hard and self._changes.left_by_load(receipt):  # what is wanted has happened
            after = Frozen.of(self._subject.model)
            return UndoReceipt(hard=False, exact=False, pause_ms=0.0, _after=after)
        return self._take_out_for_script(receipt, RemedyKind.UNDO, hard=hard)

    def prune(self, receipt: Receipt) -> UndoReceipt:
        """A script removes a graft for good; see :meth:`Session.prune`."""
        return self._take_out_for_script(receipt, RemedyKind.PRUNE, hard=False)

    def _take_out_for_script(
        self, receipt: Receipt, remedy: RemedyKind, *, hard: bool
    ) -> UndoReceipt:
        if self._is_of_another_session(receipt):
            return self._take_out_of_another_session(receipt, remedy, hard=hard)
        adaptation = self._changes.of_receipt(receipt)
        self._subject.meet(Call.UNDO, adaptation.uid, str(remedy), hard)
        report, gone = self.take_out(adaptation, hard=hard, state=AdaptationState.REVERTED)
        self._reports.removed(gone, report, "asked for by the script")
        self._reports.taken_out(gone, report, self._run.step, remedy, meant=adaptation)
        return report

    def _is_of_another_session(self, receipt: Receipt) -> bool:
        """It is in this model, by an earlier session or by ``esper.graft``."""
        here = receipt.is_of(self._subject.model) and receipt.present
        return here and not self._changes.knows(receipt)

    def _take_out_of_another_session(
        self, receipt: Receipt, remedy: RemedyKind, *, hard: bool
    ) -> UndoReceipt:
        """No record of this session has it; what came later in this session goes with it."""
        before = tuple(self._changes.remedies)
        self._subject.meet(Call.UNDO, receipt.layer, receipt.blueprint, str(remedy), hard)
        report = receipt.undo(hard=hard)
        if hard:
            self._changes.drop_younger(receipt)
        grafting.let_follow(self._subject.model, self._subject.surroundings.copies)
        self.notice_gone()
        self._idle_slots.remove()
        self._after.follow_up(restored=True)
        self._after.say_what_was_kept(receipt.blueprint, receipt.layer, report)
        self._after.report_undone(before, report)
        return report

    def notice_gone(self) -> None:
        """Grafts of this session that ``receipt.undo()`` or another session has taken out.

        Those whose layer has another name now go on under that name.
        """
        gone = self._changes.mark_gone(AdaptationState.REVERTED)
        if not gone:
            return
        for entry in gone:
            if entry.receipt is not None:
                entry.receipt.notice_gone()
        report = UndoReceipt(hard=False, exact=False, pause_ms=0.0)
        reason = "receipt.undo() was called, or another session took it out"
        # Whether the weights were restored is not known here, so nothing is said of them.
        self._reports.removed(gone, replace(report, hard=True), reason)
        self._reports.taken_out(gone, report, self._run.step, RemedyKind.UNDO, meant=gone[0])
        self._after.follow_up(restored=True)
