"""Reports to the server of changes that it did not order: by the guard and by the script."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from esper.contracts import RemedyKind
from esper.contracts.codec import number_to_wire
from esper.grafting import GuardVerdict, RemedyReceipt, UndoReceipt
from esper.sdk.adaptation import Adaptation
from esper.sdk.transport import PendingReport, TransportQueues

_LONGEST_LIST = 20  # a layer may have thousands of dead units


class SurgeryReports:
    """Queues a report of each change.

    Args:
        queues: to the server; None where this process talks to none.
    """

    def __init__(self, queues: TransportQueues | None) -> None:
        self._queues = queues

    def remedy(self, receipt: RemedyReceipt, merged: Adaptation | None = None) -> None:
        """A remedy is in effect; ``merged`` is the adaptation that it folded into its host."""
        body = _body(receipt.remedy, receipt.layer, receipt.step, receipt.pause_ms)
        body |= {"key": receipt.key, "details": _short(receipt.details)}
        body["adaptation"] = _known(merged)
        self._queue_remedy(
            body,
            lambda: {
                "digest_before": receipt.digest_before,
                "digest_after": receipt.digest_after,
            },
        )

    def undone(self, receipts: Iterable[RemedyReceipt], report: UndoReceipt, step: int) -> None:
        """Remedies that are not in effect any more."""
        for receipt in receipts:
            body = _body(RemedyKind.UNDO, receipt.layer, step, report.pause_ms)
            body |= {"undoes": receipt.key, "exact": report.exact, "digest_after": report.digest}
            self._queue_remedy(body)

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
            body = _body(remedy, entry.layer, step, report.pause_ms)
            details = {"blueprint": entry.blueprint}
            if entry is not meant:
                details["along_with"] = f"{meant.blueprint} at {meant.layer}"
            body |= {"adaptation": _known(entry), "details": details}
            body |= {"exact": report.exact, "digest_after": report.digest}
            self._queue_remedy(body)

    def rolled_back(
        self, entries: Sequence[Adaptation], report: UndoReceipt, step: int, verdict: GuardVerdict
    ) -> None:
        """Grafts that the guard took out."""
        for entry in entries:
            if entry.local:
                continue
            body = {
                "adaptation": entry.uid,
                "step": step,
                "rule": str(verdict.rule),
                "observed": number_to_wire(verdict.observed),
                "limit": number_to_wire(verdict.limit),
                "pause_ms": report.pause_ms,
                "exact": report.exact,
                "digest_after": report.digest,
            }
            self._queue(PendingReport("rollbacks", body))

    def _queue_remedy(
        self, body: dict[str, Any], rest: Callable[[], dict[str, Any]] = dict
    ) -> None:
        self._queue(PendingReport("remedies", body, rest))

    def _queue(self, report: PendingReport) -> None:
        if self._queues is not None:
            self._queues.queue_report(report)


def _body(remedy: str, layer: str, step: int, pause_ms: float) -> dict[str, Any]:
    return {
        "key": str(uuid.uuid4()),
        "remedy": str(remedy),
        "layer": layer,
        "step": step,
        "pause_ms": number_to_wire(pause_ms),
    }


def _known(entry: Adaptation | None) -> str:
    """Its id at the server, which does not know a script's own grafts."""
    return "" if entry is None or entry.local else entry.uid


def _short(details: dict[str, Any]) -> dict[str, Any]:
    """For a page: a long list becomes its length, and numbers become ones that JSON has."""
    short: dict[str, Any] = {}
    for name, value in details.items():
        if isinstance(value, list) and len(value) > _LONGEST_LIST:
            short[name] = f"{len(value)} of them"
        else:
            short[name] = number_to_wire(value) if isinstance(value, float) else value
    return short
