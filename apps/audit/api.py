from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict

from django.db.models import QuerySet
from django.http import HttpResponseBase, StreamingHttpResponse
from drf_spectacular.types import OpenApiTypes
from rest_framework.request import Request
from rest_framework.response import Response

from apps.accounts.authentication import person
from apps.accounts.endpoint import Endpoint, require
from apps.accounts.policy import Act
from apps.audit.models import AuditEvent
from apps.audit.selectors import FILTERS
from apps.audit.serializers import AuditEventOutput, ChainOutput
from apps.audit.services import verify_chain
from apps.rest.etag import cacheable_response
from apps.rest.exports import as_of_now
from apps.rest.filters import apply_filters
from apps.rest.pagination import PARAMETERS, page_response
from apps.rest.problems import not_found
from apps.rest.schema import documented, listing, page_of, queries
from apps.rest.throttling import AuditThrottle
from esper.contracts import codec

_MEANINGS = {
    "run": "The uid or the name of a run.",
    "actor": "A part of the name.",
    "act": "The beginning of the act, such as adaptation. or run.stop.",
    "object": "The uid of an object, or the number of an adaptation (A-17).",
}
_DOCUMENTED = queries(FILTERS, _MEANINGS)


class AuditLog(Endpoint):
    parameters = PARAMETERS | frozenset(FILTERS)

    @documented(
        "list_audit_events",
        answer=page_of(AuditEventOutput),
        parameters=listing(FILTERS, ("at",), _MEANINGS),
    )
    def get(self, request: Request) -> HttpResponseBase:
        require(person(request), Act.VIEW_AUDIT)
        events = apply_filters(request, AuditEvent.objects.all(), FILTERS)
        return page_response(
            request, events, lambda rows: AuditEventOutput(rows, many=True).data, order=("at",)
        )


class AuditEntry(Endpoint):
    @documented("read_audit_event", answer=AuditEventOutput)
    def get(self, request: Request, number: int) -> Response:
        require(person(request), Act.VIEW_AUDIT)
        event = AuditEvent.objects.filter(pk=number).first()
        if event is None:
            raise not_found("event of the audit log")
        return cacheable_response(request, AuditEventOutput(event).data)


class AuditVerification(Endpoint):
    throttle_classes = (AuditThrottle,)

    @documented("verify_audit_log", answer=ChainOutput, summary="Check the whole chain of hashes")
    def get(self, request: Request) -> Response:
        require(person(request), Act.VIEW_AUDIT)
        return Response(asdict(verify_chain()))


class AuditExport(Endpoint):
    throttle_classes = (AuditThrottle,)
    parameters = frozenset(FILTERS)

    @documented(
        "export_audit_log",
        answer=OpenApiTypes.BINARY,
        media_type="application/x-ndjson",
        parameters=_DOCUMENTED,
        summary="The log as NDJSON, oldest first",
    )
    def get(self, request: Request) -> StreamingHttpResponse:
        require(person(request), Act.VIEW_AUDIT)
        events = apply_filters(request, AuditEvent.objects.all(), FILTERS)
        return StreamingHttpResponse(
            as_of_now(ndjson(events)),
            content_type="application/x-ndjson",
            headers={"Content-Disposition": 'attachment; filename="esper-audit.ndjson"'},
        )


def ndjson(events: QuerySet[AuditEvent]) -> Iterator[bytes]:
    for event in events.order_by("id").iterator(chunk_size=500):
        yield codec.encode(AuditEventOutput(event).data) + b"\n"
