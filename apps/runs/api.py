from __future__ import annotations

from typing import ClassVar

from rest_framework.request import Request
from rest_framework.response import Response

from apps.accounts.authentication import person, via
from apps.accounts.endpoint import READERS, TRAINERS, Endpoint, run_of_token
from apps.accounts.policy import Act, may
from apps.rest.etag import cacheable_response
from apps.rest.fields import ReasonInput, parse
from apps.rest.idempotency import idempotent
from apps.rest.schema import documented
from apps.rest.throttling import ActThrottle
from apps.runs.models import Run
from apps.runs.selectors import visible_run
from apps.runs.serializers import RunDetailOutput
from apps.runs.services import request_pause, request_stop


class RunDetail(Endpoint):
    readers: ClassVar = READERS | TRAINERS

    @documented("read_run", answer=RunDetailOutput)
    def get(self, request: Request, uid: str) -> Response:
        return cacheable_response(
            request, run_answer(request, visible_run(uid, only=run_of_token(request)))
        )


class PauseAdaptation(Endpoint):
    throttle_classes = (ActThrottle,)

    @documented("pause_adaptation", body=ReasonInput, answer=RunDetailOutput, status=202, act=True)
    @idempotent
    def post(self, request: Request, uid: str) -> Response:
        return _pause(request, uid, paused=True)


class ResumeAdaptation(Endpoint):
    throttle_classes = (ActThrottle,)

    @documented("resume_adaptation", body=ReasonInput, answer=RunDetailOutput, status=202, act=True)
    @idempotent
    def post(self, request: Request, uid: str) -> Response:
        return _pause(request, uid, paused=False)


class StopRun(Endpoint):
    throttle_classes = (ActThrottle,)

    @documented("stop_run", body=ReasonInput, answer=RunDetailOutput, status=202, act=True)
    @idempotent
    def post(self, request: Request, uid: str) -> Response:
        run = visible_run(uid, only=run_of_token(request))
        reason = parse(ReasonInput, request.data)["reason"]
        request_stop(run=run, user=person(request), via=via(request), reason=reason)
        return _asked(request, run)


def _pause(request: Request, uid: str, *, paused: bool) -> Response:
    run = visible_run(uid, only=run_of_token(request))
    reason = parse(ReasonInput, request.data)["reason"]
    request_pause(run=run, paused=paused, user=person(request), via=via(request), reason=reason)
    return _asked(request, run)


def _asked(request: Request, run: Run) -> Response:
    """202: it is asked for; the trainer acknowledges it when it gets there."""
    run.refresh_from_db()
    return Response(run_answer(request, run), status=202)


def run_answer(request: Request, run: Run) -> dict[str, object]:
    user = person(request)
    permissions = {
        str(act): may(user, act, owner_id=run.owner_id)
        for act in (Act.PAUSE_ADAPTATION, Act.STOP_RUN)
    }
    data: dict[str, object] = RunDetailOutput(run, context={"permissions": permissions}).data
    return data
