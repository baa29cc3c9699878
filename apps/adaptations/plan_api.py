"""Plans: lists and acts for people, the proposal for Tamiyo."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from django.http.response import HttpResponseBase
from rest_framework.request import Request
from rest_framework.response import Response

from apps.accounts.act_endpoint import act_endpoint
from apps.accounts.actors import ActorKind
from apps.accounts.authentication import actor, person
from apps.accounts.endpoint import Endpoint, run_of_token
from apps.adaptations import services
from apps.adaptations.models import Plan
from apps.adaptations.plan_serializers import ApprovePlanInput, PlanDetailOutput, PlanOutput
from apps.adaptations.selectors import plans
from apps.adaptations.serializers import ActInput, RejectInput
from apps.rest.etag import cacheable_response, versioned_response
from apps.rest.fields import message
from apps.rest.filters import Lookup, apply_filters, many_of, of_run, one_of, text
from apps.rest.idempotency import HEADER, idempotent
from apps.rest.identifiers import named
from apps.rest.pagination import PARAMETERS, page_response
from apps.rest.problems import not_found
from apps.rest.schema import documented, listing, page_of
from apps.runs.selectors import visible_run
from esper.contracts import PlanState, TokenScope, protocol

FILTERS: dict[str, Lookup] = {
    "run": (of_run, text),
    "state": ("state", one_of(PlanState)),
    "state__in": ("state__in", many_of(PlanState)),
}
ORDER = ("changed_at", "created_at", "proposed_step")


class Plans(Endpoint):
    parameters = PARAMETERS | frozenset(FILTERS)

    @documented("list_plans", answer=page_of(PlanOutput), parameters=listing(FILTERS, ORDER))
    def get(self, request: Request) -> HttpResponseBase:
        rows = apply_filters(request, plans(), FILTERS)
        return page_response(
            request, rows, lambda rows: PlanOutput(rows, many=True).data, order=ORDER
        )


class PlanDetail(Endpoint):
    @documented("read_plan", answer=PlanDetailOutput)
    def get(self, request: Request, uid: str) -> Response:
        found = _plan(uid)
        return cacheable_response(request, _detail(request, found), version=found.version)


def _act(name: str, service: Callable[..., Plan], body: type[ActInput] = ActInput) -> Any:
    return act_endpoint(
        name,
        service,
        subject="plan",
        find=lambda _, uid: _plan(uid),
        answer=lambda request, changed: _answer(request, changed),
        output=PlanDetailOutput,
        body=body,
        versioned=True,
    )


ApprovePlan = _act("approve_plan", services.approve_plan, ApprovePlanInput)
RejectPlan = _act("reject_plan", services.reject_plan, RejectInput)
UndoPlan = _act("undo_plan", services.take_back_plan)


class PlanProposals(Endpoint):
    writers: ClassVar = frozenset({TokenScope.DECIDE})

    @documented(
        "propose_plan",
        body=protocol.PlanProposal,
        answer=PlanDetailOutput,
        status=201,
        act=True,
        summary="Several adaptations of one run, decided on together",
    )
    @idempotent
    def post(self, request: Request, uid: str) -> Response:
        proposed = services.propose_plan(
            run=visible_run(uid, only=run_of_token(request)),
            proposal=message(request, protocol.PlanProposal),
            idempotency_key=request.headers[HEADER].strip(),
            actor=actor(request, ActorKind.TAMIYO),
        )
        return _answer(request, _plan(proposed.uid), status=201)


def _plan(uid: str) -> Plan:
    found = plans().filter(named(uid, "P")).first()
    if found is None:
        raise not_found("plan")
    return found


def _answer(request: Request, plan: Plan, *, status: int = 200) -> Response:
    return versioned_response(_detail(request, plan), plan.version, status=status)


def _detail(request: Request, plan: Plan) -> Any:
    context = {
        "risk": services.plan_risk(plan),
        "members": services.members_of(plan),
        "undo": services.plan_undo_text(plan),
        "permissions": services.plan_permissions(plan, person(request)),
    }
    return PlanDetailOutput(plan, context=context).data
