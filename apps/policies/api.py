from __future__ import annotations

from django.http import HttpResponseBase
from rest_framework.request import Request
from rest_framework.response import Response

from apps.accounts.authentication import person, via
from apps.accounts.endpoint import Endpoint
from apps.policies.models import PolicyVersion
from apps.policies.serializers import PolicyInput, PolicyOutput
from apps.policies.services import current_policy, publish_policy
from apps.rest.etag import cacheable_response, versioned_response
from apps.rest.fields import parse
from apps.rest.idempotency import idempotent
from apps.rest.pagination import PARAMETERS, page_response
from apps.rest.problems import not_found
from apps.rest.schema import documented, listing, page_of
from apps.rest.throttling import ActThrottle


class CurrentPolicy(Endpoint):
    @documented("read_current_policy", answer=PolicyOutput, summary="The thresholds in force")
    def get(self, request: Request) -> Response:
        policy = current_policy()
        return versioned_response(PolicyOutput(policy).data, policy.version)


class PolicyDetail(Endpoint):
    @documented("read_policy", answer=PolicyOutput)
    def get(self, request: Request, version: int) -> Response:
        found = PolicyVersion.objects.filter(version=version).first()
        if found is None:
            raise not_found("policy version")
        return cacheable_response(request, PolicyOutput(found).data)


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
        given = parse(PolicyInput, request.data)
        policy = publish_policy(
            changes=given["changes"],
            reason=given["reason"],
            user=person(request),
            via=via(request),
        )
        return versioned_response(PolicyOutput(policy).data, policy.version, status=201)
