"""Traces of requests and tasks, by OpenTelemetry's own instrumentations (``esper.tracing``)."""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any

from esper import tracing

# Probes and files tell nothing, and come every few seconds.
os.environ.setdefault("OTEL_PYTHON_DJANGO_EXCLUDED_URLS", "healthz,readyz,metrics,static/")
# An address may hold a search, a name or a ticket; these say who asks, and from where.
_HIDDEN = (
    *("http.url", "http.target", "url.full", "url.path", "url.query", "http.user_agent"),
    *("user_agent.original", "net.peer.ip", "client.address", "http.client_ip"),
)


def trace_requests() -> None:
    """Spans of requests, and of the tasks that they send. Before the middleware is loaded."""
    if tracing.start("web"):
        _instrument("django", "Django", request_hook=_hide, response_hook=_finish)
        _instrument("celery", "Celery")


def trace_tasks() -> None:
    """Spans of a worker's tasks; in the process that runs them, which has the sending thread."""
    if tracing.start("worker"):
        _instrument("celery", "Celery")


def _instrument(module: str, name: str, **options: Any) -> None:
    found = import_module(f"opentelemetry.instrumentation.{module}")
    instrumentor = getattr(found, f"{name}Instrumentor")()
    if not instrumentor.is_instrumented_by_opentelemetry:
        instrumentor.instrument(tracer_provider=tracing.provider(), **options)


def _hide(span: Any, _request: Any) -> None:
    if span is not None and span.is_recording():
        known = span.attributes or {}
        span.set_attributes({name: "hidden" for name in _HIDDEN if name in known})


def _finish(span: Any, request: Any, _response: Any) -> None:
    """The route says which page or endpoint it was, without what its address names."""
    _hide(span, request)
    match = getattr(request, "resolver_match", None)
    if span is not None and span.is_recording() and match is not None:
        span.set_attribute("http.target", f"/{match.route}")
