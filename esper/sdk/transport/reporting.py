"""Reports of what a script does to its model by itself: remedies, and grafts taken out."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable
from typing import Any

from esper.contracts import RemedyKind
from esper.contracts.codec import number_to_wire
from esper.grafting import RemedyReceipt, UndoReceipt
from esper.sdk.surgeon import Adaptation
from esper.sdk.transport.queues import PendingReport

_LONGEST_LIST = 20  # a layer may have thousands of dead units


class SurgeryReports:
    """Queues a report of each change for the server.

    Args:
        queue_report: queues it, where there is a server.
    """

    def __init__(self, queue_report: Callable[[PendingReport], None]) -> None:
        self._queue_report = queue_report

    def remedy(self, receipt: RemedyReceipt, merged: Adaptation | None = None) -> None:
        """A remedy is in effect; ``merged`` is the adaptation that it folded into its host."""
        body = _body(receipt.remedy, receipt.layer, receipt.step, receipt.pause_ms)
        body |= {"key": receipt.key, "details": _short(receipt.details)}
        body["adaptation"] = _known(merged)
        self._tell(
            body,
            lambda: {
                "digest_before": receipt.digest_before,
                "digest_after": receipt.digest_after,
            },
        )

    def undone(self, receipts: Iterable[RemedyReceipt], report: UndoReceipt, step: int) -> None:
        """Remedies that are in effect no more."""
        for receipt in receipts:
            body = _body(RemedyKind.UNDO, receipt.layer, step, report.pause_ms)
            body |= {"undoes": receipt.key, "exact": report.exact, "digest_after": report.digest}
            self._tell(body)

    def taken_out(
        self,
        entries: Iterable[Adaptation],
        report: UndoReceipt,
        step: int,
        remedy: RemedyKind,
        *,
        meant: Adaptation,
    ) -> None:
        """Grafts that are in the model no more, without an order of the server.

        Args:
            meant: the one that was to go; the others had to go along.
        """
        for entry in entries:
            body = _body(remedy, entry.layer, step, report.pause_ms)
            details = {"blueprint": entry.blueprint}
            if entry is not meant:
                details["along_with"] = f"{meant.blueprint} at {meant.layer}"
            body |= {"adaptation": _known(entry), "details": details}
            body |= {"exact": report.exact, "digest_after": report.digest}
            self._tell(body)

    def _tell(self, body: dict[str, Any], rest: Callable[[], dict[str, Any]] = dict) -> None:
        self._queue_report(PendingReport("remedies", body, rest))


def _body(remedy: str, layer: str, step: int, pause_ms: float) -> dict[str, Any]:
    return {
        "key": str(uuid.uuid4()),
        "remedy": str(remedy),
        "layer": layer,
        "step": step,
        "pause_ms": number_to_wire(pause_ms),
    }


def _known(entry: Adaptation | None) -> str:
    """Its id at the server, which knows nothing of a script's own grafts."""
    return "" if entry is None or entry.local else entry.uid


def _short(details: dict[str, Any]) -> dict[str, Any]:
    """As it can be read on a page: of a long list its length, and numbers that JSON has."""
    short: dict[str, Any] = {}
    for name, value in details.items():
        if isinstance(value, list) and len(value) > _LONGEST_LIST:
            short[name] = f"{len(value)} of them"
        else:
            short[name] = number_to_wire(value) if isinstance(value, float) else value
    return short
