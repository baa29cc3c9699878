"""Storing telemetry, notifying Tamiyo and the browsers, and thinning old rows."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from django.db import transaction
from django.db.models import Count, F, Model
from django.utils import timezone

from apps.accounts.actors import Actor, ActorKind
from apps.notifications.services import group_name, notify, run_topic
from apps.runs.models import Run
from apps.runs.services import check_epoch, set_state
from apps.telemetry.batch import Batch, FrameItem, MetricItem
from apps.telemetry.health_stream import add_frames
from apps.telemetry.metric_names import split_by_name
from apps.telemetry.models import Frame, Metric
from esper.contracts import RunState, codec

__all__ = ["Batch", "FrameItem", "Ingested", "MetricItem", "ingest_batch", "thin_telemetry"]

log = logging.getLogger(__name__)

PROGRESS_PERIOD_SECONDS = 0.25
SLOW_WRITE_MS = 250.0

FRAMES_KEPT = 5_000  # the newest ones of a run; older ones are thinned
METRICS_KEPT = 20_000  # likewise, of each name
THINNED = ((1, 2), (4, 10))  # older than n x kept: one in m stays
DELETED_AT_ONCE = 500

RecordFindings = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Ingested:
    stored: int
    duplicate: bool
    slow_down_ms: int = 0


def ingest_batch(*, run: Run, batch: Batch, record_findings: RecordFindings) -> Ingested:
    """Store a batch once, and tell Tamiyo and the browsers after the commit.

    Args:
        record_findings: ``violations.services.record_findings``; violations are a layer above
            telemetry, so telemetry cannot import them.

    Raises:
        Problem: the run has a newer epoch, or has ended.
    """
    started = time.perf_counter()
    with transaction.atomic():
        run = Run.objects.select_for_update().get(pk=run.pk)
        check_epoch(run, batch.epoch)
        if batch.seq_to <= run.telemetry_seq:
            Run.objects.filter(pk=run.pk).update(last_seen_at=timezone.now())
            return Ingested(stored=0, duplicate=True)
        batch = _within_names(run, batch)
        _store(run, batch)
        _advance(run, batch)
        if batch.findings:
            record_findings(run=run, findings=batch.findings)
        transaction.on_commit(lambda: _announce(run, batch))
    return Ingested(batch.items, False, _slow_down_ms((time.perf_counter() - started) * 1e3))


def _within_names(run: Run, batch: Batch) -> Batch:
    """The batch without metrics under too many names; they count as dropped, which pages show."""
    taken, refused = split_by_name(run, batch.metrics)
    if not refused:
        return batch
    log.warning("%s: %d values under too many metric names", run.uid, len(refused))
    return replace(batch, metrics=taken, dropped=batch.dropped + len(refused))


def _store(run: Run, batch: Batch) -> None:
    Frame.objects.bulk_create(
        Frame(
            run=run,
            epoch=run.epoch,
            step=frame.step,
            wall_time=frame.wall_time,
            values=frame.values,
        )
        for frame in batch.frames
    )
    Metric.objects.bulk_create(_metric_row(run, metric) for metric in batch.metrics)


def _metric_row(run: Run, metric: MetricItem) -> Metric:
    finite = math.isfinite(metric.value)
    return Metric(
        run=run,
        epoch=run.epoch,
        step=metric.step,
        wall_time=metric.wall_time,
        name=metric.name,
        value=metric.value if finite else None,
        status="" if finite else str(codec.number_to_wire(metric.value)),
    )


def _advance(run: Run, batch: Batch) -> None:
    changes: dict[str, Any] = {
        "telemetry_seq": batch.seq_to,
        "last_seen_at": timezone.now(),
        "dropped_items": F("dropped_items") + batch.dropped,
    }
    steps = [frame.step for frame in batch.frames] + [metric.step for metric in batch.metrics]
    if steps:
        changes["step"] = run.step = max(steps)
    loss = _newest_loss(batch.metrics)
    if loss is not None:
        row = _metric_row(run, loss)
        changes |= {"last_loss": row.value, "last_loss_status": row.status}
    Run.objects.filter(pk=run.pk).update(**changes)
    if run.state in {RunState.STARTING, RunState.UNREACHABLE}:
        set_state(run=run, state=RunState.RUNNING, actor=Actor(ActorKind.TRAINER, run.name))


def _newest_loss(metrics: Iterable[MetricItem], *, up_to: float = math.inf) -> MetricItem | None:
    losses = [item for item in metrics if item.name == "loss" and item.step <= up_to]
    return max(losses, key=lambda item: item.step, default=None)


def _slow_down_ms(elapsed_ms: float) -> int:
    """Back-pressure: after a slow write, ask for a pause of the same length."""
    return int(elapsed_ms) if elapsed_ms > SLOW_WRITE_MS else 0


def _announce(run: Run, batch: Batch) -> None:
    add_frames(
        {
            "run": run.uid,
            "epoch": run.epoch,
            "seq": batch.seq_to,
            "step": frame.step,
            "wall_time": repr(frame.wall_time),
            "layers": len(run.layers),
            "values": frame.values,
            "loss": _loss_text(_newest_loss(batch.metrics, up_to=frame.step)),
        }
        for frame in batch.frames
    )
    _notify_progress(run, _newest_loss(batch.metrics))


def _loss_text(loss: MetricItem | None) -> str:
    return "" if loss is None else repr(loss.value)  # "nan" and "inf" included


_progress_sent_at: dict[int, float] = {}


def _notify_progress(run: Run, loss: MetricItem | None) -> None:
    """A notification without a row: a browser that misses it reads the run again."""
    now = time.monotonic()
    if now - _progress_sent_at.get(run.pk, -math.inf) < PROGRESS_PERIOD_SECONDS:
        return
    if len(_progress_sent_at) > 1000:
        _progress_sent_at.clear()
    _progress_sent_at[run.pk] = now
    topic = run_topic(run.uid)
    data = {"step": run.step, "loss": None if loss is None else codec.number_to_wire(loss.value)}
    message = {"topic": topic, "type": "run.progress", "data": data}
    notify(group_name(topic), "feed.progress", message)


def thin_telemetry() -> int:
    """Thin what is older than the newest rows of each run; returns how many rows were deleted.

    Older than the newest 5,000 frames (20,000 values of a metric) about one row in two stays, older
    than four times that about one in ten. Rows stay on a grid of steps, so thinning again
    changes nothing. Values that are not finite are always kept.
    """
    deleted = 0
    for group in _large_groups(Frame.objects.values("run"), FRAMES_KEPT):
        deleted += _thin(Frame, {"run": group["run"]}, FRAMES_KEPT)
    for group in _large_groups(Metric.objects.values("run", "name"), METRICS_KEPT):
        chosen = {"run": group["run"], "name": group["name"], "status": ""}
        deleted += _thin(Metric, chosen, METRICS_KEPT)
    return deleted


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
