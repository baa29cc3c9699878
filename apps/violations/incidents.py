"""Violations and findings of one run with one cause, as one incident.

An incident is no row of its own: its state follows from its records.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from apps.runs.models import Run
from apps.violations.models import Violation
from esper.contracts import Severity

RECORDS_READ = 2000  # newest first


class IncidentState(StrEnum):
    OPEN = "open"  # a record is neither acknowledged nor over
    ACKNOWLEDGED = "acknowledged"
    RESOLVED = "resolved"  # everything that was not acknowledged was over by itself


@dataclass(frozen=True, slots=True)
class Incident:
    """Records with the same run and cause, the newest first."""

    records: tuple[Violation, ...]

    @property
    def key(self) -> str:
        """The uid of its newest record."""
        return self.newest.uid

    @property
    def newest(self) -> Violation:
        return self.records[0]

    @property
    def first(self) -> Violation:
        return self.records[-1]

    @property
    def run(self) -> Run | None:
        return self.newest.run

    @property
    def unseen(self) -> list[Violation]:
        """Those that a person has still to acknowledge."""
        return [
            row for row in self.records if row.acknowledged_at is None and row.resolved_step is None
        ]

    @property
    def state(self) -> IncidentState:
        if self.unseen:
            return IncidentState.OPEN
        over = all(row.resolved_step is not None for row in self.records)
        return IncidentState.RESOLVED if over else IncidentState.ACKNOWLEDGED

    @property
    def worst(self) -> Violation:
        """The newest of the most severe records that are open, or of all where none is."""
        order = list(Severity)
        return max(self.unseen or self.records, key=lambda row: order.index(Severity(row.severity)))

    @property
    def severity(self) -> Severity:
        return Severity(self.worst.severity)

    @property
    def since_step(self) -> int | None:
        """The first step of which it is known."""
        steps = [row.since_step if row.since_step is not None else row.step for row in self.records]
        return min((step for step in steps if step is not None), default=None)

    @property
    def since(self) -> datetime:
        return self.first.created_at

    @property
    def layers(self) -> list[str]:
        """Where it was seen; the first one is where it began."""
        return list(dict.fromkeys(row.layer for row in reversed(self.records) if row.layer))

    @property
    def remedies(self) -> list[str]:
        """Slugs of what can answer it, in the order in which to try them."""
        return list(dict.fromkeys(slug for row in self.records for slug in row.remedies))


def incidents(rows: Iterable[Violation]) -> list[Incident]:
    """Group records, newest first, and put the most severe first, then the newest."""
    groups: dict[tuple[int | None, str, str], list[Violation]] = {}
    for row in rows:
        groups.setdefault((row.run_id, row.rule, row.finding), []).append(row)
    found = [Incident(tuple(records)) for records in groups.values()]
    order = list(Severity)
    return sorted(found, key=lambda one: (-order.index(one.severity), -one.newest.pk))
