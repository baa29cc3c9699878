"""Storing telemetry, notifying Tamiyo and the browsers, and thinning old rows."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from django.conf import settings
from django.db import transaction
from django.db.models import Count, F, Model
from django.db.models.functions import Length
from django.utils import timezone

from apps.accounts.actors import Actor, ActorKind
from apps.notifications.services import group_name, notify, run_topic
from apps.rest.clock import now as database_now
from apps.runs.models import Run
from apps.runs.selectors import HUGE_COLUMNS
from apps.runs.services import check_epoch, set_state
from apps.telemetry.back_pressure import pause_after, seconds_to_pause
from apps.telemetry.health_stream import add_batch
from apps.telemetry.metric_names import KnownNames
from apps.telemetry.models import Frame, Metric
from apps.telemetry.rows import FRAME_COLUMNS, METRIC_COLUMNS, Row, insert_rows
from esper.contracts import RunState, codec, protocol
from esper.contracts.protocol import Telemetry, TelemetryAnswer
from hosts.disk import free_mib

__all__ = ["Growth", "ingest_batch", "seconds_to_pause", "telemetry_growth", "thin_telemetry"]

log = logging.getLogger(__name__)

PROGRESS_PERIOD_SECONDS = 0.25

THINNED = ((1, 2), (4, 10))  # older than n x kept: one in m stays
DELETED_AT_ONCE = 500
GROWTH_FRAMES = 500  # the newest ones, from which the growth is taken
ROW_BYTES = 80  # of a frame beside its values, with its place in the index

RecordFindings = Callable[..., Any]


def ingest_batch(*, run: Run, batch: Telemetry, record_findings: RecordFindings) -> TelemetryAnswer:
    """Store a batch once, and tell Tamiyo and the browsers after the commit.

    Args:
        record_findings: ``violations.services.record_findings``; violations are a layer above
            telemetry, so telemetry cannot import them.

    Raises:
        Problem: the run has a newer epoch, or has ended.
    """
    started = time.perf_counter()
    with transaction.atomic():
        run = Run.objects.select_for_update().defer(*HUGE_COLUMNS).get(pk=run.pk)
        check_epoch(run, batch.epoch)
        if batch.seq_to <= run.telemetry_seq:
            Run.objects.filter(pk=run.pk).update(last_seen_at=database_now())
            return TelemetryAnswer(stored=0, duplicate=True)
        metrics, refused = _metric_rows(run, batch)
        if refused:
            log.warning("%s: %d values under too many metric names", run.uid, refused)
        insert_rows(Frame, FRAME_COLUMNS, [_frame_row(run, frame) for frame in batch.frames])
        insert_rows(Metric, METRIC_COLUMNS, metrics)
        # What was refused counts as dropped, which pages show.
        _advance(run, batch, dropped=batch.dropped + refused)
        if batch.findings:
            record_findings(run=run, findings=batch.findings)
        transaction.on_commit(lambda: _announce(run, batch))
    elapsed_ms = (time.perf_counter() - started) * 1e3
    return TelemetryAnswer(
        stored=batch.items, slow_down_ms=pause_after(run.uid, elapsed_ms=elapsed_ms)
    )


def _frame_row(run: Run, frame: protocol.Frame) -> Row:
    loss, status = _stored(frame.loss)
    return (run.pk, run.epoch, frame.step, frame.wall_time, frame.values, loss, status)


def _metric_rows(run: Run, batch: Telemetry) -> tuple[list[Row], int]:
    """Rows to store, and how many values are refused because the run has too many names."""
    known = KnownNames(run)
    rows: list[Row] = []
    refused = 0
    for entry in batch.metrics:
        for name, number in entry.values.items():
            if known.take(name):
                value, status = _stored(number)
                rows.append((run.pk, run.epoch, entry.step, entry.wall_time, name, value, status))
            else:
                refused += 1
    return rows, refused


def _stored(number: float | None) -> tuple[float | None, str]:
    """(finite value or null, name of a value that is not finite)."""
    if number is None or math.isfinite(number):
        return number, ""
    return None, str(codec.number_to_wire(number))


def _advance(run: Run, batch: Telemetry, *, dropped: int) -> None:
    changes: dict[str, Any] = {
        "telemetry_seq": batch.seq_to,
        "last_seen_at": database_now(),
        "dropped_items": F("dropped_items") + dropped,
    }
    steps = [frame.step for frame in batch.frames] + [entry.step for entry in batch.metrics]
    if steps:
        changes["step"] = run.step = max(steps)
    loss = _newest_loss(batch)
    if loss is not None:
        changes["last_loss"], changes["last_loss_status"] = _stored(loss)
    Run.objects.filter(pk=run.pk).update(**changes)
    if run.state in {RunState.STARTING, RunState.UNREACHABLE}:
        set_state(run=run, state=RunState.RUNNING, actor=Actor(ActorKind.TRAINER, run.name))


def _newest_loss(batch: Telemetry, *, up_to: float = math.inf) -> float | None:
    """The loss of the latest step of the batch; None where it holds none."""
    losses = [
        (entry.step, entry.values["loss"]) for entry in batch.metrics if "loss" in entry.values
    ]
    losses += [(frame.step, frame.loss) for frame in batch.frames if frame.loss is not None]
    known = [pair for pair in losses if pair[0] <= up_to]
    return max(known, key=lambda pair: pair[0])[1] if known else None


def _announce(run: Run, batch: Telemetry) -> None:
    if batch.frames:
        add_batch(_entry(run, batch))
    _notify_progress(run, _newest_loss(batch))


def _entry(run: Run, batch: Telemetry) -> dict[str, Any]:
    """The newest frames of a batch for Tamiyo, which looks at no more of them."""
    frames = batch.frames[-protocol.FRAMES_OF_ENTRY :]
    return {
        "run": run.uid,
        "epoch": run.epoch,
        "seq": batch.seq_to,
        "layers": run.layer_count,
        "frames": len(frames),
        "findings": len(batch.findings),
        "steps": _joined(frame.step for frame in frames),
        "wall_times": _joined(frame.wall_time for frame in frames),
        "losses": ",".join(_loss_text(_loss_of(batch, frame)) for frame in frames),
        "values": b"".join(frame.values for frame in frames),
    }


def _joined(numbers: Iterable[float]) -> str:
    return ",".join(repr(number) for number in numbers)


def _loss_of(batch: Telemetry, frame: protocol.Frame) -> float | None:
    return frame.loss if frame.loss is not None else _newest_loss(batch, up_to=frame.step)


def _loss_text(loss: float | None) -> str:
    return "" if loss is None else repr(float(loss))  # "nan" and "inf" included


_progress_sent_at: dict[int, float] = {}


def _notify_progress(run: Run, loss: float | None) -> None:
    """A notification without a row: a browser that misses it reads the run again."""
    now = time.monotonic()
    if now - _progress_sent_at.get(run.pk, -math.inf) < PROGRESS_PERIOD_SECONDS:
        return
    if len(_progress_sent_at) > 1000:
        _progress_sent_at.clear()
    _progress_sent_at[run.pk] = now
    topic = run_topic(run.uid)
    data = {"step": run.step, "loss": None if loss is None else codec.number_to_wire(loss)}
    message = {"topic": topic, "type": "run.progress", "data": data}
    notify(group_name(topic), "feed.progress", message)


def thin_telemetry() -> int:
    """Thin what is older than the newest rows of each run; returns how many rows were deleted.

    Older than the newest ``ESPER_FRAMES_KEPT`` frames (``ESPER_METRICS_KEPT`` values of a metric)
    about one row in two stays, older than four times that about one in ten. Rows stay on a grid of
    steps, so thinning again changes nothing. Values that are not finite are always kept, until
    ``ESPER_TELEMETRY_DAYS`` after the end of their run.
    """
    deleted = _forget_old_runs()
    frames_kept, metrics_kept = settings.ESPER_FRAMES_KEPT, settings.ESPER_METRICS_KEPT
    for group in _large_groups(Frame.objects.values("run"), frames_kept):
        deleted += _thin(Frame, {"run": group["run"]}, frames_kept)
    for group in _large_groups(Metric.objects.values("run", "name"), metrics_kept):
        chosen = {"run": group["run"], "name": group["name"], "status": ""}
        deleted += _thin(Metric, chosen, metrics_kept)
    return deleted


def _forget_old_runs() -> int:
    """Delete the telemetry of runs that ended long ago; in small transactions."""
    if not settings.ESPER_TELEMETRY_DAYS:
        return 0
    limit = timezone.now() - timedelta(days=settings.ESPER_TELEMETRY_DAYS)
    old = Run.objects.filter(ended_at__lt=limit).values("pk")
    deleted = 0
    for model in (Frame, Metric):
        rows = model._default_manager.filter(run__in=old).order_by().values_list("pk", flat=True)
        while keys := list(rows[:DELETED_AT_ONCE]):
            model._default_manager.filter(pk__in=keys).delete()
            deleted += len(keys)
    return deleted


@dataclass(frozen=True, slots=True)
class Growth:
    """How fast frames fill the disk, before they are thinned.

    Attributes:
        mib_per_day: at the rate of the newest frames; 0 while none arrive.
        days_left: until the disk of the data directory is full; None: it does not fill.
    """

    mib_per_day: float
    free_mib: int

    @property
    def days_left(self) -> float | None:
        return self.free_mib / self.mib_per_day if self.mib_per_day > 0 else None

    def __str__(self) -> str:
        if self.days_left is None:
            return f"No frames arrive; {self.free_mib:,} MiB are free."
        return (
            f"Frames grow by {self.mib_per_day:,.0f} MiB a day before they are thinned; "
            f"{self.free_mib:,} MiB are free, enough for {self.days_left:,.0f} days."
        )


def telemetry_growth() -> Growth:
    """From the newest frames, found by their keys: it costs the same with any number of rows."""
    newest = list(
        Frame.objects.order_by("-id").values_list("wall_time", Length("values"))[:GROWTH_FRAMES]
    )
    free = free_mib(settings.ESPER_DATA_DIR)
    if len(newest) < 2:
        return Growth(0.0, free)
    # Until now, so that the rate falls once no more frames come; trainers' clocks may be ahead.
    seconds = max(time.time(), newest[0][0]) - min(moment for moment, _ in newest)
    size = sum(length + ROW_BYTES for _, length in newest)
    return Growth(size / max(seconds, 1.0) * 86_400 / 2**20, free)


def _large_groups(groups: Any, kept: int) -> list[dict[str, Any]]:
    # Without a margin every pass would find a few rows to delete.
    rows = groups.order_by().annotate(count=Count("id")).filter(count__gt=kept * 11 // 10)
    return list(rows)


def _thin(model: type[Model], chosen: dict[str, Any], kept: int) -> int:
    rows = list(
        model._default_manager.filter(**chosen).order_by("-step", "-id").values_list("id", "step")
    )
    spacing = max(1.0, (rows[0][1] - rows[kept - 1][1]) / kept)
    doomed: list[int] = []
    for (first, stride), following in zip(THINNED, [*THINNED[1:], None], strict=True):
        end = following[0] * kept if following else None
        doomed += _doomed(rows[first * kept : end], width=_power_of_two(spacing * stride))
    for start in range(0, len(doomed), DELETED_AT_ONCE):
        model._default_manager.filter(pk__in=doomed[start : start + DELETED_AT_ONCE]).delete()
    return len(doomed)


def _power_of_two(width: float) -> int:
    # Grids of powers of two lie within one another, so that a grid which grows keeps what it has.
    return 1 << round(math.log2(width))


def _doomed(rows: list[tuple[int, int]], *, width: int) -> list[int]:
    """All but the newest row of each bucket of ``width`` steps."""
    seen: set[int] = set()
    doomed = []
    for key, step in rows:
        bucket = step // width
        if bucket in seen:
            doomed.append(key)
        seen.add(bucket)
    return doomed
