from __future__ import annotations

from rest_framework.request import Request
from rest_framework.response import Response

from apps.accounts.authentication import person, via
from apps.accounts.endpoint import Endpoint
from apps.rest.fields import ReasonInput, parse
from apps.rest.filters import apply_filters, flag, one_of, text
from apps.rest.idempotency import idempotent
from apps.rest.pagination import PARAMETERS, page_response
from apps.rest.problems import not_found
from apps.rest.schema import CURSOR, LIMIT, documented, page_of, query
from apps.rest.throttling import ActThrottle
from apps.violations.models import Violation
from apps.violations.serializers import ViolationOutput
from apps.violations.services import acknowledge_violation
from esper.contracts import Severity, ViolationRule

FILTERS = {
    "run": ("run__uid", text),
    "adaptation": ("adaptation_uid", text),
    "rule": ("rule", one_of(ViolationRule)),
    "severity": ("severity", one_of(Severity)),
    "open": ("acknowledged_at__isnull", flag),
}


class Violations(Endpoint):
    parameters = PARAMETERS | frozenset(FILTERS)

    @documented(
        "list_violations",
        answer=page_of(ViolationOutput),
        parameters=[*(query(name) for name in FILTERS), CURSOR, LIMIT],
    )
    def get(self, request: Request) -> Response:
        rows = Violation.objects.select_related("run", "acknowledged_by")
        violations = apply_filters(request, rows, FILTERS)
        return page_response(
            request, violations, lambda rows: ViolationOutput(rows, many=True).data
        )


class AcknowledgeViolation(Endpoint):
    throttle_classes = (ActThrottle,)

    @documented("acknowledge_violation", body=ReasonInput, answer=ViolationOutput, act=True)
    @idempotent
    def post(self, request: Request, uid: str) -> Response:
        violation = Violation.objects.select_related("run").filter(uid=uid).first()
        if violation is None:
            raise not_found("violation")
        acknowledged = acknowledge_violation(
            violation=violation,
            user=person(request),
            via=via(request),
            reason=parse(ReasonInput, request.data)["reason"],
        )
        return Response(ViolationOutput(acknowledged).data)
