"""What Tamiyo knows about one run, kept fresh from two sources: snapshots and the stream."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from esper.contracts import HealthFrame, RunSnapshot, SafetyPolicy, protocol, unpack_bytes
from esper.contracts.protocol import Active
from esper.exceptions import CodecError
from esper.services.tamiyo.stream import HealthEntry
from esper.services.tamiyo.wire import RunReport

FRAMES_KEPT = protocol.FRAMES_OF_ENTRY
GAP_FACTOR = 3.0  # several Tamiyos share a stream, so one missing frame is normal


class RunWatch:
    """Rolling state of one run: the latest snapshot, extended by the entries since.

    Attributes:
        undecided: there is evidence without a decision.
        judged: adaptations whose verdict was sent.
        held_until: (layer, adaptation type) -> monotonic time; the server refused it until then.
        declined_at: what was declined -> monotonic time of the report.
    """

    def __init__(self, uid: str) -> None:
        self.uid = uid
        self.lock = asyncio.Lock()
        self.undecided = False
        self.judged: set[str] = set()
        self.held_until: dict[tuple[str, str], float] = {}
        self.declined_at: dict[tuple[str, ...], float] = {}
        self._report: RunReport | None = None
        self._taken_at = -math.inf
        self._newest_at = math.nan  # seconds since the epoch
        self._stale = True

    @property
    def report(self) -> RunReport:
        if self._report is None:
            raise LookupError(f"run {self.uid} has no snapshot yet")
        return self._report

    @property
    def known(self) -> bool:
        """False until the first snapshot."""
        return self._report is not None

    @property
    def limits(self) -> SafetyPolicy:
        return self.report.limits

    @property
    def active(self) -> tuple[Active, ...]:
        return self._report.active if self._report else ()

    def outdate(self) -> None:
        """Something happened that only a new snapshot shows."""
        self._stale = True

    def needs_snapshot(self, entries: Sequence[HealthEntry], *, max_age_seconds: float) -> bool:
        """True at the start, after an event or a finding, on a new epoch, on a gap, and in time."""
        if self._report is None or self._stale or any(entry.findings for entry in entries):
            return True
        if time.monotonic() - self._taken_at >= max_age_seconds:
            return True
        snapshot = self._report.snapshot
        newer = [entry for entry in entries if entry.step > snapshot.step]
        if len(newer) >= FRAMES_KEPT and all(entry.epoch == snapshot.epoch for entry in newer):
            return False  # they are all that is looked at, whatever is missing before them
        return any(entry.epoch > snapshot.epoch for entry in entries) or (
            bool(newer) and self._is_gap(min(entry.step for entry in newer))
        )

    def take(self, report: RunReport) -> None:
        """Replace what we know by a snapshot of the server."""
        old = self._report.snapshot if self._report else None
        new = report.snapshot
        newest = _last_step(new)
        same_epoch = old is not None and old.epoch == new.epoch
        if (
            old is None
            or not same_epoch
            or newest > _last_step(old)
            # The decision on this frame had a part of the losses only, so it is made again.
            or _losses_until(new, newest) > _losses_until(old, newest)
            # What the run lacks was found after the last frame.
            or _findings(new) - _findings(old)
        ):
            self.undecided = bool(new.frames)
            self._newest_at = time.time() - new.age_seconds
        self._report = report
        self._taken_at = time.monotonic()
        self._stale = False
        self.judged &= {adaptation.uid for adaptation in report.active}

    def absorb(self, entries: Sequence[HealthEntry]) -> None:
        """Append newer frames; older ones, and those of another epoch, are left out."""
        for entry in sorted(entries, key=lambda entry: entry.step):
            self._absorb_one(entry)

    def snapshot(self, *, learning: bool) -> RunSnapshot:
        """What ``decide`` may look at now; without learning it knows no cases and no variants."""
        age = time.time() - self._newest_at
        # Two clocks may differ, hence never below 0; and an unknown age (NaN) stays unknown.
        snapshot = replace(self.report.snapshot, age_seconds=0.0 if age < 0 else age)
        return snapshot if learning else replace(snapshot, experience={}, variants=())

    def _absorb_one(self, entry: HealthEntry) -> None:
        snapshot = self.report.snapshot
        if entry.epoch != snapshot.epoch or entry.step <= _last_step(snapshot):
            return
        names = tuple(layer.name for layer in snapshot.layers)
        try:
            values = unpack_bytes(entry.values, len(names))
        except CodecError:
            self.outdate()  # other layers than we know
            return
        frame = HealthFrame(entry.step, entry.wall_time, names, values)
        keep = max(FRAMES_KEPT, len(snapshot.frames))
        self._report = replace(
            self.report,
            snapshot=_with_loss(
                replace(
                    snapshot,
                    step=max(snapshot.step, entry.step),
                    frames=(*snapshot.frames, frame)[-keep:],
                ),
                entry,
            ),
        )
        self._newest_at = entry.stored_at
        self.undecided = True

    def _is_gap(self, step: int) -> bool:
        steps = [frame.step for frame in self.report.snapshot.frames]
        if len(steps) < 3:
            return False
        return step - steps[-1] > GAP_FACTOR * max(1.0, float(np.median(np.diff(steps))))


def _last_step(snapshot: RunSnapshot) -> int:
    return snapshot.frames[-1].step if snapshot.frames else -1


def _findings(snapshot: RunSnapshot) -> set[tuple[str, str, str]]:
    return {(one.rule, one.slug, one.layer) for one in snapshot.findings}


def _losses_until(snapshot: RunSnapshot, step: int) -> int:
    return int(np.count_nonzero(snapshot.loss_steps <= step))


def _with_loss(snapshot: RunSnapshot, entry: HealthEntry) -> RunSnapshot:
    known = snapshot.loss_steps
    if entry.loss is None or (known.size and entry.step <= known[-1]):
        return snapshot
    return replace(
        snapshot,
        loss_steps=np.append(known, np.int64(entry.step)),
        loss=np.append(snapshot.loss, np.float64(entry.loss)),
    )
