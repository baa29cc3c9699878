"""Metrics counted in the database at each scrape, so that any number of web processes agree."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta
from typing import Any

from django.apps import apps
from django.db.models import Count, F, Min, Q, QuerySet, Sum
from django.utils import timezone
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric

from apps.telemetry.services import telemetry_growth
from esper.contracts import AdaptationState, JobState

DECISION_SECONDS = (10, 30, 60, 120, 300, 600, 900, 1800, 3600)
PAUSE_MS = (1, 5, 10, 25, 50, 100, 250, 500, 1000, 5000)
BUILD_MS = (50, 100, 250, 500, 1000, 5000, 15000, 60000)


def row_metrics() -> Iterator[Metric]:
    """Decisions, pauses, builds, the queue, telemetry and notifications."""
    yield _decisions()
    yield _decision_seconds()
    yield _pauses()
    yield _builds()
    yield from _waiting()
    yield from _telemetry()
    yield _deliveries()


def _decisions() -> Metric:
    family = CounterMetricFamily(
        "esper_decisions", "Decisions on adaptations, by who decided", labels=["by"]
    )
    decided = _rows("adaptations", "Adaptation").aggregate(
        person=Count("pk", filter=Q(decided_by__isnull=False)),
        rule=Count("pk", filter=~Q(decided_rule="")),
        nobody=Count("pk", filter=Q(state=AdaptationState.EXPIRED)),
    )
    for by, count in sorted(decided.items()):
        family.add_metric([by], count)
    return family


def _decision_seconds() -> Metric:
    by_person = _rows("adaptations", "Adaptation").filter(
        decided_by__isnull=False, decided_at__isnull=False
    )
    limits = {
        str(bound): Q(decided_at__lte=F("created_at") + timedelta(seconds=bound))
        for bound in DECISION_SECONDS
    }
    total = sum(
        (decided - created).total_seconds()
        for created, decided in by_person.values_list("created_at", "decided_at")
    )
    return _histogram(
        "esper_decision_seconds", "From proposal to a person's decision", by_person, limits, total
    )


def _pauses() -> Metric:
    rows = _rows("adaptations", "Adaptation").filter(pause_ms__isnull=False)
    return _milliseconds(
        "esper_pause_seconds", "How long a training stood still for a change", rows, "pause_ms",
        PAUSE_MS,
    )  # fmt: skip


def _builds() -> Metric:
    rows = _rows("workers", "CompileJob").filter(build_ms__isnull=False, cached=False)
    return _milliseconds(
        "esper_build_seconds", "How long a kernel was built", rows, "build_ms", BUILD_MS
    )


def _waiting() -> Iterator[Metric]:
    now = timezone.now()
    pending = _rows("adaptations", "Adaptation").filter(state=AdaptationState.AWAITING_APPROVAL)
    queued = _rows("workers", "CompileJob").filter(state=JobState.QUEUED)
    for name, text, rows, column in (
        ("esper_oldest_pending_seconds", "Age of the oldest pending decision", pending,
         "created_at"),
        ("esper_oldest_queued_seconds", "Age of the oldest queued compile job", queued,
         "queued_at"),
    ):  # fmt: skip
        oldest: datetime | None = rows.aggregate(oldest=Min(column))["oldest"]
        age = (now - oldest).total_seconds() if oldest else 0.0
        yield GaugeMetricFamily(name, f"{text}; 0: there is none", value=age)
    unsent = _rows("notifications", "OutboxMessage").filter(sent_at=None).count()
    yield GaugeMetricFamily("esper_outbox_unsent", "Messages for workers not sent", value=unsent)


def _telemetry() -> Iterator[Metric]:
    sums = _rows("runs", "Run").aggregate(
        received=Sum("telemetry_seq"), dropped=Sum("dropped_items")
    )
    # Gauges: a trainer that is started again counts from 0.
    yield GaugeMetricFamily(
        "esper_telemetry_items", "Items received in the present epochs", value=sums["received"] or 0
    )
    yield GaugeMetricFamily(
        "esper_telemetry_dropped_items", "Items that trainers dropped", value=sums["dropped"] or 0
    )
    yield GaugeMetricFamily(
        "esper_telemetry_mib_per_day",
        "Growth by frames before they are thinned",
        value=telemetry_growth().mib_per_day,
    )


def _deliveries() -> Metric:
    family = GaugeMetricFamily(
        "esper_deliveries", "Notifications, by what became of them", labels=["state"]
    )
    counts = _rows("notifications", "Delivery").aggregate(
        delivered=Count("pk", filter=Q(delivered_at__isnull=False)),
        waiting=Count("pk", filter=Q(due_at__isnull=False)),
        failed=Count("pk", filter=Q(due_at=None, delivered_at=None)),
    )
    for state, count in sorted(counts.items()):
        family.add_metric([state], count)
    return family


def _milliseconds(
    name: str, text: str, rows: QuerySet[Any], column: str, bounds: Sequence[int]
) -> Metric:
    """A histogram in seconds of a column in milliseconds."""
    limits = {f"{bound / 1000:g}": Q(**{f"{column}__lte": bound}) for bound in bounds}
    total = rows.aggregate(total=Sum(column))["total"] or 0.0
    return _histogram(name, text, rows, limits, total / 1000)


def _histogram(
    name: str, text: str, rows: QuerySet[Any], limits: dict[str, Q], total: float
) -> Metric:
    counted = rows.order_by().aggregate(
        whole=Count("pk"),
        **{f"b{place}": Count("pk", filter=limit) for place, limit in enumerate(limits.values())},
    )
    buckets = [(bound, counted[f"b{place}"]) for place, bound in enumerate(limits)]
    return HistogramMetricFamily(
        name, text, buckets=[*buckets, ("+Inf", counted["whole"])], sum_value=total
    )


def _rows(app: str, model: str) -> QuerySet[Any]:
    rows: QuerySet[Any] = apps.get_model(app, model).objects.all()
    return rows
