"""Says each change of the model to the user, and reports to the server what it did not order.

Not ordered by the server is what the guard and the script do.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from esper.contracts import RemedyKind
from esper.contracts.codec import number_to_wire
from esper.contracts.protocol import Message, RemedyReport, Rollback
from esper.grafting import GuardVerdict, RemedyReceipt, UndoReceipt
from esper.sdk.adaptation import Adaptation
from esper.sdk.announcing import Announcer
from esper.sdk.transport import PendingReport, TransportQueues

_LONGEST_LIST = 20  # a layer may have thousands of dead units


class SurgeryReports:
    """Announces each change, and queues a report of it.

    Args:
        queues: to the server; None where this process talks to none.
        announcer: says it to the user.
    """

    def __init__(self, queues: TransportQueues | None, announcer: Announcer) -> None:
        self._queues = queues
        self._announcer = announcer

    def grafted(self, adaptation: Adaptation) -> None:
        """A graft is in the model."""
        self._announcer.grafted(adaptation)

    def kept(self, adaptation: Adaptation, reason: str) -> None:
        """A graft has passed its probation."""
        self._announcer.kept(adaptation, reason)

    def removed(self, gone: Sequence[Adaptation], report: UndoReceipt, reason: str) -> None:
        """Grafts were taken out, by order of the server or by a verdict; it is not reported."""
        self._announcer.taken_out(gone, report, reason)

    def left_by_load(self, gone: Sequence[Adaptation]) -> None:
        """The script loaded a state without these grafts."""
        self._announcer.left_by_load(gone)

    def came_back(self, adaptation: Adaptation) -> None:
        """The script loaded a state with this graft."""
        self._announcer.came_back(adaptation)

    def remedy(
        self, receipt: RemedyReceipt, merged: Adaptation | None = None, finding: str = ""
    ) -> None:
        """A remedy is in effect.

        Args:
            merged: the adaptation that it folded into its host.
            finding: slug of the rule whose finding it answers.
        """
        self._announcer.remedy(receipt, finding)
        if receipt.adaptation:
            return  # the server has ordered it, and gets an answer
        details, adaptation = short_details(receipt.details), _known(merged)
        self._queue(
            "remedies",
            lambda epoch: RemedyReport(
                epoch=epoch,
                key=receipt.key,
                remedy=RemedyKind(receipt.remedy),
                layer=receipt.layer,
                step=receipt.step,
                details=details,
                pause_ms=receipt.pause_ms,
                adaptation=adaptation,
                digest_before=receipt.digest_before,  # hashes the model
                digest_after=receipt.digest_after,
            ),
        )

    def undone(
        self,
        receipts: Iterable[RemedyReceipt],
        report: UndoReceipt,
        step: int,
        *,
        ordered: RemedyReceipt | None = None,
    ) -> None:
        """Remedies that are not in effect any more.

        Args:
            ordered: the one that the server has ordered to take back.
        """
        for receipt in receipts:
            self._announcer.remedy_undone(receipt, report)
            if receipt is ordered:
                continue
            self._queue(
                "remedies",
                partial(
                    _remedy_report,
                    report,
                    key=str(uuid.uuid4()),
                    remedy=RemedyKind.UNDO,
                    layer=receipt.layer,
                    step=step,
                    adaptation=receipt.adaptation,
                    undoes="" if receipt.adaptation else receipt.key,
                ),
            )

    def taken_out(
        self,
        entries: Iterable[Adaptation],
        report: UndoReceipt,
        step: int,
        remedy: RemedyKind,
        *,
        meant: Adaptation,
    ) -> None:
        """Grafts that are not in the model any more, without an order of the server.

        Args:
            meant: the one that was to be taken out; the others had to go with it.
        """
        for entry in entries:
            details = {"blueprint": entry.blueprint}
            if entry is not meant:
                details["along_with"] = f"{meant.blueprint} at {meant.layer}"
            self._queue(
                "remedies",
                partial(
                    _remedy_report,
                    report,
                    key=str(uuid.uuid4()),
                    remedy=remedy,
                    layer=entry.layer,
                    step=step,
                    adaptation=_known(entry),
                    details=details,
                    back_to_step=meant.step if report.hard else -1,
                ),
            )

    def rolled_back(
        self, entries: Sequence[Adaptation], report: UndoReceipt, step: int, verdict: GuardVerdict
    ) -> None:
        """Grafts that the guard took out."""
        self._announcer.taken_out(entries, report, verdict.text, level=logging.WARNING)
        back_to = min((entry.step for entry in entries), default=-1) if report.hard else -1
        for entry in entries:
            if entry.local:
                continue
            self._queue(
                "rollbacks",
                partial(
                    _rollback,
                    report,
                    adaptation=entry.uid,
                    step=step,
                    rule=verdict.rule,
                    observed=verdict.observed,
                    limit=verdict.limit,
                    back_to_step=back_to,
                ),
            )

    def _queue(self, path: str, build: Callable[[int], Message]) -> None:
        if self._queues is not None:
            self._queues.queue_report(PendingReport(path, build))


def _remedy_report(undone: UndoReceipt, epoch: int, **members: Any) -> RemedyReport:
    return RemedyReport(epoch=epoch, **_result(undone), **members)


def _rollback(undone: UndoReceipt, epoch: int, **members: Any) -> Rollback:
    return Rollback(epoch=epoch, **_result(undone), **members)


def _result(undone: UndoReceipt) -> dict[str, Any]:
    """Fields of a report. Waits until the model is hashed, so not for the training thread."""
    return {
        "pause_ms": undone.pause_ms,
        "exact": undone.exact,
        "digest_after": undone.digest,
    }


def _known(entry: Adaptation | None) -> str:
    """Its id at the server, which does not know a script's own grafts."""
    return "" if entry is None or entry.local else entry.uid


def short_details(details: dict[str, Any]) -> dict[str, Any]:
    """For a page: a long list becomes its length, and numbers become ones that JSON has."""
    short: dict[str, Any] = {}
    for name, value in details.items():
        if isinstance(value, list) and len(value) > _LONGEST_LIST:
            short[name] = f"{len(value)} of them"
        else:
            short[name] = number_to_wire(value) if isinstance(value, float) else value
    return short
