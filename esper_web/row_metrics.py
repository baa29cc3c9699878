"""Metrics counted in the database at each scrape, so that any number of web processes agree."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any

from django.apps import apps
from django.db.models import BigIntegerField, Count, Func, Min, Q, QuerySet, Sum
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
    # In words that let the database answer from its indexes alone.
    rows = _rows("adaptations", "Adaptation")
    by_whom = rows.filter(decided_at__isnull=False).aggregate(
        person=Count("pk", filter=Q(decided_by__isnull=False)),
        rule=Count("pk", filter=~Q(decided_rule="")),
    )
    decided = {**by_whom, "nobody": rows.filter(state=AdaptationState.EXPIRED).count()}
    for by, count in sorted(decided.items()):
        family.add_metric([by], count)
    return family


def _decision_seconds() -> Metric:
    by_person = _rows("adaptations", "Adaptation").filter(
        decided_by__isnull=False, decided_at__isnull=False
    )
    lasted = _Milliseconds("decided_at", "created_at")
    # One group for each second, because a sum for each bound would read the rows as often. Whole
    # numbers, because the ceiling of others calls Python for each row of SQLite.
    groups = by_person.order_by().values_list((lasted + 999) / 1000)
    found = list(groups.annotate(rows=Count("pk"), sum=Sum(lasted)))
    buckets = [
        (str(bound), sum(count for up_to, count, _ in found if up_to <= bound))
        for bound in DECISION_SECONDS
    ]
    return HistogramMetricFamily(
        "esper_decision_seconds",
        "From proposal to a person's decision",
        buckets=[*buckets, ("+Inf", sum(count for _, count, _ in found))],
        sum_value=sum(total for _, _, total in found) / 1000,
    )


class _Milliseconds(Func):
    """Between two moments, the later one first. By the database itself."""

    output_field = BigIntegerField()
    arity = 2

    def as_sqlite(self, compiler: Any, connection: Any, **context: Any) -> tuple[str, Any]:
        """Django's own difference would call Python for each row."""
        return self.as_sql(
            compiler,
            connection,
            template="CAST(ROUND((julianday(%(expressions)s)) * 86400000.0) AS INTEGER)",
            arg_joiner=") - julianday(",
        )

    def as_postgresql(self, compiler: Any, connection: Any, **context: Any) -> tuple[str, Any]:
        template = "ROUND(EXTRACT(EPOCH FROM (%(expressions)s)) * 1000)::bigint"
        return self.as_sql(compiler, connection, template=template, arg_joiner=" - ")


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
    counted = rows.order_by().aggregate(
        whole=Count("pk"),
        total=Sum(column),
        **{f"b{place}": Count("pk", filter=limit) for place, limit in enumerate(limits.values())},
    )
    buckets = [(bound, counted[f"b{place}"]) for place, bound in enumerate(limits)]
    return HistogramMetricFamily(
        name,
        text,
        buckets=[*buckets, ("+Inf", counted["whole"])],
        sum_value=(counted["total"] or 0.0) / 1000,
    )


def _rows(app: str, model: str) -> QuerySet[Any]:
    rows: QuerySet[Any] = apps.get_model(app, model).objects.all()
    return rows
