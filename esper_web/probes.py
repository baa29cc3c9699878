"""Probes for machines: alive, ready, and metrics for Prometheus."""

from __future__ import annotations

import hmac
from collections.abc import Iterator
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
from prometheus_client.registry import Collector
from redis.backoff import NoBackoff
from redis.retry import Retry

from esper.contracts import ADAPTATION_ENDED


@require_safe
@never_cache
def healthz(_request: HttpRequest) -> HttpResponse:
    """The process runs."""
    return JsonResponse({"status": "alive"})


@require_safe
@never_cache
def readyz(_request: HttpRequest) -> HttpResponse:
    """The database answers. Redis is reported but not required: without it, updates are late."""
    database = _database_answers()
    checks = {"database": database, "redis": _redis_answers()}
    return JsonResponse({"ready": database, "checks": checks}, status=200 if database else 503)


@require_safe
@never_cache
def metrics(request: HttpRequest) -> HttpResponse:
    """Prometheus text, for staff and for requests with ESPER_METRICS_TOKEN."""
    if not (_has_metrics_token(request) or _is_staff(request)):
        return HttpResponseForbidden("Metrics need a staff session or the metrics token.\n")
    registry = CollectorRegistry()
    registry.register(RowCounts())
    return HttpResponse(generate_latest(registry), content_type=CONTENT_TYPE_PLAIN_0_0_4)


class RowCounts(Collector):
    """Counted in the database at each scrape, so that any number of web processes agree."""

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Gauges by state."""
        yield _by_state("esper_adaptations", "Adaptations by state", "adaptations", "Adaptation")
        yield _by_state("esper_runs", "Runs by state", "runs", "Run")
        yield _by_state("esper_jobs", "Compile jobs by state", "workers", "CompileJob")
        overdue = _model("adaptations", "Adaptation").objects.exclude(state__in=ADAPTATION_ENDED)
        yield GaugeMetricFamily(
            "esper_overdue_adaptations",
            "Adaptations that have not ended although their deadline has passed; should be 0",
            value=overdue.filter(deadline_at__lt=timezone.now()).count(),
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
