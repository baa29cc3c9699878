"""Projects and their members."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from django.http import HttpResponseBase
from django.utils import timezone
from rest_framework.request import Request
from rest_framework.response import Response

from apps.accounts.act_endpoint import act_endpoint
from apps.accounts.authentication import person, via
from apps.accounts.endpoint import Endpoint
from apps.accounts.models import Project
from apps.accounts.projects import create_project, projects_of, set_member
from apps.accounts.serializers import (
    EndServiceAccountInput,
    MemberInput,
    NewTokenOutput,
    ProjectDetailOutput,
    ProjectInput,
    ProjectOutput,
    ServiceAccountInput,
)
from apps.accounts.service_accounts import create_service_account, end_service_account
from apps.accounts.step_up import require_recent_password
from apps.rest.etag import cacheable_response
from apps.rest.fields import parse
from apps.rest.idempotency import idempotent
from apps.rest.pagination import PARAMETERS, page_response
from apps.rest.problems import not_found
from apps.rest.schema import documented, listing, page_of
from apps.rest.throttling import ActThrottle, TokenThrottle
from esper.contracts import TokenScope


class Projects(Endpoint):
    throttle_classes = (ActThrottle,)
    parameters = PARAMETERS

    @documented("list_projects", answer=page_of(ProjectOutput), parameters=listing())
    def get(self, request: Request) -> HttpResponseBase:
        context = {"user": person(request)}
        rows = projects_of(person(request))
        return page_response(
            request, rows, lambda rows: ProjectOutput(rows, many=True, context=context).data
        )

    @documented(
        "create_project", body=ProjectInput, answer=ProjectDetailOutput, status=201, act=True
    )
    @idempotent
    def post(self, request: Request) -> Response:
        name = parse(ProjectInput, request.data)["name"]
        made = create_project(name=name, user=person(request), via=via(request))
        person(request).forget_access()
        return Response(_detail(request, made), status=201)


class ProjectDetail(Endpoint):
    @documented("read_project", answer=ProjectDetailOutput)
    def get(self, request: Request, uid: str) -> Response:
        return cacheable_response(request, _detail(request, project_of(request, uid)))


SetMember = act_endpoint(
    "set_member",
    set_member,
    subject="project",
    find=lambda request, uid: project_of(request, uid),
    answer=lambda request, project: Response(_detail(request, project)),
    output=ProjectDetailOutput,
    body=MemberInput,
    dangerous=True,
)


EndServiceAccount = act_endpoint(
    "end_service_account",
    end_service_account,
    subject="project",
    find=lambda request, uid: project_of(request, uid),
    answer=lambda request, project: Response(_detail(request, project)),
    output=ProjectDetailOutput,
    body=EndServiceAccountInput,
)


class CreateServiceAccount(Endpoint):
    throttle_classes = (TokenThrottle,)

    @documented(
        "create_service_account",
        body=ServiceAccountInput,
        answer=NewTokenOutput,
        status=201,
        act=True,
    )
    @idempotent
    def post(self, request: Request, uid: str) -> Response:
        require_recent_password(request)
        project = project_of(request, uid)
        given = parse(ServiceAccountInput, request.data)
        token, secret = create_service_account(
            name=given["name"],
            scopes=[TokenScope(scope) for scope in given["scopes"]],
            project=project,
            expires_at=timezone.now() + timedelta(days=given["expires_in_days"]),
            user=person(request),
            via=via(request),
        )
        return Response(NewTokenOutput(token, context={"secret": secret}).data, status=201)


def _detail(request: Request, project: Project) -> dict[str, Any]:
    found = Project.objects.prefetch_related("members__user").get(pk=project.pk)
    data: dict[str, Any] = ProjectDetailOutput(found, context={"user": person(request)}).data
    return data


def project_of(request: Request, uid: str) -> Project:
    """Raises ``Problem`` 404 where the caller sees no such project."""
    found = projects_of(person(request)).filter(uid=uid).first()
    if found is None:
        raise not_found("project")
    return found
