from __future__ import annotations

from django.http import HttpResponseBase
from rest_framework.request import Request
from rest_framework.response import Response

from apps.accounts.act_endpoint import act_endpoint
from apps.accounts.authentication import person, via
from apps.accounts.endpoint import Endpoint
from apps.rest.etag import cacheable_response
from apps.rest.fields import parse
from apps.rest.filters import (
    Lookup,
    apply_filters,
    between,
    flag,
    moment,
    of_run,
    one_of,
    searching,
    text,
)
from apps.rest.idempotency import idempotent
from apps.rest.identifiers import named
from apps.rest.pagination import PARAMETERS, page_response
from apps.rest.problems import not_found
from apps.rest.schema import documented, listing, page_of, results_of
from apps.rest.throttling import ActThrottle
from apps.runs.selectors import HUGE_COLUMNS_OF_RUN
from apps.violations.models import Violation
from apps.violations.serializers import AcknowledgedOutput, AcknowledgeInput, ViolationOutput
from apps.violations.services import acknowledge_violation, acknowledge_violations
from esper.contracts import Severity, ViolationRule

FILTERS: dict[str, Lookup] = {
    "run": (of_run, text),
    "project": ("run__project__uid", text),
    "adaptation": ("adaptation_uid", text),
    "rule": ("rule", one_of(ViolationRule)),
    "severity": ("severity", one_of(Severity)),
    "open": ("acknowledged_at__isnull", flag),
    "q": searching("text", "layer", "finding", "run__name", "uid"),
    **between(moment, "created_at"),
}
ORDER = ("created_at", "severity")


class Violations(Endpoint):
    parameters = PARAMETERS | frozenset(FILTERS)

    @documented(
        "list_violations",
        answer=page_of(ViolationOutput),
        parameters=listing(FILTERS, ORDER),
    )
    def get(self, request: Request) -> HttpResponseBase:
        rows = Violation.objects.select_related("run", "acknowledged_by").defer(
            *HUGE_COLUMNS_OF_RUN
        )
        violations = apply_filters(request, rows, FILTERS)
        return page_response(
            request, violations, lambda rows: ViolationOutput(rows, many=True).data, order=ORDER
        )


def _violation(_: Request, uid: str) -> Violation:
    violation = Violation.objects.select_related("run").filter(named(uid, "V")).first()
    if violation is None:
        raise not_found("violation")
    return violation


class ViolationDetail(Endpoint):
    @documented("read_violation", answer=ViolationOutput)
    def get(self, request: Request, uid: str) -> Response:
        return cacheable_response(request, ViolationOutput(_violation(request, uid)).data)


AcknowledgeViolation = act_endpoint(
    "acknowledge_violation",
    acknowledge_violation,
    subject="violation",
    find=_violation,
    answer=lambda _, violation: Response(ViolationOutput(violation).data),
    output=ViolationOutput,
)


class AcknowledgeViolations(Endpoint):
    throttle_classes = (ActThrottle,)

    @documented(
        "acknowledge_violations",
        body=AcknowledgeInput,
        answer=results_of(AcknowledgedOutput),
        act=True,
        summary="Acknowledge several violations; each is answered for itself",
    )
    @idempotent
    def post(self, request: Request) -> Response:
        given = parse(AcknowledgeInput, request.data)
        rows = Violation.objects.select_related("run").filter(uid__in=given["violations"])
        found = {row.uid: row for row in rows}
        results = acknowledge_violations(
            violations=[found[uid] for uid in given["violations"] if uid in found],
            user=person(request),
            via=via(request),
            reason=given["reason"],
        )
        answers = [
            {"uid": row.uid, "code": problem.code, "detail": str(problem)}
            if problem is not None
            else {"uid": row.uid, "code": "", "detail": ""}
            for row, problem in results
        ]
        answers += [
            {"uid": uid, "code": "not-found", "detail": "There is no such violation."}
            for uid in given["violations"]
            if uid not in found
        ]
        return Response({"results": AcknowledgedOutput(answers, many=True).data})
