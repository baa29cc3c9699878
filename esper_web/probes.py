"""Probes for machines: alive, ready, and metrics for Prometheus."""

from __future__ import annotations

import hmac
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import redis
from django.apps import apps
from django.conf import settings
from django.db import DatabaseError, connection
from django.db.models import Count
from django.http import HttpRequest, HttpResponse, HttpResponseForbidden, JsonResponse
from django.utils import timezone
from django.views.decorators.cache import never_cache
from django.views.decorators.http import require_safe
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from redis.backoff import NoBackoff
from redis.retry import Retry

from apps.accounts.visibility import everything
from apps.workers import services as workers
from esper.contracts import ADAPTATION_ENDED
from esper_web.row_metrics import row_metrics
from hosts.disk import free_mib


@require_safe
@never_cache
def healthz(_request: HttpRequest) -> HttpResponse:
    """The process runs."""
    return JsonResponse({"status": "alive"})


@require_safe
@never_cache
def readyz(request: HttpRequest) -> HttpResponse:
    """Whether Esper works: the database answers, the disk has space, and every part reports.

    ``?only=web`` leaves out the other processes: for whoever sends requests to this one. Redis is
    reported but not required: without it, updates are late.
    """
    database, disk = _database_answers(), workers.disk_problem()
    parts = workers.parts() if database and request.GET.get("only") != "web" else []
    down = workers.down_processes() if request.GET.get("only") != "web" else []
    problems = [
        *([disk] if disk else []),  # first: the others often follow from it
        *([] if database else ["The database does not answer."]),
        *(part.text for part in parts if part.late),
        *(f"{entry.name} is down: it {entry.why}." for entry in down),
    ]
    answer: dict[str, Any] = {
        "ready": not problems,
        "checks": {"database": database, "redis": _redis_answers(), "disk": not disk},
        "parts": {
            part.name: {"age_seconds": _rounded(part.age_seconds), "late": part.late}
            for part in parts
        },
        "down": [entry.name for entry in down],
        "problems": problems,
    }
    return JsonResponse(answer, status=503 if problems else 200)


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 1)


@require_safe
@never_cache
def metrics(request: HttpRequest) -> HttpResponse:
    """Prometheus text, for staff and for requests with ESPER_METRICS_TOKEN."""
    if not (_has_metrics_token(request) or _is_staff(request)):
        return HttpResponseForbidden("Metrics need a staff session or the metrics token.\n")
    registry = CollectorRegistry()
    registry.register(RowCounts())
    # The token is the operator's of the whole server; a person's counts are of their projects.
    with everything() if _has_metrics_token(request) else nullcontext():
        text = generate_latest(registry)
    return HttpResponse(text, content_type=CONTENT_TYPE_PLAIN_0_0_4)


class RowCounts(Collector):
    """Counted in the database at each scrape, so that any number of web processes agree."""

    def collect(self) -> Iterator[Metric]:
        """Gauges by state, and what ``row_metrics`` counts."""
        yield _by_state("esper_adaptations", "Adaptations by state", "adaptations", "Adaptation")
        yield _by_state("esper_runs", "Runs by state", "runs", "Run")
        yield _by_state("esper_jobs", "Compile jobs by state", "workers", "CompileJob")
        overdue = _model("adaptations", "Adaptation").objects.exclude(state__in=ADAPTATION_ENDED)
        yield GaugeMetricFamily(
            "esper_overdue_adaptations",
            "Adaptations that have not ended although their deadline has passed; should be 0",
            value=overdue.filter(deadline_at__lt=timezone.now()).count(),
        )
        yield from _ages()
        yield from row_metrics()


def _ages() -> Iterator[GaugeMetricFamily]:
    """How long ago each part and each worker has reported; -1: never."""
    now = timezone.now()
    ages = GaugeMetricFamily(
        "esper_part_age_seconds", "Since the last report of a part", labels=["part"]
    )
    late = GaugeMetricFamily("esper_part_late", "1: a part does not report", labels=["part"])
    for part in workers.parts():
        ages.add_metric([part.name], -1.0 if part.age_seconds is None else part.age_seconds)
        late.add_metric([part.name], float(part.late))
    heartbeats = GaugeMetricFamily(
        "esper_worker_age_seconds", "Since the last heartbeat of a worker", labels=["worker"]
    )
    for name, seen_at in _model("workers", "Worker").objects.values_list("name", "heartbeat_at"):
        heartbeats.add_metric([name], (now - seen_at).total_seconds())
    yield from (ages, late, heartbeats)
    down = GaugeMetricFamily("esper_process_down", "1: it cannot be kept running", labels=["name"])
    for entry in workers.down_processes():
        down.add_metric([entry.name], 1.0)
    yield down
    yield GaugeMetricFamily(
        "esper_disk_free_mib",
        "Space that is free for the data directory",
        value=free_mib(settings.ESPER_DATA_DIR),
    )


def _by_state(name: str, text: str, app: str, model: str) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, text, labels=["state"])
    rows = _model(app, model).objects.values("state").order_by("state")
    for row in rows.annotate(rows=Count("pk")):
        family.add_metric([row["state"]], row["rows"])
    return family


def _model(app: str, name: str) -> Any:
    return apps.get_model(app, name)


def _database_answers() -> bool:
    try:
        with connection.cursor() as cursor:
            cursor.execute("SELECT 1")
        return True
    except DatabaseError:
        return False


def _redis_answers() -> bool:
    try:
        # One try: the client would otherwise wait and try again for seconds.
        once = Retry(NoBackoff(), 0)
        with redis.Redis.from_url(settings.REDIS_URL, socket_timeout=1.0, retry=once) as client:
            return bool(client.ping())
    except redis.RedisError:
        return False


def _has_metrics_token(request: HttpRequest) -> bool:
    wanted = settings.ESPER_METRICS_TOKEN
    given = request.headers.get("Authorization", "").removeprefix("Bearer ")
    return bool(wanted) and hmac.compare_digest(given.encode(), wanted.encode())


def _is_staff(request: HttpRequest) -> bool:
    return bool(request.user.is_active and request.user.is_staff)
