from __future__ import annotations

from rest_framework.request import Request
from rest_framework.response import Response

from apps.accounts.act_endpoint import act_endpoint
from apps.accounts.endpoint import Endpoint
from apps.rest.filters import Lookup, apply_filters, flag, of_run, one_of, text
from apps.rest.identifiers import named
from apps.rest.pagination import PARAMETERS, page_response
from apps.rest.problems import not_found
from apps.rest.schema import CURSOR, LIMIT, documented, page_of, queries
from apps.violations.models import Violation
from apps.violations.serializers import ViolationOutput
from apps.violations.services import acknowledge_violation
from esper.contracts import Severity, ViolationRule

FILTERS: dict[str, Lookup] = {
    "run": (of_run, text),
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
        parameters=[*queries(FILTERS), CURSOR, LIMIT],
    )
    def get(self, request: Request) -> Response:
        rows = Violation.objects.select_related("run", "acknowledged_by")
        violations = apply_filters(request, rows, FILTERS)
        return page_response(
            request, violations, lambda rows: ViolationOutput(rows, many=True).data
        )


def _violation(_: Request, uid: str) -> Violation:
    violation = Violation.objects.select_related("run").filter(named(uid, "V")).first()
    if violation is None:
        raise not_found("violation")
    return violation


AcknowledgeViolation = act_endpoint(
    "acknowledge_violation",
    acknowledge_violation,
    subject="violation",
    find=_violation,
    answer=lambda _, violation: Response(ViolationOutput(violation).data),
    output=ViolationOutput,
)
