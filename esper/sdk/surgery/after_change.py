"""What follows a change of the model, whoever made it."""

from __future__ import annotations

from collections.abc import Sequence

from esper.grafting import RemedyReceipt, UndoReceipt
from esper.health import HealthSampler
from esper.health.sharded import ShardedSampler
from esper.sdk.findings import LedgerWatch, fewer_snapshots, undone_in_part
from esper.sdk.surgery.subject import Subject


class AfterChange:
    """Lets the run's instruments look at the changed model, and says what can be undone.

    Args:
        snapshot_limit: bytes of memory that the snapshots may take together.

    Attributes:
        sampler: measures the model's health; None before the first complete step.
    """

    def __init__(self, subject: Subject, ledger: LedgerWatch, snapshot_limit: int) -> None:
        self._subject = subject
        self._ledger = ledger
        self._snapshot_limit = snapshot_limit
        self._told_of_limit = False
        self.sampler: HealthSampler | ShardedSampler | None = None

    def follow_up(self, *, restored: bool = False) -> None:
        """The instruments look at the model as it is now."""
        self._subject.run.wake()
        if self.sampler is not None:
            self.sampler.refresh()
        self._ledger.on_change(restored=restored)

    def tell_replicas(self) -> None:
        """DDP's reducer is made for the present parameters; no rank waits for another."""
        if self._subject.surroundings.replicas is not None:
            self._subject.surroundings.replicas.parameters_changed()

    def settle_snapshots(self, *, wait: bool = False) -> None:
        """Looks whether snapshots have arrived on disk.

        Args:
            wait: until they have; before the next one is taken, so that one copy at most is in
                memory beyond the limit.
        """
        self._subject.changes.finish_spilling(wait=wait)
        self.say_what_can_be_undone()

    def say_what_can_be_undone(self) -> None:
        """Once in a run, a finding: the limit keeps fewer snapshots than there should be."""
        changes = self._subject.changes
        if not self._subject.ranks.alone:  # at the same step on all ranks
            changes.finish_spilling(wait=True)
        shortened, changes.shortened = changes.shortened, None
        if shortened is not None and not self._told_of_limit:
            self._told_of_limit = True
            why = changes.disk_error
            self._subject.findings.add(fewer_snapshots(*shortened, self._snapshot_limit, why))

    def say_what_was_kept(self, change: str, layer: str, report: UndoReceipt) -> None:
        """A finding, where an undo has left something of the script as it was, or rewound it."""
        if report.kept or report.not_restored or report.rewound:
            self._subject.findings.add(undone_in_part(change, layer, report))

    def report_undone(
        self,
        before: Sequence[RemedyReceipt],
        report: UndoReceipt,
        *,
        ordered: RemedyReceipt | None = None,
    ) -> None:
        """The remedies that were in effect before an undo and are not any more.

        Args:
            ordered: the one whose undo the server ordered.
        """
        subject = self._subject
        undone = [receipt for receipt in before if receipt not in subject.changes.remedies]
        subject.reports.undone(undone, report, subject.run.step, ordered=ordered)
