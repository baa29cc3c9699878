"""The switches that stop adaptation: of all runs, and of one project."""

from __future__ import annotations

from rest_framework.request import Request
from rest_framework.response import Response

from apps.accounts.authentication import person, via
from apps.accounts.endpoint import Endpoint
from apps.accounts.project_api import project_of
from apps.accounts.step_up import require_recent_password
from apps.adaptations import services
from apps.policies.models import ProjectSwitch
from apps.policies.serializers import ProjectSwitchOutput, SwitchInput, SwitchOutput
from apps.policies.services import adaptation_switch
from apps.rest.fields import parse
from apps.rest.idempotency import idempotent
from apps.rest.schema import documented
from apps.rest.throttling import ActThrottle


class AllRuns(Endpoint):
    throttle_classes = (ActThrottle,)

    @documented("read_adaptation_switch", answer=SwitchOutput)
    def get(self, request: Request) -> Response:
        return Response(SwitchOutput(adaptation_switch()).data)

    @documented("set_adaptation_switch", body=SwitchInput, answer=SwitchOutput, act=True)
    @idempotent
    def post(self, request: Request) -> Response:
        given = parse(SwitchInput, request.data)
        if given["on"]:  # to kill needs nothing; to let everything go on again does
            require_recent_password(request)
        services.set_adaptation_switch(user=person(request), via=via(request), **given)
        return Response(SwitchOutput(adaptation_switch()).data)


class OneProject(Endpoint):
    throttle_classes = (ActThrottle,)

    @documented("read_project_switch", answer=ProjectSwitchOutput)
    def get(self, request: Request, uid: str) -> Response:
        project = project_of(request, uid)
        switch = ProjectSwitch.objects.filter(project=project).first()
        return Response(ProjectSwitchOutput(switch or ProjectSwitch(project=project)).data)

    @documented("set_project_switch", body=SwitchInput, answer=ProjectSwitchOutput, act=True)
    @idempotent
    def post(self, request: Request, uid: str) -> Response:
        project = project_of(request, uid)
        given = parse(SwitchInput, request.data)
        if given["on"]:
            require_recent_password(request)
        switch = services.set_project_switch(
            project=project, user=person(request), via=via(request), **given
        )
        return Response(ProjectSwitchOutput(switch).data)
