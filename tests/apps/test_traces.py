"""Traces in a collector on loopback: one for each adaptation, over processes, without secrets."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, cast

import httpx
import pytest
from asgiref.sync import async_to_sync
from django.test import AsyncClient
from opentelemetry.instrumentation.celery import CeleryInstrumentor
from opentelemetry.instrumentation.django import DjangoInstrumentor
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from apps.adaptations import services, tasks
from esper import tracing
from esper.contracts import Command, CommandKind, CommandState, Verdict
from esper.sdk.command_handler import CommandHandler
from esper.sdk.transport.queues import ReadyCommand, TransportQueues
from esper.services.tamiyo.urza import Urza
from esper_web.tracing import trace_requests
from tests.apps.callers import Caller, Trainer, frame
from tests.apps.stage import CERTIFICATE, TAMIYO, Stage
from tests.tls import serving


class Collector(ThreadingHTTPServer):
    """Takes OTLP over HTTP, as any collector does."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.bodies: list[bytes] = []

    def spans(self) -> list[Any]:
        """All that were sent until now, oldest first."""
        tracing.provider().force_flush()
        found = []
        for body in self.bodies:
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                for scope in resource.scope_spans:
                    found += scope.spans
        return found

    def of(self, adaptation: str) -> dict[str, Any]:
        """The spans of an adaptation's trace by name."""
        trace, _ = tracing._ids(adaptation)
        return {s.name: s for s in self.spans() if int.from_bytes(s.trace_id) == trace}


