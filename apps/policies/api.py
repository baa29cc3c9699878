from __future__ import annotations

from django.http import HttpResponseBase
from rest_framework.request import Request
from rest_framework.response import Response

from apps.accounts.act_endpoint import act_endpoint
from apps.accounts.authentication import person, via
from apps.accounts.endpoint import Endpoint
from apps.accounts.project_api import project_of
from apps.accounts.step_up import require_recent_password
from apps.policies.freezing import end_freeze, set_freeze
from apps.policies.models import Freeze, PolicyVersion
from apps.policies.selectors import freezes
from apps.policies.serializers import FreezeInput, FreezeOutput, PolicyInput, PolicyOutput
from apps.policies.services import (
    approve_policy,
    current_policy,
    publish_policy,
    withdraw_policy,
)
from apps.rest.etag import cacheable_response, versioned_response
from apps.rest.fields import parse
from apps.rest.idempotency import idempotent
from apps.rest.identifiers import named
from apps.rest.pagination import PARAMETERS, page_response
from apps.rest.problems import not_found
from apps.rest.schema import documented, listing, page_of
from apps.rest.throttling import ActThrottle
from apps.runs.models import Run


class CurrentPolicy(Endpoint):
    @documented("read_current_policy", answer=PolicyOutput, summary="The thresholds in force")
    def get(self, request: Request) -> Response:
        policy = current_policy()
        return versioned_response(PolicyOutput(policy).data, policy.version)


class RunPolicy(Endpoint):
    @documented("read_run_policy", answer=PolicyOutput, summary="The thresholds for one run")
    def get(self, request: Request, uid: str) -> Response:
        policy = current_policy(_run(uid))
        return versioned_response(PolicyOutput(policy).data, policy.version)


class PolicyDetail(Endpoint):
    @documented("read_policy", answer=PolicyOutput)
    def get(self, request: Request, version: int) -> Response:
        return cacheable_response(request, PolicyOutput(_version(request, str(version))).data)


class Policies(Endpoint):
    throttle_classes = (ActThrottle,)
    parameters = PARAMETERS

    @documented("list_policies", answer=page_of(PolicyOutput), parameters=listing())
    def get(self, request: Request) -> HttpResponseBase:
        current_policy()  # the first version is made when it is first looked at
        versions = PolicyVersion.objects.select_related("author")
        return page_response(request, versions, lambda rows: PolicyOutput(rows, many=True).data)

    @documented("publish_policy", body=PolicyInput, answer=PolicyOutput, status=201, act=True)
    @idempotent
    def post(self, request: Request) -> Response:
        require_recent_password(request)
        given = parse(PolicyInput, request.data)
        policy = publish_policy(
            changes=given["changes"],
            reason=given["reason"],
            user=person(request),
            via=via(request),
            scope=given["scope"],
            run=_run(given["run"]),
        )
        return versioned_response(PolicyOutput(policy).data, policy.version, status=201)


def _run(uid: str) -> Run | None:
    if not uid:
        return None
    run = Run.objects.filter(named(uid, "R")).first()
    if run is None:
        raise not_found("run")
    return run


def _version(_: Request, version: str) -> PolicyVersion:
    digits = version.lower().removeprefix("v")
    if not (digits.isascii() and digits.isdigit() and len(digits) < 9):
        raise not_found("policy version")
    found = PolicyVersion.objects.filter(version=int(digits)).first()
    if found is None:
        raise not_found("policy version")
    return found


def _answer(_: Request, policy: PolicyVersion) -> Response:
    return versioned_response(PolicyOutput(policy).data, policy.version)


ApprovePolicy = act_endpoint(
    "approve_policy",
    approve_policy,
    subject="version",
    find=_version,
    answer=_answer,
    output=PolicyOutput,
    dangerous=True,
)
WithdrawPolicy = act_endpoint(
    "withdraw_policy",
    withdraw_policy,
    subject="version",
    find=_version,
    answer=_answer,
    output=PolicyOutput,
)


class Freezes(Endpoint):
    throttle_classes = (ActThrottle,)
    parameters = PARAMETERS

    @documented("list_freezes", answer=page_of(FreezeOutput), parameters=listing())
    def get(self, request: Request) -> HttpResponseBase:
        return page_response(request, freezes(), lambda rows: FreezeOutput(rows, many=True).data)

    @documented("set_freeze", body=FreezeInput, answer=FreezeOutput, status=201, act=True)
    @idempotent
    def post(self, request: Request) -> Response:
        given = parse(FreezeInput, request.data)
        uid = given.pop("project")
        made = set_freeze(
            project=project_of(request, uid) if uid else None,
            user=person(request),
            via=via(request),
            **given,
        )
        return Response(FreezeOutput(made).data, status=201)


def _freeze(_: Request, uid: str) -> Freeze:
    found = freezes().filter(uid=uid).first()
    if found is None:
        raise not_found("freeze")
    return found


EndFreeze = act_endpoint(
    "end_freeze",
    end_freeze,
    subject="freeze",
    find=_freeze,
    answer=lambda _, freeze: Response(FreezeOutput(freeze).data),
    output=FreezeOutput,
    dangerous=True,
)
