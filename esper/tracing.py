"""Traces for OpenTelemetry: where the environment names a collector and the extra is installed.

``OTEL_EXPORTER_OTLP_ENDPOINT`` (or ``…_TRACES_ENDPOINT``) switches it on; the other standard
variables hold too. Without them, or without ``pip install esper-control[otel]``, nothing is
imported and a span costs one comparison. Spans are sent by a thread: a collector that does not
answer delays nothing, and what it does not take is dropped.

All that happens to one adaptation is one trace, in the web process, the workers and the trainer.
Its ids are made from the adaptation's uid, so each process knows the trace of a command, a task or
a row without being told. Where a span of it is written during a request or a task, a link leads to
the trace of that request. No attribute has a name of a person, an address, a token or a text that
somebody wrote.
"""

from __future__ import annotations

import hashlib
import logging
import os
import random
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from importlib import import_module
from typing import Any

logger = logging.getLogger("esper")

ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
TIMEOUT_VARIABLE = "OTEL_EXPORTER_OTLP_TIMEOUT"
TIMEOUT_SECONDS = 2.0  # of one attempt to send, also at the end of the process
# Not the global generator: in a trainer, a draw from it would change what the training does next.
_RANDOM = random.SystemRandom()
_provider: Any = None
_tracer: Any = None
_next_ids: ContextVar[tuple[int, int] | None] = ContextVar("ids", default=None)


def start(service: str) -> bool:
    """Begin to write traces where they are wanted; True where they are. Never raises.

    Args:
        service: such as ``web``; ``OTEL_SERVICE_NAME`` is stronger.
    """
    if _tracer is not None:
        return True
    if not any(os.environ.get(name) for name in ENDPOINTS):
        return False
    if os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return False
    try:
        _start(service)
    except ImportError as error:
        logger.warning("no traces: %s. pip install 'esper-control[otel]'", error)
    except Exception as error:  # such as a variable with a bad value
        logger.warning("no traces: %s", error)
    return _tracer is not None


def stop() -> None:
    """Send what waits, and write no more."""
    global _provider, _tracer
    provider, _provider, _tracer = _provider, None, None
    if provider is not None:
        provider.shutdown()


def provider() -> Any:
    """Where instrumentations of other packages write to; None: nowhere."""
    return _provider


def is_on() -> bool:
    return _tracer is not None


def span(name: str, *, adaptation: str = "", **attributes: Any) -> AbstractContextManager[Any]:
    """A span for the ``with`` block.

    Args:
        adaptation: uid; the span belongs to its trace.
        attributes: get the prefix ``esper.``.
    """
    if _tracer is None:
        return nullcontext()
    where = _place(adaptation) if adaptation else {}
    made: AbstractContextManager[Any] = _tracer.start_as_current_span(
        name, attributes=_named(adaptation, attributes), **where
    )
    return made


def record(
    name: str, *, adaptation: str, begin: float, end: float, whole: bool = False, **attributes: Any
) -> None:
    """Write a span of an adaptation's trace that is over.

    Args:
        begin, end: seconds since 1970.
        whole: this is the span from proposal to end, which all others are within.
    """
    if _tracer is None:
        return
    where = _place(adaptation)
    if whole:
        where["context"] = import_module("opentelemetry.context").Context()  # it has no parent
        _next_ids.set(_ids(adaptation))
    try:
        made = _tracer.start_span(
            name, start_time=int(begin * 1e9), attributes=_named(adaptation, attributes), **where
        )
    finally:
        _next_ids.set(None)
    made.end(end_time=int(max(begin, end) * 1e9))


def headers() -> dict[str, str]:
    """``traceparent`` of the current span, for a request to another process of Esper."""
    found: dict[str, str] = {}
    if _tracer is not None:
        propagation = import_module("opentelemetry.trace.propagation.tracecontext")
        propagation.TraceContextTextMapPropagator().inject(found)
    return found


def _start(service: str) -> None:
    global _provider, _tracer
    sdk = import_module("opentelemetry.sdk.trace")
    export = import_module("opentelemetry.sdk.trace.export")
    otlp = import_module("opentelemetry.exporter.otlp.proto.http.trace_exporter")
    resources = import_module("opentelemetry.sdk.resources")

    class Ids(sdk.IdGenerator):  # type: ignore[misc, name-defined]
        """Random, but for the span that is an adaptation as a whole."""

        def generate_trace_id(self) -> int:
            chosen = _next_ids.get()
            return chosen[0] if chosen else _RANDOM.getrandbits(128) or 1

        def generate_span_id(self) -> int:
            chosen = _next_ids.get()
            return chosen[1] if chosen else _RANDOM.getrandbits(64) or 1

    # Its pauses between attempts are drawn from the generator of the training script, too.
    import_module("opentelemetry.exporter.otlp.common.http").random = _RANDOM  # type: ignore[attr-defined]
    own = {} if os.environ.get("OTEL_SERVICE_NAME") else {"service.name": f"esper-{service}"}
    exporter = otlp.OTLPSpanExporter(
        timeout=None if os.environ.get(TIMEOUT_VARIABLE) else TIMEOUT_SECONDS
    )
    made = sdk.TracerProvider(resource=resources.Resource.create(own), id_generator=Ids())
    made.add_span_processor(export.BatchSpanProcessor(exporter))
    _provider, _tracer = made, made.get_tracer("esper")


def _place(adaptation: str) -> dict[str, Any]:
    """Parent and link of a span in the trace of an adaptation."""
    trace = import_module("opentelemetry.trace")
    trace_id, span_id = _ids(adaptation)
    parent = trace.NonRecordingSpan(
        trace.SpanContext(trace_id, span_id, is_remote=True, trace_flags=trace.TraceFlags(1))
    )
    current = trace.get_current_span().get_span_context()
    elsewhere = current.is_valid and current.trace_id != trace_id
    return {
        "context": trace.set_span_in_context(parent),
        "links": [trace.Link(current)] if elsewhere else [],
    }


def _ids(adaptation: str) -> tuple[int, int]:
    """(trace, span) of the whole adaptation; neither is zero."""
    digest = hashlib.sha256(f"esper adaptation {adaptation}".encode()).digest()
    return int.from_bytes(digest[:16]) or 1, int.from_bytes(digest[16:24]) or 1


def _named(adaptation: str, attributes: Mapping[str, Any]) -> dict[str, Any]:
    found = {
        f"esper.{name}": value for name, value in attributes.items() if value not in ("", None)
    }
    return found | ({"esper.adaptation": adaptation} if adaptation else {})