class _Handler(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        assert self.path == "/v1/traces"
        self.server.bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Silent."""


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    """Traces are on, in this process, as a web process has them."""
    with serving(Collector()) as server:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        trace_requests()
        assert tracing.is_on()
        yield server
        DjangoInstrumentor().uninstrument()
        CeleryInstrumentor().uninstrument()
        tracing.stop()


def _attributes(span: Any) -> dict[str, str]:
    return {entry.key: entry.value.string_value for entry in span.attributes}


@pytest.mark.django_db
def test_one_trace_follows_an_adaptation_from_its_proposal_to_its_end(
    collector: Collector, stage: Stage, django_capture_on_commit_callbacks: Any
) -> None:
    with django_capture_on_commit_callbacks(execute=True):
        adaptation = stage.waiting()
        services.approve_adaptation(
            adaptation=adaptation,
            user=stage.operator,
            via="session",
            version=adaptation.version,
            reason="words of a person",
            evidence_hash=adaptation.evidence_hash,
        )
        stage.compiled(adaptation)
        tasks.dispatch.apply(args=[adaptation.uid])
        command = stage.command(adaptation)
        _trainer_takes(adaptation.uid)
        stage.ack(command, CommandState.ACCEPTED)
        stage.ack(command, CommandState.APPLIED, step=120, certificate=CERTIFICATE)
        adaptation.refresh_from_db()
        verdict = Verdict(keep=True, reason="words of a verdict")
        services.judge_adaptation(
            adaptation=adaptation, verdict=verdict, reward_terms={}, actor=TAMIYO
        )
    spans = collector.of(adaptation.uid)
    states = ("awaiting approval", "compile queued", "compiling", "compiled", "dispatched")
    assert {*states, "accepted", "probation", "dispatch", "trainer graft", "adaptation"} <= set(
        spans
    )
    whole = spans.pop("adaptation")
    assert whole.parent_span_id == b""
    assert _attributes(whole)["esper.end_state"] == "kept"
    assert {span.parent_span_id for span in spans.values()} == {whole.span_id}
    begins = [spans[state].start_time_unix_nano for state in (*states, "accepted", "probation")]
    assert begins == sorted(begins)
    assert begins[0] >= whole.start_time_unix_nano
    assert spans["probation"].end_time_unix_nano == whole.end_time_unix_nano
    by_id = {span.span_id: span for span in collector.spans()}
    (link,) = spans["dispatch"].links  # to the task that did it
    assert by_id[link.span_id].name == "run/adaptations.dispatch"
    text = b"".join(collector.bodies)
    for secret in (b"words of", b"olga"):
        assert secret not in text
    values = {value for span in collector.spans() for value in _attributes(span).values()}
    assert adaptation.layer not in values


def _trainer_takes(adaptation: str) -> None:
    """What a trainer's process does with a command; here without a model, so it fails."""
    queues = TransportQueues()
    command = Command("run_x", 1, 1, CommandKind.GRAFT, 0, 9e9, adaptation=adaptation, layer="fc")
    queues.inbox.append(ReadyCommand(command))
    CommandHandler(cast(Any, None), cast(Any, None), queues).handle_all(120)


@pytest.mark.django_db
def test_requests_are_told_apart_by_their_route_and_nothing_of_people_is_sent(
    collector: Collector, operator: Caller, trainer: Trainer
) -> None:
    headers = {"User-Agent": "a browser of somebody", "X-Forwarded-For": "203.0.113.9"}
    assert operator.get("runs?q=secret-search", **headers).status == 200
    assert operator.get(f"runs/{trainer.run}", Cookie="sessionid=secret-cookie").status == 200
    assert operator.get("projects/secret-name").status == 404
    assert trainer.send(frames=[frame(1)]).status == 202
    operator.client.get("/healthz")
    token = {"Authorization": f"Bearer {operator.token}"}
    as_served = async_to_sync(AsyncClient().get)(
        "/api/v1/kernels?q=secret", headers=headers | token
    )
    assert as_served.status_code == 200
    spans = collector.spans()
    names = [span.name for span in spans]
    assert {"GET api/v1/runs/<str:uid>", "GET api/v1/kernels"} <= set(names)
    assert not any("healthz" in name for name in names)
    ingest = next(span for span in spans if span.name == "ingest")
    request = next(span for span in spans if span.span_id == ingest.parent_span_id)
    assert request.name == "POST api/v1/runs/<str:uid>/telemetry"
    told = {(k.key, k.value.string_value) for span in spans for k in span.attributes}
    assert [name for name, value in told if value == "127.0.0.1" and name != "http.host"] == []
    sent = b"".join(collector.bodies)
    for secret in (operator.token, "secret", "somebody", "203.0.113.9", "olga"):
        assert secret.encode() not in sent, secret


async def test_a_request_of_tamiyo_continues_the_trace_of_its_decision(
    collector: Collector,
) -> None:
    asked: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        return httpx.Response(200, json={})

    urza = Urza("http://esper.example.org", "esp_token")
    await urza.close()
    urza._http = httpx.AsyncClient(
        base_url="http://esper.example.org/api/v1/", transport=httpx.MockTransport(answer)
    )
    with tracing.span("tamiyo.decide", run="run_1"):
        await urza.integration_status()
    await urza.integration_status()
    await urza.close()
    (span,) = collector.spans()
    _, trace, parent, _ = asked[0].headers["traceparent"].split("-")
    assert (trace, parent) == (span.trace_id.hex(), span.span_id.hex())
    assert "traceparent" not in asked[1].headers


PROGRAM = """
import sys
import esper_web.asgi, esper_web.celery, esper.sdk
from esper import tracing
assert not tracing.start("x")
with tracing.span("x", adaptation="adp_1", step=1):
    tracing.record("x", adaptation="adp_1", begin=0, end=1)
assert tracing.headers() == {}
print([name for name in sys.modules if name.startswith("opentelemetry")])
"""
NOT_INSTALLED = 'import sys; sys.modules["opentelemetry.sdk.trace"] = None'


@pytest.mark.parametrize("wanted", [False, True])
def test_without_the_variable_or_the_packages_nothing_is_imported(wanted: bool) -> None:
    """Wanted without the packages: a line says what to install, and nothing else happens."""
    environment = {**os.environ, "DJANGO_SETTINGS_MODULE": "esper_web.settings.test"}
    environment |= {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"} if wanted else {}
    done = subprocess.run(
        [sys.executable, "-c", NOT_INSTALLED * wanted + PROGRAM],
        capture_output=True,
        text=True,
        timeout=600,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    if wanted:
        assert "pip install 'esper-control[otel]'" in done.stderr
    else:
        assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("broken", ["dead", "hanging", "refusing"])
def test_a_broken_collector_delays_and_breaks_nothing(
    broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            if broken == "hanging":
                release.wait(600)
            self.send_error(503)

        def log_message(self, *_: object) -> None:
            """Silent."""

    with serving(ThreadingHTTPServer(("127.0.0.1", 0), Handler)) as server:
        port = 1 if broken == "dead" else server.server_port
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{port}")
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "1")  # milliseconds: it is tried at once
        monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "600")
        random.seed(7)
        before = random.getstate()
        assert tracing.start("x")
        try:
            for _ in range(2_000):  # more than wait for it; the rest is dropped
                with tracing.span("x", adaptation="adp_1"):
                    pass
        finally:
            begun = time.monotonic()
            tracing.stop()
            ended = time.monotonic()
            release.set()
    assert ended - begun < 300  # of the 600 that the collector lets wait
    assert random.getstate() == before  # a training script's own numbers are not drawn from
